"""What is logged when a store goes and comes back under load: one line each."""

import re
from collections import Counter
from contextlib import suppress
from typing import Final

import pytest

from tests.processes import ServerProcess
from tests.real.mariadb_server import MariaDbDatabase
from tests.real.redis_server import RedisServer
from tests.real.serving import (
    RECOVERY_SECONDS,
    SMALL,
    LineClient,
    Load,
    Refused,
    down,
    eventually,
    is_well,
    serves,
    start_server,
)

SERVICES: Final = 300
_EVENT: Final = re.compile(r"\S+ (info|warning|error) (.*?)(?: \w+=.*)?\n")


def events(server: ServerProcess) -> Counter[str]:
    """How often each event was logged, from when the server served."""
    found = [_EVENT.fullmatch(line) for line in server.lines]
    names = [match[2] for match in found if match]
    return Counter(names[names.index("serving") + 1 :])


def visit(client: LineClient, count: int = 1) -> None:
    """Take IDs of each of many services."""
    for number in range(SERVICES):
        with suppress(Refused):
            client.alloc(count, service=f"service-{number}")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_redis_that_is_killed_under_load_is_a_line_and_so_is_its_return(
    workers: int, mariadb_database: MariaDbDatabase, redis_server: RedisServer
) -> None:
    """Each process says once that it is gone and once that it is back, whatever is under way."""
    flags = (*SMALL, "--workers", str(workers))
    with start_server(mariadb_database, redis_server, *flags) as server:
        with Load([server] * 8) as load:
            load.wait_for(400)
            with down(redis_server):
                load.wait_for(400)
            load.wait_for(1_600)
            with LineClient.connect(server) as client:
                eventually(lambda: is_well(client), RECOVERY_SECONDS)
        assert server.terminate() == 0
        seen = events(server)
    assert not load.refusals
    assert 1 <= seen.pop("the counter is down") <= workers
    assert 1 <= seen.pop("the counter is back") <= workers
    seats = {name: n for name, n in seen.items() if name.startswith("a counter was seated anew")}
    # For each reason one, and one with the sum of the others.
    assert all(times <= 2 * workers for times in seats.values())
    rest = set(seen) - seats.keys()
    assert rest <= {"stopping", "draining", "stopped", "IDs could not be given back"}


def test_a_redis_that_is_killed_under_many_services_is_a_line_and_so_is_its_return(
    mariadb_database: MariaDbDatabase, redis_server: RedisServer
) -> None:
    """When it is back all services want something of it: that this is a crowd is no outage."""
    with start_server(mariadb_database, redis_server, *SMALL) as server:
        with LineClient.connect(server) as client:
            visit(client, 60)
            with down(redis_server):
                for _ in range(2):
                    visit(client, 60)
            eventually(lambda: serves(client) and is_well(client), RECOVERY_SECONDS)
            for _ in range(4):
                visit(client, 60)
        assert server.terminate() == 0
        seen = events(server)
    assert (seen["the counter is down"], seen["the counter is back"]) == (1, 1)
    assert seen["a counter was seated anew: it was missing"] <= 2
    assert seen["too many requests wait for the counter"] <= 2
    assert seen.total() <= 2 + 4 * 2 + len(["stopping", "draining", "stopped"])


def test_a_redis_that_was_flushed_under_many_services_is_a_line_and_a_sum(
    mariadb_database: MariaDbDatabase, redis_server: RedisServer
) -> None:
    """Every service's counter is seated anew; the log names the first and counts the others."""
    with start_server(mariadb_database, redis_server, *SMALL) as server:
        with LineClient.connect(server) as client:
            visit(client)
            redis_server.command("FLUSHALL")
            for _ in range(2 * 100):  # Through all their segments.
                client.alloc(service="service-0")
            for number in range(SERVICES):
                client.alloc(100, service=f"service-{number}")
            seated = client.stat("seats_total")
        assert server.terminate() == 0
        seen = events(server)
    assert seated >= 2 * SERVICES
    [first, total] = server.says("info a counter was seated anew: it was missing")
    assert "repeated" not in first
    assert f" repeated={seated - 1} within_seconds=60" in total
    assert seen.total() == 2 + len(["stopping", "draining", "stopped"])


def test_a_service_that_is_not_ours_is_a_line_and_a_sum(
    mariadb_database: MariaDbDatabase,
) -> None:
    """However often it is asked for, and refused."""
    with start_server(mariadb_database, None) as server:
        with LineClient.connect(server) as client:
            client.alloc(service="users")  # Now there is a table.
            mariadb_database.query("INSERT INTO tbl_alloc_info VALUES ('orders', 4000, 40)")
            for _ in range(50):
                assert client.ask("ALLOC orders").startswith("ERR unavailable ")
        assert server.terminate() == 0
    assert 1 <= len(server.says("warning a service is not ours yet ")) <= 2


def test_a_database_that_is_gone_at_a_stop_is_named(
    mariadb_database: MariaDbDatabase, redis_server: RedisServer
) -> None:
    """What cannot be given back is lost, and said so."""
    with start_server(mariadb_database, redis_server) as server:
        with LineClient.connect(server) as client:
            client.alloc(3)
        with down(redis_server):
            assert server.terminate() == 0
    [line] = server.says("warning IDs could not be given back ")
    assert "services=1 ids=9997 reason=" in line
