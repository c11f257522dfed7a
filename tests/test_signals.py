"""What signals make a server do while clients are connected."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest

from tests.processes import ServerProcess

PATIENCE_SECONDS: Final = 10.0


@pytest.fixture(params=["1", "2"])
def workers(request: pytest.FixtureRequest) -> str:
    """How many processes serve."""
    count: str = request.param
    return count


@pytest.fixture
def config(tmp_path: Path, workers: str) -> Path:
    """The file with the settings."""
    path = tmp_path / "config.toml"
    path.write_text(f"workers = {workers}\n")
    return path


@pytest.fixture
def server(tmp_path: Path, config: Path) -> Iterator[ServerProcess]:
    """A server with these settings."""
    flags = ("--config", str(config))
    with ServerProcess.start(*flags, data=tmp_path / "ids") as running:
        yield running


class Client:
    """A connection that lives through whatever happens."""

    def __init__(self, server: ServerProcess, stack: ExitStack) -> None:
        connected = socket.create_connection(server.endpoint, PATIENCE_SECONDS)
        self._socket = stack.enter_context(connected)
        self._lines = stack.enter_context(connected.makefile())

    def ask(self, request: str) -> str:
        """The first line of the answer."""
        self._socket.sendall(f"{request}\n".encode())
        return self._lines.readline()


def test_a_hangup_reloads_what_may_change(
    server: ServerProcess, config: Path, workers: str
) -> None:
    """Nobody's connection ends; new connections meet the new limits, in every worker."""
    with ExitStack() as stack:
        clients = [Client(server, stack) for _ in range(8)]
        for client in clients:
            assert client.ask("PING") == "OK PONG\n"
        config.write_text(
            f"workers = {workers}\nmax_connections = 1\nlog_level = 'warning'\nmax_count = 9\n"
        )
        server.send(signal.SIGHUP)
        [line] = server.says("info reloaded ")
        assert "changed=max_connections,log_level needs_restart=max_count" in line
        assert all(client.ask("ALLOC orders").startswith("OK ") for client in clients)
        for _ in range(8):
            refused = Client(server, stack).ask("ALLOC orders")
            assert refused.startswith("ERR busy 1 connections are open")
        assert len(server.says("warning limiting connections max=1")) <= int(workers)


def test_a_hangup_reloads_rates(server: ServerProcess, config: Path, workers: str) -> None:
    """A rate holds for connections that are open, and ends as it began."""
    with ExitStack() as stack:
        clients = [Client(server, stack) for _ in range(8)]
        for rate, word in (("service_rate_limit_qps = 1", "ERR limit "), ("", "OK ")):
            config.write_text(f"workers = {workers}\n{rate}\n")
            server.send(signal.SIGHUP)
            server.says("info reloaded ", times=1 if rate else 2)
            for client in clients:
                replies = [client.ask("ALLOC orders") for _ in range(3)]
                assert replies[-1].startswith(word)
        assert len(server.says("warning limiting requests service=orders")) <= int(workers)


def test_a_bad_file_changes_nothing(server: ServerProcess, config: Path) -> None:
    """One line says what is wrong with it, and the server goes on as it was."""
    with ExitStack() as stack:
        client = Client(server, stack)
        for text in ("max_connections = 0", "max_conections = 1", "max_connections = "):
            config.write_text(text)
            server.send(signal.SIGHUP)
        for _ in range(2):  # Signals that come close together may be one.
            server.send(signal.SIGHUP)
            refusals = server.says("error not reloaded, everything stays as it is reason=")
        assert all("config" in line or "max_con" in line for line in refusals)
        assert client.ask("ALLOC orders") == "OK 1 1\n"
        assert Client(server, stack).ask("PING") == "OK PONG\n"


