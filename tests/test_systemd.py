"""What a service manager hears of us, and hands over."""

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Thread
from typing import Final, final

import attrs
import pytest
import trio
from trio.testing import MockClock

from idalloc_tcp.errors import StartRefused
from idalloc_tcp.listeners import managed_listeners
from idalloc_tcp.systemd import FIRST_DESCRIPTOR, VARIABLES, ServiceManager
from tests.processes import ServerProcess

MESSAGE_BYTES_MAX: Final = 4096
END: Final = b"END"
PID: Final = str(os.getpid())


@final
@attrs.define(eq=False)
class Manager:
    """The other side of NOTIFY_SOCKET. It reads at once: few messages fit into the queue."""

    socket: socket.socket
    address: str
    _heard: list[str] = attrs.field(init=False, factory=list)
    _reader: Thread = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._reader = Thread(target=self._read)
        self._reader.start()

    def hear(self) -> list[str]:
        """All that was said; from now on nobody listens."""
        if self._reader.is_alive():
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.sendto(END, self.socket.getsockname())
            self._reader.join()
            self.socket.close()
        return self._heard

    def _read(self) -> None:
        while (message := self.socket.recv(MESSAGE_BYTES_MAX)) != END:
            self._heard.append(message.decode())


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    """One that listens, on each kind of name."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        if request.param == "path":
            address = str(tmp_path / "notify")
            listening.bind(address)
        else:
            listening.bind("")  # The kernel finds an abstract name.
            address = "@" + listening.getsockname()[1:].decode()
        manager = Manager(listening, address)
        yield manager
        manager.hear()


def test_it_hears_what_happens(manager: Manager) -> None:
    """Ready, each reload with its time, and the stop."""
    ours = ServiceManager.take({"NOTIFY_SOCKET": manager.address})
    ours.ready()
    ours.reloading()
    ours.reloaded()
    ours.stopping()
    ready, reloading, reloaded, stopping = manager.hear()
    assert (ready, reloaded, stopping) == ("READY=1", "READY=1", "STOPPING=1")
    state, time = reloading.splitlines()
    assert state == "RELOADING=1"
    assert time.removeprefix("MONOTONIC_USEC=").isdecimal()


def test_a_reload_says_ready_neither_before_the_start_is_over_nor_after_the_stop(
    manager: Manager,
) -> None:
    """Ready is what the server is, not what it did."""
    ours = ServiceManager.take({"NOTIFY_SOCKET": manager.address})
    ours.reloading()
    ours.reloaded()
    ours.ready()
    ours.reloading()
    ours.stopping()
    ours.reloaded()
    states = [message.partition("=")[0] for message in manager.hear()]
    assert states == ["READY", "RELOADING", "STOPPING"]


async def test_the_watchdog_is_fed_twice_in_its_time(
    manager: Manager, autojump_clock: MockClock
) -> None:
    """As long as the event loop turns it hears of us, at once and then twice as often as due."""
    environ = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": PID}
    with trio.move_on_after(8):
        await ServiceManager.take(environ).keep_alive()
    assert manager.hear() == ["WATCHDOG=1"] * 6


@pytest.mark.parametrize("environ", [{}, {"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}])
async def test_a_watchdog_of_somebody_else_is_not_fed(environ: dict[str, str]) -> None:
    """Without one that is meant for this process there is nothing to do."""
    await ServiceManager.take(environ).keep_alive()


def test_a_manager_that_is_gone_does_no_harm(
    manager: Manager, caplog: pytest.LogCaptureFixture
) -> None:
    """That it cannot be told is worth a line, and nothing else."""
    ours = ServiceManager.take({"NOTIFY_SOCKET": manager.address})
    manager.hear()
    ours.ready()
    assert caplog.messages == ["the service manager cannot be told"]


def test_children_see_nothing_of_it() -> None:
    """All variables of the protocol are taken out of the environment, and nothing else."""
    environ = dict.fromkeys(VARIABLES, "1") | {"PATH": "/bin"}
    ServiceManager.take(environ)
    assert environ == {"PATH": "/bin"}


@pytest.mark.parametrize(
    "environ",
    [
        {"LISTEN_FDS": "two", "LISTEN_PID": PID},
        {"LISTEN_FDS": "0", "LISTEN_PID": PID},
        {"LISTEN_FDS": "-1", "LISTEN_PID": PID},
        {"WATCHDOG_USEC": "1e6"},
    ],
)
def test_what_makes_no_sense_is_refused(environ: dict[str, str]) -> None:
    """A number that is none ends the start with a line that names it."""
    name = next(iter(environ))
    with pytest.raises(StartRefused, match=f"{name}: expected a number above 0"):
        ServiceManager.take(environ)


def test_sockets_are_those_for_this_process() -> None:
    """They are counted from the first descriptor; without names they have none."""
    environ = {"LISTEN_FDS": "3", "LISTEN_PID": PID, "LISTEN_FDNAMES": "tcp:unix"}
    taken = ServiceManager.take(environ).descriptors
    assert list(taken.values()) == ["tcp", "unix", "unnamed"]
    assert list(taken) == [FIRST_DESCRIPTOR, FIRST_DESCRIPTOR + 1, FIRST_DESCRIPTOR + 2]
    for pid in ("1", ""):
        assert not ServiceManager.take({"LISTEN_FDS": "3", "LISTEN_PID": pid}).descriptors


def test_sockets_that_listen_are_taken_over(tmp_path: Path) -> None:
    """Over TCP or Unix: they do not block, children do not get them, and their names stay."""
    path = tmp_path / "socket"
    with ExitStack() as stack:
        tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        unix = stack.enter_context(socket.socket(socket.AF_UNIX))
        unix.bind(str(path))
        unix.listen()
        for opened in (tcp, unix):
            copy = os.dup(opened.fileno())
            os.set_inheritable(copy, True)
            [listener] = managed_listeners({copy: "name"})
            assert listener.is_managed
            assert not listener.socket.getblocking()
            assert not os.get_inheritable(copy)
            listener.remove_name()
            listener.socket.close()
    assert path.exists()


def unfit(kind: str) -> int:
    """The descriptor of what is not a stream socket that listens."""
    match kind:
        case "closed":
            descriptor = os.open(os.devnull, os.O_RDONLY)
            os.close(descriptor)
            return descriptor
        case "file":
            return os.open(os.devnull, os.O_RDONLY)
        case "datagram":
            return socket.socket(type=socket.SOCK_DGRAM).detach()
        case _:
            return socket.socket().detach()


@pytest.mark.parametrize("kind", ["closed", "file", "datagram", "silent"])
def test_what_does_not_listen_is_refused(kind: str) -> None:
    """Before anything is served, in a line that names the socket."""
    descriptor = unfit(kind)
    with pytest.raises(StartRefused, match=rf"cannot listen on descriptor {descriptor} \(odd\): "):
        managed_listeners({descriptor: "odd"})
    if kind == "file":
        os.close(descriptor)


#: Passes a socket on as a service manager does.
_ACTIVATE: Final = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()), LISTEN_FDNAMES="ids")
os.execv(sys.executable, [sys.executable, "-m", "idalloc_tcp", *sys.argv[2:]])
"""


