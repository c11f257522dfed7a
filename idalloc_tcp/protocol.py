"""The grammar of the wire, both directions, without I/O.

    request = VERB *(SP argument) [CR] LF         at most 255 bytes before the LF
    reply   = "OK" *(SP field) EOL / "ERR" SP code SP text EOL

Bytes become lines (`LineReader`), lines become requests (`RequestParser`), and what was found
becomes the lines of a reply (`ok`, `err`). A client uses the same classes the other way round:
`encode` writes a request, `parse_reply` reads the answer. Nothing here knows a socket, a task
or a clock; `session` holds the state of one conversation. protocol.md is the specification.

Everything a peer may send has a bound, and the bounds are here:

* `LINE_BYTES_MAX`: what a line holds before its LF. A longer one is skipped to its LF while
  no more than a line's worth of it is kept, so a peer cannot make us buffer.
* `TRACE_CHARS_MAX` and `names.NAME_CHARS_MAX`: so that every reply is a short line as well.
* `KNOWN_LINES_MAX`: how many raw lines the parser remembers.
"""

import re
from collections.abc import Callable
from typing import Final, final

import attrs

from idalloc_tcp.errors import (
    BadCount,
    BadSyntax,
    IdallocError,
    LineTooLong,
    ProtocolViolation,
    UnknownVerb,
    from_wire,
)
from idalloc_tcp.names import fold_name

PROTOCOL: Final = "idalloc/1"
LINE_BYTES_MAX: Final = 255
TRACE_CHARS_MAX: Final = 64
KNOWN_LINES_MAX: Final = 131_072

_PRINTABLE: Final = re.compile(rb"[\x20-\x7e]*")
_COUNT: Final = re.compile(r"[1-9][0-9]*")
_TRACE: Final = re.compile(rf"@[A-Za-z0-9_.:-]{{1,{TRACE_CHARS_MAX}}}")
_HTTP_LINE: Final = re.compile(rb"\S+ .+ HTTP/[0-9.]+\r?")
_HTTP_START: Final = re.compile(rb"(?:GET|HEAD|POST|PUT|DELETE|CONNECT|OPTIONS|TRACE|PATCH) ")


@final
@attrs.frozen
class Alloc:
    """`ALLOC service [count] [@trace]`: give me `count` contiguous IDs."""

    service: str
    count: int = 1
    trace: str = ""


@final
@attrs.frozen
class Ping:
    """`PING`: are you there?"""


@final
@attrs.frozen
class Hello:
    """`HELLO`: what do you speak, and what are your limits?"""


@final
@attrs.frozen
class Auth:
    """`AUTH token`: I may use this server."""

    token: str = attrs.field(repr=False)


@final
@attrs.frozen
class Stats:
    """`STATS [service]`: how are you, or how is this service?"""

    service: str | None = None


@final
@attrs.frozen
class Help:
    """`HELP`: what can I type?"""


@final
@attrs.frozen
class Quit:
    """`QUIT`: goodbye."""


Request = Alloc | Ping | Hello | Auth | Stats | Help | Quit


