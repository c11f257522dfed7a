"""The ledger in a real database: its table, its faults, and what they leave behind."""

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Final

import attrs
import pytest
import trio
import trio.testing

from idalloc_tcp.bridge import UNIT_SECONDS, asyncio_loop
from idalloc_tcp.errors import Exhausted, Unavailable
from idalloc_tcp.ledger import CLOSED, Row, Tail
from idalloc_tcp.ledger import mysql as module
from idalloc_tcp.ledger.mysql import CONNECTIONS_MAX, MysqlLedger
from idalloc_tcp.ledger.mysql_url import MysqlUrl
from idalloc_tcp.pool import MAX_ID, Segment
from tests.ledger.conftest import url_of
from tests.real.mariadb_server import MariaDbDatabase, MariaDbServer
from tests.real.proxy import FaultProxy

#: For the machine's own slowness.
SLACK_SECONDS: Final = 2.0


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """What is inside takes no longer, but for the machine's own slowness."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds + SLACK_SECONDS


@asynccontextmanager
async def opened(url: MysqlUrl, *, create_table: bool = True) -> AsyncIterator[MysqlLedger]:
    """A ledger, closed at the end."""
    async with asyncio_loop():
        ledger = MysqlLedger(url, create_table)
        try:
            yield ledger
        finally:
            await ledger.aclose()


@pytest.fixture
async def ledger(mariadb_database: MariaDbDatabase) -> AsyncIterator[MysqlLedger]:
    """A ledger in an empty database."""
    async with opened(url_of(mariadb_database)) as it:
        await it.prepare()
        yield it


@pytest.fixture
async def proxied(
    mariadb_database: MariaDbDatabase, fault_proxy: FaultProxy
) -> AsyncIterator[MysqlLedger]:
    """A ledger behind a proxy, which has leased (0, 100] of `orders`."""
    fault_proxy.target_port = mariadb_database.port
    async with opened(attrs.evolve(url_of(mariadb_database), port=fault_proxy.port)) as it:
        assert await lease(it, 100) == Segment(1, 101)
        yield it


async def lease(ledger: MysqlLedger, size: int, *, floor: int = 0) -> Segment:
    """A lease of `orders` under the highest ceiling."""
    return await ledger.lease("orders", size, floor=floor, ceiling=MAX_ID)


async def problem(url: MysqlUrl, *, create_table: bool = False) -> str:
    """Why it cannot lease: one line."""
    async with opened(url, create_table=create_table) as ledger:
        with pytest.raises(Unavailable) as caught:
            await lease(ledger, 10)
    text = str(caught.value)
    assert text.isprintable()
    return text


def write_row(database: MariaDbDatabase, last: int, version: int) -> None:
    """Put a row of `orders` there, as another program would."""
    database.query(f"REPLACE INTO tbl_alloc_info VALUES ('orders', {last}, {version})")


def read_rows(database: MariaDbDatabase) -> list[tuple[str, ...]]:
    """The whole table."""
    return database.query("SELECT * FROM tbl_alloc_info ORDER BY service_name")


# The table


async def test_prepares_the_table_once(mariadb_database: MariaDbDatabase) -> None:
    """The table is that of the original, and making it again changes nothing."""
    async with opened(url_of(mariadb_database), create_table=False) as ledger:
        await ledger.prepare()
        await lease(ledger, 10)
        await ledger.prepare()
    assert read_rows(mariadb_database) == [("orders", "10", str(CLOSED))]
    columns = mariadb_database.query(
        "SELECT column_name, column_type, is_nullable, column_key FROM information_schema.columns"
        f" WHERE table_schema = '{mariadb_database.name}' ORDER BY ordinal_position"
    )
    assert columns == [
        ("service_name", "varchar(64)", "NO", "PRI"),
        ("last_alloc_value", "bigint(20) unsigned", "NO", ""),
        ("data_version", "bigint(20) unsigned", "NO", ""),
    ]


async def test_missing_table_says_what_to_run(mariadb_database: MariaDbDatabase) -> None:
    """A database without the table is an error that names the command which makes it."""
    text = await problem(url_of(mariadb_database))
    assert text == "MySQL: the table tbl_alloc_info is missing: run `idalloc-tcp init-db`"


async def test_ledger_goes_on_once_the_table_is_there(mariadb_database: MariaDbDatabase) -> None:
    """A missing table is no reason to start again."""
    async with opened(url_of(mariadb_database), create_table=False) as ledger:
        with pytest.raises(Unavailable):
            await lease(ledger, 10)
        await ledger.prepare()
        assert await lease(ledger, 10) == Segment(1, 11)


async def test_table_is_made_on_the_first_connection(mariadb_database: MariaDbDatabase) -> None:
    """If it may, the first lease makes the table."""
    async with opened(url_of(mariadb_database)) as ledger:
        assert await lease(ledger, 10) == Segment(1, 11)


# Numbers


@pytest.mark.parametrize("start", [2**53 - 3, 2**62 + 1, MAX_ID - 30])
async def test_numbers_are_exact(
    ledger: MysqlLedger, mariadb_database: MariaDbDatabase, start: int
) -> None:
    """Where doubles are no longer exact every ID still is, in the reply and in the row."""
    assert await lease(ledger, 1, floor=start - 1) == Segment(start, start + 1)
    for offset in range(1, 22, 3):
        assert await lease(ledger, 3) == Segment(start + offset, start + offset + 3)
    assert await ledger.read("orders") == Row(start + 21, CLOSED)
    assert read_rows(mariadb_database) == [("orders", str(start + 21), str(CLOSED))]
    assert await ledger.extend("orders", start + 21, start + 23)
    tail = Tail("orders", Segment(start + 23, start + 24))
    assert await ledger.give_back([tail]) == [True]
    assert await ledger.read("orders") == Row(start + 22, CLOSED)


async def test_row_above_all_ids_is_exhausted(
    ledger: MysqlLedger, mariadb_database: MariaDbDatabase
) -> None:
    """A row that somebody has put beyond 2^63 leases nothing, and nothing overflows."""
    write_row(mariadb_database, 2**64 - 1, CLOSED)
    with pytest.raises(Exhausted):
        await lease(ledger, 1)
    assert await ledger.read("orders") == Row(2**64 - 1, CLOSED)


# Names


async def test_service_names_are_escaped(ledger: MysqlLedger) -> None:
    """Any name of a service is just a name."""
    name = "o'; DROP TABLE tbl_alloc_info; -- \\ %s \" ö"
    segment = await ledger.lease(name, 10, floor=0, ceiling=MAX_ID)
    assert segment == Segment(1, 11)
    assert await ledger.read(name) == Row(10, CLOSED)


# Many at once


async def test_new_service_of_two_servers_at_once(
    ledger: MysqlLedger, mariadb_database: MariaDbDatabase
) -> None:
    """Two servers that meet a service at the same moment both get leases of it."""
    other = MysqlLedger(url_of(mariadb_database))
    segments: list[Segment] = []

    async def lease_one(ledger: MysqlLedger, service: str) -> None:
        segments.append(await ledger.lease(service, 10, floor=0, ceiling=MAX_ID))

    for number in range(15):
        async with trio.open_nursery() as nursery:
            for one in (ledger, other) * 4:
                nursery.start_soon(lease_one, one, f"service-{number}")
        assert sorted(segments) == [Segment(start, start + 10) for start in range(1, 81, 10)]
        segments.clear()
    await other.aclose()


async def test_connections_are_bounded(
    ledger: MysqlLedger, mariadb_database: MariaDbDatabase
) -> None:
    """However many lease at once, the database sees no more than the limit."""
    count = (
        f"SELECT COUNT(*) FROM information_schema.processlist WHERE db = '{mariadb_database.name}'"
    )
    async with trio.open_nursery() as nursery:
        for _ in range(5 * CONNECTIONS_MAX):
            nursery.start_soon(lease, ledger, 1)
    [(connections,)] = mariadb_database.query(count)
    assert 1 < int(connections) <= CONNECTIONS_MAX + 1  # One is for asking.
    await ledger.aclose()
    await trio.testing.wait_all_tasks_blocked(0.02)
    assert mariadb_database.query(count) == [("1",)]


async def test_waiting_for_a_connection_is_bounded(
    ledger: MysqlLedger, mariadb_database: MariaDbDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who gets no connection in time took nothing, and is told so."""
    monkeypatch.setattr(module, "SLOT_SECONDS", 0.01)
    async with trio.open_nursery() as nursery:
        for _ in range(CONNECTIONS_MAX):
            nursery.start_soon(ledger._slots.acquire_on_behalf_of, object())
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(Unavailable, match="busy"):
            await lease(ledger, 10)
    assert read_rows(mariadb_database) == []


