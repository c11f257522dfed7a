"""The client: against a real server, and against one that says what a test tells it to."""

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from idalloc_tcp import __version__
from idalloc_tcp.address import TcpAddress, UnixAddress
from idalloc_tcp.allocator import AllocatorPolicy
from idalloc_tcp.client import RECEIVE_BYTES, REPLY_LINES_MAX, Client
from idalloc_tcp.errors import (
    BY_CODE,
    BadCount,
    BadName,
    Busy,
    ConnectionLost,
    Draining,
    IdallocError,
    Internal,
    ProtocolViolation,
    Unavailable,
)
from idalloc_tcp.server import ServerLimits
from tests.fakes import FakeLedger
from tests.serving import Peer, serving, until

TIMEOUT_SECONDS: Final = 5.0
REQUEST: Final = b"ALLOC orders 1\n"


@asynccontextmanager
async def puppet() -> AsyncIterator[tuple[Client, Peer]]:
    """A client, and the server's end of its connection in the hands of the test."""
    ours, theirs = trio.testing.memory_stream_pair()
    async with Client(ours, TIMEOUT_SECONDS) as client, Peer(theirs, 1e6) as server:
        yield client, server


# --- against a server ---------------------------------------------------------------------


async def test_ranges_follow_each_other() -> None:
    """`alloc` returns the range that was asked for, and `stats` what there is to know."""
    async with serving() as running, await Client.connect(running.addresses[0]) as client:
        assert await client.alloc("orders") == range(1, 2)
        assert await client.alloc("Orders", 10) == range(2, 12)
        assert (await client.stats())["version"] == __version__
        assert (await client.stats("ORDERS"))["last_served"] == "11"


async def test_a_unix_socket_will_do(tmp_path: Path) -> None:
    """The client connects to whatever addresses name."""
    async with (
        serving(f"unix:{tmp_path / 'ids.sock'}") as running,
        await Client.connect(running.addresses[0]) as client,
    ):
        assert await client.alloc("orders", 3) == range(1, 4)


async def test_an_error_reply_leaves_the_client_usable() -> None:
    """What the server refuses raises the class of its code; the next request is served."""
    async with serving() as running, await Client.connect(running.addresses[0]) as client:
        with pytest.raises(BadCount, match="a count is a plain decimal from 1 to 1000000"):
            await client.alloc("orders", 1_000_001)
        running.ledger.down = True
        with pytest.raises(Unavailable):
            await client.alloc("orders")
        running.ledger.down = False
        assert (await client.stats())["errors_total.badcount"] == "1"


async def test_what_is_not_a_request_is_not_sent() -> None:
    """A wrong name or count is found out before the server is troubled."""
    async with serving() as running, await Client.connect(running.addresses[0]) as client:
        with pytest.raises(BadName):
            await client.alloc("or ders")
        with pytest.raises(BadName):
            await client.stats("x\nQUIT")
        with pytest.raises(BadCount, match="at least 1"):
            await client.alloc("orders", 0)
        assert running.metrics.requests_total == 0


async def test_tasks_that_share_a_client_take_turns() -> None:
    """Concurrent requests on one client get disjoint ranges of the sizes that they asked for."""
    ledger = FakeLedger(delay_seconds=0.01)
    async with serving(ledger=ledger) as running:
        taken: list[range] = []
        async with await Client.connect(running.addresses[0]) as client:

            async def take(count: int) -> None:
                taken.append(await client.alloc("orders", count))
                assert len(taken[-1]) == count

            async with trio.open_nursery() as nursery:
                for count in range(1, 30):
                    nursery.start_soon(take, count)
        ids = [id_ for ids in taken for id_ in ids]
        assert sorted(ids) == list(range(1, sum(range(1, 30)) + 1))


@pytest.mark.parametrize("is_unix", [False, True])
async def test_a_client_that_is_turned_away_hears_why(is_unix: bool, tmp_path: Path) -> None:
    """`Busy` is raised even if the server has closed before the request could be sent."""
    address = f"unix:{tmp_path / 'ids.sock'}" if is_unix else "127.0.0.1:0"
    async with (
        serving(address, limits=ServerLimits(max_connections=0)) as running,
        await Client.connect(running.addresses[0]) as client,
    ):
        await until(lambda: running.metrics.connections_refused_total == 1)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(Busy, match="0 connections are open"):
            await client.alloc("orders")
        with pytest.raises(ConnectionLost):
            await client.alloc("orders")


async def test_a_stopped_server_is_a_lost_connection() -> None:
    """A client whose server has stopped is told so, and told again."""
    async with serving() as running, await Client.connect(running.addresses[0]) as client:
        assert await client.alloc("orders") == range(1, 2)
        await running.stop()
        for _ in range(2):
            with pytest.raises(ConnectionLost):
                await client.alloc("orders")


