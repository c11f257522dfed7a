"""One connection over memory streams, in virtual time."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Final, final

import attrs
import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from idalloc_tcp.connection import (
    FAREWELL_SECONDS,
    LINGER_BYTES,
    LINGER_SECONDS,
    QUIET_SECONDS,
    RECEIVE_BYTES,
    Connection,
    ConnectionLimits,
)
from idalloc_tcp.errors import Busy
from idalloc_tcp.metrics import Metrics, Row
from idalloc_tcp.protocol import LINE_BYTES_MAX, RequestParser
from idalloc_tcp.session import REPLY_BYTES_GOAL, Session
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
    return Connection(stream, session, ids.wait, LIMITS)


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


def oks(*firsts: int) -> bytes:
    """The replies to ALLOCs of one ID each."""
    return b"".join(b"OK %d 1\n" % first for first in firsts)


# --- the conversation ---------------------------------------------------------------------


async def test_requests_are_answered(autojump_clock: MockClock) -> None:
    """Each request gets its reply, however its bytes were split on the way."""
    async with conversation() as talk:
        assert await talk.peer.ask(b"PING\n") == b"OK PONG\n"
        for byte in b"ALLOC orders 3\r\n":
            await talk.peer.say(bytes([byte]))
            await trio.sleep(0.1)
        assert await talk.peer.hear() == b"OK 1 3\r\n"
        assert await talk.peer.ask(b"NONSENSE\n") == b"ERR unknown no verb NONSENSE; try HELP\n"
        assert await talk.peer.ask(b"QUIT\n") == b"OK\n"
        assert await talk.peer.hear_all() == b""


@pytest.mark.parametrize(
    "make_pair", [trio.testing.memory_stream_pair, trio.testing.lockstep_stream_pair]
)
async def test_pipelined_requests_are_answered_in_order(
    make_pair: StreamPair, autojump_clock: MockClock
) -> None:
    """Thousands of requests sent at once get their replies in their order."""
    async with conversation(make_pair=make_pair) as talk, trio.open_nursery() as nursery:
        nursery.start_soon(talk.peer.say, b"ALLOC orders\n" * 5000 + b"QUIT\n")
        assert await talk.peer.hear_all() == oks(*range(1, 5001)) + b"OK\n"


async def test_after_a_half_close_all_complete_lines_are_answered(
    autojump_clock: MockClock,
) -> None:
    """A client may say no more and still hears everything; a line without its LF is not run."""
    async with conversation() as talk:
        await talk.peer.say(b"ALLOC orders\n" * 3 + b"ALLOC orders 10")
        await talk.peer.end()
        assert await talk.peer.hear_all() == oks(1, 2, 3)
        assert talk.ids.taken == 3


async def test_after_a_half_close_a_waiting_request_is_answered(autojump_clock: MockClock) -> None:
    """A request that waits is answered even if the client has said its last word meanwhile."""
    async with conversation(Ids(dry=True)) as talk:
        await talk.peer.say(b"ALLOC orders\nPING\n")
        await talk.peer.end()
        await trio.sleep(1)
        talk.ids.come.set()
        assert await talk.peer.hear_all() == b"OK 1 1\nOK PONG\n"


async def test_replies_do_not_wait_with_a_later_request(autojump_clock: MockClock) -> None:
    """What precedes a waiting ALLOC is sent at once; what follows it comes after it."""
    async with conversation(Ids(dry=True)) as talk:
        await talk.peer.say(b"PING\nALLOC orders\nPING\n")
        assert await talk.peer.hear() == b"OK PONG\n"
        assert trio.current_time() < 0.001
        with trio.move_on_after(1000) as silence:
            await talk.peer.hear()
        assert silence.cancelled_caught
        talk.ids.come.set()
        assert await talk.peer.hear() == b"OK 1 1\n"
        assert await talk.peer.hear() == b"OK PONG\n"


async def test_a_request_whose_ids_do_not_come_is_told_why(autojump_clock: MockClock) -> None:
    """An error of the wait is that request's reply, and the connection lives."""
    async with conversation(Ids(dry=True)) as talk:
        await talk.peer.say(b"ALLOC orders\r\nPING\n")
        await trio.testing.wait_all_tasks_blocked()
        talk.ids.fault = Busy("no IDs came within 2 s; retry")
        talk.ids.come.set()
        assert await talk.peer.hear() == b"ERR busy no IDs came within 2 s; retry\r\n"
        assert await talk.peer.hear() == b"OK PONG\n"


# --- deadlines ----------------------------------------------------------------------------