# Faults


async def test_lost_reply_is_a_gap(proxied: MysqlLedger, fault_proxy: FaultProxy) -> None:
    """A lease whose reply was lost is never leased again, and its connection never used."""
    fault_proxy.swallow_replies(1)
    with pytest.raises(Unavailable, match="MySQL: Lost connection"):
        await lease(proxied, 100)
    fault_proxy.heal()
    assert await lease(proxied, 100) == Segment(201, 301)
    assert fault_proxy.statistics().connections_accepted == 2


async def test_lost_replies_of_all_kinds(proxied: MysqlLedger, fault_proxy: FaultProxy) -> None:
    """Whatever was asked for, a lost reply is Unavailable, and what was done stays done."""
    tail = Tail("orders", Segment(191, 201))
    for call, service, row in (
        (lambda: proxied.extend("orders", 100, 200), "orders", Row(200, CLOSED)),
        (lambda: proxied.give_back([tail]), "orders", Row(190, CLOSED)),
        (lambda: proxied.raise_to("orders", 300), "orders", Row(300, CLOSED)),
        (lambda: proxied.commit_beside("users", 50, 7), "users", Row(50, 7)),
        (
            lambda: proxied.take_over("users", 10, floor=0, ceiling=MAX_ID),
            "users",
            Row(60, CLOSED),
        ),
    ):
        assert await proxied.read(service) != row
        fault_proxy.swallow_replies(1)
        with pytest.raises(Unavailable):
            await call()
        assert await proxied.read(service) == row
    assert fault_proxy.statistics().connections_accepted == 6


