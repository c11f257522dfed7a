"""`idalloc-tcp top`: rates between samples, where samples come from, and a real terminal."""

import fcntl
import http.server
import json
import os
import pty
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self, final

import attrs
import pytest
from rich.console import Console

from idalloc_tcp.errors import ConnectionLost, ProtocolViolation
from idalloc_tcp.top.sample import Pace, Sample, Value, Values, cover_seconds, parsed
from idalloc_tcp.top.screen import duration, quantity, screen
from idalloc_tcp.top.source import AdminSource, ServerSource
from tests.processes import ServerProcess
from tests.serving import serving

PATIENCE_SECONDS: Final = 15.0
#: What a terminal is told when a program takes all of it, and when it gives it back.
ENTER_SCREEN: Final = b"\x1b[?1049h"
LEAVE_SCREEN: Final = b"\x1b[?1049l"


def sample(at: float, rows: Values, **services: Values) -> Sample:
    """A sample at a second."""
    return Sample(at, rows, services)


def shown(pace: Pace, trouble: str = "", height: int | None = None) -> str:
    """What a person sees of it."""
    console = Console(width=100, file=open(os.devnull, "w"), record=True)  # noqa: SIM115
    console.print(screen(pace, "somewhere", trouble, height))
    console.file.close()
    return console.export_text()


def test_rates_are_differences() -> None:
    """Between two samples, over the time that passed; not known without both."""
    before = sample(10.0, {"ids_total": 100}, orders={"served_ids": 50})
    now = sample(12.0, {"ids_total": 500, "waits_total": 3}, orders={"served_ids": 50}, users={})
    pace = Pace(before, now)
    assert pace.of_server("ids_total") == 200.0
    assert pace.of_server("waits_total") is None
    assert pace.of_service("orders") == 0.0
    assert pace.of_service("users") is None
    assert Pace(None, now).of_server("ids_total") is None


def test_a_count_that_began_anew_has_no_rate() -> None:
    """A restarted server does not go backwards."""
    pace = Pace(sample(1.0, {"ids_total": 100}), sample(2.0, {"ids_total": 5}))
    assert pace.of_server("ids_total") is None


@pytest.mark.parametrize(
    ("service", "seconds"),
    [
        ({"remaining_ids": 100, "rate_ids_per_second": 20.0}, 5.0),
        ({"remaining_ids": 100, "rate_ids_per_second": 0}, None),
        ({"remaining_ids": 100, "rate_ids_per_second": 20.0, "cover_seconds": 2.5}, 2.5),
        ({}, None),
    ],
)
def test_cover(service: Values, seconds: float | None) -> None:
    """As the server tells it, or else what is in memory over the demand."""
    assert cover_seconds(service) == seconds


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((None, ""), ("none", ""), (0, "0"), (3.0, "3"), (1.25, "1.2"), (123.4, "123")),
        *((9_999, "9999"), (10_000, "10.0k"), (999_999, "1000k"), (10_700_000, "10.7M")),
        (2.5e12, "2500G"),
    ],
)
def test_numbers_are_short(value: Value, text: str) -> None:
    """Whatever their size."""
    assert quantity(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (7200, "2 h"), (8.64e5, "10 d")],
)
def test_durations_are_short(seconds: float, text: str) -> None:
    """Whatever their length."""
    assert duration(seconds) == text


def test_values_of_stats_are_numbers_where_they_can_be() -> None:
    """And text where not."""
    assert list(map(parsed, ("5", "1.5", "none"))) == [5, 1.5, "none"]


def test_the_screen_shows_what_is_wrong() -> None:
    """A store that is down, a service in trouble, a server that stops or does not answer."""
    rows: Values = {"version": "1", "draining": 1, "ledger_up": 0, "counter_up": 1}
    text = shown(Pace(None, sample(1.0, rows, orders={"trouble": "unavailable"})), "gone")
    for word in ("ledger DOWN", "counter up", "stopping", "unavailable", "gone"):
        assert word in text


