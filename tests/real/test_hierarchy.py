"""IDs through Redis and MySQL, as they are and as they fail: real servers, real processes."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest

from idalloc_tcp.fallback import LOWEST
from idalloc_tcp.ledger import CLOSED
from idalloc_tcp.pool import MAX_ID
from tests.processes import ServerProcess
from tests.real.mariadb_server import MariaDbDatabase, MariaDbServer
from tests.real.redis_server import RedisServer
from tests.real.serving import (
    RECOVERY_SECONDS,
    SERVICE,
    SMALL,
    LineClient,
    Load,
    Refused,
    down,
    duplicates,
    eventually,
    hash_of,
    is_well,
    mysql_url,
    run_command,
    serves,
    start_server,
    store_flags,
)

RSS_MIB_MAX: Final = 48.0
#: A request whose pool is full takes less, whatever a store does; so does a refusal. As others may
#: use the machine, a few requests may take longer, but not as long as any wait for a store.
SERVED_SECONDS_MAX: Final = 0.1
REFUSED_SECONDS_MAX: Final = 0.05
WAITED_SECONDS_MIN: Final = 0.4
#: What a refusal may take that has to find out first.
FOUND_OUT_SECONDS_MAX: Final = 0.5
LOAD_SECONDS: Final = 1.5
STOP_SECONDS_MAX: Final = 5.0


@pytest.fixture
def own_database(mariadb_server: MariaDbServer) -> MariaDbDatabase:
    """A database whose server may be killed and paused."""
    return mariadb_server.create_database("ids")


@pytest.fixture
def server(mariadb_database: MariaDbDatabase, redis_server: RedisServer) -> Iterator[ServerProcess]:
    """A server on a Redis and a database, which is not to be killed."""
    with start_server(mariadb_database, redis_server) as running:
        yield running


def refusal(client: LineClient, service: str = SERVICE) -> tuple[str, float]:
    """How an ALLOC is refused, and after how many seconds."""
    began = time.monotonic()
    with pytest.raises(Refused) as refused:
        client.alloc(service=service)
    return str(refused.value), time.monotonic() - began


def drain(client: LineClient) -> None:
    """Take all that the pool holds."""
    for count in (1_000, 100, 10, 1):
        while serves_many(client, count):
            pass


def serves_many(client: LineClient, count: int) -> bool:
    """Do so many IDs come at once?"""
    try:
        client.alloc(count)
    except Refused:
        return False
    return True


def test_ids_go_through_redis_and_mysql(
    server: ServerProcess, mariadb_database: MariaDbDatabase, redis_server: RedisServer
) -> None:
    """The hash has the original's fields and our two, the table the original's columns."""
    with LineClient.connect(server) as client:
        assert client.alloc(3) == range(1, 4)
        assert client.stat("seats_total.missing") == 1
    fields = hash_of(redis_server)
    run_id, replid = fields.pop("fence").split(":")
    assert fields == {
        "lastAllocValue": "10000",
        "dataVersion": str(CLOSED),
        "leaseEnd": "1000000",
    }
    info = redis_server.info()
    assert (run_id, replid) == (info["run_id"], info["master_replid"])
    columns = mariadb_database.query("SHOW COLUMNS FROM tbl_alloc_info")
    assert [(name, kind, key) for name, kind, _, key, *_ in columns] == [
        ("service_name", "varchar(64)", "PRI"),
        ("last_alloc_value", "bigint(20) unsigned", ""),
        ("data_version", "bigint(20) unsigned", ""),
    ]
    rows = mariadb_database.query("SELECT * FROM tbl_alloc_info")
    assert rows == [(SERVICE, "1000000", str(CLOSED))]


def test_an_idle_server_is_small(server: ServerProcess) -> None:
    """With both drivers, the bridge and a service in use, it stays within its memory."""
    with LineClient.connect(server) as client:
        client.alloc()
        print(f"resident with both stores: {server.rss_mib:.1f} MiB")
        assert server.rss_mib <= RSS_MIB_MAX


@pytest.fixture(params=["redis", "mysql-only"])
def redis_or_none(request: pytest.FixtureRequest, redis_server: RedisServer) -> RedisServer | None:
    """With a Redis, and without."""
    return redis_server if request.param == "redis" else None


def test_servers_share_their_stores(
    mariadb_database: MariaDbDatabase, redis_or_none: RedisServer | None
) -> None:
    """Two servers on the same stores, under load, give nothing twice."""
    with (
        start_server(mariadb_database, redis_or_none, *SMALL) as one,
        start_server(mariadb_database, redis_or_none, *SMALL) as other,
    ):
        with Load([one, other]) as load:
            load.wait_for(400)
        assert duplicates(load.taken) == 0
        assert not load.refusals


def test_a_restart_leaves_no_gap(
    mariadb_database: MariaDbDatabase, redis_or_none: RedisServer | None
) -> None:
    """A server that is stopped cleanly gives back what it did not serve, and the next goes on."""
    for first in (1, 4):
        with (
            start_server(mariadb_database, redis_or_none) as server,
            LineClient.connect(server) as client,
        ):
            assert client.alloc(3).start == first
            assert ("counter_up" in client.stats()) is (redis_or_none is not None)
            client.ask("QUIT")
            assert server.terminate() == 0
        if redis_or_none is not None:
            assert hash_of(redis_or_none)["lastAllocValue"] == str(first + 2)


def test_ids_are_exact_up_to_the_last_one(
    mariadb_database: MariaDbDatabase, redis_server: RedisServer
) -> None:
    """Around 2^53 and up to 2^63-1 each ID comes once through Redis; then it says exhausted."""
    starts = {"near53": 2**53 - 3, "near63": MAX_ID - 2_000}
    flags = ("--segment-size", "1000", "--lease-segments", "2", "--pool-seconds", "0")
    assert run_command("init-db", "--mysql", mysql_url(mariadb_database)).returncode == 0
    for name, start in starts.items():
        values = f"('{name}', {start}, {CLOSED})"
        mariadb_database.query(f"INSERT INTO tbl_alloc_info VALUES {values}")
    with (
        start_server(mariadb_database, redis_server, *flags, "--ceilings", "few=100") as server,
        LineClient.connect(server) as client,
    ):
        for expected in range(2**53 - 2, 2**53 + 900):
            assert client.alloc(service="near53").start == expected
        for expected in range(MAX_ID - 1_999, MAX_ID, 100):
            assert client.alloc(100, "near63").start == expected
        assert hash_of(redis_server, "near63")["lastAllocValue"] == str(MAX_ID)
        for expected in range(1, 101):
            assert client.alloc(service="few").start == expected
        for service in ("near63", "few"):
            assert refusal(client, service)[0].startswith("ERR exhausted ")


@pytest.mark.parametrize("lost", ["redis", "mysql", "both"])
def test_a_server_starts_without_its_stores(
    lost: str, own_database: MariaDbDatabase, redis_server: RedisServer
) -> None:
    """It listens at once, serves or says unavailable, and is well soon after the store is there."""
    missing: list[MariaDbDatabase | RedisServer] = []
    missing += [redis_server] if lost != "mysql" else []
    missing += [own_database] if lost != "redis" else []
    with ExitStack() as stack:
        with down(*missing):
            server = stack.enter_context(start_server(own_database, redis_server, *SMALL))
            client = stack.enter_context(LineClient.connect(server))
            assert client.ask("PING") == "OK PONG"
            if lost == "redis":
                assert client.alloc() == range(1, 2)
            else:
                text, seconds = refusal(client)
                assert text.startswith("ERR unavailable ")
                assert seconds < FOUND_OUT_SECONDS_MAX
                assert refusal(client)[1] < REFUSED_SECONDS_MAX
        took = eventually(lambda: serves(client), RECOVERY_SECONDS)
        print(f"without {lost}: serves {took:.2f} s after the start of the store")
        # Each of these is more than a pool holds, so that Redis is asked.
        eventually(lambda: serves_many(client, 200) and is_well(client), RECOVERY_SECONDS)
        assert duplicates(client.taken) == 0


def test_a_store_that_hangs_holds_nobody_up(
    own_database: MariaDbDatabase, redis_server: RedisServer
) -> None:
    """While Redis, then MariaDB, is stopped, only a request whose pool is empty waits for it."""
    with start_server(own_database, redis_server) as server:
        for store, name, word in (
            (redis_server, "counter", "OK"),
            (own_database.server, "ledger", "ERR"),
        ):
            with LineClient.connect(server) as client, Load([server], counts=[10]) as load:
                load.wait_for(50)
                store.pause()
                del load.seconds[:]
                began = time.monotonic()
                assert client.ask(f"ALLOC without-{name}").startswith(word)
                assert time.monotonic() - began > WAITED_SECONDS_MIN, "it did not even wait"
                load.wait_for(200)
                store.resume()
            print(f"{name} hangs: slowest of {len(load.seconds)} {max(load.seconds):.3f} s")
            assert not load.refusals
            assert max(load.seconds) < WAITED_SECONDS_MIN
            late = sum(seconds > SERVED_SECONDS_MAX for seconds in load.seconds)
            assert late <= len(load.seconds) / 100


def test_a_dead_store_is_left_alone(
    own_database: MariaDbDatabase, redis_server: RedisServer
) -> None:
    """However many ask for IDs, a dead store is asked once or twice a second."""
    with (
        start_server(own_database, redis_server, *SMALL) as server,
        LineClient.connect(server) as client,
    ):
        client.alloc()
        with ExitStack() as stack:
            for store, name in ((redis_server, "counter"), (own_database, "ledger")):
                stack.enter_context(down(store))
                probes = probes_of_a_load(client, f"{name}_probes_total")
                print(f"{name} is dead: {probes} probes in {LOAD_SECONDS:g} s")
                assert 1 <= probes <= 1 + 2 * LOAD_SECONDS
        eventually(lambda: serves_many(client, 200), RECOVERY_SECONDS)
        assert duplicates(client.taken) == 0


def probes_of_a_load(client: LineClient, name: str) -> int:
    """How often a store is asked in `LOAD_SECONDS` of load on ten services, a second into it."""
    before = 0
    for seconds in (1.0, LOAD_SECONDS):  # In the first the pauses between the probes grow.
        before = client.stat(name)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for number in range(10):
                client.ask(f"ALLOC service{number} 150")
            time.sleep(0.01)
    return client.stat(name) - before


def test_pools_outlive_both_stores(
    own_database: MariaDbDatabase, redis_server: RedisServer
) -> None:
    """With both dead, what pools hold is served; then a refusal, or a random range, at once."""
    with (
        start_server(own_database, redis_server) as plain,
        start_server(own_database, redis_server, "--fallback", "random") as falling,
        LineClient.connect(plain) as client,
        LineClient.connect(falling) as other,
    ):
        client.alloc()
        other.alloc()
        with down(redis_server, own_database):
            drain(client)
            drain(other)
            assert sum(count for _, _, count in client.taken) == 10_000
            refusals = [refusal(client) for _ in range(20)]
            assert all(text.startswith("ERR unavailable ") for text, _ in refusals)
            *_, second, slowest = sorted(seconds for _, seconds in refusals)
            print(f"slowest refusals with both stores dead: {second:.4f} and {slowest:.4f} s")
            assert second < REFUSED_SECONDS_MAX
            assert slowest < WAITED_SECONDS_MIN
            for _ in range(20):
                word, first, count = other.ask(f"ALLOC {SERVICE} 7").split()
                assert (word, count) == ("RANDOM", "7")
                assert LOWEST <= int(first) <= MAX_ID - 6
        for one in (client, other):
            eventually(lambda one=one: serves(one), RECOVERY_SECONDS)  # type: ignore[misc]
        assert duplicates(client.taken, other.taken) == 0


def test_the_table_has_to_be_made(
    mariadb_database: MariaDbDatabase, redis_server: RedisServer
) -> None:
    """Without it a server says unavailable and logs why; after init-db, twice even, it serves."""
    stores = store_flags(mariadb_database, redis_server)
    with (
        ServerProcess.start(*stores, data=Path("unused")) as server,
        LineClient.connect(server) as client,
    ):
        assert refusal(client)[0].startswith("ERR unavailable ")
        eventually(lambda: "run `idalloc-tcp init-db`" in "".join(server.lines), RECOVERY_SECONDS)
        for _ in range(2):
            done = run_command("init-db", "--mysql", mysql_url(mariadb_database))
            assert (done.returncode, done.stderr) == (0, "")
        eventually(lambda: serves(client), RECOVERY_SECONDS)
    done = run_command("init-db", "--mysql", f"{mysql_url(mariadb_database)}_not")
    assert done.returncode == 1
    assert done.stderr.startswith("idalloc-tcp: unavailable: MySQL: Unknown database")


@pytest.mark.usefixtures("shared_mariadb_server")  # It knows what to do if none is installed.
def test_a_wrong_password_is_told_and_not_shown() -> None:
    """The server starts all the same, says unavailable, and its log names the account alone."""
    with MariaDbServer(grants=True) as mariadb:
        database = mariadb.create_database("ids")
        mariadb.query("CREATE USER ids@127.0.0.1 IDENTIFIED BY 'right-secret'")
        mariadb.query("GRANT ALL ON ids.* TO ids@127.0.0.1")
        for password, reply in (("wrong-secret", "ERR unavailable"), ("right-secret", "OK 1 1")):
            flags = ("--mysql", mysql_url(database, f"ids:{password}"), "--create-table")
            with ServerProcess.start(*flags, data=Path("unused")) as server:
                with LineClient.connect(server) as client:
                    assert client.ask(f"ALLOC {SERVICE}").startswith(reply)
                assert server.terminate() == 0
                said = "".join(server.lines)
                assert ("Access denied for user 'ids'" in said) is (reply != "OK 1 1")
                assert "secret" not in said


@pytest.mark.parametrize("how", ["dead", "hanging"])
def test_a_stop_does_not_wait_for_stores(
    how: str, own_database: MariaDbDatabase, redis_server: RedisServer
) -> None:
    """SIGTERM ends a server in time, with status 0, though nobody takes anything back."""
    with start_server(own_database, redis_server) as server:
        with LineClient.connect(server) as client:
            client.alloc()
            for store in (redis_server, own_database.server):
                if how == "dead":
                    store.kill()
                else:
                    store.pause()
        began = time.monotonic()
        assert server.terminate() == 0
        took = time.monotonic() - began
        print(f"stopped in {took:.2f} s with {how} stores")
        assert took < STOP_SECONDS_MAX
