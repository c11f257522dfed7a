"""How a server stops: what is answered, what is refused, what is left behind."""

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

import pytest
import trio
import trio.testing

from idalloc_tcp.address import Address, UnixAddress
from idalloc_tcp.allocator import AllocatorPolicy
from idalloc_tcp.connection import QUIET_SECONDS
from idalloc_tcp.server import ServerLimits
from idalloc_tcp.signals import ECHO_SECONDS, STOP_SIGNALS, stop_on_signals
from tests.fakes import FakeLedger
from tests.serving import (
    ADDRESS_KINDS,
    PATIENCE_SECONDS,
    Peer,
    Running,
    free_address,
    serving,
    until,
)

#: A ledger that takes so long is as good as hung.
HUNG_SECONDS: Final = 3600.0
#: What a stop may take beyond the bounds that it was given: these machines are busy.
SLACK_SECONDS: Final = 1.0

pytestmark = pytest.mark.usefixtures("serving_variant")


@pytest.fixture(params=ADDRESS_KINDS)
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Each kind of address in turn."""
    return free_address(request.param, tmp_path)


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


async def test_a_stop_is_bounded_while_the_ledger_hangs(caplog: pytest.LogCaptureFixture) -> None:
    """A request that waits for a hung ledger, and its fetch, are given up within their bounds.

    So are the IDs that should go back to it, and the log says so.
    """
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
    assert "not all IDs could be given back in time" in caplog.messages


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


@pytest.fixture
def _signals_as_before() -> Iterator[None]:
    """A server that came to its end leaves stop signals ignored; its tests must not."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


async def keep_busy(running: Running) -> Peer:
    """A client whose request keeps the drain going."""
    peer = await running.connect()
    await peer.say(b"ALLOC orders\n")
    await until(lambda: running.metrics.waits_total == 1)
    return peer


@pytest.mark.usefixtures("_signals_as_before")
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


@pytest.mark.usefixtures("_signals_as_before")
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
            await trio.sleep(2 * ECHO_SECONDS)
            signal.raise_signal(signal.SIGINT)
            with trio.fail_after(PATIENCE_SECONDS):
                await trio.sleep_forever()
