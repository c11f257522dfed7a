"""One connection: a nursery, its deadlines, and the session that it moves bytes for.

The connection's nursery lives as long as the connection. Two deadlines guard it, one at a time:

* While it hears, a scope around that alone: how long the client may stay silent, or may take to
  finish a line that it began. A request that was read is past it, and gets its answer.
* While it sends, the nursery's own: how long the client may take to accept its replies.

A connection that has a place in the fast lane hears there while its session is at rest.
"""

from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from math import inf
from typing import Final, final

import attrs
import trio

from idalloc_tcp import log
from idalloc_tcp.errors import BadSyntax, IdallocError, Internal
from idalloc_tcp.lanes import Rider
from idalloc_tcp.metrics import Row
from idalloc_tcp.observation import Observer
from idalloc_tcp.protocol import Alloc, Stats
from idalloc_tcp.session import RECEIVE_BYTES, Session

#: On a stop, a client that has sent nothing for so long counts as idle.
QUIET_SECONDS: Final = 0.05
#: Closing a socket that has unread input resets it, and the reset may overtake the last replies.
#: So after them the input is read and dropped: for so long, and so much, at most.
LINGER_SECONDS: Final = 0.5
LINGER_BYTES: Final = 1_048_576
#: How long the very last line may take to be accepted.
FAREWELL_SECONDS: Final = 0.5

#: Waits for IDs: as `Session`'s take, but never None.
Wait = Callable[[str, int], Awaitable[int]]
#: Gathers measured values from several processes: as `Session`'s report, but never None.
Gather = Callable[[str | None], Awaitable[Iterable[Row]]]


async def no_gathering(_service: str | None) -> Iterable[Row]:
    """This process is the only one."""
    raise Internal("there is nobody to ask")


@final
@attrs.frozen
class ConnectionLimits:
    """How long a client may take, in seconds."""

    #: ... without sending anything.
    idle_seconds: float = 3600.0
    #: ... to finish a line that it began.
    line_seconds: float = 60.0
    #: ... to accept its replies.
    send_seconds: float = 30.0


@final
@attrs.define(eq=False)
class Connection:
    """The slow lane: everything goes through one task and a Trio stream.

    Args:
        wait: gets the IDs that the session must wait for.
        rider: its place in the fast lane, if there is one. The stream is on the same socket.
        gather: gets the measured values that the session must wait for.
    """

    _stream: trio.abc.HalfCloseableStream
    _session: Session
    _wait: Wait
    _limits: ConnectionLimits
    _observer: Observer
    _rider: Rider | None = None
    _gather: Gather = no_gathering
    _scope: trio.CancelScope = attrs.field(init=False, factory=trio.CancelScope)
    #: Around what hears, or heard last.
    _patience: trio.CancelScope = attrs.field(init=False, factory=trio.CancelScope)
    #: When the requests came that are being answered.
    _heard_at: float = attrs.field(init=False, default=0.0)
    _line_began_at: float | None = attrs.field(init=False, default=None)
    _is_draining: bool = attrs.field(init=False, default=False)
    _is_broken: bool = attrs.field(init=False, default=False)
    _last_line: bytes = attrs.field(init=False, default=b"")

    async def run(self) -> None:
        """Serve the client until it leaves, misses a deadline or is drained."""
        async with self._stream:
            async with trio.open_nursery() as nursery:
                self._scope = nursery.cancel_scope
                await self._converse()
            if self._session.finished and not self._is_broken:
                with trio.move_on_after(FAREWELL_SECONDS + LINGER_SECONDS):
                    await self._part()

    def drain(self) -> None:
        """Answer what has arrived, refuse the rest, and close as soon as the client is quiet."""
        self._is_draining = True
        self._session.drain()
        self._patience.deadline = trio.current_time() + QUIET_SECONDS

    async def _converse(self) -> None:
        session = self._session
        try:
            while not session.finished:
                if not await self._hear():
                    self._give_up()
                    return
                await self._reply()
        except trio.BrokenResourceError:
            self._is_broken = True  # The client is gone: nobody is left to tell.
        except Exception:
            log.sparingly(log.ERROR, "a connection failed")
            self._last_line = session.abort(Internal("the server failed; its log says why"))

    async def _hear(self) -> bool:
        """Wait until there may be something to do. False: the client was silent for too long."""
        if self._rider is not None and self._session.is_at_rest:
            return await self._ride(self._rider)
        data = await self._receive()
        if data is None:
            return False
        self._session.receive(data)
        return True

    async def _ride(self, rider: Rider) -> bool:
        # The sweep moves no deadline: that would cost more than a request. So when the time is
        # up, it is looked whether the client has said anything since.
        heard_at = trio.current_time()
        while (deadline := heard_at + self._silence_seconds) > trio.current_time():
            self._patience = trio.CancelScope(deadline=deadline)
            with self._patience:
                await rider.ride()
                self._heard_at = rider.active_at
                return True
            heard_at = rider.active_at
        return False

    async def _receive(self) -> bytes | None:
        self._patience = trio.CancelScope(deadline=self._reading_deadline())
        with self._patience:
            data = await self._stream.receive_some(RECEIVE_BYTES)
            self._heard_at = trio.current_time()
            if b"\n" in data:
                self._line_began_at = None
            return bytes(data)
        return None

    @property
    def _silence_seconds(self) -> float:
        return QUIET_SECONDS if self._is_draining else self._limits.idle_seconds

    def _reading_deadline(self) -> float:
        now = trio.current_time()
        if self._is_draining or not self._session.is_mid_line:
            return now + self._silence_seconds
        # From the line's beginning: a byte now and then buys no more time.
        if self._line_began_at is None:
            self._line_began_at = now
        return self._line_began_at + self._limits.line_seconds

    def _give_up(self) -> None:
        if self._session.is_mid_line and not self._is_draining:
            text = f"the line was not finished within {self._limits.line_seconds:g} s; closing"
            self._last_line = self._session.abort(BadSyntax(text))

    async def _reply(self) -> None:
        """Send all replies that are due; those before a wait do not wait with it."""
        session = self._session
        while True:
            answered = self._observer.answered_total
            replies = session.advance()
            self._observe(self._observer.answered_total - answered)
            if replies:
                await self._send(replies)
            if session.waiting:
                await self._settle(session.waiting)
            elif not session.has_work:
                return

    def _observe(self, requests: int) -> None:
        seconds = trio.current_time() - self._heard_at
        self._observer.took(seconds, requests)
        if self._session.traced:
            self._observer.tell(self._session.take_traced(), "own task", seconds)

    async def _settle(self, request: Alloc | Stats) -> None:
        try:
            match request:
                case Alloc(service, count):
                    self._session.resolve(await self._wait(service, count))
                case Stats(about):
                    self._session.describe(await self._gather(about))
        except IdallocError as error:
            self._session.reject(error)
        self._observe(isinstance(request, Alloc))

    async def _send(self, data: bytes) -> None:
        self._scope.deadline = trio.current_time() + self._limits.send_seconds
        await self._stream.send_all(data)
        self._scope.deadline = inf

    async def _part(self) -> None:
        """Leave so that the last replies arrive."""
        with suppress(trio.BrokenResourceError):  # It left first.
            await self._stream.send_all(self._last_line)
            await self._stream.send_eof()
            await self._linger()

    async def _linger(self) -> None:
        dropped = 0
        while dropped < LINGER_BYTES:
            data = await self._stream.receive_some(RECEIVE_BYTES)
            if not data:
                return
            dropped += len(data)
