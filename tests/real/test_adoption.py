"""Carrying an installation of the original idalloc over: beside it, after it, and by mistake."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

import pytest

from idalloc_tcp.ledger import CLOSED
from idalloc_tcp.ledger.mysql import CREATE_TABLE
from tests.real.mariadb_server import MariaDbDatabase
from tests.real.original import SEGMENT, Original
from tests.real.redis_server import RedisServer
from tests.real.resp import RedisError
from tests.real.serving import (
    KEY_PREFIX,
    SERVICE,
    SMALL,
    LineClient,
    Load,
    Range,
    Refused,
    duplicates,
    eventually,
    start_server,
)

ORIGINALS: Final = 2
#: Those beside ours are slower than they could be, so that ours get their share.
THINK_SECONDS: Final = 0.005


@pytest.fixture
def database(mariadb_database: MariaDbDatabase) -> MariaDbDatabase:
    """With the table of the original."""
    mariadb_database.query(CREATE_TABLE)
    return mariadb_database


@contextmanager
def originals_at_work(database: MariaDbDatabase, redis: RedisServer) -> Iterator[list[Original]]:
    """Processes of the original that cut all the while."""
    is_over = threading.Event()

    def wants_more() -> bool:
        return not is_over.wait(THINK_SECONDS)

    with ExitStack() as stack:
        originals = [stack.enter_context(Original(database, redis)) for _ in range(ORIGINALS)]
        for original in originals:
            thread = threading.Thread(target=original.serve, args=(wants_more,))
            thread.start()
            stack.callback(thread.join)
        stack.callback(is_over.set)
        yield originals


def run_original(database: MariaDbDatabase, redis: RedisServer, cuts: int) -> list[Range]:
    """One process of the original makes so many cuts and stops: what it served."""
    with Original(database, redis) as original:
        original.serve(lambda: len(original.taken) < cuts)
    return original.taken


def row_of(database: MariaDbDatabase) -> tuple[int, int]:
    """The row's last_alloc_value and data_version."""
    [(last, version)] = database.query("SELECT last_alloc_value, data_version FROM tbl_alloc_info")
    return int(last), int(version)


def hash_of(redis: RedisServer) -> list[str]:
    """lastAllocValue, dataVersion, leaseEnd; "None" for what is not there."""
    fields = ("lastAllocValue", "dataVersion", "leaseEnd")
    values = redis.command("HMGET", f"{KEY_PREFIX}{SERVICE}", *fields)
    assert isinstance(values, list)
    return list(map(str, values))


def highest(*takers: list[Range]) -> int:
    """The last ID that anybody has."""
    return max(first + count - 1 for taken in takers for _, first, count in taken)


def test_it_serves_beside_the_original(
    database: MariaDbDatabase, redis_server: RedisServer
) -> None:
    """On one Redis, under load, neither gets what the other has, and hash and row stay theirs."""
    with (
        originals_at_work(database, redis_server) as originals,
        start_server(database, redis_server, *SMALL) as one,
        start_server(database, redis_server, *SMALL) as other,
    ):
        eventually(lambda: all(len(original.taken) > 20 for original in originals), 10)
        with Load([one, other]) as load:
            load.wait_for(400)
        cuts = sum(len(original.taken) for original in originals)
        assert cuts > 2 * 20
    print(f"the originals cut {cuts} times, ours served {len(load.taken)} ranges")
    assert duplicates(load.taken, *(original.taken for original in originals)) == 0
    assert not load.refusals
    assert not any(original.failures for original in originals)
    last, version, lease_end = hash_of(redis_server)
    assert lease_end == "None"
    assert highest(load.taken) <= int(last)
    assert int(version) < CLOSED
    assert row_of(database)[1] < CLOSED


