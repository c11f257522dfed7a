"""Just enough of the Redis protocol to drive a server without the driver under test."""

import socket
import time
from typing import Final, TypeAlias

from tests.real.process import HOST

#: Far more than any reply that a test asks for.
MAX_REPLY_BYTES: Final = 1_048_576
_RECEIVE_BYTES: Final = 65_536

Reply: TypeAlias = "int | str | list[Reply] | None"


class RedisError(Exception):
    """The server's error reply."""


def encode(*args: str | int) -> bytes:
    """One command as it goes over the wire."""
    words = [str(arg).encode(errors="surrogateescape") for arg in args]
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(w), w) for w in words)


def parse(data: bytes, at: int = 0) -> tuple[Reply, int] | None:
    """The reply that starts at `at`, and where the next one starts. None: not all here yet.

    Integers are exact; strings of both kinds are `str`.

    Raises:
        RedisError: the reply is an error, or an array that holds one.
    """
    end = data.find(b"\r\n", at)
    if end < 0:
        return None
    kind, text, after = data[at : at + 1], data[at + 1 : end].decode(), end + 2
    match kind:
        case b"+":
            return text, after
        case b"-":
            raise RedisError(text)
        case b":":
            return int(text), after
        case b"$":
            return _parse_bulk(data, after, int(text))
        case b"*":
            return _parse_array(data, after, int(text))
    raise ValueError(f"not a reply: {data[at:end]!r}")


def _parse_bulk(data: bytes, at: int, size: int) -> tuple[Reply, int] | None:
    if size < 0:
        return None, at
    if len(data) < at + size + 2:
        return None
    return data[at : at + size].decode(errors="surrogateescape"), at + size + 2


def _parse_array(data: bytes, at: int, size: int) -> tuple[Reply, int] | None:
    if size < 0:
        return None, at
    items: list[Reply] = []
    for _ in range(size):
        parsed = parse(data, at)
        if parsed is None:
            return None
        item, at = parsed
        items.append(item)
    return items, at


def call(port: int, *args: str | int, timeout_seconds: float) -> Reply:
    """One command over a connection of its own; blocks until the reply or the deadline.

    Raises:
        RedisError: the server refused it.
        TimeoutError: no whole reply in time. Whether it was executed is not known.
        OSError: no connection, or it broke.
    """
    deadline = time.monotonic() + timeout_seconds
    with socket.create_connection((HOST, port), timeout_seconds) as connection:
        connection.sendall(encode(*args))
        data = b""
        while (parsed := parse(data)) is None:
            left_seconds = deadline - time.monotonic()
            if left_seconds <= 0:
                raise TimeoutError(f"no reply within {timeout_seconds} s")
            connection.settimeout(left_seconds)
            received = connection.recv(_RECEIVE_BYTES)
            if not received or len(data) > MAX_REPLY_BYTES:
                raise ConnectionError("the connection ended within a reply, or never ended one")
            data += received
    return parsed[0]
