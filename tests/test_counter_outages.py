"""Segments while a store is down, and up to the last ID of a service."""

import pytest
import trio
from trio.testing import MockClock

from idalloc_tcp.errors import Exhausted, Unavailable
from idalloc_tcp.pool import MAX_ID, Segment
from tests.counter_rig import LEASE, SIZE, Rig, Worker


@pytest.fixture
def rig() -> Rig:
    """Stores that are empty."""
    return Rig()


@pytest.fixture
def worker(rig: Rig) -> Worker:
    """One server on them."""
    return rig.worker()


# What is down


async def test_first_the_counter_then_the_ledger_then_nobody(rig: Rig, worker: Worker) -> None:
    """Without the counter leases come from the ledger, in the size that was asked for."""
    assert await worker.reserve() == Segment(1, 11)
    rig.counter.down = True
    assert await worker.reserve() == Segment(LEASE + 1, LEASE + SIZE + 1)
    rig.ledger.down = True
    with pytest.raises(Unavailable, match="the store of IDs does not answer"):
        await worker.reserve()
    rig.counter.down = False  # Its lease was passed, and there is no other one yet.
    with pytest.raises(Unavailable):
        await worker.reserve()
    rig.ledger.down = False
    assert (await worker.reserve()).start == LEASE + SIZE + 1


async def test_a_dead_counter_is_asked_once_a_pause(
    rig: Rig, worker: Worker, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Its probes grow rare, its absence costs nobody time, and it is logged once."""
    caplog.set_level("INFO")
    rig.counter.down = True
    for _ in range(1_000):
        await worker.reservation.reserve("orders", SIZE)
        await trio.sleep(0.02)
    probes = len(worker.counter.calls)
    assert 20 < probes < 50
    assert worker.reservation.health.probes_total == probes - 1
    rig.counter.down = False
    await trio.sleep(1)
    await worker.reservation.reserve("orders", SIZE)
    assert worker.metrics.seats_total == {"missing": 1}
    assert caplog.messages == [
        "the counter is down",
        "the counter is back",
        "a counter was seated anew: it was missing",
    ]


async def test_nobody_waits_for_stores_that_are_down(
    rig: Rig, worker: Worker, autojump_clock: MockClock
) -> None:
    """Once both are known to be down, every request is told so at once, and neither is asked."""
    rig.counter.down = rig.ledger.down = True
    for _ in range(100):
        with pytest.raises(Unavailable):
            await worker.reservation.reserve("orders", SIZE)
    assert trio.current_time() == 0
    assert worker.calls == (["take"], ["lease"])


# Ceilings


async def test_the_counter_serves_the_last_id_below_the_ceiling() -> None:
    """The last extension is as short as it has to be; then the service is exhausted, exactly."""
    rig = Rig(ceiling=2 * LEASE + 13)
    worker = rig.worker()
    stop = 1
    while stop <= rig.ceiling:
        segment = await worker.reserve()
        assert segment.start == stop
        stop = segment.stop
    assert stop == rig.ceiling + 1
    with pytest.raises(Exhausted):
        await worker.reserve()


async def test_without_room_for_a_lease_the_rest_is_leased_directly() -> None:
    """A counter that has to be seated anew near the ceiling leaves the rest to the ledger."""
    rig = Rig(ceiling=LEASE + 13)
    worker = rig.worker()
    await worker.reserve()
    rig.counter.flush()
    assert [(await worker.reserve(8)).size for _ in range(2)] == [8, 5]
    with pytest.raises(Exhausted):
        await worker.reserve(8)


async def test_ids_of_63_bits_through_the_counter(rig: Rig, worker: Worker) -> None:
    """The highest IDs there are come through the counter, too."""
    rig.ledger.take_from_outside("orders", MAX_ID - LEASE)
    last = [(await worker.reserve()).last for _ in range(LEASE // SIZE)][-1]
    assert last == MAX_ID
    with pytest.raises(Exhausted):
        await worker.reserve()