@pytest.mark.parametrize("is_early", [True, False])
def test_a_worker_that_starts_later_has_the_new_settings(is_early: bool, tmp_path: Path) -> None:
    """Also if they were reloaded while it started, with what it had been told before."""
    config = tmp_path / "config.toml"
    config.write_text("workers = 2\n")
    flags = ("--config", str(config))
    with (
        ServerProcess.start(*flags, data=tmp_path / "ids") as server,
        ExitStack() as stack,
    ):

        def reload() -> None:
            config.write_text("workers = 2\nmax_connections = 2\n")
            server.send(signal.SIGHUP)
            server.says("reloaded changed=max_connections max_connections=2")

        before = server.workers
        if is_early:
            reload()
        for worker in before:
            worker.kill()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while len(set(server.workers) - set(before)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        if not is_early:
            reload()
        replies = [Client(server, stack).ask("PING") for _ in range(16)]
        assert 1 <= replies.count("OK PONG\n") <= 2


def test_a_worker_that_did_not_hear_of_new_settings_is_named(tmp_path: Path) -> None:
    """One that hangs is worth a warning; when it goes on it has them as well."""
    config = tmp_path / "config.toml"
    config.write_text("workers = 2\n")
    flags = ("--config", str(config))
    with (
        ServerProcess.start(*flags, data=tmp_path / "ids") as server,
        ExitStack() as stack,
    ):
        hung = server.workers[0]
        hung.suspend()
        config.write_text("workers = 2\nmax_connections = 2\n")
        server.send(signal.SIGHUP)
        server.says("reloaded changed=max_connections")
        assert len(server.says("warning a worker may still have the settings of before")) == 1
        hung.resume()
        replies = [Client(server, stack).ask("PING") for _ in range(16)]
        assert 1 <= replies.count("OK PONG\n") <= 2


def test_workers_outlive_a_hangup_of_the_whole_group(server: ServerProcess, workers: str) -> None:
    """Somebody who signals every process of the name reloads once and ends nothing."""
    with ExitStack() as stack:
        client = Client(server, stack)
        assert client.ask("ALLOC orders") == "OK 1 1\n"
        for worker in server.workers:
            worker.send_signal(signal.SIGHUP)
        server.send(signal.SIGHUP)
        assert len(server.says("nothing changed")) == 1
        assert client.ask("ALLOC orders") == "OK 2 1\n"
        assert len(server.workers) == (int(workers) if int(workers) > 1 else 0)


def test_a_status_is_a_handful_of_lines(server: ServerProcess) -> None:
    """Of the server as a whole, and of a few services however many there are."""
    with ExitStack() as stack:
        client = Client(server, stack)
        for number in range(40):
            assert client.ask(f"ALLOC service-{number} {number + 1}").startswith("OK 1 ")
        server.send(signal.SIGUSR1)
        lines = server.says("info status of a service ", times=5)
        assert [line.partition("service=")[2].split()[0] for line in lines] == [
            f"service-{number}" for number in range(39, 34, -1)
        ]
        [line] = server.says("info status version=")
        assert f" ids_total={sum(range(41))} " in line
        assert " ledger_up=1 " in line
        assert len(server.says("info status")) == 6


_STOPS_TWICE: Final = """
import os, signal, trio
from idalloc_tcp.signals import stop_on_signals

class Server:
    is_stopping = False
    def __init__(self):
        self.stopped = trio.Event()
    def stop(self):
        self.is_stopping = True
        self.stopped.set()

async def main():
    server = Server()
    async with trio.open_nursery() as nursery:
        await nursery.start(stop_on_signals, server)
        os.kill(os.getpid(), signal.SIGTERM)
        await server.stopped.wait()
        await trio.sleep(0.5)
        nursery.cancel_scope.cancel()
        {within}
    {after}

again = [signal.SIGTERM, signal.SIGINT]
trio.run(main)
{at_the_end}
print("clean")
"""


@pytest.mark.parametrize("place", ["within", "after", "at_the_end"])
def test_a_signal_in_the_last_moment_does_not_spoil_a_clean_stop(place: str) -> None:
    """Whoever signals once more when all is done meets neither death nor a traceback."""
    places = dict.fromkeys(["within", "after", "at_the_end"], "pass")
    places[place] = "[os.kill(os.getpid(), number) for number in again]"
    done = subprocess.run(
        [sys.executable, "-c", _STOPS_TWICE.format(**places)],
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "clean\n", "")
