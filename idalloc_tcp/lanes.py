"""The sweep: one task that serves all connections whose requests can be answered at once.

To wake a connection's task for every request costs more than the request. So while a connection
needs nothing but answers, its task sleeps, and its socket is in one epoll set that a single task
sweeps: for each ready socket receive, answer, send, without an await in between. As soon as a
connection needs more (IDs that must be waited for, a reply that its socket does not take at once,
the rest of a line, its end), its socket leaves the set and its own task goes on, until the session
is at rest again.

Fairness: a round serves every socket that was ready when it began, and of each at most
`RECEIVE_BYTES` of requests. So a client waits for one such chunk of each other client at most,
and after `SWEEP_SECONDS` all other tasks of the process have their turn.
"""

import select
from collections.abc import Callable, Iterable, Sequence
from socket import socket
from typing import Final, final

import attrs
import trio

from idalloc_tcp import log
from idalloc_tcp.observation import Observer
from idalloc_tcp.session import RECEIVE_BYTES, Session

#: Sockets served in one round, so that the first reply of it is not kept waiting by many others.
#: The kernel hands out those beyond it first the next time.
ROUND_SOCKETS_MAX: Final = 128
#: Rounds go on for so long while there is something to do, before other tasks have their turn.
SWEEP_SECONDS: Final = 0.004

#: Most chunks are a line or two, and for so few bytes Python has memory at hand: a third of the
#: cost of receiving. A client that sends more at once is received from with `RECEIVE_BYTES`.
FEW_BYTES: Final = 448

#: Has this system what the sweep needs?
HAS_EPOLL: Final = hasattr(select, "epoll")


#: As `express.Express.answer`.
Answer = Callable[[Sequence[bytes]], Sequence[bytes]]


def no_short_way(chunks: Sequence[bytes]) -> Sequence[bytes]:
    """Sessions answer for themselves."""
    return [b""] * len(chunks)


