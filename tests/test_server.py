"""The server over real sockets of this machine."""

import random
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import pytest
import trio
import trio.testing

from idalloc_tcp import __version__
from idalloc_tcp.address import TcpAddress
from idalloc_tcp.allocator import AllocatorPolicy
from idalloc_tcp.connection import ConnectionLimits
from idalloc_tcp.protocol import HELP_LINES
from idalloc_tcp.server import ServerLimits
from idalloc_tcp.sizing import SizePolicy
from tests.fakes import FakeLedger
from tests.serving import ADDRESS_KINDS, Peer, free_address, serving, until

JUNK_BYTES: Final = 500_000
LONG_LINE_BYTES: Final = 1_000_000
SILENT_CLIENTS: Final = 300
RESETS: Final = 60

pytestmark = pytest.mark.usefixtures("serving_variant")


@pytest.fixture(params=ADDRESS_KINDS)
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Each kind of address in turn."""
    return free_address(request.param, tmp_path)


async def hear_block(peer: Peer) -> list[bytes]:
    """The lines before END."""
    lines: list[bytes] = []
    while (line := await peer.hear()) != b"END\n":
        lines.append(line)
    return lines


async def stats(peer: Peer, service: bytes = b"") -> dict[bytes, bytes]:
    """What STATS says, as names and values."""
    await peer.say(b"STATS %b\n" % service if service else b"STATS\n")
    rows: dict[bytes, bytes] = {}
    for line in await hear_block(peer):
        word, name, value = line.split(maxsplit=2)
        assert word == b"STAT"
        rows[name] = value.rstrip()
    return rows


# --- the protocol -------------------------------------------------------------------------


async def test_every_request_gets_its_reply(address: str) -> None:
    """The whole conversation, on every kind of address."""
    async with serving(address) as running, await running.connect() as peer:
        assert await peer.ask(b"HELLO\n") == b"OK idalloc/1 line=255 count=1000000\n"
        assert await peer.ask(b"ALLOC orders\n") == b"OK 1 1\n"
        assert await peer.ask(b"alloc Orders 10\n") == b"OK 2 10\n"
        assert await peer.ask(b"ALLOC orders 5 @req-7\n") == b"OK 12 5 @req-7\n"
        assert await peer.ask(b"ALLOC users @t\n") == b"OK 1 1 @t\n"
        assert await peer.ask(b"PING\n") == b"OK PONG\n"
        assert await peer.ask(b"AUTH secret\n") == (
            b"ERR denied no tokens are configured on this server\n"
        )
        await peer.say(b"HELP\n")
        assert await hear_block(peer) == [line.encode() + b"\n" for line in HELP_LINES]
        assert await peer.ask(b"QUIT\n") == b"OK\n"
        assert await peer.hear_all() == b""


async def test_a_reply_ends_as_its_request_did() -> None:
    """CRLF is answered with CRLF, every line of it, and LF with LF."""
    async with serving() as running, await running.connect() as peer:
        await peer.say(b"ALLOC orders\r\nPING\nNONSENSE\r\nHELP\r\nQUIT\r\n")
        lines = (await peer.hear_all()).splitlines(keepends=True)
        assert lines[:2] == [b"OK 1 1\r\n", b"OK PONG\n"]
        assert all(line.endswith(b"\r\n") for line in lines[2:])
        assert lines[-1] == b"OK\r\n"


@pytest.mark.parametrize(
    ("request_line", "code"),
    [
        (b"FLY me", b"unknown"),
        (b"", b"syntax"),
        (b"ALLOC", b"syntax"),
        (b"ALLOC orders 1 2 3", b"syntax"),
        (b"ALLOC or\0ders", b"syntax"),
        (b"ALLOC \xc3\xa9", b"syntax"),
        (b"ALLOC or/ders", b"badname"),
        (b"ALLOC orders 0", b"badcount"),
        (b"ALLOC orders -1", b"badcount"),
        (b"ALLOC orders 1e3", b"badcount"),
        (b"ALLOC orders 1000001", b"badcount"),
        (b"ALLOC orders 1" + b"0" * 30, b"badcount"),
        (b"ALLOC " + b"x" * 300, b"toolong"),
    ],
)
async def test_a_bad_request_gets_one_error(request_line: bytes, code: bytes) -> None:
    """One line with the right code; the connection lives, and nothing is allocated."""
    async with serving() as running, await running.connect() as peer:
        reply = await peer.ask(request_line + b"\n")
        assert reply.startswith(b"ERR %b " % code)
        assert await peer.ask(b"PING\n") == b"OK PONG\n"
        assert running.ledger.leases == []


async def test_stats_tell_how_the_server_is_doing() -> None:
    """STATS has the version and every counter; STATS of a service has its pool."""
    async with serving() as running, await running.connect() as peer:
        await peer.ask(b"ALLOC orders 10\n")
        await peer.ask(b"NONSENSE\n")
        rows = await stats(peer)
        assert rows[b"version"] == __version__.encode()
        assert rows[b"draining"] == b"0"
        assert rows[b"services"] == b"1"
        assert rows[b"connections_open"] == b"1"
        assert rows[b"requests_total"] == b"3"
        assert rows[b"ids_total"] == b"10"
        assert rows[b"errors_total.unknown"] == b"1"
        rows = await stats(peer, b"orders")
        assert rows[b"service"] == b"orders"
        assert rows[b"active"] == b"1"
        assert rows[b"last_served"] == b"10"
        assert (await stats(peer, b"nobody"))[b"active"] == b"0"
        assert (await stats(peer))[b"services"] == b"1", "asking starts nothing"


async def test_a_connection_too_many_is_turned_away() -> None:
    """At `max_connections` a new client hears `ERR busy`; when one has left, there is room."""
    async with serving(limits=ServerLimits(max_connections=2)) as running:
        async with await running.connect() as one, await running.connect() as two:
            assert await one.ask(b"PING\n") == await two.ask(b"PING\n") == b"OK PONG\n"
            async with await running.connect() as three:
                expected = b"ERR busy 2 connections are open; retry later\n"
                assert await three.hear_all() == expected
            assert await one.ask(b"PING\n") == b"OK PONG\n"
        await until(lambda: running.metrics.connections_open == 0)
        async with await running.connect() as four:
            assert await four.ask(b"PING\n") == b"OK PONG\n"
        assert running.metrics.connections_refused_total == 1


async def test_who_is_turned_away_while_asking_hears_the_whole_reply() -> None:
    """A request that the server never reads does not turn `ERR busy` into a reset."""
    async with serving(limits=ServerLimits(max_connections=0)) as running:
        [address] = running.addresses
        assert isinstance(address, TcpAddress)
        # At one go, so that the request is there before the server accepts.
        asking = socket.create_connection((address.host, address.port))
        asking.sendall(b"ALLOC orders\n")
        async with Peer(trio.SocketStream(trio.socket.from_stdlib_socket(asking))) as peer:
            assert await peer.hear_all() == b"ERR busy 0 connections are open; retry later\n"
        assert running.metrics.requests_total == 0


# --- abuse --------------------------------------------------------------------------------


async def test_junk_is_answered_line_by_line(address: str) -> None:
    """Random bytes get an error for each line, and not one ID; the server lives."""
    junk = random.Random(20_240_517).randbytes(JUNK_BYTES)
    async with serving(address) as running:
        async with await running.connect() as peer, trio.open_nursery() as nursery:

            async def say_all() -> None:
                await peer.say(junk)
                await peer.end()

            nursery.start_soon(say_all)
            replies = (await peer.hear_all()).splitlines()
        assert all(reply.startswith(b"ERR ") for reply in replies)
        last_is_too_long = len(junk) - junk.rindex(b"\n") - 1 > 255
        assert len(replies) == junk.count(b"\n") + last_is_too_long
        assert running.metrics.ids_total == 0
        async with await running.connect() as honest:
            assert await honest.ask(b"ALLOC orders\n") == b"OK 1 1\n"


async def test_an_endless_line_costs_one_error() -> None:
    """A megabyte without an LF is skipped to its LF, and the connection lives."""
    async with serving() as running, await running.connect() as peer:
        await peer.say(b"x" * LONG_LINE_BYTES)
        reply = await peer.ask(b"\nPING\n")
        assert reply == b"ERR toolong a line holds at most 255 bytes before its LF\n"
        assert await peer.hear() == b"OK PONG\n"


async def test_silent_clients_harm_nobody() -> None:
    """Hundreds of connections that say nothing, or half a line, leave an honest one its IDs."""
    async with serving() as running:
        silent = [await running.connect() for _ in range(SILENT_CLIENTS)]
        for peer in silent[::2]:
            await peer.say(b"ALLOC ord")
        async with await running.connect() as honest:
            for expected in range(1, 201):
                assert await honest.ask(b"ALLOC orders\n") == b"OK %d 1\n" % expected
        assert running.metrics.connections_total == SILENT_CLIENTS + 1
        for peer in silent:
            await peer.stream.aclose()
        await until(lambda: running.metrics.connections_open == 0)


async def test_a_client_that_never_reads_is_dropped() -> None:
    """It is cut off after `send_seconds`; others are served all the time."""
    limits = ServerLimits(connection=ConnectionLimits(send_seconds=0.3))
    async with serving(limits=limits) as running, await running.connect() as honest:
        await honest.ask(b"PING\n")
        async with await running.connect() as deaf, trio.open_nursery() as nursery:

            async def flood() -> None:
                with suppress(trio.BrokenResourceError):
                    while True:
                        await deaf.say(b"HELP\n" * 10_000)

            nursery.start_soon(flood)
            await until(lambda: running.metrics.connections_open == 2)
            while running.metrics.connections_open == 2:
                assert await honest.ask(b"PING\n") == b"OK PONG\n"
        assert await honest.ask(b"ALLOC orders\n") == b"OK 1 1\n"


async def leave_at_once(peer: Peer) -> None:
    """Say nothing."""


async def leave_in_a_line(peer: Peer) -> None:
    """Stop in the middle of a request."""
    await peer.say(b"ALLOC ord")


async def leave_before_the_reply(peer: Peer) -> None:
    """Ask, and do not listen."""
    await peer.say(b"ALLOC orders\n" * 3)


async def leave_in_a_flood(peer: Peer) -> None:
    """Ask for more than fits any buffer, then go."""
    with trio.move_on_after(0.02):
        await peer.stream.send_all(b"HELP\n" * 100_000)


async def leave_while_waiting(peer: Peer) -> None:
    """Ask for what must be fetched, and go while it is."""
    await peer.say(b"ALLOC other%d\nPING\n" % random.randrange(10**9))
    await trio.sleep(0.001)


async def leave_after_the_reply(peer: Peer) -> None:
    """Take what was asked for, and go without a word."""
    assert await peer.ask(b"PING\n") == b"OK PONG\n"


@pytest.mark.parametrize(
    "leave",
    [
        leave_at_once,
        leave_in_a_line,
        leave_before_the_reply,
        leave_in_a_flood,
        leave_while_waiting,
        leave_after_the_reply,
    ],
)
async def test_a_reset_at_any_point_harms_nobody(leave: Callable[[Peer], Awaitable[None]]) -> None:
    """Clients that break off abruptly cost their own connection, and nothing else."""
    ledger = FakeLedger(delay_seconds=0.01)
    async with serving(ledger=ledger) as running, await running.connect() as honest:

        async def crash() -> None:
            peer = await running.connect()
            await leave(peer)
            peer.reset()

        async with trio.open_nursery() as nursery:
            for _ in range(RESETS):
                nursery.start_soon(crash)
        await until(lambda: running.metrics.connections_open == 1)
        assert (await honest.ask(b"ALLOC honest\n")) == b"OK 1 1\n"


@pytest.mark.parametrize(
    ("beginning", "expected"),
    [
        (b"QUIT\n", b"OK\n"),
        (
            b"POST /alloc HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n",
            b"ERR syntax this server speaks idalloc/1, not HTTP; closing\r\n",
        ),
    ],
)
async def test_the_reply_survives_a_close_with_unread_input(
    address: str, beginning: bytes, expected: bytes
) -> None:
    """What a client sends behind its last request neither runs nor resets the reply away."""
    async with serving(address) as running:
        for pause_seconds in (0.0, 0.01):
            async with await running.connect() as peer:
                await peer.say(beginning)
                await trio.sleep(pause_seconds)
                await peer.say(b"ALLOC orders 5\n" * 7_000)
                await peer.end()
                assert await peer.hear_all() == expected
        assert running.metrics.ids_total == 0


# --- many at once -------------------------------------------------------------------------


async def test_no_id_is_given_twice_under_a_crowd() -> None:
    """Clients that pipeline on many connections get disjoint ranges, each rising, no gap."""
    taken: list[int] = []
    policy = AllocatorPolicy(size=SizePolicy(smallest=10, largest=1_000))
    async with serving(policy=policy) as running:

        async def ask() -> None:
            async with await running.connect() as peer:
                await peer.say(b"ALLOC orders 3\n" * 50)
                await peer.end()
                lines = (await peer.hear_all()).splitlines()
                firsts = [int(line.split()[1]) for line in lines]
                assert firsts == sorted(firsts)
                taken.extend(id_ for first in firsts for id_ in range(first, first + 3))

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(ask)
        assert len(taken) == len(set(taken)) == 20 * 50 * 3
        await running.stop()
        leased = max(running.ledger.snapshot().values())
        assert leased == len(taken) + running.metrics.gap_ids_total.total()
