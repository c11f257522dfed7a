"""The grammar of the wire: lines and requests, as they are written and read."""

import string
from random import Random
from typing import Final, get_args

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from idalloc_tcp import protocol
from idalloc_tcp.errors import (
    BadCount,
    BadName,
    BadSyntax,
    LineTooLong,
    RequestError,
    UnknownVerb,
)
from idalloc_tcp.protocol import (
    KNOWN_LINES_MAX,
    LINE_BYTES_MAX,
    TRACE_CHARS_MAX,
    Alloc,
    Auth,
    Hello,
    Help,
    LineReader,
    Ping,
    Quit,
    Request,
    RequestParser,
    Stats,
    encode,
    ending_of,
    err,
    looks_like_http,
)
from tests.lane import MAX_COUNT, chunks

REQUESTS: Final = get_args(Request)

NAME_CHARS: Final = string.ascii_lowercase + string.digits + "_.:-"
NAMES: Final = st.text(NAME_CHARS, min_size=1, max_size=64)
TRACES: Final = st.text(NAME_CHARS + string.ascii_uppercase, min_size=1, max_size=TRACE_CHARS_MAX)
TOKENS: Final = st.text([chr(code) for code in range(0x21, 0x7F)], min_size=1, max_size=200)

#: How to make up a request, for every class of them.
MADE_UP: Final[dict[type[Request], st.SearchStrategy[Request]]] = {
    Alloc: st.builds(
        Alloc, NAMES, st.integers(1, MAX_COUNT), st.one_of(st.just(""), TRACES.map("@{}".format))
    ),
    Ping: st.just(Ping()),
    Hello: st.just(Hello()),
    Auth: st.builds(Auth, TOKENS),
    Stats: st.builds(Stats, st.none() | NAMES),
    Help: st.just(Help()),
    Quit: st.just(Quit()),
}

#: Bytes in which ends of lines, ordinary lines and over-long lines are all frequent.
STREAMS: Final = st.lists(
    st.sampled_from([b"\n", b"\r\n", b"\r", b"\n\n", b"PING", b"x" * 100, b"y" * LINE_BYTES_MAX])
    | st.binary(max_size=5)
).map(b"".join)


def parse(line: bytes) -> Request:
    """The request in a line, read by a parser that knows nothing yet."""
    return RequestParser(MAX_COUNT).parse(line)


def answer(parser: RequestParser, line: bytes) -> Request | tuple[type[RequestError], str]:
    """What a parser makes of a line, errors included, so that two can be compared."""
    try:
        return parser.parse(line)
    except RequestError as error:
        return type(error), str(error)


def known_of(line: bytes) -> bytes | tuple[bytes, bytes]:
    """The line; of an over-long one only what a reader promises to keep."""
    if len(line) <= LINE_BYTES_MAX:
        return line
    return line[: LINE_BYTES_MAX + 1], line[-1:]


# Lines


@settings(deadline=None)
@given(STREAMS, st.lists(st.integers(0, 2000)))
def test_lines_do_not_depend_on_how_the_stream_was_split(data: bytes, cuts: list[int]) -> None:
    """Whole, byte by byte or cut anywhere, a stream gives the same lines and the same rest."""
    *lines, rest = map(known_of, data.split(b"\n"))
    for pieces in (chunks(data, []), chunks(data, cuts), chunks(data, range(len(data)))):
        reader = LineReader()
        found = [line for piece in pieces for line in reader.feed(piece)]
        assert list(map(known_of, found)) == lines
        assert known_of(reader.unfinished) == rest


@settings(deadline=None)
@given(STREAMS, st.lists(st.integers(0, 2000)))
def test_a_reader_keeps_at_most_about_a_line(data: bytes, cuts: list[int]) -> None:
    """However the bytes come, what is kept of an unfinished line is bounded."""
    reader = LineReader()
    for piece in chunks(data, cuts):
        reader.feed(piece)
        assert len(reader.unfinished) <= LINE_BYTES_MAX + 2


def test_a_line_without_an_end_is_not_kept() -> None:
    """Sixteen megabytes without a LF leave no more behind than a line's worth."""
    reader = LineReader()
    for _ in range(256):
        assert reader.feed(b"x" * 65_536) == []
        assert len(reader.unfinished) <= LINE_BYTES_MAX + 2
    [line] = reader.feed(b"\r\nPING")
    assert len(line) <= LINE_BYTES_MAX + 3
    assert ending_of(line) == b"\r\n"
    assert reader.unfinished == b"PING"


