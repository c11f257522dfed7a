"""Minutes of mixed load: does the server keep its memory and its files, and no ID come twice?

Clients take IDs in all counts, pipeline, come and go, send junk, fall silent in the middle of a
line, and stop reading. The server's deadlines are shortened, so that each of them passes often.
"""

import random
import statistics
import time
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Self, TypeAlias, final

import attrs
import trio

from bench import peers
from bench.peers import Peer
from bench.picture import WIDTH_INCHES, clean
from bench.report import Options, Progress, Report
from bench.table import Cell, Table, Target, ratio
from tests.hammer import overlaps

#: How many tasks of each kind there are.
TAKERS: Final = 8
COMERS: Final = 4
JUNKERS: Final = 2
SLOW_READERS: Final = 2
SILENT: Final = 2

#: Some are always in use; of the others, each is used now and then, and given back in between.
BUSY_SERVICES: Final = 16
RARE_SERVICES: Final = 400
RARE_SHARE: Final = 0.01
COUNTS: Final = (1, 1, 1, 2, 3, 7, 10, 50, 100, 999)
IN_FLIGHT_MAX: Final = 64
#: Between two batches of one taker: the load is mixed, not heavy.
TAKER_PAUSE_SECONDS: Final = 0.02
FLAGS: Final = (
    *("--idle-service-seconds", "5"),
    *("--idle-seconds", "5"),
    *("--line-seconds", "2"),
    *("--send-seconds", "2"),
)
#: No reply, and no close that is due, takes so long.
PATIENCE_SECONDS: Final = 20.0
#: All connections are gone by then, and what was idle is given back.
CALM_SECONDS: Final = 8.0
QUICK_SECONDS: Final = 10.0

READ_BYTES: Final = 65_536
_FLOOD: Final = b"ALLOC flood 1\n" * 4_000
_LINE_BYTES_MAX: Final = 255
_JUNK: Final = (
    b"\n",
    b"ALLOC\n",
    b"ALLOC orders 0\n",
    b"ALLOC orders 1e3\n",
    b"ALLOC orders " + b"9" * 30 + b"\n",
    b"ALLOC f\xc3\xbcr 1\n",
    b"\0\1\2\3\n",
    b"FETCH orders\n",
    b"ALLOC  orders\n",
    b"A" * (_LINE_BYTES_MAX + 1) + b"\n",
    b"A" * 100_000 + b"\n",
)

_LIMIT_OF_MEMORY: Final = 1.05
#: Clients come and go, so that their number is never quite the same.
_LIMIT_OF_FILES: Final = 1.2

#: First and count, one after the other.
Ranges: TypeAlias = "Mapping[str, array[int]]"


@final
@attrs.define(eq=False)
class Line:
    """A connection that reads line by line."""

    stream: trio.SocketStream
    #: By service: the last ID that came over it.
    last: dict[str, int] = attrs.field(factory=dict)
    _buffer: bytearray = attrs.field(factory=bytearray)

    @classmethod
    async def connect(cls, port: int) -> Self:
        """To 127.0.0.1."""
        return cls(await trio.open_tcp_stream("127.0.0.1", port))

    async def read(self) -> bytes:
        """The next line without its end.

        Raises:
            EOFError: the server has closed.
        """
        while (end := self._buffer.find(b"\n")) < 0:
            data = await self.stream.receive_some(READ_BYTES)
            if not data:
                raise EOFError
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line


@final
@attrs.define
class Taken:
    """What all clients together got and saw."""

    ranges: Ranges = attrs.field(factory=lambda: defaultdict(lambda: array("q")))
    events: Counter[str] = attrs.field(factory=Counter)
    order_violations: int = 0
    #: Replies that should not have been, for a look.
    surprises: list[str] = attrs.field(factory=list)

    def surprise(self, what: str) -> None:
        """Something that a healthy server does not do."""
        self.events["surprises"] += 1
        if len(self.surprises) < 20:
            self.surprises.append(what)


def _service(rng: random.Random) -> str:
    if rng.random() < RARE_SHARE:
        return f"rare{rng.randrange(RARE_SERVICES)}"
    return f"busy{rng.randrange(BUSY_SERVICES)}"


