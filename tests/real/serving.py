"""Servers on real stores, and clients that keep what they were given."""

import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Self, final

import attrs

from tests.hammer import overlaps
from tests.processes import ServerProcess
from tests.real.mariadb_server import MariaDbDatabase
from tests.real.redis_server import RedisServer

SERVICE: Final = "orders"
KEY_PREFIX: Final = "idalloc:alloc_info_"
#: No reply takes so long, unless it never comes.
PATIENCE_SECONDS: Final = 10.0
#: Both stores are asked again within a second, and pools ask them within another.
RECOVERY_SECONDS: Final = 2.5
#: Segments so small that there are many of them, and faults fall between their cuts.
SMALL: Final = ("--segment-size", "100", "--pool-seconds", "0")
_THINK_SECONDS: Final = 0.002

#: A service, the first ID of a range, and how many there are.
Range = tuple[str, int, int]


class Refused(Exception):
    """The server answered something else than OK; `args[0]` is the reply."""


def mysql_url(database: MariaDbDatabase, account: str = "root") -> str:
    """Where a server finds this database."""
    return f"mysql://{account}@127.0.0.1:{database.port}/{database.name}"


def store_flags(database: MariaDbDatabase, redis: RedisServer | int | None) -> list[str]:
    """What a server on these stores is started with. The Redis, or the port of a proxy to it."""
    flags = ["--mysql", mysql_url(database)]
    if redis is not None:
        port = redis if isinstance(redis, int) else redis.port
        flags += ["--redis", f"redis://127.0.0.1:{port}/0"]
    return flags


def start_server(
    database: MariaDbDatabase, redis: RedisServer | int | None, *flags: str
) -> ServerProcess:
    """A server on these stores, which makes its table itself."""
    stores = store_flags(database, redis)
    return ServerProcess.start(*stores, "--create-table", *flags, data=Path("unused"))


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    command = [sys.executable, "-m", "idalloc_tcp", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


@final
@attrs.define(eq=False)
class LineClient:
    """One connection, one request at a time, and every range that came over it."""

    _socket: socket.socket
    _lines: BinaryIO
    taken: list[Range] = attrs.field(factory=list)

    @classmethod
    @contextmanager
    def connect(cls, server: ServerProcess) -> Iterator[Self]:
        """A connection for as long as the `with` lasts."""
        with (
            socket.create_connection(server.endpoint, PATIENCE_SECONDS) as connection,
            connection.makefile("rb") as lines,
        ):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield cls(connection, lines)

    def ask(self, request: str) -> str:
        """The one line that answers a request."""
        self._socket.sendall(f"{request}\n".encode())
        return self._line()

    def alloc(self, count: int = 1, service: str = SERVICE) -> range:
        """Take IDs.

        Raises:
            Refused: none came.
        """
        reply = self.ask(f"ALLOC {service} {count}")
        word, first, *_ = reply.split()
        if word != "OK":
            raise Refused(reply)
        self.taken.append((service, int(first), count))
        return range(int(first), int(first) + count)

    def stats(self, service: str = "") -> dict[str, str]:
        """What the server says of itself, or of one service."""
        line = self.ask(f"STATS {service}".strip())
        found = {}
        while line != "END":
            _, name, value = line.split(" ", 2)
            found[name] = value
            line = self._line()
        return found

    def stat(self, name: str) -> int:
        """One number of `stats`."""
        return int(self.stats()[name])

    def _line(self) -> str:
        line = self._lines.readline()
        if not line.endswith(b"\n"):
            raise ConnectionError("the server closed the connection")
        return line.decode().rstrip("\n")


@final
@attrs.define(eq=False)
class Load:
    """Clients in threads of their own, one for each server, that take IDs until told to stop.

    Args:
        counts: what they ask for, in turn.
    """

    _servers: Sequence[ServerProcess]
    counts: Sequence[int] = (1, 7, 60, 250)
    taken: list[Range] = attrs.field(init=False, factory=list)
    #: Of the requests that were served.
    seconds: list[float] = attrs.field(init=False, factory=list)
    refusals: Counter[str] = attrs.field(init=False, factory=Counter)
    _is_over: threading.Event = attrs.field(init=False, factory=threading.Event)
    _threads: list[threading.Thread] = attrs.field(init=False)

    def __enter__(self) -> Self:
        self._threads = [threading.Thread(target=self._take, args=(one,)) for one in self._servers]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Let every client finish, and put what they got into `taken`."""
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _take(self, server: ServerProcess) -> None:
        with LineClient.connect(server) as client:
            turn = 0
            while not self._is_over.is_set():
                began = time.monotonic()
                try:
                    client.alloc(self.counts[turn % len(self.counts)])
                except Refused as refused:
                    self.refusals[str(refused)] += 1
                else:
                    self.seconds.append(time.monotonic() - began)
                turn += 1
                time.sleep(_THINK_SECONDS)
            self.taken.extend(client.taken)

    def wait_for(self, requests: int) -> None:
        """Let so many more requests be served."""
        goal = len(self.seconds) + requests
        eventually(lambda: len(self.seconds) >= goal, PATIENCE_SECONDS)


def eventually(holds: Callable[[], bool], seconds: float) -> float:
    """Wait until it holds: how long that took.

    Raises:
        TimeoutError: it did not hold in time.
    """
    began = time.monotonic()
    while not holds():
        if time.monotonic() - began > seconds:
            raise TimeoutError(f"it does not hold after {seconds:g} s")
        time.sleep(0.01)
    return time.monotonic() - began


def serves(client: LineClient, service: str = SERVICE) -> bool:
    """Does an ID come?"""
    try:
        client.alloc(service=service)
    except Refused:
        return False
    return True


def duplicates(*takers: Sequence[Range]) -> int:
    """How many IDs somebody got that somebody got already."""
    ranges = [one for taken in takers for one in taken]
    assert ranges, "nobody got anything"
    services = {service for service, _, _ in ranges}
    return sum(
        overlaps((first, count) for service, first, count in ranges if service == one)[0]
        for one in services
    )


@contextmanager
def down(*stores: MariaDbDatabase | RedisServer) -> Iterator[None]:
    """Those that are killed are back at the end."""
    servers = [one.server if isinstance(one, MariaDbDatabase) else one for one in stores]
    with ExitStack() as stack:
        for server in servers:
            server.kill()
            stack.callback(server.start)
        yield


def load_for(servers: list[ServerProcess], requests: int) -> list[Range]:
    """What clients of all these servers get, in so many requests or a few more."""
    with Load(servers) as load:
        load.wait_for(requests)
    assert not load.refusals
    return load.taken


def hash_of(redis: RedisServer, service: str = SERVICE) -> dict[str, str]:
    """A service's hash."""
    flat = redis.command("HGETALL", f"{KEY_PREFIX}{service}")
    assert isinstance(flat, list)
    return dict(zip(map(str, flat[::2]), map(str, flat[1::2]), strict=True))


def last_cut(redis: RedisServer) -> int:
    """The last ID that its counter cut."""
    return int(hash_of(redis)["lastAllocValue"])


def is_well(client: LineClient) -> bool:
    """Are both stores up?"""
    stats = client.stats()
    return (stats["ledger_up"], stats["counter_up"]) == ("1", "1")