def test_the_busiest_services_come_first_and_fit() -> None:
    """What does not fit is counted."""
    before = sample(0.0, {}, **{f"s{i}": {"served_ids": 0} for i in range(30)})
    now = sample(1.0, {}, **{f"s{i}": {"served_ids": i} for i in range(30)})
    lines = shown(Pace(before, now), height=24).splitlines()
    services = [line.split()[0] for line in lines if line.startswith("s")]
    assert services[:4] == ["service", "s29", "s28", "s27"]
    assert len(lines) < 24
    assert "… and 14 more" in lines[-1]


async def test_a_server_is_asked_again_on_one_connection() -> None:
    """Its rows, and those of the services that were named; asking starts nothing."""
    async with serving() as running:
        source = ServerSource(running.addresses[0], ["orders"])
        for _ in range(2):
            found = await source.sample()
            assert found.rows["connections_total"] == 1
            assert found.services == {"orders": {"service": "orders", "active": 0}}
        await source.aclose()


async def test_a_server_that_is_back_is_asked_anew() -> None:
    """A failure is told once; the next sample connects again."""
    async with serving() as running:
        address = running.addresses[0]
        source = ServerSource(address, [])
        await source.sample()
    with pytest.raises(ConnectionLost):
        await source.sample()
    async with serving(str(address)):
        assert (await source.sample()).rows["connections_total"] == 1
        await source.aclose()


STATUS: Final = {
    "rows": {"version": "1", "ids_total": 7},
    "services": [{"name": "orders", "served_ids": 7}, {"name": "users", "served_ids": 0}],
}


@contextmanager
def admin_pages(answer: Any, status: int = 200) -> Iterator[str]:
    """An HTTP server that says this at /status.json: its URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/status.json" else 404)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


async def test_the_admin_pages_tell_of_all_services() -> None:
    """Or of those that are named, whether they know them or not."""
    with admin_pages(STATUS) as url:
        found = await AdminSource.parse(url, []).sample()
        assert found.rows == STATUS["rows"]
        assert {name: of["served_ids"] for name, of in found.services.items()} == {
            "orders": 7,
            "users": 0,
        }
        some = await AdminSource.parse(f"{url}/", ["orders", "others"]).sample()
        assert list(some.services) == ["orders", "others"]


@pytest.mark.parametrize("answer", [[], {}, {"rows": {}, "services": [1]}, "text"])
async def test_other_pages_are_told_apart(answer: Any) -> None:
    """What is not the status of an idalloc-tcp is said to be something else."""
    with admin_pages(answer) as url, pytest.raises(ProtocolViolation, match="of an idalloc-tcp"):
        await AdminSource.parse(url, []).sample()
    with admin_pages(STATUS, 500) as url, pytest.raises(ProtocolViolation):
        await AdminSource.parse(url, []).sample()


async def test_admin_pages_that_do_not_answer() -> None:
    """It is said in plain words, and a wrong URL is refused at once."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        source = AdminSource.parse(f"http://127.0.0.1:{unused.getsockname()[1]}", [])
        with pytest.raises(ConnectionLost, match="refused"):
            await source.sample()
    for url in ("127.0.0.1:80", "ftp://x", "http://", "http://x:y"):
        with pytest.raises(ValueError, match=r"."):
            AdminSource.parse(url, [])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    """A server on a new data file."""
    with ServerProcess.start(data=tmp_path / "ids") as running:
        yield running


def command(*arguments: str) -> list[str]:
    """The command line."""
    return [sys.executable, "-m", "idalloc_tcp", "top", "--interval", "0.1", *arguments]


def test_without_a_terminal_it_prints_one_table(server: ServerProcess) -> None:
    """And ends, without a single control character."""
    done = subprocess.run(
        command("--server", server.address, "Orders"),
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=True,
    )
    assert "ledger up" in done.stdout
    assert "\norders " in done.stdout
    assert done.stdout.replace("\n", "").isprintable()


