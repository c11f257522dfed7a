"""One conversation: what is answered, in which order, and what is never executed."""

import re
from collections import Counter
from typing import Final

import pytest

from idalloc_tcp.errors import BY_CODE, Busy, IdallocError, Internal, Unavailable
from idalloc_tcp.metrics import Metrics
from idalloc_tcp.protocol import HELP_LINES, LINE_BYTES_MAX, Alloc, RequestParser, Stats
from idalloc_tcp.session import REPLY_BYTES_GOAL, Session
from tests.lane import MAX_COUNT, Lane, chunks, converse, report

HELP: Final = [*(line.encode() for line in HELP_LINES), b"END"]


# The whole conversation


def test_a_conversation() -> None:
    """A client that sends this gets exactly that."""
    assert converse(
        b"ALLOC orders 3\n"
        b"ALLOC orders\n"
        b"alloc Orders 2 @t1\n"
        b"PING\n"
        b"NOPE\n"
        b"ALLOC orders 0\n"
        b"ALLOC orders 7\n"
    ) == (
        b"OK 1 3\n"
        b"OK 4 1\n"
        b"OK 5 2 @t1\n"
        b"OK PONG\n"
        b"ERR unknown no verb NOPE; try HELP\n"
        b"ERR badcount a count is a plain decimal from 1 to 1000000\n"
        b"OK 7 7\n"
    )


@pytest.mark.parametrize(
    ("request_", "reply"),
    [
        (b"ALLOC orders", [b"OK 1 1"]),
        (b"ALLOC orders 1000000", [b"OK 1 1000000"]),
        (b"ALLOC orders 2 @T.x", [b"OK 1 2 @T.x"]),
        (b"ALLOC orders @t", [b"OK 1 1 @t"]),
        (b"ALLOC slow 2 @t", [b"OK 1 2 @t"]),
        (b"PING", [b"OK PONG"]),
        (b"HELLO", [b"OK idalloc/1 line=255 count=1000000"]),
        (b"AUTH s3cret", [b"ERR denied no tokens are configured on this server"]),
        (b"STATS", [b"STAT about all", b"STAT ratio 0.5", b"END"]),
        (b"STATS Orders", [b"STAT about orders", b"STAT ratio 0.5", b"END"]),
        (b"STATS slow", [b"STAT about slow", b"STAT ratio 0.5", b"END"]),
        (b"STATS spent", [b"ERR busy ask again later"]),
        (b"HELP", HELP),
        (b"QUIT", [b"OK"]),
        (b"ALLOC spent", [b"ERR exhausted no IDs are left"]),
        (b"", [b"ERR syntax a line begins with a verb; try HELP"]),
        (b"x" * 300, [b"ERR toolong a line holds at most 255 bytes before its LF"]),
    ],
)
def test_a_reply_ends_as_its_request_did(request_: bytes, reply: list[bytes]) -> None:
    """Every line of every kind of reply ends with LF or CR LF, as its request did."""
    for verb_case in (request_, request_.replace(b"ALLOC", b"aLLoc")):
        for end in (b"\n", b"\r\n"):
            assert converse(verb_case + end) == b"".join(line + end for line in reply)


def test_each_request_decides_for_its_own_end() -> None:
    """LF and CR LF may alternate on one connection, also across a wait."""
    assert converse(b"PING\r\nPING\nALLOC slow\r\nALLOC a\nNOPE\r\nPING\n") == (
        b"OK PONG\r\nOK PONG\nOK 1 1\r\nOK 1 1\nERR unknown no verb NOPE; try HELP\r\nOK PONG\n"
    )


def test_everything_is_counted() -> None:
    """Requests, IDs, waits and errors by code each count once, whoever is at fault."""
    lane = Lane()
    lane.converse([b"ALLOC a 3\nALLOC slow 4\nALLOC a 0\nALLOC spent\nNOPE\nPING\n", b"x" * 300])
    assert (lane.metrics.requests_total, lane.metrics.ids_total) == (7, 7)
    assert lane.metrics.waits_total == 1
    assert lane.metrics.errors_total == Counter(
        {"badcount": 1, "exhausted": 1, "unknown": 1, "toolong": 1}
    )


# What is not executed


@pytest.mark.parametrize("tail", [b"ALLOC a 10", b"ALLOC a 10\r", b"QUIT", b"A", b"x" * 255])
def test_an_unfinished_line_is_never_executed(tail: bytes) -> None:
    """`ALLOC a 10` at the end may be the beginning of `ALLOC a 100`."""
    lane = Lane()
    assert lane.send(b"ALLOC a\n" + tail) == b"OK 1 1\n"
    assert lane.session.is_mid_line
    assert lane.send(b"") == b""
    assert lane.session.finished
    assert lane.taken == {"a": 1}