async def test_a_draining_server_says_so() -> None:
    """While a server drains, `alloc` raises `Draining`."""
    policy = AllocatorPolicy(wait_seconds=0.3)
    async with (
        serving(ledger=FakeLedger(delay_seconds=0.2), policy=policy) as running,
        await Client.connect(running.addresses[0]) as client,
        await running.connect() as busy,
    ):
        assert await client.alloc("orders") == range(1, 2)
        await busy.say(b"ALLOC users\n")
        await until(lambda: running.metrics.waits_total == 2)
        running.server.stop()
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(Draining):
            await client.alloc("orders")


async def test_a_reset_is_a_lost_connection() -> None:
    """A connection that the server's machine breaks is reported as lost."""
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    host, port = listener.socket.getsockname()
    async with listener, await Client.connect(TcpAddress(host, port)) as client:
        peer = Peer(await listener.accept())
        async with trio.open_nursery() as nursery:

            async def reset_at_the_request() -> None:
                await peer.hear()
                peer.reset()

            nursery.start_soon(reset_at_the_request)
            with pytest.raises(ConnectionLost, match="was lost before the reply"):
                await client.alloc("orders")


# --- connecting ---------------------------------------------------------------------------


async def test_nobody_listens_on_a_port() -> None:
    """A refused connection is told in plain words, with the address."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(ConnectionLost) as lost:
            await Client.connect(TcpAddress("127.0.0.1", port))
    assert str(lost.value) == f"cannot connect to 127.0.0.1:{port}: Connection refused"


async def test_nobody_listens_on_a_path(tmp_path: Path) -> None:
    """A socket file that is not there is told in plain words."""
    path = tmp_path / "ids.sock"
    with pytest.raises(ConnectionLost) as lost:
        await Client.connect(UnixAddress(str(path)))
    assert str(lost.value) == f"cannot connect to unix:{path}: No such file or directory"


async def test_a_host_that_cannot_be() -> None:
    """A host with an empty label is told in plain words."""
    with pytest.raises(ConnectionLost) as lost:
        await Client.connect(TcpAddress("a..b", 1))
    assert str(lost.value) == "cannot connect to a..b:1: not a host name"


async def test_an_unknown_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that the look-up does not find is told with the look-up's own words."""

    async def find_nothing(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(trio.socket, "getaddrinfo", find_nothing)
    with pytest.raises(ConnectionLost) as lost:
        await Client.connect(TcpAddress("nobody.invalid", 1))
    assert str(lost.value) == "cannot connect to nobody.invalid:1: Name or service not known"


async def test_a_host_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    """Connecting takes no longer than it may."""

    async def hang(*_: object, **__: object) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(trio, "open_tcp_stream", hang)
    with pytest.raises(ConnectionLost) as lost:
        await Client.connect(TcpAddress("127.0.0.1", 1), 2.5)
    assert str(lost.value) == "cannot connect to 127.0.0.1:1: no answer within 2.5 s"


# --- against a puppet ---------------------------------------------------------------------


@pytest.mark.parametrize("code", [*BY_CODE, "internal", "newcode"])
async def test_an_error_reply_raises_the_class_of_its_code(code: str) -> None:
    """Every code has its class; a code that is not known yet is `Internal`."""
    async with puppet() as (client, server):
        await server.say(f"ERR {code} the reason why\n".encode())
        with pytest.raises(IdallocError) as refused:
            await client.alloc("orders")
        assert type(refused.value) is BY_CODE.get(code, Internal)
        assert str(refused.value) == "the reason why"
        assert await server.hear() == REQUEST


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"OK",
        b"OK 1",
        b"OK 1 2",
        b"OK one 1",
        b"OK -5 1",
        b"OK  1",
        b"ok 1 1",
        b"HTTP/1.1 400 Bad Request\r",
        b"STAT version 1",
        b"\xff\xfe\x00",
        b"x" * 100_000,
    ],
)
async def test_garbage_is_a_violation_of_the_protocol(reply: bytes) -> None:
    """What is not the reply to an ALLOC raises, with at most the beginning of what came."""
    async with puppet() as (client, server):
        await server.say(reply + b"\n")
        with pytest.raises(ProtocolViolation) as violation:
            await client.alloc("orders")
        assert len(str(violation.value)) < 250
        assert "\n" not in str(violation.value)


@pytest.mark.parametrize("line", [b"OK 1 1", b"STAT version", b"STAT", b""])
async def test_garbage_within_statistics_is_a_violation_of_the_protocol(line: bytes) -> None:
    """Before its END, a reply to STATS holds rows and nothing else."""
    async with puppet() as (client, server):
        await server.say(b"STAT version 1\n" + line + b"\nEND\n")
        with pytest.raises(ProtocolViolation):
            await client.stats()


async def test_statistics_may_end_in_an_error() -> None:
    """An ERR line ends any reply, and is raised."""
    async with puppet() as (client, server):
        await server.say(b"STAT version 1\nERR internal the server failed\n")
        with pytest.raises(Internal, match="the server failed"):
            await client.stats()


