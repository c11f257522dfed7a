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

from idalloc_tcp.session import RECEIVE_BYTES, Session

#: Sockets served in one round; the kernel hands out those beyond it first the next time.
ROUND_SOCKETS_MAX: Final = 1024
#: Rounds go on for so long while there is something to do, before other tasks have their turn.
SWEEP_SECONDS: Final = 0.002

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
                    self._serve(ready, now)
                    now = trio.current_time()

    def rider(self, connected: socket, session: Session) -> "Rider":
        """A place in this lane for a connection. The socket must not block."""
        return Rider(self, connected, session, trio.current_time())

    def _serve(self, ready: Iterable[tuple[int, int]], now: float) -> None:
        # Each step for all of them: its code and data stay in the processor's caches.
        heard = self._receive(ready, now)
        answered = self._answer([data for _, data in heard])
        for (rider, data), known in zip(heard, answered, strict=True):
            replies = known
            try:
                replies = replies or rider.converse(data)
                if replies and (sent := rider.socket.send(replies)) != len(replies):
                    rider.session.put_back(replies[sent:])
            except BlockingIOError:  # To have been ready is no promise.
                rider.session.put_back(replies)
            except OSError as error:
                rider.wake(trio.BrokenResourceError(str(error)))
                continue
            except Exception as error:
                rider.wake(error)  # Raised where all errors of a connection are handled.
                continue
            if not rider.session.is_at_rest:
                rider.wake()

    def _receive(self, ready: Iterable[tuple[int, int]], now: float) -> list[tuple["Rider", bytes]]:
        heard = []
        for descriptor, _events in ready:
            rider = self._riders[descriptor]
            try:
                data = rider.socket.recv(rider.room)
                if len(data) == rider.room:
                    data += rider.receive_more()
            except BlockingIOError:
                continue
            except OSError as error:
                rider.wake(trio.BrokenResourceError(str(error)))
                continue
            rider.active_at = now
            heard.append((rider, data))
        return heard

    def _enter(self, rider: "Rider") -> None:
        descriptor = rider.socket.fileno()
        self._epoll.register(descriptor, select.EPOLLIN)
        self._riders[descriptor] = rider

    def _leave(self, rider: "Rider") -> None:
        descriptor = rider.socket.fileno()
        del self._riders[descriptor]
        # Closed at the end of a run; then it has no members either.
        if not self._epoll.closed:
            self._epoll.unregister(descriptor)


@final
@attrs.define(eq=False)
class Rider:
    """One connection's place in the lane."""

    _sweep: Sweep
    socket: socket
    session: Session
    #: When it last had something to say, on Trio's clock.
    active_at: float
    #: How many bytes to receive from it at once.
    room: int = attrs.field(init=False, default=FEW_BYTES)
    _task: trio.lowlevel.Task | None = attrs.field(init=False, default=None)
    _error: Exception | None = attrs.field(init=False, default=None)

    async def ride(self) -> None:
        """Let the sweep serve the client until the session is no longer at rest.

        Raises:
            trio.BrokenResourceError: the client is gone.
            Exception: what the session raised.
        """
        self._task = trio.lowlevel.current_task()
        self.room = FEW_BYTES
        self._sweep._enter(self)
        await trio.lowlevel.wait_task_rescheduled(self._abort)
        if self._error is not None:
            raise self._error

    def receive_more(self) -> bytes:
        """What came beyond the first `room` bytes, up to `RECEIVE_BYTES` with them."""
        rest, self.room = RECEIVE_BYTES - self.room, RECEIVE_BYTES
        try:
            return self.socket.recv(rest) if rest else b""
        except BlockingIOError:
            return b""

    def converse(self, data: bytes) -> bytes:
        """The long way from a chunk to its replies."""
        self.session.receive(data)
        return self.session.advance()

    def wake(self, error: Exception | None = None) -> None:
        """End the ride."""
        assert self._task is not None, "it does not ride"
        self._error = error
        self._sweep._leave(self)
        trio.lowlevel.reschedule(self._task)

    def _abort(self, _raise_cancel: object) -> trio.lowlevel.Abort:
        self._sweep._leave(self)
        return trio.lowlevel.Abort.SUCCEEDED
