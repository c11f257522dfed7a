"""Services of the original idalloc: beside its servers, and once they are gone."""

import pytest

from idalloc_tcp.errors import Exhausted, NotOurs, Unavailable
from idalloc_tcp.ledger import CLOSED, Row
from idalloc_tcp.pool import Segment
from tests.counter_rig import LEASE, SIZE, Rig, Worker

#: What the original's hash and row say at first: the hash leads by up to ten versions.
HASH_LAST = 5_000
ROW_LAST = 4_000


@pytest.fixture
def rig() -> Rig:
    """Stores in which the original wrote."""
    rig = Rig()
    rig.counter.write_original("orders", HASH_LAST, 50)
    rig.ledger.write_original("orders", ROW_LAST, 40)
    return rig


@pytest.fixture
def worker(rig: Rig) -> Worker:
    """A server that works beside the original."""
    return rig.worker()


@pytest.fixture
def heir(rig: Rig) -> Worker:
    """A server that takes over."""
    return rig.worker(take_over=True)


# Beside the original


async def test_beside_the_original_ids_come_from_its_hash(rig: Rig, worker: Worker) -> None:
    """We and the original cut in turns, and each cut of ours is in the row before it is served."""
    assert await worker.reserve() == Segment(5_001, 5_011)
    assert rig.row() == 5_010
    assert rig.counter.cut_original("orders", 100) == Segment(5_011, 5_111)
    assert await worker.reserve() == Segment(5_111, 5_121)
    assert await rig.ledger.read("orders") == Row(5_120, 53)


async def test_beside_the_original_a_new_service_begins_without_a_row(rig: Rig) -> None:
    """A hash that the original made before it wrote the row is cut from, too."""
    rig.counter.write_original("users", 0, 0)
    assert await rig.worker().reserve(service="users") == Segment(1, 11)
    assert await rig.ledger.read("users") == Row(10, 1)


async def test_beside_the_original_an_uncommitted_cut_is_not_served(
    rig: Rig, worker: Worker
) -> None:
    """Lead: a cut whose commit has an unknown end is lost, and not committed again."""
    worker.ledger.lost.add("commit_beside")
    with pytest.raises(Unavailable):
        await worker.reserve()
    assert worker.calls == (["take", "cut_beside"], ["read", "commit_beside"])
    worker.ledger.lost.clear()
    assert (await worker.reserve()).start == 5_011


async def test_beside_the_original_a_cut_without_reply_is_lost(rig: Rig, worker: Worker) -> None:
    """At most once: it is not repeated, and the row, which may be behind, cannot stand in."""
    worker.counter.lost.add("cut_beside")
    with pytest.raises(Unavailable):
        await worker.reserve()
    assert worker.calls == (["take", "cut_beside"], ["read", "lease"])
    assert rig.row() == ROW_LAST


async def test_beside_the_original_a_cut_too_late_is_dropped(
    rig: Rig, worker: Worker, heir: Worker
) -> None:
    """Somebody took the row over before our commit: the cut is a gap, another one is taken."""
    done: list[Segment] = []

    async def take_over() -> None:
        done.append(await heir.reserve())

    worker.ledger.before["commit_beside"] = take_over
    segment = await worker.reserve()
    assert worker.metrics.gap_ids_total == {"beside": SIZE}
    assert done == [Segment(5_011, 5_021)]
    assert segment == Segment(5_021, 5_031)


async def test_beside_the_original_the_ceiling_holds(rig: Rig, worker: Worker) -> None:
    """The original knows no ceiling, so its hash may pass one; what is served does not."""
    rig.ceiling = 5_013
    assert await worker.reserve() == Segment(5_001, 5_011)
    assert await worker.reserve() == Segment(5_011, 5_014)
    for _ in range(2):
        with pytest.raises(Exhausted):
            await worker.reserve()


