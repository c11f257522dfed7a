"""The harness itself: what it says about real servers must hold."""

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import psutil
import pytest
import trio

from tests.real.mariadb_server import MariaDbDatabase, MariaDbServer, QueryFailed
from tests.real.process import HOST, LocalServer, StartFailed, wait_until
from tests.real.proxy import FaultProxy
from tests.real.redis_server import RedisServer
from tests.real.resp import RedisError, encode, parse

SHORT_SECONDS: Final = 0.1
#: Servers answer within a tenth of this on an idle machine; others may use this one too.
START_BOUND_SECONDS: Final = 3.0
#: For whatever must happen.
TIMEOUT_SECONDS: Final = 5.0
ROOT: Final = Path(__file__).parents[2]


@pytest.fixture(params=[RedisServer, MariaDbServer])
def server(request: pytest.FixtureRequest) -> LocalServer:
    """Either kind of server, to do anything to."""
    kinds = {RedisServer: "redis_server", MariaDbServer: "mariadb_server"}
    found = request.getfixturevalue(kinds[request.param])
    assert isinstance(found, LocalServer)
    return found


@pytest.fixture
def replica(redis_server: RedisServer) -> Iterator[RedisServer]:
    """A replica that is in sync with `redis_server`."""
    with RedisServer() as second:
        second.replicate_from(redis_server.port)
        redis_server.wait_for_sync(second)
        yield second


def greeting_of(port: int, timeout_seconds: float = TIMEOUT_SECONDS) -> bytes:
    """What a MariaDB server or a Redis (to a PING) says first."""
    with socket.create_connection((HOST, port), timeout_seconds) as connection:
        connection.sendall(b"PING\r\n")
        return connection.recv(100)


def wait_briefly_for_sync(master: RedisServer, replica: RedisServer) -> None:
    master.wait_for_sync(replica, timeout_seconds=SHORT_SECONDS)


def has_ended(pid: int) -> bool:
    """An orphan that nobody has waited for yet has ended, too."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


# Both kinds of server


def test_it_starts_fast_and_answers(server: LocalServer) -> None:
    """A restart takes little time, and what it returns from is a server that answers."""
    began = time.monotonic()
    server.restart()
    assert time.monotonic() - began < START_BOUND_SECONDS
    assert greeting_of(server.port)


@pytest.mark.parametrize("end", [LocalServer.kill, LocalServer.stop])
def test_it_can_be_ended_while_it_is_paused(
    server: LocalServer, end: Callable[[LocalServer], None]
) -> None:
    """A paused server can be killed or stopped; then its port refuses, and it can start again."""
    server.pause()
    end(server)
    assert server.pid is None
    with pytest.raises(ConnectionRefusedError):
        greeting_of(server.port)
    server.start()
    assert greeting_of(server.port)


def test_its_port_is_kept_for_it_while_it_is_down(redis_server: RedisServer) -> None:
    """Nobody else can have the port of a server that is down."""
    redis_server.kill()
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind((HOST, redis_server.port))


def test_it_answers_again_each_time_it_is_resumed(server: LocalServer) -> None:
    """Pausing means no answer, every time anew; resuming means an answer again."""
    for _ in range(2):
        server.pause()
        with pytest.raises(TimeoutError):
            greeting_of(server.port, SHORT_SECONDS)
        server.resume()
        assert greeting_of(server.port)


def test_a_server_that_is_down_cannot_be_signalled(redis_server: RedisServer) -> None:
    """Pausing a dead server is an error in the test, and never a signal to another process."""
    redis_server.kill()
    with pytest.raises(RuntimeError, match="not running"):
        redis_server.pause()


def test_it_leaves_nothing_behind() -> None:
    """After its context the process has ended and the folder is gone."""
    with RedisServer() as redis:
        pid, folder = redis.pid, redis.folder
        assert pid is not None
        assert not has_ended(pid)
    assert has_ended(pid)
    assert not folder.exists()


def test_a_failed_start_quotes_the_log_and_leaves_nothing_behind() -> None:
    """A server that does not start says why, and its folder is gone."""
    redis = RedisServer(("--no-such-flag", "1"))
    with pytest.raises(StartFailed, match="Bad directive"), redis:
        pass
    assert not redis.folder.exists()


def test_a_missing_server_fails_in_ci(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where CI is set, a missing program fails the test and names the package."""
    monkeypatch.setenv("CI", "true")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(pytest.fail.Exception, match="apt-get install redis-server"):
        request.getfixturevalue("redis_server")