@pytest.mark.parametrize(
    ("line", "ending"),
    [(b"PING", b"\n"), (b"PING\r", b"\r\n"), (b"", b"\n"), (b"\r", b"\r\n"), (b"\rx", b"\n")],
)
def test_a_reply_ends_as_its_line_did(line: bytes, ending: bytes) -> None:
    """A CR before the LF, and nothing else, makes the reply end with both."""
    assert ending_of(line) == ending


# Requests


def test_there_is_a_round_trip_for_every_request() -> None:
    """No class of requests is forgotten by the test below."""
    assert MADE_UP.keys() == set(REQUESTS)


@settings(deadline=None)
@given(st.one_of(list(MADE_UP.values())), st.sampled_from([b"", b"\r"]))
def test_parsing_undoes_encoding(request: Request, cr: bytes) -> None:
    """What a client writes is one line, and the server reads the same request, a value, in it."""
    encoded = encode(request)
    line = encoded.removesuffix(b"\n")
    assert encoded == line + b"\n"
    assert b"\n" not in line
    assert {parse(line + cr)} == {request}


@settings(deadline=None)
@given(st.one_of(list(MADE_UP.values())), st.randoms(use_true_random=False))
def test_verbs_are_read_in_any_case(request: Request, rng: Random) -> None:
    """`alloc`, `Alloc` and `ALLOC` are the same verb; so it is with all others."""
    verb, space, rest = encode(request).removesuffix(b"\n").partition(b" ")
    cased = "".join(rng.choice((char.upper(), char.lower())) for char in verb.decode())
    assert parse(cased.encode() + space + rest) == request


@pytest.mark.parametrize(
    ("line", "request_"),
    [
        (b"ALLOC orders", Alloc("orders", 1)),
        (b"ALLOC orders 1", Alloc("orders", 1)),
        (b"ALLOC orders 1000000", Alloc("orders", MAX_COUNT)),
        (b"ALLOC orders @t", Alloc("orders", 1, "@t")),
        (b"ALLOC orders 2 @T-1.x:y_Z", Alloc("orders", 2, "@T-1.x:y_Z")),
        (b"ALLOC orders @" + b"t" * TRACE_CHARS_MAX, Alloc("orders", 1, "@" + "t" * 64)),
        (b"ALLOC OrDeRs.EU 3", Alloc("orders.eu", 3)),
        (b"ALLOC 3", Alloc("3", 1)),
        (b"ALLOC 3 3", Alloc("3", 3)),
        (b"ALLOC alloc", Alloc("alloc", 1)),
        (b"ALLOC " + b"N" * 64, Alloc("n" * 64, 1)),
        (b"PING", Ping()),
        (b"PING\r", Ping()),
        (b"HELLO", Hello()),
        (b"HELP", Help()),
        (b"QUIT", Quit()),
        (b"AUTH s3cret!@#", Auth("s3cret!@#")),
        (b"AUTH Token", Auth("Token")),
        (b"STATS", Stats()),
        (b"STATS Orders", Stats("orders")),
    ],
)
def test_what_a_line_asks_for(line: bytes, request_: Request) -> None:
    """Every form of every request, with names folded, and traces and tokens as they were sent."""
    assert parse(line) == request_
    assert type(parse(line)) is type(request_)