async def test_nothing_is_leased_from_a_row_that_is_not_ours(rig: Rig, worker: Worker) -> None:
    """Its row may be behind its hash: without the counter nothing stands in."""
    rig.counter.down = True
    for server in (worker, rig.worker(take_over=True)):
        with pytest.raises(NotOurs):
            await server.direct.reserve("orders", SIZE)
        with pytest.raises(Unavailable):
            await server.reserve()
    assert rig.row() == ROW_LAST


async def test_a_hash_that_is_lost_does_not_leave_its_row_to_us(rig: Rig, heir: Worker) -> None:
    """Without the hash nothing says how far the row is behind, so not even an heir takes it."""
    rig.counter.flush()
    with pytest.raises(Unavailable):
        await heir.reserve()
    assert await rig.ledger.read("orders") == Row(ROW_LAST, 40)


# Taking over


async def test_an_heir_goes_on_above_the_hash(rig: Rig, heir: Worker) -> None:
    """Row and hash become ours, and the original fails from then on instead of cutting."""
    assert await heir.reserve() == Segment(HASH_LAST + 1, HASH_LAST + 11)
    assert await rig.ledger.read("orders") == Row(HASH_LAST + LEASE, CLOSED)
    assert rig.counter.cut_original("orders", 100) is None
    assert heir.calls == (["take", "take_over", "seat"], ["take_over"])


@pytest.mark.parametrize("step", ["take_over", "seat"])
async def test_an_heir_closes_the_hash_first(rig: Rig, heir: Worker, step: str) -> None:
    """Whatever the original cuts until its hash is closed lies below what the heir leases."""
    cuts: list[Segment | None] = []
    heir.counter.before[step] = lambda: cuts.append(rig.counter.cut_original("orders", 500))
    segment = await heir.reserve()
    [cut] = cuts
    assert (cut is None) == (step == "seat")
    assert segment.start > (cut.last if cut else HASH_LAST)


async def test_a_row_that_leads_its_hash_is_heeded(rig: Rig, heir: Worker) -> None:
    """The greater of both values is the floor."""
    rig.ledger.write_original("orders", 6_000, 60)
    assert (await heir.reserve()).start == 6_001


@pytest.mark.parametrize("lost", ["counter", "ledger"])
async def test_a_take_over_that_was_interrupted_is_finished(
    rig: Rig, heir: Worker, lost: str
) -> None:
    """An heir that failed between its steps leaves nothing that the next one cannot mend."""
    (heir.ledger if lost == "ledger" else heir.counter).lost.add("take_over")
    with pytest.raises(Unavailable):
        await heir.reserve()
    segment = await rig.worker(take_over=True).reserve()
    assert segment.start == HASH_LAST + 1 + (LEASE if lost == "ledger" else 0)


async def test_a_take_over_that_never_reached_the_row_is_finished(
    rig: Rig, worker: Worker, heir: Worker
) -> None:
    """The hash is ours and the row is not: whoever may take over does, and nobody else serves."""
    rig.ledger.fail_next(1)
    with pytest.raises(Unavailable):
        await heir.reserve()
    with pytest.raises(Unavailable):
        await worker.reserve()
    assert (await heir.reserve()).start == HASH_LAST + 1
    assert (await worker.reserve()).start == HASH_LAST + 1 + SIZE


async def test_near_the_ceiling_the_rest_is_taken_over_directly(rig: Rig, heir: Worker) -> None:
    """Where a lease has no room, the row becomes ours with what is left."""
    rig.ceiling = HASH_LAST + 13
    assert await heir.reserve() == Segment(5_001, 5_011)
    assert await heir.reserve() == Segment(5_011, 5_014)
    with pytest.raises(Exhausted):
        await heir.reserve()
    assert await rig.ledger.read("orders") == Row(rig.ceiling, CLOSED)


async def test_a_hash_of_the_original_beside_a_row_of_ours_is_closed(rig: Rig) -> None:
    """Once a row is ours every server closes a hash that the original brings back."""
    worker = rig.worker()
    rig.counter.write_original("users", 70, 3)
    rig.ledger.take_from_outside("users", 40)
    assert await worker.reserve(service="users") == Segment(71, 81)
    assert worker.metrics.seats_total == {"spent": 1}
