"""A connection over memory streams, its peer in the hands of the test, and faults on call."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Final, final

import attrs
import trio
import trio.testing

from idalloc_tcp.connection import Connection, ConnectionLimits
from idalloc_tcp.metrics import Metrics, Row
from idalloc_tcp.observation import Observer
from idalloc_tcp.protocol import RequestParser
from idalloc_tcp.session import Session
from tests.serving import Peer

Stream = trio.abc.HalfCloseableStream
StreamPair = Callable[[], tuple[Stream, Stream]]

LIMITS: Final = ConnectionLimits(idle_seconds=3600.0, line_seconds=60.0, send_seconds=30.0)
#: In virtual time patience costs nothing.
PATIENCE_SECONDS: Final = 1e6
#: More operations than any of these conversations has.
OPERATIONS_MAX: Final = 100


@final
@attrs.define(eq=False)
class Ids:
    """IDs from 1. While `dry`, only for requests that wait until they `come`."""

    dry: bool = False
    taken: int = 0
    fault: Exception | None = None
    come: trio.Event = attrs.field(init=False, factory=trio.Event)

    def take(self, _service: str, count: int) -> int | None:
        """As `Allocator.take`."""
        if self.fault:
            raise self.fault
        if self.dry:
            return None
        self.taken += count
        return self.taken - count + 1

    async def wait(self, service: str, count: int) -> int:
        """As `Allocator.wait`."""
        await self.come.wait()
        self.dry = False
        first = self.take(service, count)
        assert first is not None
        return first


@final
class Watched(Stream):
    """A stream that counts, and has a fault at the operation that it is told to fail at.

    The fault is a connection that the peer broke, or, if there is a scope, its cancellation.

    Attributes:
        operations: how often it was asked to do anything but close.
        heard_bytes: how much was received through it.
        unsent_bytes: how much the operation under way has yet to send.
    """

    def __init__(
        self,
        inner: Stream,
        fail_at: int = OPERATIONS_MAX,
        scope: trio.CancelScope | None = None,
    ) -> None:
        self.operations = 0
        self.heard_bytes = 0
        self.unsent_bytes = 0
        self.is_closed = False
        self._inner = inner
        self._fail_at = fail_at
        self._scope = scope

    @property
    def has_failed(self) -> bool:
        """Has the fatal operation come?"""
        return self.operations > self._fail_at

    def _begin(self) -> None:
        self.operations += 1
        if self.has_failed:
            if self._scope is None:
                raise trio.BrokenResourceError("broken, as it was told to be")
            self._scope.cancel()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """Receive from the inner stream."""
        self._begin()
        data = await self._inner.receive_some(max_bytes)
        self.heard_bytes += len(data)
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send through the inner stream."""
        self._begin()
        self.unsent_bytes = len(data)
        await self._inner.send_all(data)
        self.unsent_bytes = 0

    async def wait_send_all_might_not_block(self) -> None:
        """Nothing here needs it."""
        raise NotImplementedError

    async def send_eof(self) -> None:
        """Half-close the inner stream."""
        self._begin()
        await self._inner.send_eof()

    async def aclose(self) -> None:
        """Close the inner stream."""
        self.is_closed = True
        await self._inner.aclose()


@final
@attrs.frozen
class Conversation:
    """A connection that runs, and its peer."""

    peer: Peer
    connection: Connection
    ids: Ids
    metrics: Metrics
    ended: trio.Event


def report(_service: str | None) -> Iterator[Row]:
    """What STATS answers here."""
    yield "weather", "fine"


def connect(stream: Stream, ids: Ids, metrics: Metrics) -> Connection:
    """A connection on this stream."""
    session = Session(RequestParser(1_000_000), ids.take, report, metrics)
    observer = Observer(metrics, lambda _service: "")
    return Connection(stream, session, ids.wait, LIMITS, observer)


@asynccontextmanager
async def conversation(
    ids: Ids | None = None, make_pair: StreamPair = trio.testing.memory_stream_pair
) -> AsyncIterator[Conversation]:
    """A running connection with a peer; both have ended when this has."""
    ids, metrics, ended = ids or Ids(), Metrics(), trio.Event()
    ours, theirs = make_pair()
    connection = connect(theirs, ids, metrics)

    async def run() -> None:
        await connection.run()
        ended.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        async with Peer(ours, PATIENCE_SECONDS) as peer:
            yield Conversation(peer, connection, ids, metrics, ended)
        with trio.fail_after(PATIENCE_SECONDS):
            await ended.wait()
