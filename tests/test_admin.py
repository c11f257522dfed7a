"""The admin pages of real servers, of one process and of two, quiet and under load."""

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Event, Thread
from typing import Final

import pytest
import trio
import trio.testing

from idalloc_tcp.address import parse_address
from idalloc_tcp.admin.listening import REQUEST_BYTES_MAX, SEND_SECONDS, BoundedStream, serve
from idalloc_tcp.listeners import open_listeners
from tests.admin import ADMIN, ask, samples
from tests.processes import ServerProcess

WORKERS: Final = {"alone": "1", "together": "2"}
PATIENCE_SECONDS: Final = 10.0
#: More than a server lets in.
CROWD: Final = 24


@pytest.fixture(params=WORKERS)
def workers(request: pytest.FixtureRequest) -> str:
    """How many processes serve."""
    return WORKERS[request.param]


@pytest.fixture
def server(workers: str, tmp_path: Path) -> Iterator[ServerProcess]:
    """A server with admin pages, also those for debugging."""
    flags = ("--workers", workers, *ADMIN, "--debug")
    with ServerProcess.start(*flags, data=tmp_path / "ids") as running:
        yield running


def alloc(server: ServerProcess, *requests: str) -> None:
    """Take IDs, each on a connection of its own: workers share them."""
    for request in requests:
        with socket.create_connection(server.endpoint, PATIENCE_SECONDS) as client:
            client.sendall(f"ALLOC {request}\n".encode())
            assert client.recv(100).startswith(b"OK")


