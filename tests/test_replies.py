"""The replies of the wire, as the server writes them and the client reads them."""

from typing import get_args

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from idalloc_tcp.errors import BY_CODE, IdallocError, Internal, ProtocolViolation, Unavailable
from idalloc_tcp.protocol import (
    HELP_LINES,
    LINE_BYTES_MAX,
    Request,
    block,
    err,
    ok,
    parse_reply,
    stat,
)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"OK", ["OK"]),
        (b"OK 1 3", ["OK", "1", "3"]),
        (b"OK 9223372036854775807 1 @t", ["OK", "9223372036854775807", "1", "@t"]),
        (b"OK PONG\r", ["OK", "PONG"]),
        (b"OK idalloc/1 line=255 count=7", ["OK", "idalloc/1", "line=255", "count=7"]),
        (b"STAT version 0.1.0", ["STAT", "version", "0.1.0"]),
        (b"END", ["END"]),
        (b"PING   answer", ["PING", "", "", "answer"]),
        (b"", [""]),
        (b"x" * LINE_BYTES_MAX, ["x" * LINE_BYTES_MAX]),
    ],
)
def test_the_words_of_a_reply(line: bytes, words: list[str]) -> None:
    """Every form of a reply that is not an error comes apart at its spaces."""
    assert parse_reply(line) == words


def test_what_the_server_writes_the_client_reads() -> None:
    """The lines of replies have exactly the documented forms, and come apart again."""
    assert ok() == b"OK"
    assert ok(1, 3, "@t") == b"OK 1 3 @t"
    assert stat("uptime_seconds", 7) == b"STAT uptime_seconds 7"
    assert block([stat("a", 1)]) == [b"STAT a 1", b"END"]
    assert parse_reply(ok(1, 3, "@t")) == ["OK", "1", "3", "@t"]
    assert parse_reply(stat("a", "b c")) == ["STAT", "a", "b", "c"]


@pytest.mark.parametrize("cls", [*BY_CODE.values(), IdallocError])
def test_an_error_comes_back_as_it_was_sent(cls: type[IdallocError]) -> None:
    """The client raises the class that the server turned into a code, with the same text."""
    line = err(cls("what  was wrong; do this"))
    assert line == b"ERR " + cls.code.encode() + b" what  was wrong; do this"
    for received in (line, line + b"\r"):
        with pytest.raises(BY_CODE[cls.code], match=r"^what  was wrong; do this$") as caught:
            parse_reply(received)
        assert type(caught.value).code == cls.code


@pytest.mark.parametrize(
    ("line", "text"),
    [(b"ERR newcode some text", "some text"), (b"ERR newcode", ""), (b"ERR", ""), (b"ERR ", "")],
)
def test_an_unknown_code_is_internal(line: bytes, text: str) -> None:
    """A code that this client does not know, or none, is a fault of the server."""
    with pytest.raises(Internal) as caught:
        parse_reply(line)
    assert str(caught.value) == text


@pytest.mark.parametrize(
    "line",
    [
        "OK naïve".encode(),
        b"\xff",
        b"OK 1\0",
        b"ERR internal \x1b[2J",
        b"OK\t1",
        b"OK 1\r\r",
        b"OK 1 1 " + b"x" * LINE_BYTES_MAX,
        b"HTTP/1.1 400 Bad Request\x07",
    ],
)
def test_what_is_no_reply(line: bytes) -> None:
    """A line that is over-long or not printable ASCII is not of this protocol."""
    with pytest.raises(ProtocolViolation) as caught:
        parse_reply(line)
    assert str(caught.value).isascii()
    assert str(caught.value).isprintable()


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_any_reply_is_words_or_an_error(line: bytes) -> None:
    """No server can make `parse_reply` do anything else than return words or raise ours."""
    try:
        words = parse_reply(line)
    except IdallocError:
        return
    assert " ".join(words).encode() == line.removesuffix(b"\r")


@settings(deadline=None)
@given(st.sampled_from([*BY_CODE.values()]), st.text(max_size=400))
@example(Unavailable, "two\nlines\r\nand a \x1b[2J")
@example(Unavailable, "Ärger\udcff\N{LINE SEPARATOR}")
@example(Unavailable, "x" * 1000)
@example(Unavailable, "")
def test_an_error_is_one_short_line(cls: type[IdallocError], text: str) -> None:
    """Whatever an error says, its reply is one printable line of at most 255 bytes with its CR."""
    line = err(cls(text))
    assert line.startswith(b"ERR %s " % cls.code.encode())
    assert len(line + b"\r") <= LINE_BYTES_MAX
    assert line.isascii()
    assert line.decode().isprintable()
    assert line.split(b" ", 2)[2], "there is always a text"


def test_help_is_fit_for_a_reply() -> None:
    """HELP tells of every verb, in lines that no client takes for an error or for the end."""
    for line in HELP_LINES:
        assert line.isascii()
        assert line.isprintable()
        assert len(line) < LINE_BYTES_MAX
        assert line.split(" ")[0] not in {"OK", "ERR", "STAT", "END"}
    verbs = [cls.__name__.upper() for cls in get_args(Request)]
    assert [line.split(" ")[0] for line in HELP_LINES][: len(verbs)] == verbs