async def _take(line: Line, requests: int, rng: random.Random, taken: Taken) -> None:
    """Take IDs with so many requests in flight, and keep them."""
    asked = [(_service(rng), rng.choice(COUNTS)) for _ in range(requests)]
    await line.stream.send_all(
        b"".join(b"ALLOC %s %d\n" % (name.encode(), count) for name, count in asked)
    )
    for name, count in asked:
        reply = await line.read()
        word, first, *_ = reply.split()
        if word != b"OK":
            taken.surprise(reply.decode())
            continue
        taken.ranges[name].extend((int(first), count))
        taken.order_violations += int(first) <= line.last.get(name, 0)
        line.last[name] = int(first) + count - 1
        taken.events["requests"] += 1
        taken.events["IDs"] += count


@final
@attrs.frozen
class Soak:
    """The clients of one server, each in a task, until the end."""

    _port: int
    _ends: float
    taken: Taken

    def _goes_on(self) -> bool:
        return time.monotonic() < self._ends

    async def taker(self, rng: random.Random) -> None:
        """Keeps its connection and pipelines."""
        line = await Line.connect(self._port)
        async with line.stream:
            while self._goes_on():
                await _take(line, rng.randint(1, IN_FLIGHT_MAX), rng, self.taken)
                await trio.sleep(TAKER_PAUSE_SECONDS)

    async def comer(self, rng: random.Random) -> None:
        """Connects, takes a little, and leaves: orderly, at once, or with replies under way."""
        while self._goes_on():
            line = await Line.connect(self._port)
            async with line.stream:
                await _take(line, rng.randint(1, 3), rng, self.taken)
                leave = rng.choice(("quit", "half-close", "close", "abandon"))
                if leave == "quit":
                    await line.stream.send_all(b"QUIT\n")
                    await line.read()
                elif leave == "half-close":
                    await line.stream.send_eof()
                    await self._expect_end(line)
                elif leave == "abandon":
                    await line.stream.send_all(b"ALLOC abandoned 5\n" * IN_FLIGHT_MAX)
            self.taken.events[f"left by {leave}"] += 1
            await trio.sleep(rng.uniform(0, 0.01))

    async def junker(self, rng: random.Random) -> None:
        """Sends what is not the protocol; each line gets one error, and the connection lives."""
        while self._goes_on():
            line = await Line.connect(self._port)
            async with line.stream:
                for _ in range(20):
                    await line.stream.send_all(rng.choice(_JUNK))
                    reply = await line.read()
                    if not reply.startswith(b"ERR "):
                        self.taken.surprise(f"to junk: {reply.decode()}")
                    self.taken.events["bad lines"] += 1
                await line.stream.send_all(b"GET / HTTP/1.1\r\n")
                await line.read()
                await self._expect_end(line)
            await trio.sleep(0.05)

    async def slow_reader(self, rng: random.Random) -> None:
        """Asks and does not read, until the server has had enough of it."""
        while self._goes_on():
            line = await Line.connect(self._port)
            async with line.stream:
                with trio.move_on_after(rng.uniform(1.0, 6.0)):
                    try:
                        while True:
                            await line.stream.send_all(_FLOOD)
                    except trio.BrokenResourceError:
                        self.taken.events["slow readers closed"] += 1
            self.taken.events["slow readers"] += 1

    async def silent(self, rng: random.Random) -> None:
        """Begins a line or none, and waits for the server to close."""
        while self._goes_on():
            line = await Line.connect(self._port)
            async with line.stream:
                begun = rng.choice((b"", b"ALLOC ord"))
                if begun:
                    await line.stream.send_all(begun)
                    await line.read()
                await self._expect_end(line)
            self.taken.events["silent ones closed"] += 1

    async def _expect_end(self, line: Line) -> None:
        with trio.move_on_after(PATIENCE_SECONDS):
            try:
                self.taken.surprise(f"after the end: {(await line.read()).decode()}")
            except (EOFError, trio.BrokenResourceError):
                return
        self.taken.surprise("a connection that should have been closed was not")


@final
@attrs.frozen
class Moment:
    """The server at one second of the run."""

    seconds: float
    rss_mib: float
    files: int

    @classmethod
    def of(cls, server: Peer, began: float) -> Self:
        """As it is now."""
        return cls(time.monotonic() - began, server.rss_bytes() / 2**20, server.open_files())


