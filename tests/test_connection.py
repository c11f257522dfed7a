"""One connection over memory streams, in virtual time."""

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from idalloc_tcp.connection import QUIET_SECONDS
from idalloc_tcp.errors import Busy
from idalloc_tcp.metrics import Metrics
from idalloc_tcp.protocol import LINE_BYTES_MAX
from idalloc_tcp.session import RECEIVE_BYTES, REPLY_BYTES_GOAL
from tests.conversation import (
    LIMITS,
    PATIENCE_SECONDS,
    Ids,
    StreamPair,
    Watched,
    connect,
    conversation,
)
from tests.serving import Peer


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