async def test_an_idle_client_is_left_without_a_word(autojump_clock: MockClock) -> None:
    """After `idle_seconds` of silence the server closes and says nothing."""
    async with conversation() as talk:
        assert await talk.peer.hear_all() == b""
        assert trio.current_time() == pytest.approx(LIMITS.idle_seconds)


async def test_a_request_begins_the_idle_time_anew(autojump_clock: MockClock) -> None:
    """A client that asks now and then is never idle."""
    async with conversation() as talk:
        for _ in range(3):
            await trio.sleep(LIMITS.idle_seconds - 1)
            assert await talk.peer.ask(b"PING\n") == b"OK PONG\n"


@pytest.mark.parametrize("beginning", [b"A", b"x" * (LINE_BYTES_MAX + 10)], ids=["short", "long"])
async def test_a_byte_now_and_then_buys_no_time(
    beginning: bytes, autojump_clock: MockClock
) -> None:
    """A line must be finished within `line_seconds` of its beginning; else one error, a close."""
    async with conversation() as talk, trio.open_nursery() as nursery:
        await trio.sleep(1000)
        began_at = trio.current_time()
        await talk.peer.say(b"PING\n" + beginning)
        assert await talk.peer.hear() == b"OK PONG\n"
        nursery.start_soon(dribble, talk.peer)
        expected = b"ERR syntax the line was not finished within 60 s; closing\n"
        assert await talk.peer.hear_all() == expected
        assert trio.current_time() - began_at == pytest.approx(LIMITS.line_seconds)
        nursery.cancel_scope.cancel()


async def dribble(peer: Peer) -> None:
    """Say a byte every 7 s, whether or not anybody listens."""
    while True:
        await trio.sleep(7)
        try:
            await peer.say(b"A")
        except trio.BrokenResourceError:
            return


async def test_a_finished_line_ends_its_deadline(autojump_clock: MockClock) -> None:
    """The next line has its own time, from its own beginning, even if both came together."""
    async with conversation() as talk:
        await talk.peer.say(b"PI")
        await trio.sleep(LIMITS.line_seconds - 1)
        assert await talk.peer.ask(b"NG\nPI") == b"OK PONG\n"
        await trio.sleep(LIMITS.line_seconds - 1)
        assert await talk.peer.ask(b"NG\n") == b"OK PONG\n"
        await trio.sleep(LIMITS.line_seconds + 1)
        assert await talk.peer.ask(b"PING\n") == b"OK PONG\n"


async def test_the_wait_for_ids_counts_against_nobody(autojump_clock: MockClock) -> None:
    """While the server waits for IDs, no deadline of the client runs."""
    async with conversation(Ids(dry=True)) as talk:
        await talk.peer.say(b"ALLOC orders\nPI")
        await trio.sleep(LIMITS.idle_seconds + LIMITS.line_seconds)
        talk.ids.come.set()
        assert await talk.peer.hear() == b"OK 1 1\n"
        assert await talk.peer.ask(b"NG\n") == b"OK PONG\n"


async def test_a_reader_that_never_reads_is_dropped(autojump_clock: MockClock) -> None:
    """It is closed after `send_seconds`, and until then a bounded number of bytes is held."""
    ours, theirs = trio.testing.lockstep_stream_pair()
    watched = Watched(theirs)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connect(watched, Ids(), Metrics()).run)
        with pytest.raises(trio.BrokenResourceError):
            # HELP is what makes the most bytes out of the fewest.
            await Peer(ours, PATIENCE_SECONDS).say(b"HELP\n" * 1_000_000)
        assert watched.is_closed
    assert trio.current_time() == pytest.approx(LIMITS.send_seconds)
    assert watched.heard_bytes <= RECEIVE_BYTES
    assert REPLY_BYTES_GOAL <= watched.unsent_bytes <= REPLY_BYTES_GOAL + 1000


# --- the drain ----------------------------------------------------------------------------


async def test_a_drain_closes_an_idle_connection_at_once(autojump_clock: MockClock) -> None:
    """A client that is silent when the server stops is left within `QUIET_SECONDS`."""
    async with conversation() as talk:
        await talk.peer.ask(b"PING\n")
        await trio.testing.wait_all_tasks_blocked()
        began_at = trio.current_time()
        talk.connection.drain()
        assert await talk.peer.hear_all() == b""
        assert trio.current_time() - began_at <= QUIET_SECONDS + 0.001


async def test_a_drain_before_the_first_step_holds(autojump_clock: MockClock) -> None:
    """A connection may be drained before it runs: it answers nothing but refusals, and closes."""
    ours, theirs = trio.testing.memory_stream_pair()
    connection = connect(theirs, Ids(), Metrics())
    connection.drain()
    async with Peer(ours, PATIENCE_SECONDS) as peer:
        await peer.say(b"ALLOC orders\nPING\n")
        await connection.run()
        refusal = b"ERR draining the server is stopping; connect again\n"
        assert await peer.hear_all() == refusal + b"OK PONG\n"
        assert trio.current_time() <= QUIET_SECONDS + 0.001


