"""The server over real sockets of this machine."""

import os
import random
import signal
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import pytest
import trio
import trio.testing

from idalloc_tcp import __version__
from idalloc_tcp.address import Address, UnixAddress
from idalloc_tcp.allocator import AllocatorPolicy
from idalloc_tcp.connection import QUIET_SECONDS, ConnectionLimits
from idalloc_tcp.protocol import HELP_LINES
from idalloc_tcp.server import ServerLimits, stop_on_signals
from idalloc_tcp.sizing import SizePolicy
from tests.fakes import FakeLedger
from tests.serving import Peer, Running, serving, until

JUNK_BYTES: Final = 500_000
LONG_LINE_BYTES: Final = 1_000_000
SILENT_CLIENTS: Final = 300
RESETS: Final = 60
#: A ledger that takes so long is as good as hung.
HUNG_SECONDS: Final = 3600.0
#: What a stop may take beyond the bounds that it was given: these machines are busy.
SLACK_SECONDS: Final = 1.0


def has_ipv6() -> bool:
    """Can this machine listen on ::1?"""
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.fixture(params=["127.0.0.1:0", "[::1]:0", "unix"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Each kind of address in turn."""
    if request.param == "[::1]:0" and not has_ipv6():
        pytest.skip("this machine has no ::1")
    return f"unix:{tmp_path / 'ids.sock'}" if request.param == "unix" else str(request.param)


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


# --- the stop -----------------------------------------------------------------------------


def is_in_file_system(address: Address) -> bool:
    """Has it a name there?"""
    return isinstance(address, UnixAddress) and os.path.exists(address.path)


async def test_a_stop_ends_idle_connections_and_listeners(address: str) -> None:
    """Idle clients see the end at once, nobody can connect any more, no socket file is left."""
    async with serving(address) as running:
        async with await running.connect() as idle, await running.connect() as unfinished:
            await idle.ask(b"PING\n")
            await unfinished.ask(b"PING\nALLOC ord")
            assert await running.stop() < QUIET_SECONDS + SLACK_SECONDS
            assert await idle.hear_all() == await unfinished.hear_all() == b""
        with pytest.raises(OSError, match=r"connect|No such file"):
            await running.connect()
        assert not any(is_in_file_system(bound) for bound in running.addresses)


async def test_a_stop_answers_a_busy_connection() -> None:
    """A request whose IDs are on their way is answered first; later ones are refused."""
    ledger = FakeLedger(delay_seconds=0.2)
    async with serving(ledger=ledger) as running, await running.connect() as peer:
        await peer.say(b"ALLOC orders 3\nALLOC orders 4\n")
        await until(lambda: running.metrics.waits_total == 1)
        running.server.stop()
        await trio.testing.wait_all_tasks_blocked()
        await peer.say(b"ALLOC orders 5\nSTATS\n")
        replies = (await peer.hear_all()).splitlines()
        assert replies[:2] == [b"OK 1 3", b"OK 4 4"]
        assert replies[2].startswith(b"ERR draining ")
        assert b"STAT draining 1" in replies


async def test_a_stop_does_not_wait_for_a_client_that_never_rests() -> None:
    """A client that goes on and on is refused and, after `drain_seconds`, cut off."""
    limits = ServerLimits(drain_seconds=0.3)
    replies: list[bytes] = []
    async with serving(limits=limits) as running, await running.connect() as peer:
        assert await peer.ask(b"ALLOC orders\n") == b"OK 1 1\n"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(running.stop)
            with suppress(trio.BrokenResourceError):
                while reply := await peer.ask(b"ALLOC orders\n"):
                    replies.append(reply)
                    await trio.sleep(0.005)
    served = sum(reply.startswith(b"OK") for reply in replies)
    assert running.ledger.snapshot() == {"orders": 1 + served}
    assert len(replies) - served > 5
    assert all(reply.startswith(b"ERR draining ") for reply in replies[served:])


async def test_a_stop_gives_the_tails_back_so_that_a_restart_leaves_no_gap(address: str) -> None:
    """The next server on the same ledger goes on with the very next ID."""
    ledger = FakeLedger()
    for first in (1, 8):
        async with serving(address, ledger=ledger) as running, await running.connect() as peer:
            assert await peer.ask(b"ALLOC orders 7\n") == b"OK %d 7\n" % first
            await running.stop()
        assert ledger.snapshot() == {"orders": first + 6}
        assert running.metrics.gap_ids_total.total() == 0


async def test_a_stop_is_bounded_while_the_ledger_hangs() -> None:
    """A request that waits for a hung ledger, and its fetch, are given up within their bounds."""
    ledger = FakeLedger()
    limits = ServerLimits(drain_seconds=0.2)
    policy = AllocatorPolicy(wait_seconds=HUNG_SECONDS, stop_seconds=0.2)
    async with (
        serving(ledger=ledger, limits=limits, policy=policy) as running,
        await running.connect() as waiting,
        await running.connect() as idle,
    ):
        assert await idle.ask(b"ALLOC users\n") == b"OK 1 1\n"
        ledger.delay_seconds = HUNG_SECONDS
        await waiting.say(b"ALLOC orders\n")
        await until(lambda: running.metrics.waits_total == 2)
        assert await running.stop() < 0.2 + 2 * 0.2 + SLACK_SECONDS
        assert await waiting.hear_all() == await idle.hear_all() == b""


async def test_whoever_is_accepted_during_a_stop_is_drained_too() -> None:
    """A connection whose task begins only after the stop refuses ALLOCs, and closes."""
    ledger = FakeLedger(delay_seconds=0.3)
    async with serving(ledger=ledger) as running, await running.connect() as waiting:
        await waiting.say(b"ALLOC orders\n")
        await until(lambda: running.metrics.waits_total == 1)
        running.server.stop()
        ours, theirs = trio.testing.memory_stream_pair()
        async with trio.open_nursery() as nursery, Peer(ours) as late:
            nursery.start_soon(running.server.serve_stream, theirs)
            await late.say(b"ALLOC orders\n")
            refusal = b"ERR draining the server is stopping; connect again\n"
            assert await late.hear_all() == refusal
        assert await waiting.hear() == b"OK 1 1\n"


async def test_a_stop_amid_a_rush_of_clients_leaves_nobody_hanging() -> None:
    """Clients that connect and ask while the server stops get a reply or an end, soon."""
    replies: list[bytes] = []
    async with serving() as running, trio.open_nursery() as nursery:

        async def ask() -> None:
            try:
                async with await running.connect() as peer:
                    replies.append(await peer.ask(b"ALLOC orders\n"))
            except (OSError, trio.BrokenResourceError):
                replies.append(b"")

        for number in range(60):
            nursery.start_soon(ask)
            if number == 30:
                await trio.sleep(0.002)
                running.server.stop()
    assert len(replies) == 60
    refused = [reply for reply in replies if reply.startswith(b"ERR draining ")]
    given = [int(reply.split()[1]) for reply in replies if reply.startswith(b"OK ")]
    assert len(given) + len(refused) + replies.count(b"") == 60
    assert len(given) == len(set(given))


async def test_a_stop_before_the_first_client_is_a_clean_one() -> None:
    """A server that served nobody stops at once, and an early second call does no harm."""
    async with serving() as running:
        running.server.stop()
        assert await running.stop() < SLACK_SECONDS
        assert running.server.is_stopping


# --- signals ------------------------------------------------------------------------------


async def keep_busy(running: Running) -> Peer:
    """A client whose request keeps the drain going."""
    peer = await running.connect()
    await peer.say(b"ALLOC orders\n")
    await until(lambda: running.metrics.waits_total == 1)
    return peer


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_first_stop_signal_drains(number: signal.Signals) -> None:
    """After one signal the busy connection is still answered, and the tails go back."""
    ledger = FakeLedger(delay_seconds=0.2)
    async with trio.open_nursery() as nursery:
        async with serving(ledger=ledger) as running, await keep_busy(running) as peer:
            await nursery.start(stop_on_signals, running.server)
            signal.raise_signal(number)
            await until(lambda: running.server.is_stopping)
            assert await peer.hear_all() == b"OK 1 1\n"
        nursery.cancel_scope.cancel()
    assert ledger.snapshot() == {"orders": 1}


async def test_the_second_stop_signal_gives_up() -> None:
    """A second signal does not wait for anybody: KeyboardInterrupt ends it all."""
    ledger = FakeLedger(delay_seconds=HUNG_SECONDS)
    with pytest.RaisesGroup(KeyboardInterrupt, flatten_subgroups=True):
        async with (
            serving(ledger=ledger, limits=ServerLimits(drain_seconds=HUNG_SECONDS)) as running,
            trio.open_nursery() as nursery,
            await keep_busy(running),
        ):
            await nursery.start(stop_on_signals, running.server)
            signal.raise_signal(signal.SIGTERM)
            await until(lambda: running.server.is_stopping)
            signal.raise_signal(signal.SIGINT)
            await trio.sleep_forever()


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