async def test_statistics_without_an_end_are_bounded() -> None:
    """A reply of ever more lines is given up, and the client with it."""
    async with puppet() as (client, server):
        await server.say(b"STAT a b\n" * (REPLY_LINES_MAX + 1))
        with pytest.raises(ProtocolViolation, match="more than"):
            await client.stats()
        with pytest.raises(ConnectionLost):
            await client.alloc("orders")


async def test_a_line_without_an_end_is_bounded(autojump_clock: MockClock) -> None:
    """Of a reply line that does not end, next to nothing is kept, and it is given up in time."""
    async with puppet() as (client, server):
        await server.say(b"x" * 10_000_000)
        with pytest.raises(ConnectionLost, match="no reply within 5 s"):
            await client.alloc("orders")
        assert len(client._reader.unfinished) < RECEIVE_BYTES


async def test_what_nobody_asked_for_is_not_taken_for_a_reply() -> None:
    """A server that says more than the reply has lost its place: the client is given up."""
    async with puppet() as (client, server):
        await server.say(b"OK 1 1\nOK 1 1\n")
        assert await client.alloc("orders") == range(1, 2)
        with pytest.raises(ConnectionLost):
            await client.alloc("orders")


async def test_a_reply_that_does_not_come_in_time_makes_the_client_useless(
    autojump_clock: MockClock,
) -> None:
    """After a timeout the late reply is never taken for the next one's."""
    async with puppet() as (client, server):
        with pytest.raises(ConnectionLost, match="no reply within 5 s"):
            await client.alloc("orders")
        assert trio.current_time() == pytest.approx(TIMEOUT_SECONDS)
        await server.say(b"OK 1 1\n")
        with pytest.raises(ConnectionLost, match="was lost before; connect again"):
            await client.alloc("orders")


async def test_a_reply_that_trickles_in_gets_no_more_time(autojump_clock: MockClock) -> None:
    """The time is for the whole reply, not for each line of it."""
    async with puppet() as (client, server), trio.open_nursery() as nursery:

        async def trickle() -> None:
            while True:
                await server.say(b"STAT a b\n")
                await trio.sleep(TIMEOUT_SECONDS - 1)

        nursery.start_soon(trickle)
        with pytest.raises(ConnectionLost, match="no reply within 5 s"):
            await client.stats()
        nursery.cancel_scope.cancel()


async def test_a_server_that_does_not_read_is_given_up(autojump_clock: MockClock) -> None:
    """Sending is bounded as well."""
    ours, _theirs = trio.testing.lockstep_stream_pair()
    async with Client(ours, TIMEOUT_SECONDS) as client:
        with pytest.raises(ConnectionLost, match="no reply within 5 s"):
            await client.alloc("orders")


@pytest.mark.parametrize("beginning", [b"", b"OK 1"])
async def test_an_end_before_the_reply_is_a_lost_connection(beginning: bytes) -> None:
    """Half a reply is none."""
    async with puppet() as (client, server):
        await server.say(beginning)
        await server.end()
        with pytest.raises(ConnectionLost, match="closed the connection before its reply"):
            await client.alloc("orders")


async def test_a_cancelled_request_does_not_leave_its_reply_to_the_next(
    autojump_clock: MockClock,
) -> None:
    """Whoever gives a request up gives the client up; those who wait for a turn are told."""
    async with puppet() as (client, server), trio.open_nursery() as nursery:
        lost: list[str] = []

        async def ask_next() -> None:
            with pytest.raises(ConnectionLost) as error:
                await client.alloc("orders")
            lost.append(str(error.value))

        with trio.move_on_after(1):
            nursery.start_soon(ask_next)
            await client.alloc("orders")
        await server.say(b"OK 1 1\nOK 2 1\n")
        await trio.testing.wait_all_tasks_blocked()
        assert len(lost) == 1


async def test_a_request_that_is_cancelled_before_its_turn_harms_nobody(
    autojump_clock: MockClock,
) -> None:
    """A task that gives up waiting for its turn has asked for nothing."""
    async with puppet() as (client, server), trio.open_nursery() as nursery:
        taken: list[range] = []

        async def ask_first() -> None:
            taken.append(await client.alloc("orders"))
            taken.append(await client.alloc("orders"))

        nursery.start_soon(ask_first)
        await trio.testing.wait_all_tasks_blocked()
        with trio.move_on_after(1):
            await client.alloc("users")
        for reply in (b"OK 1 1\n", b"OK 2 1\n"):
            assert await server.hear() == REQUEST
            await server.say(reply)
        await trio.testing.wait_all_tasks_blocked()
        assert taken == [range(1, 2), range(2, 3)]


@pytest.mark.parametrize("reply", [b"RANDOM 4611686018427387904 1", b"RANDOM 7 1 @t", b"RANDOM"])
async def test_a_random_range_is_no_range_of_ids(reply: bytes) -> None:
    """The client never takes one by mistake; the connection goes on."""
    async with puppet() as (client, server):
        await server.say(reply + b"\n")
        with pytest.raises(Unavailable, match="only random IDs"):
            await client.alloc("orders")
        await server.say(b"OK 5 1\n")
        assert await client.alloc("orders") == range(5, 6)
