"""The admin pages of servers on real stores, judged by Prometheus' own tool and by a browser."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.admin import ADMIN, ask, samples
from tests.processes import ServerProcess
from tests.real.mariadb_server import MariaDbServer
from tests.real.process import wait_until
from tests.real.redis_server import RedisServer
from tests.real.serving import LineClient, start_server

#: A store is asked every five seconds; how soon it answers depends on the machine.
NOTICED_SECONDS: Final = 15.0
BROWSER_SECONDS: Final = 60.0
#: What a page may wait for, in milliseconds of its own clock.
BUDGET_MS: Final = 5_000


@pytest.fixture
def server(mariadb_server: MariaDbServer, redis_server: RedisServer) -> Iterator[ServerProcess]:
    """A server of two workers on stores that may be killed."""
    database = mariadb_server.create_database("ids")
    with start_server(database, redis_server, "--workers", "2", *ADMIN) as running:
        yield running


def until_ready_says(server: ServerProcess, status: int, text: str) -> None:
    """Wait for an answer of `/readyz`."""

    def is_said() -> bool:
        reply = ask(server, "/readyz")
        return (reply.status, reply.text) == (status, text)

    wait_until(is_said, timeout_seconds=NOTICED_SECONDS, what=f"/readyz says {text!r}")


def see(chromium: str, server: ServerProcess, profile: Path) -> str:
    """The text of the page in a browser, once it has asked for the status a few times."""
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={profile}", f"--virtual-time-budget={BUDGET_MS}", "--dump-dom"]
    done = subprocess.run(
        [*command, f"http://{server.admin}/"],
        capture_output=True,
        text=True,
        timeout=BROWSER_SECONDS,
        check=True,
    )
    body = done.stdout.partition("<script>")[0].partition("<body>")[2]
    return " ".join(re.sub("<[^>]*>", " ", body).split())


def test_stores_that_go_and_come_back_are_told_though_no_client_asks(
    server: ServerProcess, mariadb_server: MariaDbServer, redis_server: RedisServer
) -> None:
    """Each is down and up where it should be; the server stays ready, for it knows its stores."""
    until_ready_says(server, 200, "ready\nledger: up\ncounter: up\n")
    redis_server.kill()
    until_ready_says(server, 200, "ready\nledger: up\ncounter: down\n")
    mariadb_server.kill()
    until_ready_says(server, 200, "ready\nledger: down\ncounter: down\n")
    found = samples(server)
    assert found.get("store_up", store="ledger") == found.get("store_up", store="counter") == 0
    assert (found.get("store_failures_total", store="ledger") or 0) >= 1
    redis_server.start()
    mariadb_server.start()
    until_ready_says(server, 200, "ready\nledger: up\ncounter: up\n")


def test_not_ready_before_a_store_has_answered(
    mariadb_server: MariaDbServer, redis_server: RedisServer
) -> None:
    """A server that starts without its stores says so, and is ready by itself once one is back."""
    database = mariadb_server.create_database("ids")
    mariadb_server.kill()
    redis_server.kill()
    with start_server(database, redis_server, *ADMIN) as server:
        until_ready_says(
            server, 503, "not ready: no store has answered yet\nledger: down\ncounter: down\n"
        )
        assert samples(server).get("ready") == 0
        assert ask(server, "/healthz").status == 200
        mariadb_server.start()
        until_ready_says(server, 200, "ready\nledger: up\ncounter: down\n")


def test_prometheus_accepts_what_is_exposed(server: ServerProcess, promtool: str) -> None:
    """All of it: with stores and services, segments from Redis, errors."""
    with LineClient.connect(server) as client:
        client.alloc(3, "orders")
        client.alloc(3, "users")
        client.ask("ALLOC orders 0")
    text = ask(server, "/metrics").text
    checked = subprocess.run(
        [promtool, "check", "metrics"],
        input=text,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
    found = samples(server)
    assert found.get("refill_seconds_count", source="counter") == 2
    assert found.get("lease_headroom_ids", service="orders") == 990_000
    assert found.get("sync_queue_tasks") == 0
    assert found.get("errors_total", code="badcount") == 1
    assert found.get("errors_total", code="unavailable") == 0


def test_the_page_in_a_browser(
    server: ServerProcess, redis_server: RedisServer, chromium: str, tmp_path: Path
) -> None:
    """It shows services, numbers and stores, and above all else what is wrong."""
    with LineClient.connect(server) as client:
        for _ in range(3):
            client.alloc(1_371, "orders")
        client.alloc(2, "users")
        page = see(chromium, server, tmp_path / "profile")
        assert re.search(r"\borders \S+ 4,113 4113 5,887 10,000 – 990K 9\.2·10¹⁸ ok\b", page), page
        assert re.search(r"\busers \S+ 2 2 9,998 ", page), page
        assert re.search(r"ready 2 workers up \d+ s", page), page
        assert re.search(r"Stores ledger up counter up Refills", page), page
        assert "is down" not in page
        redis_server.kill()
        until_ready_says(server, 200, "ready\nledger: up\ncounter: down\n")
        page = see(chromium, server, tmp_path / "profile")
        assert "Redis is down. Segments come straight from the database." in page