async def test_cancelled_lease_leaves_nothing_to_be_misread(
    proxied: MysqlLedger, fault_proxy: FaultProxy
) -> None:
    """The connection of a lease that was cancelled is closed: its reply reaches nobody."""
    fault_proxy.delay(to_client_seconds=0.1)
    with trio.move_on_after(0.03) as scope:
        await lease(proxied, 100)
    assert scope.cancelled_caught
    fault_proxy.heal()
    assert await lease(proxied, 5) == Segment(201, 206)
    assert fault_proxy.statistics().connections_accepted == 2


async def test_refused_statement_closes_its_connection(
    proxied: MysqlLedger, fault_proxy: FaultProxy, mariadb_database: MariaDbDatabase
) -> None:
    """A connection on which anything failed is never used again, even if it seems sound."""
    mariadb_database.query("RENAME TABLE tbl_alloc_info TO elsewhere")
    with pytest.raises(Unavailable, match="missing"):
        await lease(proxied, 10)
    mariadb_database.query("RENAME TABLE elsewhere TO tbl_alloc_info")
    assert await lease(proxied, 10) == Segment(101, 111)
    assert fault_proxy.statistics().connections_accepted == 2


async def test_exhausted_keeps_its_connection(
    proxied: MysqlLedger, fault_proxy: FaultProxy
) -> None:
    """A refusal of ours is no fault: the connection is used again."""
    with pytest.raises(Exhausted):
        await proxied.lease("orders", 10, floor=0, ceiling=100)
    assert await lease(proxied, 10) == Segment(101, 111)
    assert fault_proxy.statistics().connections_accepted == 1


async def test_closing_meanwhile_closes_the_connection(
    proxied: MysqlLedger, fault_proxy: FaultProxy
) -> None:
    """A lease that is under way while the ledger closes ends, and leaves no connection."""
    fault_proxy.delay(to_client_seconds=0.05)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lease, proxied, 10)
        await trio.sleep(0.02)
        await proxied.aclose()
    await trio.sleep(0.02)
    assert fault_proxy.statistics().connections_open == 0


async def test_hung_server_is_unavailable_soon(mariadb_server: MariaDbServer) -> None:
    """A server that stopped costs a bounded time; what it leased late is nobody's ever after."""
    database = mariadb_server.create_database("ids")
    async with opened(url_of(database)) as ledger:
        assert await lease(ledger, 100) == Segment(1, 101)
        mariadb_server.pause()
        with bounded(1), pytest.raises(Unavailable, match="read timeout"):
            await lease(ledger, 100)
        with bounded(UNIT_SECONDS), pytest.raises(Unavailable):  # On one that is made anew.
            await lease(ledger, 100)
        mariadb_server.resume()
        segments = [await lease(ledger, 100) for _ in range(5)]
        assert segments == sorted(set(segments))
        assert segments[0].start > 100
        assert await ledger.read("orders") == Row(segments[-1].last, CLOSED)


async def test_restart_costs_no_failed_lease(
    mariadb_server: MariaDbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that was idle is asked before it is used, so a dead one costs nothing."""
    monkeypatch.setattr(module, "FRESH_SECONDS", 0.0)
    async with opened(url_of(mariadb_server.create_database("ids"))) as ledger:
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(lease, ledger, 10)
        await trio.to_thread.run_sync(mariadb_server.restart)
        assert await lease(ledger, 10) == Segment(41, 51)
        await trio.to_thread.run_sync(mariadb_server.restart)
        assert await lease(ledger, 10) == Segment(51, 61)