def test_a_missing_server_skips_elsewhere(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without CI, a missing program skips the test and names the package."""
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(pytest.skip.Exception, match="apt-get install redis-server"):
        request.getfixturevalue("redis_server")


_STARTS_A_SERVER_AND_WAITS: Final = """
import signal, sys, time
from tests.real.redis_server import RedisServer
signal.signal(signal.SIGINT, signal.default_int_handler)  # A job in the background ignores it.
with RedisServer() as redis:
    print(redis.pid, redis.folder, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_servers_die_with_their_process(number: signal.Signals) -> None:
    """Whether it is interrupted or killed, a process takes its servers with it."""
    with subprocess.Popen(
        [sys.executable, "-c", _STARTS_A_SERVER_AND_WAITS],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as starter:
        assert starter.stdout is not None
        pid, folder = starter.stdout.readline().split()
        starter.send_signal(number)
        starter.wait(TIMEOUT_SECONDS)
    wait_until(lambda: has_ended(int(pid)), timeout_seconds=TIMEOUT_SECONDS, what="it has ended")
    if number is signal.SIGINT:
        assert not Path(folder).exists()
    else:
        Path(folder, "server.log").unlink()
        Path(folder, "data").rmdir()
        Path(folder).rmdir()


def test_servers_survive_the_thread_that_started_them(redis_server: RedisServer) -> None:
    """A server that a short-lived thread has restarted lives on when that thread has ended."""
    thread = threading.Thread(target=redis_server.restart)
    thread.start()
    thread.join(TIMEOUT_SECONDS)
    time.sleep(SHORT_SECONDS)
    assert redis_server.command("PING") == "PONG"


# Redis


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"+OK\r\n", "OK"),
        (b":9223372036854775807\r\n", 2**63 - 1),
        (b":-1\r\n", -1),
        (b"$-1\r\n", None),
        (b"$4\r\na\r\nb\r\n", "a\r\nb"),
        (b"*3\r\n:1\r\n$0\r\n\r\n*1\r\n+x\r\n", [1, "", ["x"]]),
    ],
)
def test_replies_are_parsed_exactly(data: bytes, expected: object) -> None:
    """A reply is its exact value once its last byte is there, and not a byte earlier."""
    for size in range(len(data)):
        assert parse(data[:size]) is None
    assert parse(data + b"rest") == (expected, len(data))


def test_commands_are_encoded_and_errors_are_raised(redis_server: RedisServer) -> None:
    """Numbers up to 64 bits pass both ways unharmed, and an error reply is an exception."""
    assert encode("GET", 12) == b"*2\r\n$3\r\nGET\r\n$2\r\n12\r\n"
    redis_server.command("SET", "id", 2**63 - 2)
    assert redis_server.command("INCR", "id") == 2**63 - 1
    with pytest.raises(RedisError, match="overflow"):
        redis_server.command("INCR", "id")


def test_redis_can_be_restarted_empty(redis_server: RedisServer) -> None:
    """An empty restart loses everything, even what was saved, and changes both identities."""
    redis_server.command("SET", "id", 1)
    redis_server.snapshot()
    before = redis_server.info()
    redis_server.restart_empty()
    after = redis_server.info()
    assert redis_server.command("DBSIZE") == 0
    assert before["run_id"] != after["run_id"]
    assert before["master_replid"] != after["master_replid"]


def test_redis_comes_back_with_what_was_saved_last(redis_server: RedisServer) -> None:
    """A plain restart loads the last snapshot, older than the crash, under new identities."""
    redis_server.command("SET", "id", "saved")
    redis_server.snapshot()
    redis_server.command("SET", "id", "not saved")
    before = redis_server.info()
    redis_server.restart()
    after = redis_server.info()
    assert redis_server.command("GET", "id") == "saved"
    assert before["run_id"] != after["run_id"]
    assert before["master_replid"] != after["master_replid"]


def test_redis_can_be_restored_from_any_earlier_snapshot(redis_server: RedisServer) -> None:
    """An early snapshot brings the early data back, although a later one was saved."""
    redis_server.command("SET", "id", "early")
    early = redis_server.snapshot()
    redis_server.command("SET", "id", "late")
    redis_server.snapshot()
    redis_server.restart_from(early)
    assert redis_server.command("GET", "id") == "early"


def test_redis_takes_further_flags() -> None:
    """Flags of the test win: with an append-only file a crash loses nothing acknowledged."""
    with RedisServer(("--appendonly", "yes", "--appendfsync", "always")) as redis:
        redis.command("SET", "id", "kept")
        redis.restart()
        assert redis.command("GET", "id") == "kept"


def test_a_demoted_and_promoted_redis_keeps_its_run_id(
    redis_server: RedisServer, replica: RedisServer
) -> None:
    """After demotion and promotion run_id is the same and master_replid is not.

    A fence of run_id alone would not notice that the data in between was another server's.
    """
    redis_server.command("SET", "id", "newer")
    redis_server.wait_for_sync(replica)
    before = redis_server.info()
    replica.promote()
    replica.command("SET", "id", "older")
    redis_server.replicate_from(replica.port)
    replica.wait_for_sync(redis_server)
    redis_server.promote()
    after = redis_server.info()
    assert redis_server.command("GET", "id") == "older"
    assert after["role"] == "master"
    assert after["run_id"] == before["run_id"]
    assert after["master_replid"] != before["master_replid"]


def test_every_promotion_changes_the_replication_id(
    redis_server: RedisServer, replica: RedisServer
) -> None:
    """A replica shares its master's master_replid; promoted, it gets its own, run_id unchanged."""
    before = replica.info()
    assert before["master_replid"] == redis_server.info()["master_replid"]
    replica.promote()
    after = replica.info()
    assert after["master_replid"] != before["master_replid"]
    assert after["run_id"] == before["run_id"]