def test_a_servers_own_admin_pages_tell_of_all_services(tmp_path: Path) -> None:
    """Without naming any."""
    with ServerProcess.start("--admin", "127.0.0.1:0", data=tmp_path / "ids") as server:
        with socket.create_connection(server.endpoint) as client:
            client.sendall(b"ALLOC orders 42\n")
            assert client.recv(100) == b"OK 1 42\n"
        done = subprocess.run(
            command("--admin", f"http://{server.admin}"),
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=True,
        )
    assert "ledger up" in done.stdout
    assert "\norders " in done.stdout
    assert " 42 " in done.stdout


def test_what_is_wrong_at_once_ends_it(server: ServerProcess) -> None:
    """Nobody there, a name that is none, a wrong interval, a wrong URL."""
    unused = "127.0.0.1:1"
    for arguments, status in (
        (["--server", unused], 1),
        (["--server", server.address, "no name"], 1),
        (["--interval", "0"], 2),
        (["--interval", "soon"], 2),
        (["--admin", "127.0.0.1"], 2),
    ):
        done = subprocess.run(
            command(*arguments), capture_output=True, timeout=PATIENCE_SECONDS, check=False
        )
        assert done.returncode == status, arguments
        assert b"Traceback" not in done.stderr


@final
@attrs.define(eq=False)
class Terminal:
    """A terminal with `top` in it."""

    process: subprocess.Popen[bytes]
    _master: int
    _slave: int
    modes: list[Any]
    _heard: bytes = b""

    @classmethod
    @contextmanager
    def running(cls, *arguments: str) -> Iterator[Self]:
        """Start it in a new terminal of 24 lines."""
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        modes = termios.tcgetattr(slave)
        process = subprocess.Popen(
            command(*arguments),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "TERM": "xterm"},
            start_new_session=True,
        )
        try:
            yield cls(process, master, slave, modes)
        finally:
            process.kill()
            process.wait()
            os.close(master)
            os.close(slave)

    def press(self, key: bytes) -> None:
        """Type something."""
        os.write(self._master, key)

    def wait_for(self, words: bytes) -> None:
        """Until these have been shown since the last time."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while words not in self._heard:
            assert time.monotonic() < deadline, self._heard
            if select.select([self._master], [], [], 0.1)[0]:
                self._heard += os.read(self._master, 65_536)
        self._heard = self._heard.partition(words)[2]

    def assert_left(self) -> None:
        """It ended well, and the terminal is as it was."""
        self.wait_for(LEAVE_SCREEN)
        assert self.process.wait(PATIENCE_SECONDS) == 0
        assert termios.tcgetattr(self._slave) == self.modes


def test_in_a_terminal_it_goes_on_until_q(server: ServerProcess) -> None:
    """It shows anew what changes, and other keys do nothing."""
    with Terminal.running("--server", server.address, "orders") as terminal:
        terminal.wait_for(ENTER_SCREEN)
        terminal.wait_for(b"idle")
        terminal.press(b"x\n")
        with socket.create_connection(server.endpoint) as client:
            client.sendall(b"ALLOC orders 42\n")
            terminal.wait_for(b" 42 ")
        assert terminal.process.poll() is None
        terminal.press(b"q")
        terminal.assert_left()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_leave_the_terminal_as_it_was(
    server: ServerProcess, number: signal.Signals
) -> None:
    """Ctrl-C is a way to leave, not a failure."""
    with Terminal.running("--server", server.address) as terminal:
        terminal.wait_for(ENTER_SCREEN)
        terminal.wait_for(b"ledger up")
        terminal.process.send_signal(number)
        terminal.assert_left()


def test_a_server_that_goes_away_is_waited_for(server: ServerProcess) -> None:
    """The view says so and stays."""
    with Terminal.running("--server", server.address) as terminal:
        terminal.wait_for(b"ledger up")
        server.kill()
        terminal.wait_for(b"asking again")
        terminal.press(b"q")
        terminal.assert_left()
