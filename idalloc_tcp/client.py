"""A client for Trio programs, and for the command line.

    async with await Client.connect("127.0.0.1:8642") as client:
        for order_id in await client.alloc("orders", 3):
            ...

One request at a time; tasks that share a client take turns. After a timeout or a lost
connection it is not known whether IDs were taken. Connecting and asking again is always safe:
it costs at most a gap.
"""

import os
from collections import deque
from contextlib import suppress
from types import TracebackType
from typing import Final, Self, final

import attrs
import trio

from idalloc_tcp.address import Address, TcpAddress, UnixAddress, parse_address
from idalloc_tcp.errors import BadCount, ConnectionLost, ProtocolViolation, Unavailable
from idalloc_tcp.names import fold_name
from idalloc_tcp.protocol import Alloc, LineReader, Request, Stats, encode, parse_reply

#: Time for connecting, and for each reply, unless told otherwise.
TIMEOUT_SECONDS: Final = 5.0
RECEIVE_BYTES: Final = 16_384
#: No reply has more lines than this.
REPLY_LINES_MAX: Final = 10_000


@final
@attrs.define(eq=False)
class Client:
    """A connection to a server. Made by `connect`.

    Every method raises, beside what it names:
        IdallocError: the class that belongs to the code of the server's `ERR` reply.
        ConnectionLost: the connection ended or the time passed; this client is of no more use.
        ProtocolViolation: what answered does not speak this protocol.
    """

    _stream: trio.abc.HalfCloseableStream
    _timeout_seconds: float = TIMEOUT_SECONDS
    _reader: LineReader = attrs.field(init=False, factory=LineReader)
    _lines: deque[bytes] = attrs.field(init=False, factory=deque)
    _turn: trio.Lock = attrs.field(init=False, factory=trio.Lock)
    _is_lost: bool = attrs.field(init=False, default=False)

    @classmethod
    async def connect(
        cls, address: Address | str, timeout_seconds: float = TIMEOUT_SECONDS
    ) -> Self:
        """Connect to a server: "127.0.0.1:8642", "[::1]:8642" or "unix:/path".

        Raises:
            ConnectionLost: nobody answers there.
            ValueError: the text is not an address.
        """
        if isinstance(address, str):
            address = parse_address(address)
        try:
            with trio.fail_after(timeout_seconds):
                return cls(await _open(address), timeout_seconds)
        except trio.TooSlowError as error:
            text = f"cannot connect to {address}: no answer within {timeout_seconds:g} s"
            raise ConnectionLost(text) from error
        except (OSError, UnicodeError) as error:
            raise ConnectionLost(f"cannot connect to {address}: {_reason(error)}") from error

    async def alloc(self, service: str, count: int = 1) -> range:
        """Take `count` contiguous IDs.

        Raises:
            BadName, BadCount: what was asked for is not a request.
        """
        if count < 1:
            raise BadCount("a count is at least 1")
        [line] = await self._ask(Alloc(fold_name(service), count))
        match words := parse_reply(line):
            case ["OK", first, granted] if first.isdigit() and granted == str(count):
                return range(int(first), int(first) + count)
            case ["RANDOM", *_]:
                raise Unavailable("the server has only random IDs to offer")
        raise ProtocolViolation(f"not the reply to an ALLOC: {' '.join(words)[:80]}")

    async def stats(self, service: str | None = None) -> dict[str, str]:
        """What the server says of itself, or of one service: names and values."""
        request = Stats(None if service is None else fold_name(service))
        values: dict[str, str] = {}
        for line in await self._ask(request, until=b"END"):
            match parse_reply(line):
                case ["STAT", name, *words] if words:
                    values[name] = " ".join(words)
                case words:
                    raise ProtocolViolation(f"not the reply to STATS: {' '.join(words)[:80]}")
        return values

    async def _ask(self, request: Request, until: bytes | None = None) -> list[bytes]:
        """The lines that answer: one, or all before the line `until`."""
        async with self._turn:
            if self._is_lost:
                raise ConnectionLost("this connection was lost before; connect again")
            # Until its reply is here, a request that is given up leaves the connection useless:
            # the next one would read this one's reply.
            self._is_lost = True
            try:
                with trio.fail_after(self._timeout_seconds):
                    # A server that closed may have said why, so its words are read all the same.
                    with suppress(trio.BrokenResourceError):
                        await self._stream.send_all(encode(request))
                    lines = await self._reply(until)
            except trio.BrokenResourceError as error:
                raise ConnectionLost("the connection was lost before the reply") from error
            except trio.TooSlowError as error:
                raise ConnectionLost(f"no reply within {self._timeout_seconds:g} s") from error
            # What nobody asked for must not be read as the next reply.
            self._is_lost = bool(self._lines or self._reader.unfinished)
            return lines

    async def _reply(self, until: bytes | None) -> list[bytes]:
        lines: list[bytes] = []
        while len(lines) < REPLY_LINES_MAX:
            line = await self._line()
            if line == until:
                return lines
            lines.append(line)
            if until is None or line.startswith(b"ERR "):
                return lines
        raise ProtocolViolation(f"a reply of more than {REPLY_LINES_MAX} lines")

    async def _line(self) -> bytes:
        while not self._lines:
            data = await self._stream.receive_some(RECEIVE_BYTES)
            if not data:
                raise ConnectionLost("the server closed the connection before its reply")
            self._lines.extend(self._reader.feed(bytes(data)))
        return self._lines.popleft()

    async def aclose(self) -> None:
        """Close the connection."""
        await self._stream.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()


async def _open(address: Address) -> trio.SocketStream:
    match address:
        case TcpAddress(host, port):
            return await trio.open_tcp_stream(host, port)
        case UnixAddress(path):
            return await trio.open_unix_socket(path)


def _reason(error: OSError | UnicodeError) -> str:
    """Why connecting failed, in plain words: Trio packs one error for each address it tried."""
    match error:
        case OSError(__cause__=ExceptionGroup(exceptions=[OSError() as first, *_])):
            return _reason(first)
        case OSError(errno=int(number)) if number > 0:
            return os.strerror(number)
        case OSError():
            return error.strerror or str(error)
    return "not a host name"  # From the look-up: a label that is empty or too long.