@pytest.mark.parametrize("size", [254, 255, 256, 257, 100_000])
@pytest.mark.parametrize("cr", [b"", b"\r"])
def test_an_over_long_line_gets_one_error(size: int, cr: bytes) -> None:
    """Above 255 bytes with its CR a line gets ERR toolong, once, and the connection lives."""
    line = b"ALLOC a".ljust(size - len(cr), b"1") + cr
    code = b"toolong" if size > LINE_BYTES_MAX else b"badname"
    replies = converse(line + b"\nALLOC b\n")
    assert re.fullmatch(rb"ERR %s [^\n]+\nOK 1 1\n" % code, replies)
    assert (b"\r\n" in replies) == (cr != b"")
    at_end = converse(b"ALLOC b\n" + line)
    assert at_end.count(b"ERR toolong ") == (size > LINE_BYTES_MAX)
    assert at_end.startswith(b"OK 1 1\n")


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1",
        b"POST /ALLOC HTTP/1.0",
        b"PRI * HTTP/2.0",
        b"PROPFIND / HTTP/1.1",
        b"GET /" + b"x" * 10_000 + b" HTTP/1.1",
        b"POST /" + b"x" * 300 + b" HTTP/1.1",
    ],
)
def test_stray_http_is_told_once_and_closed(head: bytes, end: bytes) -> None:
    """After a request line of HTTP nothing is executed, neither headers nor body."""
    body = end.join([head, b"Host: x", b"", b"ALLOC orders 5", b"PING", b""])
    reply = b"ERR syntax this server speaks idalloc/1, not HTTP; closing" + end
    for data in (body, head + end):
        for cuts in ([], range(len(data)), [len(head) + len(end)]):
            lane = Lane()
            assert lane.converse(chunks(data, cuts)) == reply
            assert lane.taken == {}
    assert converse(b"ALLOC a\n" + body) == b"OK 1 1\n" + reply


def test_a_person_who_types_get_is_not_http() -> None:
    """A wrong guess at a verb is only unknown; the connection lives."""
    assert converse(b"GET orders\nALLOC orders\n") == (
        b"ERR unknown no verb GET; try HELP\nOK 1 1\n"
    )


def test_quit_is_the_end() -> None:
    """QUIT is answered; what follows it is not executed, however it arrives."""
    for pieces in ([b"quit\nALLOC a\nPING\n"], [b"QUIT\n", b"ALLOC a\n"]):
        lane = Lane()
        assert lane.converse([b"ALLOC b\n", *pieces]) == b"OK 1 1\nOK\n"
        assert lane.taken == {"b": 1}
    assert lane.session.advance() == b""


# Waiting


def test_a_wait_holds_everything_after_it() -> None:
    """While an ALLOC waits nothing behind it is answered or executed; what is before it is."""
    lane = Lane()
    session = lane.session
    session.receive(b"PING\nALLOC slow 2 @t\r\nALLOC a\nNOPE\nQUIT\n")
    assert session.advance() == b"OK PONG\n"
    assert session.waiting == Alloc("slow", 2, "@t")
    for _ in range(2):
        assert not session.has_work
        assert session.advance() == b""
    assert lane.taken == {}
    session.resolve(41)
    assert session.has_work
    assert session.advance() == b"OK 41 2 @t\r\nOK 1 1\nERR unknown no verb NOPE; try HELP\nOK\n"
    assert session.finished


@pytest.mark.parametrize("error", [Busy("no IDs came"), Unavailable("no store answers")])
def test_a_wait_may_end_in_an_error(error: IdallocError) -> None:
    """A rejected ALLOC gets its error, ended as it was asked; those behind it are served."""
    lane = Lane()
    lane.session.receive(b"ALLOC slow\r\nALLOC a\n")
    assert lane.session.advance() == b""
    lane.session.reject(error)
    reply = f"ERR {error.code} {error}\r\nOK 1 1\n"
    assert lane.session.advance() == reply.encode()
    assert lane.metrics.errors_total == {error.code: 1}
    assert lane.metrics.ids_total == 1


def test_waits_come_one_after_the_other() -> None:
    """Each ALLOC that must wait is asked for by itself, in order."""
    session = Lane().session
    session.receive(b"ALLOC slow 1\nALLOC slow 2\n")
    for count, first in ((1, 10), (2, 20)):
        session.advance()
        assert session.waiting == Alloc("slow", count)
        session.resolve(first)
        assert session.has_work
    assert session.advance() == b"OK 20 2\n"
    assert not session.has_work