async def test_a_drain_answers_what_has_arrived(autojump_clock: MockClock) -> None:
    """What was received before the stop is served, what comes after it is refused."""
    async with conversation(Ids(dry=True)) as talk:
        await talk.peer.say(b"ALLOC orders\nALLOC orders\n")
        await trio.testing.wait_all_tasks_blocked()
        talk.connection.drain()
        await talk.peer.say(b"ALLOC orders\nPING\n")
        await trio.sleep(1)
        talk.ids.come.set()
        refusal = b"ERR draining the server is stopping; connect again\n"
        assert await talk.peer.hear_all() == oks(1, 2) + refusal + b"OK PONG\n"
        assert talk.ids.taken == 2


async def test_a_drain_does_not_wait_for_the_rest_of_a_line(autojump_clock: MockClock) -> None:
    """A line that is not finished when the server stops is not waited for, nor complained of."""
    async with conversation() as talk:
        await talk.peer.say(b"ALLOC orde")
        await trio.testing.wait_all_tasks_blocked()
        talk.connection.drain()
        assert await talk.peer.hear_all() == b""
        assert talk.metrics.errors_total.total() == 0


# --- faults -------------------------------------------------------------------------------


@pytest.mark.parametrize("is_waiting", [False, True])
async def test_a_crash_is_logged_once_and_answered(
    is_waiting: bool, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """A bug in the server costs one connection: the client is told, the log has the details."""
    fault = ZeroDivisionError("a bug")
    async with conversation(Ids(dry=is_waiting)) as talk:
        assert await talk.peer.ask(b"PING\n") == b"OK PONG\n"
        if not is_waiting:
            talk.ids.fault = fault
        await talk.peer.say(b"ALLOC orders\nPING\n")
        await trio.testing.wait_all_tasks_blocked()
        talk.ids.fault = fault
        talk.ids.come.set()
        expected = b"ERR internal the server failed; its log says why\n"
        assert await talk.peer.hear_all() == expected
    [record] = caplog.records
    assert record.levelname == "ERROR"
    assert record.exc_info


#: Conversations that end in every way in which they can: what the client says, how it ends.
SCRIPTS: Final[dict[str, tuple[bytes, str]]] = {
    "quit": (b"PING\nALLOC orders\nQUIT\nmore", "listen"),
    "http": (b"POST / HTTP/1.1\r\nHost: x\r\n\r\nbody", "listen"),
    "half-close": (b"PING\nALLOC orders\n", "half-close"),
    "leave": (b"PING\nALLOC orders\n", "leave"),
    "unfinished": (b"PING\nALLOC ord", "listen"),
    "idle": (b"PING\n", "listen"),
    "crash": (b"PING\nALLOC orders\n", "listen"),
}


async def play(script: str, fail_at: int, scope: trio.CancelScope | None = None) -> Watched:
    """A connection from its beginning to its end, with a fault; its stream as it was left."""
    data, ending = SCRIPTS[script]
    ids = Ids(dry=True)
    ours, theirs = trio.testing.memory_stream_pair()
    watched = Watched(theirs, fail_at, scope)

    async def run() -> None:
        with scope or trio.CancelScope():
            await connect(watched, ids, Metrics()).run()

    async with trio.open_nursery() as nursery, Peer(ours, PATIENCE_SECONDS) as peer:
        nursery.start_soon(run)
        await peer.say(data)
        await trio.testing.wait_all_tasks_blocked()
        if ending == "half-close":
            await peer.end()
        elif ending == "leave":
            await peer.stream.aclose()
        ids.fault = ZeroDivisionError("a bug") if script == "crash" else None
        ids.come.set()
        await trio.sleep(2 * LIMITS.idle_seconds)
        assert watched.is_closed
    return watched


@pytest.mark.parametrize("script", SCRIPTS)
async def test_the_client_may_break_off_anywhere(
    script: str, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Whichever operation of the stream is the first to fail, `run` ends quietly and closes."""
    for fail_at in range(OPERATIONS_MAX):
        caplog.clear()
        watched = await play(script, fail_at)
        if not watched.has_failed:
            assert fail_at > 2
            return
        assert watched.operations == fail_at + 1, "it went on after the break"
        assert caplog.messages in ([], ["a connection failed"])
    pytest.fail("the conversation does not end")


async def test_a_break_in_a_line_is_no_error_of_the_client(autojump_clock: MockClock) -> None:
    """Nobody can be told of a line that was not finished: no error reply is counted."""
    ours, theirs = trio.testing.memory_stream_pair()
    metrics = Metrics()
    await Peer(ours).say(b"ALLOC ord")
    await connect(Watched(theirs, fail_at=1), Ids(), metrics).run()
    assert metrics.errors_total.total() == 0


@pytest.mark.parametrize("script", SCRIPTS)
async def test_a_cancellation_is_never_swallowed(script: str, autojump_clock: MockClock) -> None:
    """Wherever it is cancelled from outside, it does nothing more but close, and passes it on."""
    for fail_at in range(OPERATIONS_MAX):
        scope = trio.CancelScope()
        watched = await play(script, fail_at, scope)
        if not watched.has_failed:
            assert fail_at > 2
            return
        assert watched.operations == fail_at + 1, "it went on after the cancellation"
        assert scope.cancelled_caught
    pytest.fail("the conversation does not end")


PIECES: Final = st.lists(
    st.binary(max_size=300)
    | st.sampled_from([b"PING\n", b"ALLOC a\n", b"ALLOC b 5 @x\r\n", b"STATS\n", b"\n", b"AL"]),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(pieces=PIECES, fail_at=st.integers(0, 20), is_ending=st.booleans())
def test_whatever_a_client_sends_it_cannot_make_run_raise(
    pieces: list[bytes], fail_at: int, is_ending: bool
) -> None:
    """Any bytes in any pieces, a break at any operation: whole lines come back, then the end."""

    async def check() -> None:
        ours, theirs = trio.testing.memory_stream_pair()
        async with trio.open_nursery() as nursery, Peer(ours, PATIENCE_SECONDS) as peer:
            nursery.start_soon(connect(Watched(theirs, fail_at), Ids(), Metrics()).run)
            for piece in pieces:
                with suppress(trio.BrokenResourceError):
                    await peer.say(piece)
                await trio.testing.wait_all_tasks_blocked()
            if is_ending:
                await peer.end()
            replies = await peer.hear_all()
            assert replies[-1:] in (b"", b"\n")
            for reply in replies.splitlines():
                assert reply.split()[0] in (b"OK", b"ERR", b"STAT", b"END")

    trio.run(check, clock=MockClock(autojump_threshold=0))


# --- parting ------------------------------------------------------------------------------


async def test_what_comes_after_the_end_is_read_and_dropped(autojump_clock: MockClock) -> None:
    """Input behind a QUIT is not run, and read so that the close cannot reset the reply away."""
    ours, theirs = trio.testing.memory_stream_pair()
    watched, ids = Watched(theirs), Ids()
    async with trio.open_nursery() as nursery, Peer(ours, PATIENCE_SECONDS) as peer:
        nursery.start_soon(connect(watched, ids, Metrics()).run)
        await peer.say(b"QUIT\n" + b"ALLOC orders\n" * 20_000)
        await peer.end()
        assert await peer.hear_all() == b"OK\n"
        await trio.testing.wait_all_tasks_blocked()
    assert watched.heard_bytes == 5 + 13 * 20_000
    assert ids.taken == 0


async def test_lingering_is_bounded_in_time(autojump_clock: MockClock) -> None:
    """A client that neither speaks nor leaves after QUIT is not waited for."""
    async with conversation() as talk:
        await talk.peer.say(b"QUIT\n")
        await talk.ended.wait()
        assert trio.current_time() <= FAREWELL_SECONDS + LINGER_SECONDS + 0.001


async def test_lingering_is_bounded_in_bytes(autojump_clock: MockClock) -> None:
    """A client that goes on sending after QUIT is not listened to for long."""
    ours, theirs = trio.testing.lockstep_stream_pair()
    watched = Watched(theirs)
    async with trio.open_nursery() as nursery, Peer(ours, PATIENCE_SECONDS) as peer:
        nursery.start_soon(connect(watched, Ids(), Metrics()).run)
        await peer.say(b"QUIT\n")
        assert await peer.hear_all() == b"OK\n"
        with pytest.raises(trio.BrokenResourceError):
            await peer.say(bytes(2 * LINGER_BYTES))
        assert watched.is_closed
        assert watched.heard_bytes <= 5 + LINGER_BYTES + RECEIVE_BYTES
        assert trio.current_time() < 0.001


async def test_parting_from_a_reader_that_never_reads_is_bounded(autojump_clock: MockClock) -> None:
    """Even the last error line is not waited for longer than the farewell may take."""
    async with conversation(make_pair=trio.testing.lockstep_stream_pair) as talk:
        await talk.peer.say(b"never finished")
        await talk.ended.wait()
        longest = LIMITS.line_seconds + FAREWELL_SECONDS + LINGER_SECONDS
        assert trio.current_time() <= longest + 0.001