@pytest.mark.parametrize("workers", ["1", "2"])
def test_who_connects_between_two_servers_is_served(workers: str, tmp_path: Path) -> None:
    """The manager's socket outlives a server: a client that comes in between just waits."""
    with socket.create_server(("127.0.0.1", 0)) as ours:
        host, port = ours.getsockname()
        program = [sys.executable, "-c", _ACTIVATE, str(ours.fileno())]
        for _ in range(2):
            with (
                socket.create_connection((host, port), timeout=20) as client,
                ServerProcess.start(
                    *("--workers", workers),
                    data=tmp_path / "ids",
                    program=program,
                    descriptors=[ours.fileno()],
                ) as server,
                client.makefile() as replies,
            ):
                assert server.addresses == [f"{host}:{port}"]
                client.sendall(b"ALLOC orders\n")
                assert replies.readline().startswith("OK ")
                assert server.terminate() == 0


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_server_tells_how_it_is(workers: str, manager: Manager, tmp_path: Path) -> None:
    """One process alone speaks, however many serve: ready once it listens, reloads, the stop."""
    environ = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "100000"}
    flags = ("--workers", workers)
    with ServerProcess.start(*flags, data=tmp_path / "ids", environ=environ) as server:
        server.send(signal.SIGHUP)
        server.says("nothing changed")
        time.sleep(0.3)
        assert server.terminate() == 0
    heard = manager.hear()
    states = [message.partition("=")[0] for message in heard]
    assert states.count("WATCHDOG") >= 4
    others = [state for state in states if state != "WATCHDOG"]
    assert others == ["READY", "RELOADING", "READY", "STOPPING"]
