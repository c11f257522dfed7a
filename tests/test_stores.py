"""The stores that the settings name."""

import os
from pathlib import Path

import pytest

from idalloc_tcp.errors import SettingsError, StartRefused
from idalloc_tcp.metrics import Metrics
from idalloc_tcp.pool import Segment
from idalloc_tcp.settings import Settings
from idalloc_tcp.stores import mysql_url, open_stores

MYSQL = "mysql://u:s3cret@127.0.0.1:1/ids"


async def test_without_urls_ids_come_from_the_data_file(tmp_path: Path) -> None:
    """The embedded ledger is opened, said to be the data, and closed at the end."""
    settings = Settings(data=tmp_path / "ids", ceilings={"short": 5})
    for first in (1, 11):
        async with open_stores(settings, Metrics()) as stores:
            assert await stores.source.reserve("orders", 10) == Segment(first, first + 10)
            assert stores.described == {"data": str(tmp_path / "ids")}
            assert dict(stores.rows(None)) == {
                "ledger_up": 1,
                "ledger_answers_total": 2,  # One is that it could be opened.
                "ledger_failures_total": 0,
                "ledger_probes_total": 0,
            }
    async with open_stores(settings, Metrics()) as stores:
        assert (await stores.source.reserve("short", 8)).size == 5
    assert os.listdir(tmp_path) == ["ids"]  # The log beside it is gone, so it was closed.


async def test_a_data_file_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    """It is not taken for an empty one."""
    (tmp_path / "ids").write_text("something else, " * 100)
    with pytest.raises(StartRefused):
        async with open_stores(Settings(data=tmp_path / "ids"), Metrics()):
            raise AssertionError("it was opened")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(mysql="mysql://u:s3cret@h"), "mysql: it names no database"),
        (Settings(mysql="mysql://u:s3cret@h:x/ids"), "mysql: it is not mysql://"),
        (Settings(mysql=f"{MYSQL}?ssl=s3cret"), "mysql: its ssl= is none of off, on, verify"),
        (
            Settings(mysql=MYSQL, redis="redis://:s3cret@h:x/0"),
            "redis: it is not a redis://, rediss:// or unix:// URL",
        ),
        (Settings(mysql=MYSQL, redis="redis://:s3cret@h/0?nonsense=1"), "redis: it is not"),
    ],
)
async def test_a_url_that_does_not_say_what_it_should(settings: Settings, message: str) -> None:
    """It is refused as a setting, in words that do not repeat it."""
    with pytest.raises(SettingsError) as caught:
        async with open_stores(settings, Metrics()):
            raise AssertionError("it was opened")
    assert str(caught.value).startswith(message)
    assert "s3cret" not in str(caught.value)


def test_there_has_to_be_a_database() -> None:
    """What works on the database alone says so if there is none."""
    with pytest.raises(SettingsError, match="mysql: it is not mysql://"):
        mysql_url(Settings())


async def test_stores_that_do_not_answer_do_not_stop_the_start() -> None:
    """They are opened, described without passwords, and found to be down by the first request."""
    settings = Settings(mysql=MYSQL, redis="redis://:s3cret@127.0.0.1:1/0")
    async with open_stores(settings, Metrics()) as stores:
        assert stores.described == {
            "mysql": "mysql://u:***@127.0.0.1:1/ids",
            "redis": "redis://:***@127.0.0.1:1/0",
        }
        assert set(stores.health) == {"ledger", "counter"}
        assert all(health.is_up for health in stores.health.values())
