"""The sweep by itself: whose turn it is, for how long, and who needs a task of its own."""

import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Final

import pytest
import trio
import trio.testing

from idalloc_tcp.lanes import FEW_BYTES, Rider, Sweep
from idalloc_tcp.metrics import Metrics
from idalloc_tcp.observation import Observer
from idalloc_tcp.session import RECEIVE_BYTES
from tests.lane import SLOW, Lane

PATIENCE_SECONDS: Final = 10.0
ASK: Final = b"ALLOC orders\n"


def make_sweep() -> Sweep:
    """One whose sessions answer for themselves."""
    return Sweep(Observer(Metrics(), lambda _service: ""))


@contextmanager
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The server's end of a connection, which does not block, and the client's."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.settimeout(PATIENCE_SECONDS)
        yield ours, theirs


@asynccontextmanager
async def sweeping() -> AsyncIterator[Sweep]:
    """A sweep at work."""
    sweep = make_sweep()
    with trio.fail_after(PATIENCE_SECONDS):
        async with trio.open_nursery() as nursery:
            await nursery.start(sweep.run)
            yield sweep
            nursery.cancel_scope.cancel()


async def hear(client: socket.socket) -> bytes:
    """What comes next."""
    return await trio.to_thread.run_sync(client.recv, 65_536)


async def test_requests_are_answered_without_waking_the_task() -> None:
    """While nothing but answers is needed, the connection's own task sleeps on."""
    async with sweeping() as sweep, trio.open_nursery() as nursery:
        with sockets() as (ours, theirs):
            nursery.start_soon(sweep.rider(ours, Lane().session).ride)
            for first in (1, 2, 3):
                theirs.send(ASK)
                assert await hear(theirs) == b"OK %d 1\n" % first
            theirs.send(ASK * 3 + b"PING\n")
            assert await hear(theirs) == b"OK 4 1\nOK 5 1\nOK 6 1\nOK PONG\n"
            assert len(nursery.child_tasks) == 1
            nursery.cancel_scope.cancel()
            await trio.lowlevel.cancel_shielded_checkpoint()


@pytest.mark.parametrize(
    ("said", "replies"),
    [
        (ASK + b"ALLOC " + SLOW.encode() + b"\n" + ASK, b"OK 1 1\n"),
        (ASK + b"ALLOC ord", b"OK 1 1\n"),
        (b"ALLOC ord", b""),
        (b"QUIT\n" + ASK, b"OK\n"),
        (ASK, b"OK 1 1\n"),
    ],
    ids=["empty pool", "half a line after one", "half a line", "quit", "end"],
)
async def test_what_needs_more_than_an_answer_ends_the_ride(said: bytes, replies: bytes) -> None:
    """All that can be answered is; then the connection's own task goes on."""
    async with sweeping() as sweep:
        with sockets() as (ours, theirs):
            session = Lane().session
            theirs.send(said)
            theirs.shutdown(socket.SHUT_WR)
            await sweep.rider(ours, session).ride()
            assert not session.is_at_rest
            assert (theirs.recv(1000) if replies else b"") == replies


async def test_what_the_socket_does_not_take_is_not_lost() -> None:
    """A reply of which only a part could be sent leaves its rest to the connection's task."""
    async with sweeping() as sweep:
        with sockets() as (ours, theirs):
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            session, requests = Lane().session, 0
            async with trio.open_nursery() as nursery:
                nursery.start_soon(sweep.rider(ours, session).ride)
                while nursery.child_tasks:
                    theirs.send(ASK * 100)
                    requests += 100
                    await trio.testing.wait_all_tasks_blocked(0.001)
            ours.setblocking(True)
            theirs.setblocking(False)
            heard = b""
            while heard.count(b"\n") < requests:
                heard += theirs.recv(65_536)
                ours.sendall(session.advance())
            assert heard == b"".join(b"OK %d 1\n" % first for first in range(1, requests + 1))


async def test_a_client_that_is_gone_ends_the_ride() -> None:
    """A reset is raised where the connection's other errors are."""
    listening = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(listening.getsockname())
    ours, _ = listening.accept()
    ours.setblocking(False)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    with ours, listening:
        async with sweeping() as sweep:
            client.close()
            with pytest.raises(trio.BrokenResourceError):
                await sweep.rider(ours, Lane().session).ride()


