"""A conversation does not depend on how its bytes were split, and no bytes break it."""

import re
from typing import Final

from hypothesis import given, settings
from hypothesis import strategies as st

from idalloc_tcp.metrics import Row
from idalloc_tcp.protocol import LINE_BYTES_MAX
from tests.lane import Lane, chunks, converse

ENDS: Final = st.sampled_from([b"\n", b"\r\n"])
VALID: Final = st.sampled_from(
    [
        *(b"ALLOC a", b"ALLOC a 3", b"alloc A 10 @t", b"ALLOC b 2", b"ALLOC slow 5 @w"),
        *(b"PING", b"HELLO", b"STATS", b"stats A", b"HELP"),
    ]
)
INVALID: Final = st.sampled_from(
    [
        *(b"", b" ", b"NOPE", b"ALLOC", b"ALLOC a 0", b"ALLOC a 007", b"ALLOC a  1", b"PING "),
        *(b"ALLOC a\t1", b"ALLOC a/b", b"GET a", b"AUTH t", b"ALLOC spent", b"STATS spent"),
    ]
)
OVER_LONG: Final = st.builds(
    lambda start, size, cr: start.ljust(size - len(cr), b"1") + cr,
    st.sampled_from([b"", b"ALLOC a ", b"ALLOC a 1 ", b"\0"]),
    st.sampled_from([254, 255, 256, 257, 100_000]),
    st.sampled_from([b"", b"\r"]),
)
JUNK: Final = st.binary(max_size=40).map(lambda junk: b"\x80" + junk.replace(b"\n", b"\r"))
LAST_WORDS: Final = st.sampled_from([b"QUIT", b"GET / HTTP/1.1", b"POST /" + b"x" * 300])

LIVING: Final = st.builds(bytes.__add__, VALID | INVALID | OVER_LONG | JUNK, ENDS)
LINES: Final = st.lists(LIVING, max_size=12).map(b"".join)
STREAMS: Final = st.builds(
    lambda before, last, after: before + last + after,
    LINES,
    st.just(b"") | st.builds(bytes.__add__, LAST_WORDS, ENDS),
    LINES,
)
TAILS: Final = VALID | INVALID | OVER_LONG | JUNK | LAST_WORDS


ALLOCS: Final = (b"ALLOC a", b"ALLOC a 3", b"alloc A 10", b"ALLOC b 2", b"ALLOC slow 5")
KNOWN: Final = st.builds(bytes.__add__, st.sampled_from(ALLOCS), ENDS)
#: What arrives at once: one line over and over, several, what is no line yet, or the rest of one.
PIECES: Final = st.one_of(
    st.builds(bytes.__mul__, KNOWN, st.integers(1, 4)),
    st.lists(KNOWN | LIVING, min_size=1, max_size=4).map(b"".join),
    st.lists(KNOWN, min_size=1, max_size=4).map(lambda lines: b"".join(lines)[:-1]),
    ENDS,
)


def outcome(
    pieces: list[bytes], *, is_short: bool = False
) -> tuple[bytes, dict[str, int], list[Row]]:
    """All that a conversation brings about: replies, IDs that are gone, counters."""
    lane = Lane(is_short)
    return lane.converse(pieces), lane.taken, list(lane.metrics.rows())


def mask_first_ids(replies: bytes) -> bytes:
    """The replies with the first ID of every ALLOC made alike."""
    return re.sub(rb"^OK [0-9]+ ", b"OK # ", replies, flags=re.MULTILINE)


@settings(deadline=None)
@given(STREAMS, st.just(b"") | TAILS, st.lists(st.integers(0, 1500), max_size=30))
def test_replies_do_not_depend_on_how_the_stream_was_split(
    stream: bytes, tail: bytes, cuts: list[int]
) -> None:
    """Whole, byte by byte or cut anywhere, with an unfinished end or not: all is the same."""
    data = stream + tail
    whole = outcome(chunks(data, []))
    assert outcome(chunks(data, cuts)) == whole
    assert outcome(chunks(data, range(3000))) == whole
    if len(tail) <= LINE_BYTES_MAX:
        assert outcome(chunks(stream, [])) == whole


@settings(deadline=None)
@given(st.lists(PIECES, max_size=8), st.just(b"") | TAILS)
def test_the_short_way_is_the_long_way(pieces: list[bytes], tail: bytes) -> None:
    """What was seen before is answered, counted and taken just as at its first time."""
    seen = [line + end for line in ALLOCS for end in (b"\n", b"\r\n")]
    pieces = [piece for piece in (*seen, *pieces, tail) if piece]
    assert outcome(pieces, is_short=True) == outcome(pieces)


def test_a_very_long_line_byte_by_byte() -> None:
    """The one line whose bytes above are not all sent one by one."""
    data = b"ALLOC a\nALLOC " + b"1" * 100_000 + b"\r\nALLOC a\n"
    assert converse(*chunks(data, range(len(data)))) == converse(data)


@settings(deadline=None)
@given(st.lists(st.builds(bytes.__add__, VALID | INVALID | OVER_LONG | JUNK, ENDS), max_size=20))
def test_one_reply_a_line(lines: list[bytes]) -> None:
    """Every line gets its reply, in order, as if it were alone, but for the first ID."""
    alone = b"".join(map(converse, lines))
    assert mask_first_ids(converse(b"".join(lines))) == mask_first_ids(alone)


@settings(deadline=None)
@given(st.binary(max_size=600), st.lists(st.integers(0, 600)))
def test_no_bytes_break_a_session(data: bytes, cuts: list[int]) -> None:
    """Whatever arrives, every line gets a short printable reply, and nothing is raised."""
    replies = converse(*chunks(data, cuts))
    for line in replies.replace(b"\r\n", b"\n").split(b"\n"):
        assert len(line) <= LINE_BYTES_MAX
        assert line.isascii()
        assert line.decode().isprintable()
    assert replies == b"" or replies.endswith(b"\n")


@settings(deadline=None)
@given(
    st.sampled_from([b"ALLOC orders 3", b"ALLOC orders", b"alloc a 1 @t", b"PING", b""]),
    st.integers(0, 20),
    st.sampled_from(
        [bytes([code]) for code in range(256) if not 0x20 <= code < 0x7F and code != 10]
    ),
    ENDS,
)
def test_binary_junk_allocates_nothing(line: bytes, at: int, junk: bytes, end: bytes) -> None:
    """One byte that is not printable ASCII, wherever it stands, makes a line ERR syntax."""
    lane = Lane()
    spoilt = line[:at] + junk + line[at:]
    replies = lane.converse([spoilt + b"x" * spoilt.endswith(b"\r") + end])
    assert replies.startswith(b"ERR syntax a line is printable ASCII")
    assert replies.count(b"\n") == 1
    assert lane.taken == {}


@settings(deadline=None)
@given(st.lists(st.binary(max_size=300) | st.sampled_from([b"\n", b"x" * 70_000]), max_size=20))
def test_what_a_session_tells_of_itself(pieces: list[bytes]) -> None:
    """It is in the middle of a line if bytes came after the last LF; answered, it has no work."""
    lane = Lane()
    data = b""
    for piece in filter(None, pieces):
        data += piece
        lane.send(piece)
        if lane.session.finished:
            break
        assert lane.session.is_mid_line == (not data.endswith(b"\n"))
        assert not lane.session.has_work
        assert lane.session.advance() == b""