async def soak(server: Peer, seconds: float) -> tuple[Taken, list[Moment]]:
    """Put it under load for so long; the last moment is after all clients have gone."""
    began, taken, rng = time.monotonic(), Taken(), random.Random(1)
    clients = Soak(server.port, began + seconds, taken)
    moments, progress = [Moment.of(server, began)], Progress(round(seconds))
    async with trio.open_nursery() as nursery:
        for client, count in (
            (clients.taker, TAKERS),
            (clients.comer, COMERS),
            (clients.junker, JUNKERS),
            (clients.slow_reader, SLOW_READERS),
            (clients.silent, SILENT),
        ):
            for _ in range(count):
                nursery.start_soon(client, random.Random(rng.random()))
        while time.monotonic() < began + seconds:
            await trio.sleep(1)
            moments.append(Moment.of(server, began))
            now = moments[-1]
            progress.step(f"seconds, {now.rss_mib:.1f} MiB, {now.files} files")
    progress.end()
    await trio.sleep(CALM_SECONDS)
    moments.append(Moment.of(server, began))
    return taken, moments


def quarter_growth(moments: Sequence[Moment], of: Callable[[Moment], float]) -> float | None:
    """The median of the last quarter over that of the second: the first one warms up."""
    quarter = len(moments) // 4
    if not quarter:
        return None
    second = statistics.median(map(of, moments[quarter : 2 * quarter]))
    last = statistics.median(map(of, moments[-quarter:]))
    return ratio(last, second)


def count_duplicates(ranges: Ranges) -> int:
    """How many IDs of a service somebody got that somebody had got already."""
    return sum(overlaps(zip(flat[::2], flat[1::2], strict=True))[0] for flat in ranges.values())


def _tables(taken: Taken, moments: Sequence[Moment]) -> list[Table]:
    events: list[list[Cell]] = [[name, count] for name, count in sorted(taken.events.items())]
    last = len(moments) - 2
    rows: list[list[Cell]] = [
        [f"{moments[at].seconds:.0f} s", moments[at].rss_mib, moments[at].files]
        for at in sorted({0, *(last * part // 4 for part in range(1, 5))})
    ]
    rows.append(["all gone", moments[-1].rss_mib, moments[-1].files])
    return [
        Table("what the clients did and saw", ["what", "how often"], events),
        Table("the server over time", ["after", "MiB", "open files"], rows),
    ]


def _targets(taken: Taken, moments: Sequence[Moment]) -> list[Target]:
    during = moments[:-1]
    left = moments[-1].files - moments[0].files
    return [
        Target("IDs given out twice", 0, count_duplicates(taken.ranges)),
        Target("IDs out of order on a connection", 0, taken.order_violations),
        Target("replies or silences that should not be", 0, taken.events["surprises"]),
        Target(
            "memory of the last quarter / second quarter",
            _LIMIT_OF_MEMORY,
            quarter_growth(during, lambda moment: moment.rss_mib),
        ),
        Target(
            "open files of the last quarter / second quarter",
            _LIMIT_OF_FILES,
            quarter_growth(during, lambda moment: moment.files),
        ),
        Target("files still open after all have gone", 0, max(0, left)),
    ]


def _draw(moments: Sequence[Moment], figure: Any) -> None:
    figure.set_size_inches(WIDTH_INCHES, 5)
    memory, files = figure.subplots(2, 1, sharex=True)
    seconds = [moment.seconds for moment in moments]
    memory.plot(seconds, [moment.rss_mib for moment in moments])
    memory.set_ylabel("MiB")
    memory.set_ylim(bottom=0)
    clean(memory, "Resident memory under mixed load")
    files.plot(seconds, [moment.files for moment in moments], color="C1")
    files.set_ylim(bottom=0)
    files.set_xlabel("seconds")
    clean(files, "Open files")


def run(options: Options) -> Report:
    """Start a server, soak it, lay all ranges side by side."""
    seconds = QUICK_SECONDS if options.quick else options.minutes * 60
    flags = (*FLAGS, *options.server_flags)
    with peers.open_ours(*flags) as server:
        taken, moments = trio.run(soak, server, seconds)
    return Report(
        "soak",
        method={"server_flags": flags, "seconds": seconds},
        draw=lambda figure: _draw(moments, figure),
        tables=_tables(taken, moments),
        targets=_targets(taken, moments),
        samples=[attrs.asdict(moment) for moment in moments],
        notes=[f"should not be: {surprise}" for surprise in taken.surprises],
    )