@pytest.mark.parametrize(
    ("error", "lines"),
    [
        (
            BadCount,
            [
                *(b"ALLOC orders 0", b"ALLOC orders 00", b"ALLOC orders 007"),
                *(b"ALLOC orders -1", b"ALLOC orders +5", b"ALLOC orders 1e3"),
                *(b"ALLOC orders 1.0", b"ALLOC orders 1_000", b"ALLOC orders 0x10"),
                *(b"ALLOC orders abc", b"ALLOC orders 1a", b"ALLOC orders ,"),
                b"ALLOC orders %d" % (MAX_COUNT + 1),
                b"ALLOC orders %d" % 10**30,
                b"ALLOC orders " + b"9" * 200,
                b"ALLOC orders 0 @t",
                b"ALLOC orders @s @t",
            ],
        ),
        (
            BadName,
            [
                *(b"ALLOC a/b", b"ALLOC a/b 1", b"ALLOC a/b 1 @t", b"ALLOC *", b"STATS a/b"),
                *(b"ALLOC @t", b"STATS @t", b"ALLOC a/b 0"),
                b"ALLOC " + b"n" * 65,
                b"STATS " + b"n" * 65,
            ],
        ),
        (
            BadSyntax,
            [
                *(b"", b"\r", b" ", b" PING", b"\tPING", b"PING ", b"PING  ", b"PING\t"),
                *(b"ALLOC", b"ALLOC ", b"ALLOC  orders", b"ALLOC orders ", b"ALLOC orders 1 "),
                *(b"ALLOC orders  1", b"ALLOC orders\t1", b"ALLOC\torders", b"ALLOC orders  @t"),
                *(b"ALLOC orders 1 2", b"ALLOC orders 1 2 @t", b"ALLOC orders @t 1"),
                *(
                    b"ALLOC orders @",
                    b"ALLOC orders 1 @",
                    b"ALLOC orders @a/b",
                    b"ALLOC orders @a@",
                ),
                b"ALLOC orders @" + b"t" * (TRACE_CHARS_MAX + 1),
                *(b"AUTH", b"AUTH ", b"AUTH a b", b"STATS a b", b"STATS "),
                *(b"PING x", b"HELLO x", b"HELP x", b"QUIT x"),
                *(b"PING\0", b"\0PING", b"ALLOC orders\0", b"ALLOC orders 1\0"),
                *(b"ALLOC orders \xc2\xb9", "ALLOC naïve".encode(), b"\xff\xfe", b"\x7f"),
                *(b"PI\rNG", b"PING\r\r", b"\rPING", b"\xef\xbb\xbfPING"),
                b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            ],
        ),
        (
            UnknownVerb,
            [
                *(b"NOPE", b"ALLOCATE orders", b"ALLOC,orders", b"PINGPING", b"P", b"OK 1 1"),
                *(b"END", b"GET orders", b"INCR orders", b"?", b"NOPE  x ", b"@t"),
                b"x" * (LINE_BYTES_MAX - 1),
            ],
        ),
        (
            LineTooLong,
            [
                b"x" * (LINE_BYTES_MAX + 1),
                b"ALLOC orders" + b" " * LINE_BYTES_MAX,
                b"\0" * (LINE_BYTES_MAX + 1),
                b"A" * 100_000,
                b"AUTH " + b"x" * (LINE_BYTES_MAX - len(b"AUTH ")) + b"\r",
            ],
        ),
    ],
)
def test_what_is_wrong_with_a_line(error: type[RequestError], lines: list[bytes]) -> None:
    """Every line that cannot be served is refused with the error that says what to fix."""
    for line in lines:
        with pytest.raises(RequestError) as caught:
            parse(line)
        assert type(caught.value) is error, line
        if not line.endswith(b"\r"):
            with pytest.raises(error):
                parse(line + b"\r")


@pytest.mark.parametrize("maximum", [1, 9, 10, 99, 999, 2**63 - 1])
def test_the_largest_count(maximum: int) -> None:
    """A count may be as large as the maximum, and not one larger."""
    parser = RequestParser(maximum)
    assert parser.parse(b"ALLOC orders %d" % maximum) == Alloc("orders", maximum)
    for count in (maximum + 1, maximum * 10):
        with pytest.raises(BadCount, match=rf" 1 to {maximum}$"):
            parser.parse(b"ALLOC orders %d" % count)


@pytest.mark.parametrize("size", [LINE_BYTES_MAX - 1, LINE_BYTES_MAX])
@pytest.mark.parametrize("cr", [b"", b"\r"])
def test_the_longest_line(size: int, cr: bytes) -> None:
    """A line may hold 255 bytes before its LF, the CR among them."""
    token = "x" * (size - len(b"AUTH ") - len(cr))
    assert parse(b"AUTH " + token.encode() + cr) == Auth(token)


def test_a_token_is_not_shown() -> None:
    """A token stays out of whatever prints a request."""
    assert "s3cret" not in repr(parse(b"AUTH s3cret"))


@settings(deadline=None)
@given(st.binary(max_size=300))
@example(b"ALLOC \xff")
def test_any_line_is_a_request_or_refused(line: bytes) -> None:
    """No line does anything but parse or raise a RequestError, whose text is fit for a reply."""
    found = answer(RequestParser(MAX_COUNT), line)
    if isinstance(found, tuple):
        cls, text = found
        assert text.isascii()
        assert text.isprintable()
        assert err(cls(text)) == f"ERR {cls.code} {text}".encode(), "never long enough to be cut"
    else:
        assert type(found) in REQUESTS


# The lines that the parser remembers

REPEATED: Final = (
    *(b"ALLOC a", b"ALLOC a\r", b"ALLOC A", b"alloc a", b"ALLOC a 1", b"ALLOC a 2", b"ALLOC b 2"),
    *(b"ALLOC a @t", b"ALLOC a 0", b"ALLOC a 1 ", b"PING", b"AUTH t", b"NOPE", b"x" * 256, b""),
)


