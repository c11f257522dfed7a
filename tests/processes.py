"""Real servers in processes of their own, for tests and load commands.

with ServerProcess.start(data=tmp_path / "ids.sqlite3") as server:
    with socket.create_connection(server.endpoint) as client: ...
"""

import os
import re
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self, final

import attrs
import psutil

PROGRAM: Final = (sys.executable, "-m", "idalloc_tcp")
START_SECONDS: Final = 20.0
STOP_SECONDS: Final = 10.0
_SERVING: Final = re.compile(r" info serving listen=(\S+) ")
_ADMIN: Final = re.compile(r" info serving listen=\S+ admin=(\S+) ")


@final
@attrs.define(eq=False)
class ServerProcess:
    """A running `idalloc-tcp serve`; ended for certain when the `with` ends."""

    process: subprocess.Popen[bytes]
    #: Where it listens, in the order of its --listen flags, as it printed them.
    addresses: list[str]
    #: What it logged, line by line.
    lines: list[str]
    _collector: threading.Thread | None = attrs.field(init=False, default=None)

    @classmethod
    def start(
        cls,
        *flags: str,
        data: Path,
        listen: str = "127.0.0.1:0",
        environ: Mapping[str, str] | None = None,
        program: Sequence[str] = PROGRAM,
        descriptors: Sequence[int] = (),
    ) -> Self:
        """Start a server and wait until it says that it serves.

        Args:
            program: what runs the command.
            descriptors: of files that it gets.
        """
        process = subprocess.Popen(
            [*program, "serve", "--data", str(data), "--listen", listen, *flags],
            pass_fds=descriptors,
            stderr=subprocess.PIPE,
            # Unbuffered: a line that waits in a buffer of ours is nothing to select.
            bufsize=0,
            env={**os.environ, **(environ or {})},
        )
        server = cls(process, [], [])
        try:
            server._wait_until_serving()
        except BaseException:
            server.kill()
            server._close()
            raise
        return server

    @property
    def address(self) -> str:
        """Its first address, as a client would write it."""
        return self.addresses[0]

    @property
    def endpoint(self) -> tuple[str, int]:
        """Its first address, as the socket module takes it."""
        host, port = self.address.rsplit(":", 1)
        return host.strip("[]"), int(port)

    @property
    def admin(self) -> str:
        """Where its admin pages are, as HOST:PORT."""
        found = [match[1] for line in self.lines if (match := _ADMIN.search(line))]
        assert found, "it was started without --admin"
        return found[0]

    @property
    def workers(self) -> list[psutil.Process]:
        """Its worker processes; none if it does all by itself."""
        children: list[psutil.Process] = psutil.Process(self.process.pid).children()
        return children

    @property
    def rss_mib(self) -> float:
        """The resident memory of the largest of its processes."""
        processes = [psutil.Process(self.process.pid), *self.workers]
        rss: int = max(process.memory_info().rss for process in processes)
        return rss / 2**20

    def terminate(self) -> int:
        """Stop it cleanly; its exit status."""
        self.send(signal.SIGTERM)
        return self.process.wait(STOP_SECONDS)

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def says(self, text: str, times: int = 1) -> list[str]:
        """The lines of its log with this text, once there are so many."""
        deadline = time.monotonic() + STOP_SECONDS
        while len(found := [line for line in list(self.lines) if text in line]) < times:
            assert time.monotonic() < deadline, f"not {times} times in the log: {text}"
            time.sleep(0.01)
        return found

    def kill(self) -> None:
        """End it at once, as a crash would."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.kill()
        if self._collector is not None:  # It ends with the last process that may write to it.
            self._collector.join(STOP_SECONDS)
            assert not self._collector.is_alive(), "a worker outlives its server"

    def _wait_until_serving(self) -> None:
        stderr = self.process.stderr
        assert stderr is not None
        deadline = time.monotonic() + START_SECONDS
        with selectors.DefaultSelector() as selector:
            selector.register(stderr, selectors.EVENT_READ)
            while selector.select(deadline - time.monotonic()):
                line = stderr.readline().decode()
                if not line:
                    said = "".join(self.lines)
                    raise RuntimeError(f"the server ended with {self.process.wait()}: {said}")
                self.lines.append(line)
                if serving := _SERVING.search(line):
                    self.addresses += serving[1].split(",")
                    self._collector = threading.Thread(target=self._collect, daemon=True)
                    self._collector.start()
                    return
        raise RuntimeError(f"the server did not serve within {START_SECONDS:g} s")

    def _close(self) -> None:
        if self._collector is None and self.process.stderr is not None:
            self.process.stderr.close()

    def _collect(self) -> None:
        """Keep the pipe of the log empty, and what came through it; then close it."""
        assert self.process.stderr is not None
        with self.process.stderr as stderr:
            for line in stderr:
                self.lines.append(line.decode())