@pytest.mark.parametrize(("behind", "reply"), [(b"PING\nALLOC a 10", b"OK PONG\n"), (b"", b"")])
def test_the_end_may_come_during_a_wait(behind: bytes, reply: bytes) -> None:
    """Half-close: all complete lines are answered, also those behind a wait, then it is over."""
    session = Lane().session
    session.receive(b"ALLOC slow\n" + behind)
    assert session.advance() == b""
    session.receive(b"")
    assert session.advance() == b""
    assert not session.finished
    session.resolve(1)
    assert session.advance() == b"OK 1 1\n" + reply
    assert session.finished


def test_only_what_waits_can_be_settled() -> None:
    """Settling a request that does not wait is a fault of the caller, and does nothing."""
    session = Lane().session
    with pytest.raises(AssertionError, match="no request is waiting"):
        session.resolve(1)
    with pytest.raises(AssertionError, match="no request is waiting"):
        session.reject(Busy("no IDs came"))
    assert session.advance() == b""


# Errors, and the end


@pytest.mark.parametrize("cls", BY_CODE.values())
def test_every_error_of_the_store_is_a_reply(cls: type[IdallocError]) -> None:
    """Whatever `take` refuses with becomes an ERR line with its code, and the connection lives."""

    def refuse(_service: str, _count: int) -> int | None:
        raise cls("sorry\nabout\x1bthat")

    session = Session(RequestParser(MAX_COUNT), refuse, report, Metrics())
    session.receive(b"ALLOC a\nPING\n")
    assert session.advance() == f"ERR {cls.code} sorry about that\nOK PONG\n".encode()
    assert not session.finished


def test_giving_up_on_a_client() -> None:
    """An abort has a last line for the client and ends the session, whatever was received."""
    lane = Lane()
    lane.session.receive(b"ALLOC a\n")
    assert lane.session.abort(Internal("the server failed")) == b"ERR internal the server failed\n"
    assert lane.session.finished
    assert not lane.session.has_work
    assert lane.session.advance() == b""
    assert lane.taken == {}
    assert lane.metrics.errors_total == {"internal": 1}


def test_a_crash_costs_no_reply_before_it() -> None:
    """What was served before a fault of the server is still told, once, ahead of the last line."""

    def take(service: str, _count: int) -> int | None:
        if service == "crash":
            raise RuntimeError("a fault")
        return None

    session = Session(RequestParser(MAX_COUNT), take, report, Metrics())
    session.receive(b"ALLOC slow 3\nPING\nALLOC crash\nALLOC a\n")
    assert session.advance() == b""
    session.resolve(1)
    with pytest.raises(RuntimeError):
        session.advance()
    last = b"ERR internal the server failed\n"
    assert session.abort(Internal("the server failed")) == b"OK 1 3\nOK PONG\n" + last
    assert not session.has_work
    assert session.advance() == b""
    assert session.abort(Internal("the server failed")) == last


def test_an_end_without_a_word() -> None:
    """A client that connects and leaves gets nothing."""
    assert converse() == b""


# Draining


def test_a_drain_serves_what_was_received() -> None:
    """On a stop what has arrived is still served; each later ALLOC is refused, PING answers."""
    lane = Lane()
    lane.session.receive(b"ALLOC a\nALLOC slow\nALLOC a 2\n")
    lane.session.drain()
    assert lane.session.advance() == b"OK 1 1\n"
    lane.session.resolve(1)
    assert lane.session.advance() == b"OK 1 1\nOK 2 2\n"
    draining = b"ERR draining the server is stopping; connect again"
    assert lane.send(b"ALLOC a\r\nPING\nALLOC slow\nALLOC a 0\n") == (
        draining + b"\r\nOK PONG\n" + draining + b"\n"
        b"ERR badcount a count is a plain decimal from 1 to 1000000\n"
    )
    assert lane.send(b"") == b""
    assert lane.session.finished
    assert lane.taken == {"a": 3}


def test_a_line_that_a_drain_cuts_in_two_is_refused() -> None:
    """An ALLOC counts as received when its LF is."""
    lane = Lane()
    assert lane.send(b"ALLOC a") == b""
    lane.session.drain()
    assert lane.send(b" 5\n").startswith(b"ERR draining ")
    assert lane.taken == {}


# Bounds


@pytest.mark.parametrize("line", [b"HELP\n", b"STATS\n", b"PING\n", b"ALLOC a\n", b"\n"])
def test_one_step_gives_a_bounded_number_of_bytes(line: bytes) -> None:
    """A flood of requests is answered in steps, none of much more than the goal."""
    flood, one = 65_536 // len(line), len(converse(line)) + len("65536")
    lane = Lane()
    lane.session.receive(line * flood)
    lane.session.receive(b"")
    lines = 0
    while not lane.session.finished:
        replies = lane.session.advance()
        assert 0 < len(replies) < REPLY_BYTES_GOAL + one
        lines += replies.count(b"\n")
    assert lines == flood * converse(line).count(b"\n")


