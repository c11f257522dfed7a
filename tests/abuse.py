"""Clients that mean no good: does the server live, stay small and serve the honest ones?

    python -m tests.abuse

Against a server of its own, one after the other and then all at once: 500 KB of random bytes, 1 MB
without a line's end, 2,000 connections that say nothing, a client that never reads its replies.
Prints resident memory, and how long an honest client waited, after each. Exits with 1 if the server
died, grew beyond `GROWTH_MIB_MAX`, gave IDs to junk or let the honest client wait.
"""

import argparse
import contextlib
import random
import resource
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tests.processes import ServerProcess

JUNK_BYTES: Final = 500_000
LONG_LINE_BYTES: Final = 1_000_000
SILENT_CONNECTIONS: Final = 2_000
FLOOD_BYTES: Final = 64 * 2**20
FLOOD_SECONDS: Final = 5.0
#: 2,000 connections are the larger part of it.
GROWTH_MIB_MAX: Final = 32.0
HONEST_SECONDS_MAX: Final = 1.0

Abuse = Callable[[ServerProcess, contextlib.ExitStack], str]


def send_junk(server: ServerProcess, _open: contextlib.ExitStack) -> str:
    """Random bytes; every line of them is an error, and nothing is allocated."""
    junk = random.Random(1).randbytes(JUNK_BYTES)
    with socket.create_connection(server.endpoint, timeout=10) as client:
        replies = _exchange(client, junk)
    wrong = [line for line in replies.splitlines() if not line.startswith(b"ERR ")]
    assert not wrong, f"junk was answered {wrong[0]!r}"
    return f"{JUNK_BYTES:,} random bytes: {replies.count(b'ERR ')} errors, nothing else"


def send_long_line(server: ServerProcess, _open: contextlib.ExitStack) -> str:
    """One line without an end, then its end: one error, and the connection lives."""
    with socket.create_connection(server.endpoint, timeout=10) as client:
        client.sendall(b"x" * LONG_LINE_BYTES)
        rss_mib = server.rss_mib
        replies = _exchange(client, b"\nPING\n")
    first, second = replies.splitlines()
    assert first.startswith(b"ERR toolong "), first
    assert second == b"OK PONG", second
    return f"a line of {LONG_LINE_BYTES:,} bytes ({rss_mib:.1f} MiB meanwhile): {first.decode()}"


def say_nothing(server: ServerProcess, kept: contextlib.ExitStack) -> str:
    """Many connections that never send a byte."""
    for _ in range(SILENT_CONNECTIONS):
        kept.enter_context(socket.create_connection(server.endpoint, timeout=10))
    return f"{SILENT_CONNECTIONS:,} connections that say nothing"


def never_read(server: ServerProcess, kept: contextlib.ExitStack) -> str:
    """Requests with long replies, as many as the server will take, and no reply is read."""
    client = kept.enter_context(socket.create_connection(server.endpoint, timeout=10))
    client.setblocking(False)
    flood = b"HELP\n" * 13_000
    sent, deadline = 0, time.monotonic() + FLOOD_SECONDS
    quiet_since = time.monotonic()
    while sent < FLOOD_BYTES and time.monotonic() < min(deadline, quiet_since + 1):
        with contextlib.suppress(BlockingIOError):
            sent += client.send(flood)
            quiet_since = time.monotonic()
    assert sent < FLOOD_BYTES, "the server took everything from a client that never read"
    return f"a client that never reads: {sent:,} bytes of requests were taken, then no more"


def _exchange(client: socket.socket, data: bytes) -> bytes:
    client.sendall(data)
    client.shutdown(socket.SHUT_WR)
    replies = bytearray()
    while received := client.recv(65_536):
        replies += received
    return bytes(replies)


def honest_seconds(server: ServerProcess) -> float:
    """How long a client that does everything right waits for its IDs."""
    began = time.monotonic()
    with socket.create_connection(server.endpoint, timeout=10) as client:
        reply = _exchange(client, b"ALLOC honest 3\n")
    assert reply.startswith(b"OK "), reply
    return time.monotonic() - began


def abuse(show: Callable[[str], None] = print) -> None:
    """Do it all; raises AssertionError if the server falls short."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 8_192)), hard))
    with (
        tempfile.TemporaryDirectory() as folder,
        ServerProcess.start(data=Path(folder) / "ids.sqlite3") as server,
        contextlib.ExitStack() as kept,
    ):
        honest_seconds(server)
        idle_mib = server.rss_mib
        show(f"{idle_mib:6.1f} MiB  idle, one client served")
        for one in (send_junk, send_long_line, say_nothing, never_read, send_junk):
            said = one(server, kept)
            waited = honest_seconds(server)
            show(
                f"{server.rss_mib:6.1f} MiB  {said}; an honest client waited {waited * 1e3:.0f} ms"
            )
            assert waited < HONEST_SECONDS_MAX, "an honest client had to wait"
            assert server.rss_mib < idle_mib + GROWTH_MIB_MAX, "the server grew too large"
        assert server.process.poll() is None, "the server died"
        kept.close()
        status = server.terminate()
        show(f"            stopped cleanly with status {status}")
        assert status == 0, "the server did not stop cleanly"


def main() -> int:
    """The command line."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    try:
        abuse()
    except AssertionError as error:
        print(f"falls short: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