@final
@attrs.define(eq=False)
class Sweep:
    """The fast lane of a process. `run` must be running for it to serve anybody.

    Args:
        answer: the replies to each of several chunks; b"" for one that its session must answer.
    """

    _observer: Observer
    _answer: Answer = no_short_way
    _epoll: "select.epoll" = attrs.field(init=False, factory=select.epoll)
    _riders: dict[int, "Rider"] = attrs.field(init=False, factory=dict)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Sweep until cancelled."""
        with self._epoll as epoll:
            task_status.started()
            while True:
                await trio.lowlevel.wait_readable(epoll.fileno())
                now = trio.current_time()
                turn_ends_at = now + SWEEP_SECONDS
                while now < turn_ends_at and (ready := epoll.poll(0, ROUND_SOCKETS_MAX)):
                    answered = self._observer.answered_total
                    self._serve(ready, now)
                    began_at, now = now, trio.current_time()
                    self._observer.took(now - began_at, self._observer.answered_total - answered)

    def rider(self, connected: socket, session: Session) -> "Rider":
        """A place in this lane for a connection. The socket must not block."""
        return Rider(self, connected, session, trio.current_time())

    def _serve(self, ready: Iterable[tuple[int, int]], now: float) -> None:
        # One step for all of them, then the next: what it needs stays in the processor's caches.
        # Beside the system calls these lines are most of what a request costs.
        riders, heard, chunks = self._riders, [], []
        for descriptor, _events in ready:
            rider = riders[descriptor]
            try:
                data = rider.receive(rider.room)
            except OSError as error:
                rider.fail(error)
                continue
            if len(data) == rider.room:
                data += rider.receive_more()
            rider.active_at = now
            heard.append(rider)
            chunks.append(data)
        for rider, data, replies in zip(heard, chunks, self._answer_known(chunks), strict=True):
            if not replies:
                rider.converse(data)
                continue
            try:
                sent = rider.send(replies)
            except OSError as error:
                rider.fail(error, replies)
                continue
            if sent != len(replies):
                rider.keep(replies[sent:])

    def _answer_known(self, chunks: Sequence[bytes]) -> Sequence[bytes]:
        try:
            return self._answer(chunks)
        except Exception:
            # A fault with one request must not end the lane of all. What had been taken is lost;
            # the sessions answer for themselves, and each bears its own error.
            log.sparingly(log.ERROR, "the short way to a reply failed")
            return no_short_way(chunks)

    def tell(self, session: Session, heard_at: float) -> None:
        """Note what a session answered to requests with a trace."""
        self._observer.tell(session.take_traced(), "sweep", trio.current_time() - heard_at)

    def enter(self, rider: "Rider", descriptor: int) -> None:
        """Serve it from now on."""
        self._epoll.register(descriptor, select.EPOLLIN)
        self._riders[descriptor] = rider

    def leave(self, descriptor: int) -> None:
        """Serve it no more."""
        del self._riders[descriptor]
        # Closed at the end of a run; then it has no members either.
        if not self._epoll.closed:
            self._epoll.unregister(descriptor)


@final
@attrs.define(eq=False)
class Rider:
    """One connection's place in the lane."""

    _sweep: Sweep
    _socket: socket
    _session: Session
    #: When it last had something to say, on Trio's clock.
    active_at: float
    #: How many bytes to receive from it at once.
    room: int = attrs.field(init=False, default=FEW_BYTES)
    receive: Callable[[int], bytes] = attrs.field(init=False)
    send: Callable[[bytes], int] = attrs.field(init=False)
    _task: trio.lowlevel.Task | None = attrs.field(init=False, default=None)
    _error: Exception | None = attrs.field(init=False, default=None)

    def __attrs_post_init__(self) -> None:
        self.receive, self.send = self._socket.recv, self._socket.send

    async def ride(self) -> None:
        """Let the sweep serve the client until the session is no longer at rest.

        Raises:
            trio.BrokenResourceError: the client is gone.
            Exception: what the session raised.
        """
        self._task = trio.lowlevel.current_task()
        self.room = FEW_BYTES
        self._sweep.enter(self, self._socket.fileno())
        await trio.lowlevel.wait_task_rescheduled(self._abort)
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
        finally:
            # Its traceback holds this frame: a ring, and those put away no collector sees.
            del error

    def receive_more(self) -> bytes:
        """What came beyond the first `room` bytes, up to `RECEIVE_BYTES` with them."""
        rest, self.room = RECEIVE_BYTES - self.room, RECEIVE_BYTES
        try:
            return self.receive(rest) if rest else b""
        except OSError:
            return b""  # If that is no passing thing, it will be there the next time.

    def converse(self, data: bytes) -> None:
        """Let the session answer; what it cannot do here is left to the connection's task."""
        try:
            self._session.receive(data)
            replies = self._session.advance()
        except Exception as error:
            self.wake(error)  # Raised where all errors of a connection are handled.
            return
        if self._session.traced:
            self._sweep.tell(self._session, self.active_at)
        try:
            sent = self.send(replies) if replies else 0
        except OSError as error:
            self.fail(error, replies)
            return
        if sent != len(replies):
            self.keep(replies[sent:])
        elif not self._session.is_at_rest:
            self.wake()

    def keep(self, replies: bytes) -> None:
        """Leave to the connection's task what the socket did not take."""
        self._session.put_back(replies)
        self.wake()

    def fail(self, error: OSError, replies: bytes = b"") -> None:
        """Neither received nor sent."""
        if not isinstance(error, BlockingIOError):
            self.wake(trio.BrokenResourceError(str(error)))
        elif replies:
            self.keep(replies)

    def wake(self, error: Exception | None = None) -> None:
        """End the ride."""
        assert self._task is not None, "it does not ride"
        self._error = error
        self._sweep.leave(self._socket.fileno())
        trio.lowlevel.reschedule(self._task)

    def _abort(self, _raise_cancel: object) -> trio.lowlevel.Abort:
        self._sweep.leave(self._socket.fileno())
        return trio.lowlevel.Abort.SUCCEEDED
