"""What a connection does when things go wrong, and how it parts; in virtual time."""

from contextlib import suppress
from typing import Final

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
)
from idalloc_tcp.metrics import Metrics
from idalloc_tcp.session import RECEIVE_BYTES
from tests.conversation import (
    LIMITS,
    OPERATIONS_MAX,
    PATIENCE_SECONDS,
    Ids,
    Watched,
    connect,
    conversation,
)
from tests.serving import Peer


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


async def test_a_crash_keeps_the_replies_before_it(autojump_clock: MockClock) -> None:
    """What was served before the crash, in one read with it, still reaches the client."""
    async with conversation(Ids()) as talk:
        talk.ids.fault = ZeroDivisionError("a bug")
        await talk.peer.say(b"PING\nPING\nALLOC orders\nPING\n")
        heard = await talk.peer.hear_all()
    assert heard == b"OK PONG\nOK PONG\nERR internal the server failed; its log says why\n"


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