def until(condition: Callable[[], bool]) -> None:
    """Wait for what other processes bring about."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_what_each_page_answers(server: ServerProcess, workers: str) -> None:
    """Alive, ready, and the same numbers for people and for Prometheus, of all processes."""
    assert (ask(server, "/healthz").status, ask(server, "/healthz").text) == (200, "alive\n")
    ready = ask(server, "/readyz")
    assert (ready.status, ready.text) == (200, "ready\nledger: up\n")
    alloc(server, *["orders 7"] * 16, *["users 2"] * 4)
    until(lambda: samples(server).get("ids_total", service="orders") == 7 * 16)
    assert samples(server).get("ids_total", service="users") == 8
    assert samples(server).get("ids_total", service="other") == 0
    assert samples(server).get("workers") == (None if workers == "1" else 2)
    status = ask(server, "/status.json")
    assert status.headers["content-type"] == "application/json"
    orders, users = status.json["services"]
    assert (orders["name"], orders["served_ids"]) == ("orders", 112)
    assert (users["name"], users["served_ids"]) == ("users", 8)
    assert orders["remaining_ids"] > 0
    assert orders["ceiling_left_ids"] == 2**63 - 1 - int(orders["last_served"])
    assert status.json["not_ready"] is None
    assert status.json["refills"]["ledger"]["count"] >= 2
    page = ask(server, "/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_only_to_look_at(server: ServerProcess) -> None:
    """Other methods, paths and queries get the status that says so, and the server lives."""
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH"):
        reply = ask(server, "/metrics", method, b"x=1")
        assert (reply.status, reply.headers["allow"]) == (405, "GET, HEAD")
    head = ask(server, "/", "HEAD")
    assert (head.status, head.text) == (200, "")
    assert int(head.headers["content-length"]) > 1_000
    for path in ("/nothing", "/metrics/", "//", "/debug", "/page.html", "/../setup.cfg"):
        assert ask(server, path).status == 404
    for query in ("seconds=0", "seconds=61", "seconds=nan", "seconds=x", "seconds=" + "1" * 400):
        reply = ask(server, f"/debug/profile?{query}")
        assert (reply.status, reply.text) == (400, "seconds: expected a number from 1 to 60\n")
    for worker in ("-1", "x", "9", "%00"):
        assert ask(server, f"/debug/tasks?worker={worker}").status == 400
    assert ask(server, "/debug/tasks?" + "&".join(["a=1"] * 9)).status == 400
    assert ask(server, "/healthz").status == 200


def test_what_a_process_is_doing(server: ServerProcess, workers: str) -> None:
    """Tasks as a tree, and a profile as a page; one at a time; of a worker, or of the parent."""
    alloc(server, "orders")
    tasks = ask(server, "/debug/tasks")
    assert tasks.status == 200
    assert "prefetch orders" in tasks.text or workers == "2"
    parent = ask(server, "/debug/tasks?worker=0")
    assert "Workers" in parent.text if workers == "2" else "accept" in parent.text
    replies: list[int] = []

    def profile() -> None:
        replies.append(ask(server, "/debug/profile?seconds=1").status)

    threads = [Thread(target=profile) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(replies) == [200, 409]
    reply = ask(server, f"/debug/profile?seconds=1&worker={0 if workers == '1' else 2}")
    assert (reply.status, reply.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "pyinstrument" in reply.text
    assert "idalloc-tcp, process" in reply.text


def test_debugging_is_off_unless_asked_for(tmp_path: Path) -> None:
    """Without the setting its pages do not exist."""
    with ServerProcess.start(*ADMIN, data=tmp_path / "ids") as server:
        assert ask(server, "/debug/tasks").status == 404
        assert ask(server, "/debug/profile").status == 404


def test_a_profile_without_its_package(tmp_path: Path) -> None:
    """The answer says what to install."""
    (tmp_path / "pyinstrument.py").write_text("raise ImportError")
    environ = {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parent.parent}"}
    with ServerProcess.start(*ADMIN, "--debug", data=tmp_path / "ids", environ=environ) as server:
        reply = ask(server, "/debug/profile?seconds=1")
    assert reply.status == 501
    assert "pip install 'idalloc-tcp[profile]'" in reply.text


def test_without_admin_pages_nothing_of_them_is_loaded(tmp_path: Path) -> None:
    """A server that was not asked for them costs nothing for them."""
    program = "import sys, idalloc_tcp.composition; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=30
    ).stdout.split()
    assert not {"hypercorn", "prometheus_client", "h11", "idalloc_tcp.admin.pages"} & set(loaded)


@pytest.mark.parametrize("count", WORKERS.values())
def test_an_address_that_is_taken(tmp_path: Path, count: str) -> None:
    """One line that says so, status 1, and nothing left behind."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "idalloc_tcp", "serve", "--data", str(tmp_path / "ids")]
        command += ["--listen", f"unix:{tmp_path}/s", "--workers", count]
        command += ["--admin", f"127.0.0.1:{port}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    complaint = f"idalloc-tcp: cannot listen on 127.0.0.1:{port}: Address already in use\n"
    assert (done.returncode, done.stderr) == (1, complaint)
    assert list(tmp_path.iterdir()) == []


def test_on_a_unix_socket(tmp_path: Path) -> None:
    """Where no port should be open to others; its name goes when the server does."""
    path = tmp_path / "admin.sock"
    with ServerProcess.start("--admin", f"unix:{path}", data=tmp_path / "ids") as server:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(PATIENCE_SECONDS)
            client.connect(str(path))
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert client.makefile("rb").read().endswith(b"\r\n\r\nalive\n")
        assert server.terminate() == 0
    assert not path.exists()


def test_counts_only_grow_under_load(server: ServerProcess) -> None:
    """While clients take IDs, every count in every scrape is at least what it was before."""
    enough = Event()

    def load() -> None:
        with socket.create_connection(server.endpoint, PATIENCE_SECONDS) as client:
            replies = client.makefile("rb")
            while not enough.is_set():
                client.sendall(b"ALLOC orders 5\nALLOC users\nALLOC x 0\n")
                for _ in range(3):
                    replies.readline()

    threads = [Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        before = samples(server)
        for _ in range(4):
            time.sleep(0.6)
            now = samples(server)
            for key, value in before.values.items():
                if key[0].endswith(("_total", "_count", "_bucket", "_sum")):
                    assert now.values[key] >= value, key
            assert (now.get("ids_total", service="orders") or 0) > (
                before.get("ids_total", service="orders") or 0
            )
            before = now
    finally:
        enough.set()
        for thread in threads:
            thread.join()


def test_a_dead_worker_takes_no_count_with_it(tmp_path: Path) -> None:
    """What it gave out still counts, its successor is counted, and no worker is silent again."""
    with ServerProcess.start("--workers", "2", *ADMIN, data=tmp_path / "ids") as server:
        alloc(server, *["orders 7"] * 16)
        until(lambda: samples(server).get("ids_total", service="orders") == 7 * 16)
        server.workers[0].kill()
        until(lambda: samples(server).get("worker_restarts_total") == 1)
        until(lambda: samples(server).get("workers_silent") == 0)
        alloc(server, *["orders 1"] * 16)
        until(lambda: samples(server).get("ids_total", service="orders") == 8 * 16)
        for worker in server.workers:
            worker.suspend()
        assert ask(server, "/healthz").status == 200
        until(lambda: ask(server, "/readyz").status == 503)
        assert ask(server, "/readyz").text.startswith("not ready: no worker answers\n")
        for worker in server.workers:
            worker.resume()
        until(lambda: ask(server, "/readyz").status == 200)


async def test_a_reader_that_does_not_read(autojump_clock: trio.abc.Clock) -> None:
    """What is sent has a deadline, whoever shields the sending from being cancelled."""
    began_at = trio.current_time()
    ours, _theirs = trio.testing.lockstep_stream_pair()
    with pytest.raises(trio.BrokenResourceError), trio.CancelScope(shield=True):
        await BoundedStream(ours, lambda: None, lambda: None).send_all(b"x")
    assert trio.current_time() - began_at >= SEND_SECONDS


async def test_a_page_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    """It is a status for who asked, and a line in our own log; the next one is answered."""

    async def fail(_scope: object, _receive: object, _send: object) -> None:
        raise ValueError("a mistake")

    listeners = await open_listeners([parse_address("127.0.0.1:0")])
    port = listeners[0].socket.getsockname()[1]
    async with trio.open_nursery() as nursery:
        await nursery.start(serve, listeners, fail)
        for _ in range(2):
            stream = await trio.open_tcp_stream("127.0.0.1", port)
            async with stream:
                await stream.send_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                with trio.fail_after(PATIENCE_SECONDS):
                    assert (await stream.receive_some()).startswith(b"HTTP/1.1 500 ")
        nursery.cancel_scope.cancel()
    assert {record.name for record in caplog.records} == {"idalloc_tcp.admin.listening"}
    assert "a mistake" in caplog.text


async def test_a_client_that_says_too_much() -> None:
    """It is heard up to the bound, and then as one that has left."""
    ours, theirs = trio.testing.memory_stream_pair()
    ends: list[str] = []
    stream = BoundedStream(ours, lambda: ends.append("end"), lambda: ends.append("close"))
    await theirs.send_all(b"x" * (REQUEST_BYTES_MAX + 1))
    assert len(await stream.receive_some(REQUEST_BYTES_MAX)) == REQUEST_BYTES_MAX
    assert ends == []
    assert await stream.receive_some(1) == b""
    assert ends == ["end"]
    await stream.aclose()
    assert ends == ["end", "close"]


def test_hostile_clients_harm_nobody(server: ServerProcess) -> None:
    """Silence, junk, floods and readers that do not read: IDs come, and so do pages, soon after."""
    port = int(server.admin.rsplit(":", 1)[1])
    talks = [
        b"",
        b"GET /",
        b"\x00\xff" * 500,
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 100_000,
        b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 50_000,
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 4_000,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00",
        b"GET / HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nConnection: upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        b"HTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 500,
    ]
    with ExitStack() as stack:
        for number in range(CROWD):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", port), 5))
            client.setblocking(False)
            client.send(talks[number % len(talks)] or b" ")
        began_at = time.monotonic()
        alloc(server, *["orders 3"] * 20)
        assert time.monotonic() - began_at < 2.0
    began_at = time.monotonic()
    assert ask(server, "/healthz").status == 200
    assert time.monotonic() - began_at < 4.0  # Nobody's place is kept who has left.
    assert not [line for line in server.lines if "Traceback" in line], "".join(server.lines)


def test_a_stop_does_not_wait_for_whoever_looks(server: ServerProcess) -> None:
    """Connections to the admin pages, also one that takes a profile, end with the server."""
    port = int(server.admin.rsplit(":", 1)[1])
    with ExitStack() as stack:
        for path in ("debug/profile?seconds=60", "metrics", ""):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", port), 5))
            if path:
                client.sendall(f"GET /{path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        alloc(server, "orders")
        began_at = time.monotonic()
        assert server.terminate() == 0
        assert time.monotonic() - began_at < 2.0