def test_a_step_is_not_small() -> None:
    """While there is work a step fills up to the goal, so that few sends are needed."""
    lane = Lane()
    lane.session.receive(b"PING\n" * REPLY_BYTES_GOAL)
    for _ in range(3):
        assert len(lane.session.advance()) == REPLY_BYTES_GOAL
        assert lane.session.has_work


def test_the_bound_counts_a_settled_reply() -> None:
    """The reply to what waited is part of the step that sends it."""
    lane = Lane()
    lane.session.receive(b"ALLOC slow @a-long-trace\n" + b"PING\n" * REPLY_BYTES_GOAL)
    lane.session.advance()
    lane.session.resolve(1)
    replies = lane.session.advance()
    assert replies.startswith(b"OK 1 1 @a-long-trace\nOK PONG\n")
    assert REPLY_BYTES_GOAL <= len(replies) < REPLY_BYTES_GOAL + len(b"OK PONG\n")


# A random range in place of an error


def fallen_back(error: IdallocError, *pieces: bytes) -> tuple[bytes, Metrics]:
    """What a session with a fallback says where the store refuses, and what it counts."""

    def refuse(_service: str, _count: int) -> int | None:
        raise error

    def fall_back(service: str, count: int) -> int | None:
        return None if service == "short" else 2**62 + count

    metrics = Metrics()
    session = Session(RequestParser(MAX_COUNT), refuse, report, metrics, fall_back)
    for piece in pieces:
        session.receive(piece)
    return session.advance(), metrics


def test_a_random_range_has_a_word_of_its_own() -> None:
    """The reply says RANDOM, not OK, with the first ID, the count and the trace as they were."""
    replies, metrics = fallen_back(
        Unavailable("down"), b"ALLOC a 3\nALLOC a\r\nALLOC a 2 @t.1\nPING\n"
    )
    base = 2**62
    assert replies == (
        b"RANDOM %d 3\nRANDOM %d 1\r\nRANDOM %d 2 @t.1\nOK PONG\n" % (base + 3, base + 1, base + 2)
    )
    assert metrics.random_total == 3
    assert metrics.ids_total == 0
    assert not metrics.errors_total


def test_what_has_no_fallback_gets_its_error() -> None:
    """Where nothing may stand in the error stays what it was."""
    replies, metrics = fallen_back(Unavailable("down"), b"ALLOC short 3\n")
    assert replies == b"ERR unavailable down\n"
    assert (metrics.random_total, metrics.errors_total) == (0, {"unavailable": 1})


@pytest.mark.parametrize("cls", [cls for cls in BY_CODE.values() if cls is not Unavailable])
def test_only_what_is_unavailable_is_replaced(cls: type[IdallocError]) -> None:
    """An exhausted, busy or draining service is no reason for a random range."""
    replies, metrics = fallen_back(cls("sorry"), b"ALLOC a\n")
    assert replies == f"ERR {cls.code} sorry\n".encode()
    assert metrics.random_total == 0


def test_a_wrong_request_gets_no_random_range() -> None:
    """What cannot be read is refused before anybody asks a store."""
    replies, _ = fallen_back(Unavailable("down"), b"ALLOC a 0\nALLOC\n")
    assert [reply[:8] for reply in replies.splitlines()] == [b"ERR badc", b"ERR synt"]


def test_a_request_that_waited_may_get_a_random_range() -> None:
    """One that waited in vain is answered like one that did not; only `unavailable` counts."""
    lane = Lane()
    lane.session._fallback = lambda _service, count: 2**62 + count
    lane.session.receive(b"ALLOC slow 5 @t\r\nALLOC slow\nPING\n")
    lane.session.advance()
    lane.session.reject(Unavailable("down"))
    assert lane.session.advance() == b"RANDOM %d 5 @t\r\n" % (2**62 + 5)
    lane.session.reject(Busy("no IDs came"))
    assert lane.session.advance() == b"ERR busy no IDs came\nOK PONG\n"
    assert lane.metrics.random_total == 1


def test_stats_that_need_others_wait_their_turn() -> None:
    """Nothing overtakes a STATS that waits; it may be refused; it is no wait for IDs."""
    lane = Lane()
    session = lane.session
    session.receive(b"PING\nSTATS slow\r\nALLOC a\n")
    assert session.advance() == b"OK PONG\n"
    assert session.waiting == Stats("slow")
    session.reject(Busy("ask again later"))
    assert session.advance() == b"ERR busy ask again later\r\nOK 1 1\n"
    assert session.is_at_rest
    assert lane.metrics.errors_total == Counter(busy=1)
    assert lane.metrics.waits_total == 0
