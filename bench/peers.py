"""The servers that are measured, each started on a free port and ended for certain."""

import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Final, final

import attrs
import psutil

from bench.generator import HERE, Generator, Load, Sample, compile_c
from tests.processes import ServerProcess
from tests.real.mariadb_server import MariaDbDatabase, MariaDbServer
from tests.real.process import LocalServer
from tests.real.redis_server import RedisServer

OURS: Final = "idalloc-tcp"
REDIS: Final = "Redis INCRBY"
REDIS_RESP: Final = "Redis, RESP"
MARIADB: Final = "MariaDB UPDATE"
TRIO_ECHO: Final = "Trio stream echo"
C_ECHO: Final = "C epoll echo"
#: What this server is compared with.
REFERENCES: Final = (REDIS, REDIS_RESP, MARIADB, TRIO_ECHO, C_ECHO)

#: How often a server that is watched is asked for its metrics, and how long it may take to answer.
SCRAPE_SECONDS: Final = 1.0
SCRAPE_TIMEOUT_SECONDS: Final = 5.0

#: As many sequences are in use wherever a command does not say otherwise.
SERVICES: Final = tuple(f"svc{number}" for number in range(16))


@final
@attrs.frozen
class Peer:
    """A running server.

    Attributes:
        pid: of its process, which may have children.
        request: what takes an ID of a service.
        expected: what its reply begins with.
    """

    name: str
    port: int
    pid: int
    request: Callable[[str], bytes]
    expected: str

    @property
    def pids(self) -> list[int]:
        """All its processes, as they are now."""
        children = psutil.Process(self.pid).children(recursive=True)
        return [self.pid, *(child.pid for child in children)]

    def load(self, services: Sequence[str] = SERVICES) -> Load:
        """Requests for one ID each; refine it with `attrs.evolve`."""
        requests = [self.request(service) for service in services]
        return Load(port=self.port, requests=requests, expected=self.expected, pids=self.pids)

    def rss_bytes(self) -> int:
        """The resident memory of all its processes."""
        return sum(psutil.Process(pid).memory_info().rss for pid in self.pids)

    def open_files(self) -> int:
        """Files and sockets that its processes have open."""
        return sum(psutil.Process(pid).num_fds() for pid in self.pids)


def alloc_request(service: str) -> bytes:
    """One ID, in our protocol."""
    return b"ALLOC %s 1\n" % service.encode()


def incrby_request(service: str) -> bytes:
    """One ID from Redis, asked for in a line."""
    return b"INCRBY %s 1\r\n" % service.encode()


def resp_request(service: str) -> bytes:
    """One ID from Redis, as its clients ask for it: the parts with their lengths."""
    key = service.encode()
    return b"*3\r\n$6\r\nINCRBY\r\n$%d\r\n%s\r\n$1\r\n1\r\n" % (len(key), key)


def as_peer(server: ServerProcess, name: str = OURS) -> Peer:
    """A server of ours that runs already, with its workers."""
    return Peer(name, server.endpoint[1], server.process.pid, alloc_request, "O")


@contextmanager
def open_ours(*flags: str, name: str = OURS, is_scraped: bool = False) -> Iterator[Peer]:
    """This server, on an SQLite file of its own.

    Args:
        is_scraped: have its admin pages asked for metrics every second.
    """
    with (
        tempfile.TemporaryDirectory(prefix="idalloc-bench-") as folder,
        ServerProcess.start(*flags, data=Path(folder) / "ids.sqlite3") as server,
        _scraping(server) if is_scraped else nullcontext(),
    ):
        yield as_peer(server, name)


@contextmanager
def _scraping(server: ServerProcess) -> Iterator[None]:
    url, is_over = f"http://{server.admin}/metrics", threading.Event()

    def scrape() -> None:
        while not is_over.wait(SCRAPE_SECONDS):
            with urllib.request.urlopen(url, timeout=SCRAPE_TIMEOUT_SECONDS) as answer:
                answer.read()

    scraper = threading.Thread(target=scrape)
    scraper.start()
    try:
        yield
    finally:
        is_over.set()
        scraper.join()


def _pid(server: LocalServer) -> int:
    assert server.pid is not None
    return server.pid


@contextmanager
def open_redis() -> Iterator[Peer]:
    """A Redis that writes nothing to disk."""
    with RedisServer() as server:
        yield Peer(REDIS, server.port, _pid(server), incrby_request, ":")


@contextmanager
def _open_echo(name: str, command: Sequence[str]) -> Iterator[Peer]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        yield Peer(name, port, process.pid, alloc_request, "A")
    finally:
        process.kill()
        process.communicate()


@contextmanager
def open_trio_echo() -> Iterator[Peer]:
    """What Trio's streams cost by themselves."""
    with _open_echo(TRIO_ECHO, [sys.executable, "-m", "bench.trio_echo"]) as peer:
        yield peer


@contextmanager
def open_c_echo() -> Iterator[Peer]:
    """What the kernel costs by itself."""
    with (
        tempfile.TemporaryDirectory(prefix="idalloc-bench-") as folder,
        _open_echo(C_ECHO, [str(compile_c(HERE / "echo.c", Path(folder)))]) as peer,
    ):
        yield peer


@final
@attrs.frozen
class MariaDbPeer:
    """A running MariaDB, which speaks a protocol of its own and knows no pipelining."""

    database: MariaDbDatabase

    def run(self, connections: int, seconds: float) -> Sample:
        """One request at a time on each connection, through asyncmy."""
        generator = Generator("asyncmy", [sys.executable, "-m", "bench.mariadb_generator"])
        return generator.run(
            Load(
                port=self.database.port,
                requests=[service.encode() for service in SERVICES],
                expected="",
                pids=[_pid(self.database.server)],
                connections=connections,
                seconds=seconds,
            )
        )


@contextmanager
def open_mariadb() -> Iterator[MariaDbPeer]:
    """A MariaDB that flushes every commit, with a row for each of the `SERVICES`."""
    with MariaDbServer() as server:
        server.query("SET GLOBAL max_connections = 2000")
        database = server.create_database("bench")
        rows = ", ".join(f"('{service}', 0)" for service in SERVICES)
        database.query(
            "CREATE TABLE sequence (name VARCHAR(64) PRIMARY KEY, value BIGINT UNSIGNED NOT NULL);"
            f"INSERT INTO sequence VALUES {rows}"
        )
        yield MariaDbPeer(database)