async def test_a_lagging_replica_is_promoted_without_the_last_writes(
    redis_server: RedisServer, fault_proxy: FaultProxy
) -> None:
    """A replica behind a delaying proxy becomes a master that never saw the last writes."""
    fault_proxy.target_port = redis_server.port
    with RedisServer() as replica:
        replica.replicate_from(fault_proxy.port)
        redis_server.command("SET", "id", "early")
        await trio.to_thread.run_sync(redis_server.wait_for_sync, replica)
        fault_proxy.delay(to_client_seconds=60)
        redis_server.command("SET", "id", "late")
        with pytest.raises(TimeoutError):
            await trio.to_thread.run_sync(wait_briefly_for_sync, redis_server, replica)
        replica.promote()
        assert replica.command("GET", "id") == "early"
        assert redis_server.command("GET", "id") == "late"


async def test_a_replica_without_its_master_is_not_in_sync(
    redis_server: RedisServer, fault_proxy: FaultProxy
) -> None:
    """A replica whose connection is broken counts as behind, though nothing was written since."""
    fault_proxy.target_port = redis_server.port
    with RedisServer() as replica:
        replica.replicate_from(fault_proxy.port)
        await trio.to_thread.run_sync(redis_server.wait_for_sync, replica)
        fault_proxy.refuse()
        fault_proxy.cut()
        with pytest.raises(TimeoutError):
            await trio.to_thread.run_sync(wait_briefly_for_sync, redis_server, replica)


def test_a_paused_redis_executes_later_what_timed_out(redis_server: RedisServer) -> None:
    """A command to a paused server times out in time, and is executed all the same later."""
    redis_server.pause()
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        redis_server.command("INCR", "id", timeout_seconds=SHORT_SECONDS)
    assert time.monotonic() - began < START_BOUND_SECONDS
    redis_server.resume()
    assert redis_server.command("INCR", "id") == 2


# MariaDB


def test_mariadb_keeps_what_it_committed_over_a_crash(mariadb_server: MariaDbServer) -> None:
    """After kill -9, right after its first start too, committed rows are there, others not."""
    database = mariadb_server.create_database("crash")
    database.query("CREATE TABLE ids (id BIGINT UNSIGNED PRIMARY KEY)")
    for number in (1, 2**64 - 1):
        database.query(f"INSERT INTO ids VALUES ({number})")
        database.query("BEGIN; INSERT INTO ids VALUES (7)")
        mariadb_server.restart()
    assert database.query("SELECT id FROM ids ORDER BY id") == [("1",), (str(2**64 - 1),)]


def test_a_paused_mariadb_does_not_answer(mariadb_server: MariaDbServer) -> None:
    """A query to a paused server times out, and is answered again once it is resumed."""
    mariadb_server.pause()
    with pytest.raises(TimeoutError):
        mariadb_server.query("SELECT 1", timeout_seconds=SHORT_SECONDS)
    mariadb_server.resume()
    assert mariadb_server.query("SELECT 1") == [("1",)]


def test_query_gives_all_rows_as_text(mariadb_database: MariaDbDatabase) -> None:
    """Rows of all statements come as the client prints them, and none for an empty result."""
    rows = mariadb_database.query("SELECT 1, NULL, ''; SELECT 'é\\t'; SELECT 1 WHERE FALSE")
    assert rows == [("1", "NULL", ""), ("é\\t",)]
    assert mariadb_database.query("DO 1") == []


def test_query_raises_what_the_server_says(mariadb_database: MariaDbDatabase) -> None:
    """Refused SQL is an exception with the server's words."""
    with pytest.raises(QueryFailed, match=r"doesn't exist"):
        mariadb_database.query("SELECT * FROM nowhere")


@pytest.mark.parametrize("attempt", [1, 2])
def test_each_test_gets_an_empty_database(mariadb_database: MariaDbDatabase, attempt: int) -> None:
    """What one test leaves in its database, the next does not see."""
    assert mariadb_database.query("SHOW TABLES") == [], attempt
    mariadb_database.query("CREATE TABLE left_over (id INT)")


def test_mariadb_with_grants_checks_passwords_and_privileges() -> None:
    """With grants, a wrong password is refused and a right one allows what was granted only."""
    with MariaDbServer(grants=True) as mariadb:
        database = mariadb.create_database("guarded")
        database.query("CREATE TABLE ids (id INT)")
        mariadb.query("CREATE USER reader IDENTIFIED BY 'secret'")
        mariadb.query("GRANT SELECT ON guarded.* TO reader")
        mariadb.restart()
        select, insert = "SELECT * FROM guarded.ids", "INSERT INTO guarded.ids VALUES (1)"
        assert mariadb.query(select, user="reader", password="secret") == []
        with pytest.raises(QueryFailed, match="command denied"):
            mariadb.query(insert, user="reader", password="secret")
        with pytest.raises(QueryFailed, match="Access denied"):
            mariadb.query(select, user="reader", password="wrong")