@settings(deadline=None)
@given(st.lists(st.sampled_from(REPEATED), max_size=40), st.integers(1, 4))
def test_what_was_asked_before_changes_no_answer(lines: list[bytes], known_max: int) -> None:
    """A parser that remembers lines answers each as one that has never seen any."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol, "KNOWN_LINES_MAX", known_max)
        parser = RequestParser(MAX_COUNT)
        for line in lines:
            assert answer(parser, line) == answer(RequestParser(MAX_COUNT), line)


def test_a_line_that_was_understood_is_remembered() -> None:
    """What an ALLOC asked, and how its reply reads, is known from its second time on."""
    parser = RequestParser(MAX_COUNT)
    request = parser.parse(b"ALLOC orders 3\r")
    known = parser.known[b"ALLOC orders 3\r\n"]
    assert known.request is request
    assert known.reply % 7 == b"OK 7 3\r\n"


def test_few_lines_are_remembered() -> None:
    """However many different lines come, the table of known ones stays within its bound."""
    parser = RequestParser(MAX_COUNT)
    sizes = []
    for count in range(1, 2 * KNOWN_LINES_MAX):
        assert parser.parse(b"ALLOC orders %d" % count) == Alloc("orders", count)
        sizes.append(len(parser.known))
    assert max(sizes) == KNOWN_LINES_MAX


def test_what_is_not_repeated_is_not_remembered() -> None:
    """Traces, which are all different, tokens, which are secret, and errors are not kept."""
    parser = RequestParser(MAX_COUNT)
    for line in (b"ALLOC a @t", b"AUTH s3cret", b"NOPE", b"ALLOC a 0", b"x" * 100_000):
        answer(parser, line)
    assert parser.known == {}


# Stray HTTP


@pytest.mark.parametrize(
    "line",
    [
        b"GET / HTTP/1.1",
        b"GET / HTTP/1.0",
        b"GET /orders?count=1 HTTP/1.1",
        b"GET /a b HTTP/1.1",
        "GET /naïve HTTP/1.1".encode(),
        b"HEAD / HTTP/1.1",
        b"POST /ALLOC HTTP/1.1",
        b"PUT / HTTP/1.1",
        b"DELETE / HTTP/1.1",
        b"PATCH / HTTP/1.1",
        b"TRACE / HTTP/1.1",
        b"OPTIONS * HTTP/1.1",
        b"CONNECT example.org:443 HTTP/1.1",
        b"PRI * HTTP/2.0",
        b"PROPFIND / HTTP/1.1",
        b"M-SEARCH * HTTP/1.1",
        b"patch / HTTP/1.1",
        b"GET /" + b"x" * 100_000 + b" HTTP/1.1",
        b"GET /" + b"x" * 300,
        b"POST /" + b"x" * 300,
        b"GET /".ljust(LINE_BYTES_MAX - len(b" HTTP/1.1"), b"x") + b" HTTP/1.1",
    ],
)
def test_what_looks_like_http(line: bytes) -> None:
    """A request line of HTTP is known by its version; an over-long one by a common method."""
    assert looks_like_http(line)
    assert looks_like_http(line + b"\r")


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"GET orders",
        b"GET",
        b"GET /",
        b"POST orders 1",
        b"ALLOC orders",
        b"ALLOC http 1",
        b"HTTP/1.1 200 OK",
        b"GET / HTTP/1.1 x",
        b"GET / HTTP/",
        b"x" * 300,
        b"ALLOC " + b"x" * 300,
        b"GETAWAY " + b"x" * 300,
        b"get /" + b"x" * 300,
        b"GET /".ljust(LINE_BYTES_MAX, b"x"),
    ],
)
def test_what_does_not_look_like_http(line: bytes) -> None:
    """What a person may type, or a client of this protocol may get wrong, is not HTTP."""
    assert not looks_like_http(line)
    assert not looks_like_http(line.removesuffix(b"x") + b"\r")


@settings(deadline=None)
@given(st.one_of(list(MADE_UP.values())))
def test_no_request_looks_like_http(request: Request) -> None:
    """Nothing that can be served is ever taken for HTTP."""
    assert not looks_like_http(encode(request).removesuffix(b"\n"))


def test_the_reply_with_a_random_range() -> None:
    """It reads as the one with IDs, but for its word, and is never longer than a line."""
    assert protocol.random(2**62, Alloc("a", 7)) == b"RANDOM 4611686018427387904 7"
    trace = "@" + "t" * TRACE_CHARS_MAX
    reply = protocol.random(2**63 - 1, Alloc("a", MAX_COUNT, trace))
    assert reply == b"RANDOM 9223372036854775807 1000000 " + trace.encode()
    assert len(reply) < LINE_BYTES_MAX
    assert protocol.parse_reply(reply)[0] == "RANDOM"
