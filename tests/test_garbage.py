"""What has come to stay is out of the garbage collector's sight."""

import gc
from collections.abc import Awaitable, Callable, Iterator
from functools import partial

import pytest
import trio

from idalloc_tcp.address import TcpAddress
from idalloc_tcp.garbage import NEWCOMERS_MAX, Residents
from tests.serving import serving, until


@pytest.fixture(autouse=True)
def thaw() -> Iterator[None]:
    """Leave the collector as it was."""
    yield
    gc.unfreeze()


def test_what_has_come_to_stay_is_put_away_once_there_is_enough_of_it() -> None:
    """Not at every newcomer, and what is put away is not looked at again."""
    gc.unfreeze()
    residents, kept = Residents(), []
    for number in range(NEWCOMERS_MAX):
        assert gc.get_freeze_count() == 0
        kept.append([number])
        residents.add()
    assert gc.get_freeze_count() > NEWCOMERS_MAX
    assert len(gc.get_objects()) < NEWCOMERS_MAX


async def test_connections_leave_nothing_for_the_collector() -> None:
    """Put away or not, a connection is freed when it ends: it has no cycles."""
    async with serving() as running:
        address = running.addresses[0]
        assert isinstance(address, TcpAddress)

        async def talk(said: bytes) -> None:
            stream = await trio.open_tcp_stream(address.host, address.port)
            async with stream:
                await stream.send_all(said)
                await stream.receive_some()

        async def reset() -> None:
            peer = await running.connect()
            assert await peer.ask(b"PING\n") == b"OK PONG\n"
            peer.reset()

        async def check(action: Callable[[], Awaitable[None]], what: bytes) -> None:
            await action()
            gc.collect()
            gc.disable()
            try:
                for _ in range(10):
                    await action()
                await until(lambda: running.metrics.connections_open == 0)
                await trio.sleep(0.01)
                assert gc.collect() == 0, what
            finally:
                gc.enable()

        await check(reset, b"a reset")
        for said in (
            b"PING\n",
            b"NONSENSE\n",
            b"STATS\nALLOC a 0\n",
            b"QUIT\n",
            b"GET / HTTP/1.1\n",
        ):
            await check(partial(talk, said), said)