@final
@attrs.define(eq=False)
class LineReader:
    """Cuts a stream of bytes into lines, however it was split on its way."""

    _rest: bytes = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that `data` completes, each without its LF but with its CR if it has one.

        Of an over-long line at least `LINE_BYTES_MAX + 1` bytes are kept, and its last byte.
        """
        lines = data.split(b"\n")
        if self._rest:
            lines[0] = self._rest + lines[0]
        rest = lines.pop()
        if len(rest) > LINE_BYTES_MAX:
            rest = rest[: LINE_BYTES_MAX + 1] + rest[-1:]
        self._rest = rest
        return lines

    @property
    def unfinished(self) -> bytes:
        """The beginning of a line whose LF has not come yet."""
        return self._rest


def ending_of(line: bytes) -> bytes:
    """How the reply to this line ends: as the line did."""
    return b"\r\n" if line.endswith(b"\r") else b"\n"


def looks_like_http(line: bytes) -> bool:
    """Is it an HTTP request line, of any method?

    Of an over-long line only the beginning is known, so there a common method must do.
    """
    if len(line) > LINE_BYTES_MAX:
        return _HTTP_START.match(line) is not None
    return _HTTP_LINE.fullmatch(line) is not None


@final
@attrs.frozen
class KnownLine:
    """A line that was understood before: what it asks for, and its reply but for the first ID."""

    service: str
    count: int
    #: With its end, and `%d` for the first ID.
    reply: bytes
    #: How its reply ends.
    end: bytes
    request: Alloc


@final
@attrs.define(eq=False)
class RequestParser:
    """Turns lines into requests.

    Args:
        max_count: the largest count that one ALLOC may ask for.
    """

    max_count: int
    #: Busy clients send the same few lines over and over, so those of ALLOCs without a trace are
    #: remembered, with their LF, and need no second parse. Emptied when full.
    known: dict[bytes, KnownLine] = attrs.field(init=False, factory=dict)

    def parse(self, line: bytes) -> Request:
        """The request in a line as `LineReader` gave it.

        Raises:
            RequestError: what is wrong with the line; nothing was done.
        """
        known = self.known.get(line + b"\n")
        if known is not None:
            return known.request
        request = self._parse(line)
        if type(request) is Alloc and not request.trace:
            self._remember(line, request)
        return request

    def _remember(self, line: bytes, request: Alloc) -> None:
        if len(self.known) >= KNOWN_LINES_MAX:
            self.known.clear()
        end = ending_of(line)
        reply = b"OK %%d %d" % request.count + end
        self.known[line + b"\n"] = KnownLine(request.service, request.count, reply, end, request)

    def _parse(self, line: bytes) -> Request:
        if len(line) > LINE_BYTES_MAX:
            raise LineTooLong(f"a line holds at most {LINE_BYTES_MAX} bytes before its LF")
        text = line.removesuffix(b"\r")
        if not _PRINTABLE.fullmatch(text):
            raise BadSyntax("a line is printable ASCII; try HELP")
        verb, *words = text.decode("ascii").split(" ")
        if not verb:
            raise BadSyntax("a line begins with a verb; try HELP")
        parse = _VERBS.get(verb.upper())
        if parse is None:
            raise UnknownVerb(f"no verb {verb[:32]}; try HELP")
        if "" in words:
            raise BadSyntax("words are separated by one space, and none follows the last")
        return parse(self, words)

    def _alloc(self, words: list[str]) -> Alloc:
        trace = words.pop() if len(words) > 1 and words[-1].startswith("@") else ""
        if trace and not _TRACE.fullmatch(trace):
            raise BadSyntax(f"a trace is @ and 1 to {TRACE_CHARS_MAX} of A-Z a-z 0-9 _ . : -")
        match words:
            case [service]:
                return Alloc(fold_name(service), 1, trace)
            case [service, count]:
                return Alloc(fold_name(service), self._count(count), trace)
        raise BadSyntax("usage: ALLOC <service> [<count>] [@<trace>]")

    def _count(self, word: str) -> int:
        # The length is looked at first: int() of a long digit string is slow.
        if _COUNT.fullmatch(word) and len(word) <= len(str(self.max_count)):
            count = int(word)
            if count <= self.max_count:
                return count
        raise BadCount(f"a count is a plain decimal from 1 to {self.max_count}")

    def _auth(self, words: list[str]) -> Auth:
        match words:
            case [token]:
                return Auth(token)
        raise BadSyntax("usage: AUTH <token>")

    def _stats(self, words: list[str]) -> Stats:
        match words:
            case []:
                return Stats()
            case [service]:
                return Stats(fold_name(service))
        raise BadSyntax("usage: STATS [<service>]")


def _alone(verb: str, request: Request) -> Callable[[RequestParser, list[str]], Request]:
    """The parser of a verb that takes no argument."""

    def parse(_parser: RequestParser, words: list[str]) -> Request:
        if words:
            raise BadSyntax(f"usage: {verb}")
        return request

    return parse


_VERBS: Final[dict[str, Callable[[RequestParser, list[str]], Request]]] = {
    "ALLOC": RequestParser._alloc,
    "AUTH": RequestParser._auth,
    "STATS": RequestParser._stats,
    "PING": _alone("PING", Ping()),
    "HELLO": _alone("HELLO", Hello()),
    "HELP": _alone("HELP", Help()),
    "QUIT": _alone("QUIT", Quit()),
}

#: What HELP answers, above its END.
HELP_LINES: Final = (
    "ALLOC <service> [<count>] [@<trace>]  take IDs: OK <first> <count> [@<trace>]",
    "PING                                  answer OK PONG",
    "HELLO                                 the protocol's version and limits",
    "AUTH <token>                          ask for access",
    "STATS [<service>]                     how the server, or one service, is doing",
    "HELP                                  this text",
    "QUIT                                  say goodbye",
    "A service is named with 1 to 64 of A-Z a-z 0-9 _ . : - in any case.",
)


def ok(*fields: object) -> bytes:
    """An `OK` line without its end."""
    return " ".join(("OK", *map(str, fields))).encode("ascii")


def random(first: int, request: Alloc) -> bytes:
    """The reply to an ALLOC that got a random range, without its end."""
    return b"RANDOM" + ok(first, request.count, *filter(None, [request.trace])).removeprefix(b"OK")


def err(error: IdallocError) -> bytes:
    """The `ERR` line for an error, without its end: one line of printable ASCII.

    A longer text is cut, so that the line holds at most `LINE_BYTES_MAX` bytes with its CR.
    """
    text = str(error).encode("ascii", "replace").decode("ascii")
    text = "".join(char if char.isprintable() else " " for char in text)
    return f"ERR {error.code} {text or error.code}".encode("ascii")[: LINE_BYTES_MAX - 1]


def block(lines: list[bytes]) -> list[bytes]:
    """The lines of a reply that ends with `END`."""
    return [*lines, b"END"]


def stat(name: str, value: object) -> bytes:
    """A `STAT` line without its end."""
    return f"STAT {name} {value}".encode("ascii")


def encode(request: Request) -> bytes:
    """The line that asks for `request`, with its LF: what a client sends."""
    match request:
        case Alloc(service, count, trace):
            words = ["ALLOC", service, str(count), trace]
        case Stats(service):
            words = ["STATS", service or ""]
        case Auth(token):
            words = ["AUTH", token]
        case _:
            words = [type(request).__name__.upper()]
    return " ".join(filter(None, words)).encode("ascii") + b"\n"


def parse_reply(line: bytes) -> list[str]:
    """The words of one reply line: what a client received, without its LF.

    `["OK", first, count]`, `["STAT", name, value]`, `["END"]`; a line of HELP as it is.

    Raises:
        IdallocError: the class that belongs to the code of an `ERR` line.
        ProtocolViolation: the line is over-long or not printable ASCII.
    """
    text = line.removesuffix(b"\r")
    if len(line) > LINE_BYTES_MAX or not _PRINTABLE.fullmatch(text):
        raise ProtocolViolation(f"not a reply of {PROTOCOL}: {line[:40]!r}")
    words = text.decode("ascii").split(" ")
    if words[0] == "ERR":
        raise from_wire(words[1] if len(words) > 1 else "", " ".join(words[2:]))
    return words