async def test_an_error_of_one_session_is_its_own() -> None:
    """It is raised in that connection's task; the others are served."""

    def fail(_service: str, _count: int) -> int:
        raise RuntimeError("a bug")

    async with sweeping() as sweep, trio.open_nursery() as nursery:
        with sockets() as (ours, theirs), sockets() as (ours_too, theirs_too):
            lane = Lane()
            lane.session._take = fail
            nursery.start_soon(sweep.rider(ours_too, Lane().session).ride)
            theirs.send(ASK)
            theirs_too.send(ASK)
            with pytest.raises(RuntimeError, match="a bug"):
                await sweep.rider(ours, lane.session).ride()
            assert await hear(theirs_too) == b"OK 1 1\n"
            nursery.cancel_scope.cancel()
            await trio.lowlevel.cancel_shielded_checkpoint()


async def test_a_fault_of_the_short_way_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """Sessions then answer for themselves, and the log says why."""

    def fail(_chunks: Sequence[bytes]) -> Sequence[bytes]:
        raise RuntimeError("a bug")

    sweep = Sweep(Observer(Metrics(), lambda _service: ""), fail)
    async with trio.open_nursery() as nursery:
        await nursery.start(sweep.run)
        with sockets() as (ours, theirs):
            nursery.start_soon(sweep.rider(ours, Lane().session).ride)
            theirs.send(ASK)
            assert await hear(theirs) == b"OK 1 1\n"
            nursery.cancel_scope.cancel()
            await trio.lowlevel.cancel_shielded_checkpoint()
    assert "the short way to a reply failed" in caplog.messages


async def test_a_cancelled_ride_takes_nothing_more() -> None:
    """Once its task has been told to stop, nothing of the connection is received or executed."""
    async with sweeping() as sweep:
        with sockets() as (ours, theirs):
            lane = Lane()
            with trio.move_on_after(0.01):
                await sweep.rider(ours, lane.session).ride()
            theirs.send(ASK)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert lane.taken == {}
            await trio.lowlevel.checkpoint()
            theirs.shutdown(socket.SHUT_WR)
            await sweep.rider(ours, lane.session).ride()
            assert lane.taken == {"orders": 1}


async def test_a_flood_does_not_starve_anybody() -> None:
    """In one round a flooding client gets one chunk answered, and everybody else a turn."""
    sweep = make_sweep()
    with sockets() as (ours, flooding), sockets() as (ours_too, polite):
        flood, calm = Lane(), Lane()
        async with trio.open_nursery() as nursery:
            riders = [sweep.rider(ours, flood.session), sweep.rider(ours_too, calm.session)]
            for rider in riders:
                nursery.start_soon(rider.ride)
            await trio.testing.wait_all_tasks_blocked()
            flooding.send(b"ALLOC a\n" * 4_000)
            polite.send(ASK)
            sweep._serve([(ours.fileno(), 1), (ours_too.fileno(), 1)], 0.0)
            assert calm.taken == {"orders": 1}
            assert flood.taken == {"a": RECEIVE_BYTES // len(b"ALLOC a\n")}
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("size", [FEW_BYTES - 1, FEW_BYTES, FEW_BYTES + 1, RECEIVE_BYTES])
async def test_a_chunk_of_any_size_is_received_as_one(size: int) -> None:
    """However large it is, up to the bound, a chunk is not torn at what is received at first."""
    sweep = make_sweep()
    with sockets() as (ours, theirs):
        lane = Lane()
        said = (b"ALLOC orders_us\n" * size)[: size - 1] + b"\n"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sweep.rider(ours, lane.session).ride)
            await trio.testing.wait_all_tasks_blocked()
            theirs.send(said)
            sweep._serve([(ours.fileno(), 1)], 0.0)
            assert lane.session.is_at_rest
            assert theirs.recv(1_000_000).count(b"\n") == said.count(b"\n")
            nursery.cancel_scope.cancel()


async def test_a_rider_leaves_no_trace() -> None:
    """After a ride, however it ended, the sweep knows nothing of the connection."""
    async with sweeping() as sweep:
        with sockets() as (ours, theirs):
            with trio.move_on_after(0.001):
                await sweep.rider(ours, Lane().session).ride()
            theirs.close()
            await sweep.rider(ours, Lane().session).ride()
            assert sweep._riders == {}
            with pytest.raises(FileNotFoundError):
                sweep._epoll.unregister(ours.fileno())


def test_a_rider_says_when_it_does_not_ride() -> None:
    """To wake what does not sleep is a mistake in this program."""
    with sockets() as (ours, _theirs):
        sweep = make_sweep()
        with pytest.raises(AssertionError):
            Rider(sweep, ours, Lane().session, 0.0).wake()
        sweep._epoll.close()
