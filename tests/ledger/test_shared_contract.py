"""What a ledger that a counter stands on must do, asked of the fake and of the real one alike."""

from collections.abc import AsyncIterator, Callable

import attrs
import pytest

from idalloc_tcp.bridge import asyncio_loop
from idalloc_tcp.errors import Exhausted, NotOurs, Unavailable
from idalloc_tcp.ledger import CLOSED, Row, SharedLedger, Tail
from idalloc_tcp.ledger.mysql import MysqlLedger
from idalloc_tcp.pool import MAX_ID, Segment
from tests.fakes import FakeSharedLedger
from tests.ledger.conftest import url_of
from tests.real.mariadb_server import MariaDbDatabase


@attrs.frozen
class Rig:
    """A ledger, and the original idalloc beside it."""

    ledger: SharedLedger
    #: Writes `orders` as the original does: the greater version wins, whatever the value.
    write_original: Callable[[int, int], None]


def original_in(database: MariaDbDatabase) -> Callable[[int, int], None]:
    """The original's writes into a real database."""

    def write(last: int, version: int) -> None:
        database.query(
            f"INSERT IGNORE INTO tbl_alloc_info VALUES ('orders', {last}, {version});"
            f"UPDATE tbl_alloc_info SET last_alloc_value = {last}, data_version = {version}"
            f" WHERE service_name = 'orders' AND data_version < {version}"
        )

    return write


@pytest.fixture(params=["fake", "mysql"])
async def rig(request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    """Each kind of shared ledger in turn, empty."""
    if request.param == "fake":
        fake = FakeSharedLedger()
        yield Rig(fake, lambda last, version: fake.write_original("orders", last, version))
        return
    database: MariaDbDatabase = request.getfixturevalue("mariadb_database")
    async with asyncio_loop():
        ledger = MysqlLedger(url_of(database))
        await ledger.prepare()
        yield Rig(ledger, original_in(database))
        await ledger.aclose()


async def lease(rig: Rig, size: int) -> Segment:
    """A lease of `orders` under the highest ceiling."""
    return await rig.ledger.lease("orders", size, floor=0, ceiling=MAX_ID)


async def test_row_of_a_lease_is_ours(rig: Rig) -> None:
    """A service that we met first is ours; the original cannot write to its row."""
    assert await rig.ledger.read("orders") is None
    await lease(rig, 10)
    rig.write_original(5, 100)
    assert await rig.ledger.read("orders") == Row(10, CLOSED)
    assert Row(10, CLOSED).is_ours


async def test_original_may_lower_its_own_row(rig: Rig) -> None:
    """Among the original's own writes the version decides alone; hence such a row may be behind."""
    for last, version, expected in ((100, 7, (100, 7)), (200, 7, (100, 7)), (90, 8, (90, 8))):
        rig.write_original(last, version)
        assert await rig.ledger.read("orders") == Row(*expected)


async def test_row_of_the_original_is_not_ours(rig: Rig) -> None:
    """A row that may be behind leases nothing, takes nothing back, and stays as it is."""
    rig.write_original(100, 7)
    with pytest.raises(NotOurs, match="orders"):
        await lease(rig, 10)
    assert not await rig.ledger.extend("orders", 100, 200)
    assert await rig.ledger.give_back([Tail("orders", Segment(91, 101))]) == [False]
    await rig.ledger.raise_to("orders", 500)
    assert await rig.ledger.read("orders") == Row(100, 7)
    assert not Row(100, 7).is_ours


async def test_takes_over_above_the_floor(rig: Rig) -> None:
    """What was taken over leases above the floor and is ours; the original can write no more."""
    rig.write_original(100, 7)
    segment = await rig.ledger.take_over("orders", 10, floor=500, ceiling=MAX_ID)
    assert segment == Segment(501, 511)
    assert await rig.ledger.take_over("orders", 10, floor=0, ceiling=MAX_ID) == Segment(511, 521)
    assert await lease(rig, 10) == Segment(521, 531)
    rig.write_original(200, 8)
    assert await rig.ledger.read("orders") == Row(530, CLOSED)


async def test_takes_over_what_is_not_there(rig: Rig) -> None:
    """A row that the original never wrote is just a new one."""
    segment = await rig.ledger.take_over("orders", 10, floor=50, ceiling=MAX_ID)
    assert segment == Segment(51, 61)
    assert await rig.ledger.read("orders") == Row(60, CLOSED)


async def test_take_over_respects_the_ceiling(rig: Rig) -> None:
    """A row with too little room is not taken over: it is exhausted, not foreign."""
    rig.write_original(95, 7)
    for floor in (0, 95):
        with pytest.raises(Exhausted):
            await rig.ledger.take_over("orders", 10, floor=floor, ceiling=100)
    assert await rig.ledger.read("orders") == Row(95, 7)
    assert await rig.ledger.take_over("orders", 5, floor=0, ceiling=100) == Segment(96, 101)


async def test_commits_beside_the_original(rig: Rig) -> None:
    """Beside the original the row follows the hash upwards, and never down."""
    assert await rig.ledger.commit_beside("orders", 110, 8)
    assert await rig.ledger.commit_beside("orders", 130, 10)
    assert await rig.ledger.commit_beside("orders", 120, 9)
    assert await rig.ledger.read("orders") == Row(130, 10)
    await rig.ledger.take_over("orders", 10, floor=0, ceiling=MAX_ID)
    assert not await rig.ledger.commit_beside("orders", 150, 11)
    assert not await rig.ledger.commit_beside("orders", 135, 11)
    assert await rig.ledger.read("orders") == Row(140, CLOSED)


async def test_extension_needs_the_row_to_end_there(rig: Rig) -> None:
    """A lease grows only if nothing was leased after it, and only once."""
    assert not await rig.ledger.extend("orders", 0, 100)
    assert await rig.ledger.read("orders") is None
    await lease(rig, 100)
    assert await rig.ledger.extend("orders", 100, 200)
    assert not await rig.ledger.extend("orders", 100, 200)
    assert await lease(rig, 10) == Segment(201, 211)
    assert not await rig.ledger.extend("orders", 200, 300)
    assert await rig.ledger.extend("orders", 210, MAX_ID)


async def test_row_is_raised_and_never_lowered(rig: Rig) -> None:
    """Raising a row lifts it for good; a lower value or an unknown service changes nothing."""
    await lease(rig, 100)
    await rig.ledger.raise_to("orders", 500)
    await rig.ledger.raise_to("orders", 50)
    await rig.ledger.raise_to("nobody", 50)
    assert await rig.ledger.read("orders") == Row(500, CLOSED)
    assert await rig.ledger.read("nobody") is None
    assert await lease(rig, 10) == Segment(501, 511)


async def test_closed_ledger_is_unavailable(rig: Rig) -> None:
    """After closing every call says that the ledger is not there."""
    await rig.ledger.aclose()
    for call in (
        lambda: rig.ledger.take_over("orders", 10, floor=0, ceiling=MAX_ID),
        lambda: rig.ledger.extend("orders", 0, 10),
        lambda: rig.ledger.commit_beside("orders", 10, 1),
        lambda: rig.ledger.raise_to("orders", 10),
        lambda: rig.ledger.read("orders"),
    ):
        with pytest.raises(Unavailable):
            await call()
