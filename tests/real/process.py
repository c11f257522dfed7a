"""One server process of our own: its port, its folder, its faults, and its certain end.

Everything here blocks, each time for a bounded while. Where a Trio loop must go on meanwhile
(because a proxy or the code under test runs in it), call it aside:
`await trio.to_thread.run_sync(server.restart)`.
"""

import abc
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import attrs

HOST: Final = "127.0.0.1"
#: A server that does not answer by then will not, however busy the machine.
START_TIMEOUT_SECONDS: Final = 20.0
#: How long a server may take over a clean end.
STOP_TIMEOUT_SECONDS: Final = 10.0
#: How long the kernel may take to carry out SIGKILL or SIGSTOP.
SIGNAL_TIMEOUT_SECONDS: Final = 5.0
POLL_SECONDS: Final = 0.002
#: How much of a server's log an error quotes.
LOG_TAIL_CHARACTERS: Final = 2000

# The kernel sends the parent-death signal when the *thread* that forked ends, and Trio's worker
# threads end whenever they are idle. So one thread, which lives as long as this process does,
# starts every server; with this process, however it ends, go all of them.
_SPAWNER: Final = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spawner")


class MissingServer(Exception):
    """A program that these tests start is not installed. The text names its package."""


class StartFailed(Exception):
    """A server ended or stayed mute instead of answering. The text quotes its log."""


def find_program(name: str, *, debian_package: str) -> str:
    """The path of an installed program.

    Raises:
        MissingServer: it is not installed.
    """
    # Debian keeps daemons in /usr/sbin, which is not on everybody's PATH.
    path = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"]))
    if path is None:
        raise MissingServer(f"{name} is not installed: apt-get install {debian_package}")
    return path


def wait_until(holds: Callable[[], bool], *, timeout_seconds: float, what: str) -> None:
    """Poll until `holds()`.

    Raises:
        TimeoutError: it did not hold in time; the text says `what` was awaited.
    """
    deadline = time.monotonic() + timeout_seconds
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout_seconds} s: {what}")
        time.sleep(POLL_SECONDS)


def reserve_port() -> socket.socket:
    """A bound socket that never listens: its port stays ours while the server is down.

    Without it the kernel may give the port of a server that is down to anybody's outgoing
    connection, even to a client that is just trying to reach that very server. Servers can
    listen on the port all the same, because they and this socket set SO_REUSEADDR; while none
    does, connecting is refused.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind((HOST, 0))
    return reserved


@attrs.define(eq=False)
class LocalServer(abc.ABC):
    """A server on a port and in a folder of its own: both stay the same over restarts.

    Use it as a context manager; at its end the process is dead and the folder gone.
    """

    folder: Path = attrs.field(init=False)
    _reserved: socket.socket = attrs.field(init=False)
    _process: subprocess.Popen[bytes] | None = attrs.field(init=False, default=None)

    @abc.abstractmethod
    def _prepare(self) -> None:
        """Lay out the empty folder, once, before the first start."""

    @abc.abstractmethod
    def _command_line(self) -> list[str]:
        """The command that runs the server in the foreground."""

    @abc.abstractmethod
    def _answers(self) -> bool:
        """Does it serve clients? Asked until it does; never takes longer than a second."""

    def __enter__(self) -> Self:
        self._reserved = reserve_port()
        self.folder = Path(tempfile.mkdtemp(prefix="idalloc-test-"))
        try:
            self._prepare()
            self.start()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()

    def _close(self) -> None:
        try:
            self.kill()
        finally:
            shutil.rmtree(self.folder)
            self._reserved.close()

    @property
    def port(self) -> int:
        """Where it listens on 127.0.0.1."""
        port: int = self._reserved.getsockname()[1]
        return port

    @property
    def pid(self) -> int | None:
        """None while no process runs."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def start(self) -> None:
        """Start it where it is not running, and wait until it answers.

        Raises:
            MissingServer: its program is not installed.
            StartFailed: it ended at once, or did not answer in time.
        """
        if self.pid is not None:
            raise RuntimeError("the server is running")
        self._process = _SPAWNER.submit(self._spawn, self._command_line()).result()
        try:
            wait_until(
                lambda: self.pid is None or self._answers(),
                timeout_seconds=START_TIMEOUT_SECONDS,
                what=f"{type(self).__name__} answers",
            )
        except TimeoutError as error:
            raise StartFailed(f"{error}\n{self.log_tail()}") from error
        if self.pid is None:
            raise StartFailed(f"{type(self).__name__} ended at once\n{self.log_tail()}")

    def _spawn(self, command_line: list[str]) -> subprocess.Popen[bytes]:
        setpriv = find_program("setpriv", debian_package="util-linux")
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [setpriv, "--pdeathsig", "KILL", *command_line],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    @property
    def _log(self) -> Path:
        # Beside the data, not in it: a server's folder may be emptied.
        return self.folder / "server.log"

    def log_tail(self) -> str:
        """The end of what the server has written to its log."""
        return self._log.read_text(errors="replace")[-LOG_TAIL_CHARACTERS:]

    def kill(self) -> None:
        """SIGKILL, also where it is paused. Nothing happens if it is not running."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(SIGNAL_TIMEOUT_SECONDS)

    def pause(self) -> None:
        """SIGSTOP: from now on it accepts connections (the kernel does) and never answers.

        What clients send meanwhile is executed once it is resumed.
        """
        self._signal(signal.SIGSTOP)
        wait_until(self._is_stopped, timeout_seconds=SIGNAL_TIMEOUT_SECONDS, what="paused")

    def resume(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is None or self.pid is None:
            raise RuntimeError("the server is not running")
        self._process.send_signal(number)

    def _is_stopped(self) -> bool:
        options = os.WSTOPPED | os.WNOHANG | os.WNOWAIT
        return self.pid is None or os.waitid(os.P_PID, self.pid, options) is not None

    def stop(self) -> None:
        """Let it end cleanly (SIGTERM), also where it is paused.

        Raises:
            TimeoutError: it did not end in time, and runs on.
        """
        self.resume()
        self._signal(signal.SIGTERM)
        wait_until(
            lambda: self.pid is None, timeout_seconds=STOP_TIMEOUT_SECONDS, what="a clean end"
        )

    def restart(self) -> None:
        """Crash it where it is running and start it again on what its folder holds."""
        self.kill()
        self.start()
