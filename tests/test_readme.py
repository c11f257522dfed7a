"""The README keeps up with what it speaks of."""

import re
from pathlib import Path
from typing import Final

from idalloc_tcp.config import describe
from idalloc_tcp.errors import BY_CODE
from tests.settings_table import COMMAND, README, table, with_table

ALERTS: Final = Path(__file__).parent.parent / "ops" / "alerts.yml"
SETTINGS: Final = frozenset(setting.name for setting in describe())

#: Every setting of the original idalloc.
ORIGINAL: Final = (
    *("AppName", "ServerPort", "LogLevel", "UsePprof", "UsePrometheus", "RateLimit.Enable"),
    *("RateLimit.Qps", "RedisKeyPrefix", "SyncRedisAndDBChanSize", "SyncRedisAndDBThreadNum"),
    *("RedisBatchAllocNum", "WriteDBEveryNVersion", "RecoverRedisEveryNVersion"),
    *("TraceIDHeaderKey", "Redis", "DB"),
)
#: What it is called here, where there is nothing to be set.
NONE: Final = "none"


def rows(heading: str, columns: int) -> list[list[str]]:
    """The cells of the table whose first row begins so, without its head."""
    lines = README.read_text().split(f"\n| {heading} |")[1].splitlines()[2:]
    found = []
    for line in lines:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        assert len(cells) == columns, line
        found.append(cells)
    return found


def quoted(cell: str) -> list[str]:
    """What stands in it between backticks."""
    return re.findall(r"`([^`]+)`", cell)


def test_the_table_of_settings_is_up_to_date() -> None:
    """It is the one that the settings give now."""
    text = README.read_text()
    assert with_table(text) == text, f"run `{COMMAND}`"


def test_every_setting_is_in_the_table() -> None:
    """With its default, what it takes and what it does."""
    described = [row.split(" | ") for row in table().splitlines()[2:]]
    assert {quoted(name)[0] for name, *_ in described} == SETTINGS
    assert all(len(cells) == 4 and all(cells) for cells in described)


def test_every_code_is_explained() -> None:
    """What it is in Python, what happened, and what the caller does."""
    found = {
        quoted(code)[0]: quoted(name)[0] for code, name, *_ in rows("code | in Python", columns=4)
    }
    assert found == {code: of.__name__ for code, of in BY_CODE.items()}


def test_every_alert_is_listed() -> None:
    """As `ops/alerts.yml` has them, with how bad they are."""
    alerts = re.findall(r"- alert: (\w+)(?:.|\n)*?severity: (\w+)", ALERTS.read_text())
    assert [(quoted(name)[0], severity) for name, severity, _ in rows("alert", 3)] == alerts


def test_every_setting_of_the_original_has_its_row() -> None:
    """With the settings that stand for it here, which exist, or why none does."""
    found = {quoted(theirs)[0]: (ours, why) for theirs, ours, why in rows("idalloc", 3)}
    assert list(found) == list(ORIGINAL)
    for theirs, (ours, why) in found.items():
        assert set(quoted(ours)) <= SETTINGS, theirs
        assert quoted(ours) or (ours == NONE and why), theirs


def test_every_setting_that_is_spoken_of_exists() -> None:
    """A word in backticks that is set to something is a setting of ours, or of a store."""
    spoken_of = set(re.findall(r"`([a-z_]+) = ", README.read_text()))
    assert spoken_of - {"innodb_flush_log_at_trx_commit", "sync_binlog"} <= SETTINGS
