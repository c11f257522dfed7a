"""Reading the settings again: what takes effect, what does not, and what is said."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest

from idalloc_tcp.assembly import RELOADABLE
from idalloc_tcp.errors import SettingsError
from idalloc_tcp.reload import Reload
from idalloc_tcp.settings import Settings


@attrs.define(eq=False)
class Rig:
    """A server's settings, and what became of them."""

    given: Settings | Exception = attrs.field(factory=Settings)
    applied: list[tuple[Settings, list[str]]] = attrs.field(init=False, factory=list)
    reload: Reload = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        names = {"log_level", "pool_seconds", "segment_size_max"}
        self.reload = Reload(Settings(), self._read, names, self._apply)

    def _read(self) -> Settings:
        if isinstance(self.given, Exception):
            raise self.given
        return self.given

    async def _apply(self, settings: Settings, names: Sequence[str]) -> None:
        self.applied.append((settings, list(names)))


def said(caplog: pytest.LogCaptureFixture) -> tuple[str, dict[str, Any]]:
    """The one event since the last look, and its fields."""
    [record] = caplog.records
    caplog.clear()
    return record.getMessage(), vars(record)["fields"]


async def test_what_changed_is_put_into_effect_and_named(caplog: pytest.LogCaptureFixture) -> None:
    """Only what may change does; the rest is named, each time, until a restart."""
    rig = Rig(Settings(pool_seconds=7, max_count=5, log_level="debug"))
    await rig.reload.run()
    expected = Settings(pool_seconds=7, log_level="debug")
    assert rig.applied == [(expected, ["pool_seconds", "log_level"])]
    assert said(caplog) == (
        "reloaded",
        {
            "changed": ["pool_seconds", "log_level"],
            "needs_restart": ["max_count"],
            "pool_seconds": "7.0",
            "log_level": "debug",
        },
    )
    await rig.reload.run()
    assert said(caplog) == ("nothing changed", {"needs_restart": ["max_count"]})
    rig.given = Settings()
    await rig.reload.run()
    assert said(caplog)[1]["changed"] == ["pool_seconds", "log_level"]
    await rig.reload.run()
    assert said(caplog) == ("nothing changed", {})
    assert [settings for settings, _ in rig.applied] == [expected, Settings()]


@pytest.mark.parametrize(
    "given",
    [
        SettingsError("max_count: expected ..."),
        RuntimeError("can't start new thread"),
        # Fine in itself, but not beside what only a restart changes.
        Settings(segment_size=10, max_count=10, segment_size_max=20, pool_seconds=1),
    ],
)
async def test_wrong_settings_change_nothing(
    given: Settings | Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """One line says what is wrong, at a level that is always logged; all stays as it is."""
    rig = Rig(given)
    await rig.reload.run()
    assert rig.applied == []
    assert caplog.records[0].levelname == "ERROR"
    message, fields = said(caplog)
    assert message == "not reloaded, everything stays as it is"
    assert fields["reason"]
    rig.given = Settings(pool_seconds=1)
    await rig.reload.run()
    assert said(caplog)[0] == "reloaded"


def test_what_is_reloadable_is_a_setting_and_is_described() -> None:
    """Every name that may be reloaded is one of a setting, and the README has it."""
    assert set(RELOADABLE) <= {field.name for field in attrs.fields(Settings)}
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    _, _, section = readme.partition("\nSIGHUP puts into effect ")
    assert set(re.findall(r"`(\w+)`", section.partition("\n\n")[0])) == set(RELOADABLE)