def test_a_late_write_of_the_original_harms_nobody(
    database: MariaDbDatabase, redis_server: RedisServer
) -> None:
    """The original lowers the row below what we serve, and neither we nor a take-over mind."""
    taken = run_original(database, redis_server, 9)
    with Original(database, redis_server) as original:
        with (
            start_server(database, redis_server, *SMALL) as server,
            LineClient.connect(server) as client,
        ):
            last = original.begin_cut()
            ours = client.alloc()
            assert row_of(database)[0] > last
            original.write(last, original.end_cut(last))
            assert row_of(database)[0] == last < ours.start
            for _ in range(3):
                client.alloc(100)
            assert row_of(database)[0] >= highest(client.taken)
            last = original.begin_cut()
            client.alloc(200)
        # Once more, and now nobody mends it before the take-over.
        original.write(last, original.end_cut(last))
        assert row_of(database)[0] == last < highest(client.taken)
    taken += original.taken + client.taken
    assert duplicates(taken) == 0
    with (
        start_server(database, redis_server, "--take-over", *SMALL) as server,
        LineClient.connect(server) as client,
    ):
        assert client.alloc(100).start > highest(taken)


def test_it_takes_over_what_the_original_left(
    database: MariaDbDatabase, redis_server: RedisServer
) -> None:
    """It goes on above hash and row, makes both its own, and then no fault of Redis does harm."""
    taken = run_original(database, redis_server, 17)
    left = redis_server.snapshot()
    faults: list[Callable[[], object]] = [
        lambda: redis_server.command("FLUSHALL"),
        redis_server.restart_empty,
        lambda: redis_server.restart_from(left),
        lambda: redis_server.command("DEL", f"{KEY_PREFIX}{SERVICE}"),
        lambda: redis_server.restart_from(left),
    ]
    assert row_of(database) == (10 * SEGMENT, 10)
    with start_server(database, redis_server, "--take-over", *SMALL) as server:
        with LineClient.connect(server) as client:
            assert client.alloc().start == highest(taken) + 1
        last, version, lease_end = hash_of(redis_server)
        assert highest(client.taken) <= int(last) <= int(lease_end)
        assert version == str(CLOSED)
        assert row_of(database) == (int(lease_end), CLOSED)
        with Load([server]) as load:
            for fault in faults:
                load.wait_for(60)
                fault()
            load.wait_for(60)
    assert duplicates(taken, client.taken, load.taken) == 0
    assert not load.refusals


def test_a_take_over_by_mistake_repeats_nothing(
    database: MariaDbDatabase, redis_server: RedisServer
) -> None:
    """Originals that still run fail from then on, loudly, and nobody gets an ID twice."""
    with originals_at_work(database, redis_server) as originals:
        eventually(lambda: all(len(original.taken) > 20 for original in originals), 10)
        with (
            start_server(database, redis_server, *SMALL) as beside,
            Load([beside]) as load_beside,
        ):
            load_beside.wait_for(30)
            with (
                start_server(database, redis_server, "--take-over", *SMALL) as server,
                Load([server]) as load,
            ):
                load.wait_for(30)
                cuts = [len(original.taken) for original in originals]
                failures = [original.failures for original in originals]
                load.wait_for(100)
                load_beside.wait_for(100)
        assert [len(original.taken) for original in originals] == cuts
        assert all(
            original.failures > failed for original, failed in zip(originals, failures, strict=True)
        )
        with Original(database, redis_server) as late:
            last = late.begin_cut()
            with pytest.raises(RedisError, match="overflow"):
                late.end_cut(last)
    theirs = [original.taken for original in originals]
    assert duplicates(load.taken, load_beside.taken, *theirs) == 0
    assert not load.refusals
    # A moment lies between taking the hash over and taking the row over.
    assert all("its row is the original idalloc's" in text for text in load_beside.refusals)
    assert row_of(database)[1] == CLOSED
    assert row_of(database)[0] >= highest(load.taken, load_beside.taken, *theirs)


@pytest.mark.parametrize("with_redis", [False, True], ids=["mysql-only", "hash-lost"])
def test_a_row_of_the_original_alone_is_refused(
    with_redis: bool, database: MariaDbDatabase, redis_server: RedisServer
) -> None:
    """The row may be behind what the original served: an error, and a log that says why."""
    run_original(database, redis_server, 17)
    redis_server.command("FLUSHALL")
    row = row_of(database)
    redis = redis_server if with_redis else None
    with (
        start_server(database, redis, "--take-over") as server,
        LineClient.connect(server) as client,
    ):
        with pytest.raises(Refused, match="ERR unavailable"):
            client.alloc()
        said = f"{SERVICE}: its row is the original idalloc's and may be behind"
        eventually(lambda: said in "".join(server.lines), 1)
        assert row_of(database) == row
        assert client.alloc(service="new") == range(1, 2)
