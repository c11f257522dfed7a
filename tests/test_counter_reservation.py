"""The rules of uniqueness with a counter between ledger and pools, one by one."""

import pytest

from idalloc_tcp.counter import Reason, State
from idalloc_tcp.errors import Unavailable
from idalloc_tcp.ledger import CLOSED
from idalloc_tcp.pool import Pool, Segment
from tests.counter_rig import LEASE, SIZE, Rig, Worker


@pytest.fixture
def rig() -> Rig:
    """Stores that are empty."""
    return Rig()


@pytest.fixture
def worker(rig: Rig) -> Worker:
    """One server on them."""
    return rig.worker()


async def spend(worker: Worker) -> None:
    """Have all of the counter's first lease cut off."""
    for first in range(1, LEASE, SIZE):
        assert (await worker.reserve()).start == first


# 1. Lead


async def test_lead_segments_are_parts_of_leases(rig: Rig, worker: Worker) -> None:
    """One lease is cut into many segments, and none lies above what the ledger committed."""
    for first in range(1, 3 * LEASE, SIZE):
        segment = await worker.reserve()
        assert segment == Segment(first, first + SIZE)
        assert segment.last <= rig.row()
    assert worker.calls[1] == ["lease", "extend", "extend"]
    assert (worker.metrics.cuts_total, worker.metrics.leases_total) == (30, 1)


async def test_lead_a_counter_alone_serves_to_the_end_of_its_lease(
    rig: Rig, worker: Worker
) -> None:
    """Without the ledger the counter goes on to the end of its lease, and not one ID further."""
    await worker.reserve()
    rig.ledger.down = True
    assert [(await worker.reserve(30)).size for _ in range(3)] == [30, 30, 30]
    with pytest.raises(Unavailable):
        await worker.reserve()


async def test_lead_a_commit_whose_reply_was_lost_is_not_served(rig: Rig, worker: Worker) -> None:
    """The lease under a seat has to be known to be committed: else nobody is seated on it."""
    worker.ledger.lost.add("lease")
    with pytest.raises(Unavailable):
        await worker.reserve()
    assert worker.calls == (["take"], ["lease"])
    worker.ledger.lost.clear()
    assert await worker.reserve() == Segment(LEASE + 1, LEASE + 1 + SIZE)


# 2. Fence


@pytest.mark.parametrize("size", [1, SIZE, LEASE])
async def test_fence_old_data_is_not_cut_from(rig: Rig, worker: Worker, size: int) -> None:
    """A counter that came back with a backup gives nothing of it away again."""
    await worker.reserve()
    backup = rig.counter.snapshot()
    await worker.reserve()
    rig.counter.restart(backup)
    assert await worker.reserve(size) == Segment(LEASE + 1, LEASE + 1 + size)
    assert worker.metrics.seats_total == {"missing": 1, "stale": 1}


async def test_fence_a_promoted_replica_is_seated_anew(rig: Rig, worker: Worker) -> None:
    """Nothing shows that a replica received everything, so even one that did is not believed."""
    await worker.reserve()
    rig.counter.fail_over()
    assert (await worker.reserve()).start == LEASE + 1
    assert worker.metrics.seats_total["stale"] == 1


async def test_fence_a_stale_lease_is_not_extended(rig: Rig, worker: Worker) -> None:
    """Off the path of requests, too, a lease grows only where its fence is live."""
    await worker.reserve()
    rig.counter.fail_over()
    worker.forget_calls()
    await worker.extend_ahead()
    assert worker.calls == (["inspect"], [])


async def test_fence_a_stale_end_says_nothing_about_the_row(rig: Rig, worker: Worker) -> None:
    """What a stale hash remembers does not raise a row."""
    await worker.reserve()
    rig.counter.restart({"orders": State(5, CLOSED, 5 * LEASE, "of another Redis")})
    await worker.compare()
    assert rig.row() == LEASE


async def test_fence_a_failover_while_extending_makes_the_addition_ours(
    rig: Rig, worker: Worker
) -> None:
    """An extension that the counter refuses is served directly."""
    await spend(worker)
    worker.counter.before["extend"] = rig.counter.fail_over
    assert await worker.reserve() == Segment(LEASE + 1, 2 * LEASE + 1)
    assert (await worker.reserve()).start == 2 * LEASE + 1


# 3. Seat anew


async def test_seat_anew_after_a_flush(rig: Rig, worker: Worker) -> None:
    """A counter that lost everything stands on a fresh lease, not on what we remember."""
    await worker.reserve()
    rig.counter.flush()
    assert (await worker.reserve()).start == LEASE + 1
    assert worker.metrics.seats_total == {"missing": 2}


async def test_seat_anew_once_the_ledger_has_moved_past(rig: Rig, worker: Worker) -> None:
    """A counter whose lease ends below what we saw leased would only lead us backwards."""
    await worker.reserve()
    rig.counter.down = True
    assert await worker.reserve() == Segment(LEASE + 1, LEASE + SIZE + 1)
    rig.counter.down = False
    assert (await worker.reserve()).start == LEASE + SIZE + 1
    assert worker.metrics.seats_total == {"missing": 1, "passed": 1}


async def test_seat_anew_where_a_lease_cannot_grow(rig: Rig, worker: Worker) -> None:
    """A lease that is used up, and above which somebody leased, is followed by a fresh one."""
    await spend(worker)
    rig.ledger.take_from_outside("orders", 7)
    assert (await worker.reserve()).start == LEASE + 8
    assert worker.metrics.seats_total == {"missing": 1, "spent": 1}


@pytest.mark.parametrize("reason", [Reason.MISSING, Reason.STALE, Reason.SPENT])
async def test_seat_anew_looks_whether_the_reason_still_holds(reason: Reason) -> None:
    """Who comes second leaves the seat to who came first, and serves the whole lease directly."""
    rig = Rig()
    first, second = rig.worker(), rig.worker()
    if reason is not Reason.MISSING:
        await spend(first)
    if reason is Reason.STALE:
        rig.counter.fail_over()
    if reason is Reason.SPENT:
        rig.ledger.take_from_outside("orders", LEASE)
    done: list[Segment] = []

    async def come_first() -> None:
        done.append(await first.reserve())

    second.counter.before["seat"] = come_first
    lease = await second.reserve()
    assert (lease.size, lease.stop, rig.row()) == (LEASE, done[0].start, lease.last + LEASE)
    assert (await first.reserve()).start == done[0].stop
    assert (first.metrics.seats_total[reason.value], second.metrics.seats_total) == (1, {})


# 4. At most once


async def test_at_most_once_a_cut_without_reply(rig: Rig, worker: Worker) -> None:
    """A cut whose reply was lost is a gap; the ledger is asked instead, above all of the lease."""
    await worker.reserve()
    worker.forget_calls()
    worker.counter.lost.add("take")
    assert (await worker.reserve()).start == LEASE + 1
    assert worker.calls == (["take"], ["lease"])
    assert (await rig.worker().reserve()).start == 2 * SIZE + 1


async def test_at_most_once_a_seat_without_reply(rig: Rig, worker: Worker) -> None:
    """The counter may stand on that lease now, so it is served neither twice nor directly."""
    worker.counter.lost.add("seat")
    assert await worker.reserve() == Segment(LEASE + 1, LEASE + SIZE + 1)
    assert worker.calls == (["take", "seat"], ["lease", "lease"])
    assert worker.metrics.gap_ids_total == {"lost": LEASE}
    assert await rig.worker().reserve() == Segment(SIZE + 1, 2 * SIZE + 1)


async def test_at_most_once_an_addition_without_reply(rig: Rig, worker: Worker) -> None:
    """The counter's lease may have grown, so what was added is served neither twice nor here."""
    await spend(worker)
    worker.forget_calls()
    worker.counter.lost.add("extend")
    assert (await worker.reserve()).start == 2 * LEASE + 1
    assert worker.calls == (["take", "extend"], ["extend", "lease"])
    assert worker.metrics.gap_ids_total == {"lost": LEASE}
    assert (await rig.worker().reserve()).start == LEASE + 1


async def test_at_most_once_an_extension_without_reply(worker: Worker) -> None:
    """Whether the ledger extended is not known: no other request follows, and nothing is served."""
    await spend(worker)
    worker.forget_calls()
    worker.ledger.lost.add("extend")
    with pytest.raises(Unavailable):
        await worker.reserve()
    assert worker.calls == (["take"], ["extend"])
    worker.ledger.lost.clear()
    assert (await worker.reserve()).start == 2 * LEASE + 1


@pytest.mark.parametrize("store", ["ledger", "counter"])
async def test_at_most_once_an_extension_ahead_without_reply(worker: Worker, store: str) -> None:
    """The same off the path of requests: neither of its steps is repeated."""
    await worker.reserve()
    worker.forget_calls()
    (worker.ledger if store == "ledger" else worker.counter).lost.add("extend")
    with pytest.raises(Unavailable):
        await worker.extend_ahead()
    steps = ["inspect"] if store == "ledger" else ["inspect", "extend"]
    assert worker.calls == (steps, ["extend"])


# 5. Extend by compare-and-set


async def test_extend_only_a_lease_that_the_row_ends_with(rig: Rig, worker: Worker) -> None:
    """Somebody leased above the counter's lease: it does not grow into what is theirs."""
    await worker.reserve()
    outside = rig.ledger.take_from_outside("orders", 7)
    await worker.extend_ahead()
    assert worker.counter.calls[-1] == "inspect"
    assert rig.row() == outside.last
    assert rig.counter.snapshot()["orders"].lease_end == LEASE


async def test_extend_only_a_counter_that_still_ends_there(rig: Rig, worker: Worker) -> None:
    """Somebody seated the counter anew meanwhile: the addition is ours, not the counter's."""
    await spend(worker)
    other, cut = rig.worker(), []

    async def come_first() -> None:
        cut.append(await other.reserve())

    worker.counter.before["extend"] = come_first
    assert await worker.reserve() == Segment(LEASE + 1, 2 * LEASE + 1)
    assert cut == [Segment(2 * LEASE + 1, 2 * LEASE + 1 + SIZE)]
    assert rig.counter.snapshot()["orders"].lease_end == 3 * LEASE


async def test_extend_ahead_keeps_a_lease_ahead(rig: Rig, worker: Worker) -> None:
    """Less than a lease ahead of the counter is topped up by one; enough is left alone."""
    await worker.reserve()
    await worker.extend_ahead()
    await worker.extend_ahead()
    assert worker.ledger.calls == ["lease", "extend"]
    assert rig.row() == rig.counter.snapshot()["orders"].lease_end == 2 * LEASE
    assert [(await worker.reserve(50)).start for _ in range(2)] == [11, 61]


async def test_extend_ahead_gives_back_what_the_counter_refuses(rig: Rig, worker: Worker) -> None:
    """Nobody waits for it, so an addition that the counter refuses is no gap."""
    await worker.reserve()
    worker.counter.before["extend"] = rig.counter.fail_over
    await worker.extend_ahead()
    assert rig.row() == LEASE
    assert worker.metrics.returned_ids_total == LEASE
    assert (await worker.reserve()).start == LEASE + 1


async def test_extend_ahead_seats_nobody(rig: Rig, worker: Worker) -> None:
    """A counter that is missing waits for a request."""
    await worker.extend_ahead()
    assert worker.calls == (["inspect"], [])


# 6. Floor


async def test_floor_goes_with_every_request(rig: Rig, worker: Worker) -> None:
    """Two workers, a ledger that lost its commits: who remembers leases above what he saw."""
    await worker.reserve()
    rig.ledger.forget("orders", LEASE)
    rig.counter.flush()
    assert (await worker.reserve()).start == LEASE + 1


async def test_floor_is_learnt_from_the_counter(rig: Rig, worker: Worker) -> None:
    """A cut says how far leases go, also to a worker that leased none."""
    await worker.reserve()
    other = rig.worker()
    await other.reserve()
    rig.ledger.forget("orders", LEASE)
    rig.counter.flush()
    assert (await other.reserve()).start == LEASE + 1


async def test_floor_is_learnt_from_stale_data(rig: Rig, worker: Worker) -> None:
    """A hash that must not be cut from still says how far leases went."""
    await worker.reserve()
    rig.ledger.forget("orders", LEASE)
    rig.counter.fail_over()
    assert (await rig.worker().reserve()).start == LEASE + 1


async def test_floor_is_learnt_from_an_extension(rig: Rig, worker: Worker) -> None:
    """What was added to a lease counts as seen, too."""
    await worker.reserve()
    await worker.extend_ahead()
    rig.ledger.forget("orders", LEASE)
    rig.counter.flush()
    assert (await worker.reserve()).start == 2 * LEASE + 1


async def test_floor_above_a_lease_forbids_to_extend_it(rig: Rig, worker: Worker) -> None:
    """A row that lost commits may end where the lease ends; somebody owns what lies above."""
    await worker.reserve()
    worker.counter.lost.add("take")
    direct = await worker.reserve()
    worker.counter.lost.clear()
    rig.ledger.forget("orders", direct.size)
    await worker.extend_ahead()
    assert rig.row() == LEASE
    assert worker.ledger.calls == ["lease", "lease"]


async def test_floor_a_row_that_was_lowered_is_raised(rig: Rig, worker: Worker) -> None:
    """The comparison raises a row that is behind its counter, and leaves one that leads alone."""
    await worker.reserve()
    await worker.compare()
    assert worker.ledger.calls == ["lease", "read"]
    rig.ledger.forget("orders", 30)
    await worker.compare()
    assert rig.row() == LEASE
    rig.ledger.take_from_outside("orders", 1)
    await worker.compare()
    assert rig.row() == LEASE + 1


# 7. Never backwards


async def test_never_backwards_around_an_outage(rig: Rig, worker: Worker) -> None:
    """Whatever way segments come, a pool has no reason to refuse one."""
    pool, other = Pool(), rig.worker()
    for turn in range(40):
        rig.counter.down = turn % 5 in (1, 2)
        await other.reserve()
        assert pool.offer(await worker.reserve())


# 8. Give back, or leave a gap


async def test_give_back_to_the_counter_what_it_cut(rig: Rig, worker: Worker) -> None:
    """The tail of a cut is cut off again by whoever comes next; the ledger hears nothing of it."""
    await worker.reserve()
    worker.forget_calls()
    await worker.give_back(Segment(4, 11))
    assert worker.calls == (["give_back"], [])
    assert await rig.worker().reserve() == Segment(4, 14)
    assert (worker.metrics.returned_ids_total, worker.metrics.gap_ids_total) == (7, {})


async def test_give_back_to_the_ledger_what_it_leased(rig: Rig, worker: Worker) -> None:
    """The tail of a direct lease goes to the ledger alone."""
    rig.counter.down = True
    assert await worker.reserve() == Segment(1, 11)
    worker.forget_calls()
    await worker.give_back(Segment(4, 11))
    assert worker.calls == ([], ["give_back"])
    assert await worker.reserve() == Segment(4, 14)


async def test_give_back_a_tail_of_both_to_the_ledger(rig: Rig, worker: Worker) -> None:
    """Adjoining segments have one tail: it goes where its last ID came from."""
    await spend(worker)
    rig.counter.down = True
    assert (await worker.reserve()).start == LEASE + 1
    rig.counter.down = False
    await worker.give_back(Segment(95, LEASE + SIZE + 1))
    assert rig.row() == 94
    # The counter has nothing left below its end, so 95 to 100 are leased again, once.
    other = rig.worker()
    assert (await other.reserve()).start == LEASE + 1
    assert worker.metrics.gap_ids_total == {}


async def test_give_back_a_tail_of_both_to_the_counter(rig: Rig, worker: Worker) -> None:
    """The other way round the counter cuts it off again, although its lease began later."""
    rig.counter.down = True
    assert await worker.reserve() == Segment(1, 11)
    rig.counter.down = False
    assert await worker.reserve() == Segment(11, 21)
    await worker.give_back(Segment(8, 21))
    assert await rig.worker().reserve() == Segment(8, 18)
    assert rig.row() == SIZE + LEASE


async def test_give_back_nothing_above_which_somebody_cut(rig: Rig, worker: Worker) -> None:
    """What somebody cut above is not put at risk."""
    await worker.reserve()
    await rig.worker().reserve()
    await worker.give_back(Segment(4, 11))
    assert (await rig.worker().reserve()).start == 21
    assert worker.metrics.gap_ids_total == {"unreturned": 7}


async def test_give_back_nothing_to_another_redis(rig: Rig, worker: Worker) -> None:
    """After a failover the tail is a gap; it is not offered to the ledger either."""
    await worker.reserve()
    rig.counter.fail_over()
    worker.forget_calls()
    await worker.give_back(Segment(4, 11))
    assert worker.calls == (["give_back"], [])
    assert worker.metrics.gap_ids_total == {"unreturned": 7}


@pytest.mark.parametrize("acts", [False, True])
async def test_give_back_once(rig: Rig, worker: Worker, acts: bool) -> None:
    """A tail whose way back has an unknown end is a gap, and goes nowhere else."""
    await worker.reserve()
    worker.forget_calls()
    rig.counter.down, rig.counter.lose_reply = not acts, acts
    await worker.give_back(Segment(4, 11))
    assert worker.calls == (["give_back"], [])
    assert worker.metrics.gap_ids_total == {"unreturned": 7}
    assert worker.metrics.returned_ids_total == 0


async def test_give_back_a_lease_that_was_refused_a_seat(rig: Rig, worker: Worker) -> None:
    """A lease that was served directly is the ledger's, whatever the counter cut before."""
    await worker.reserve()
    rig.counter.flush()
    worker.counter.before["seat"] = lambda: rig.counter.restart({"orders": State(1, CLOSED, 1)})
    lease = await worker.reserve()
    assert lease == Segment(LEASE + 1, 2 * LEASE + 1)
    await worker.give_back(Segment(lease.start + 5, lease.stop))
    assert rig.row() == lease.start + 4


async def test_every_cut_is_reported(worker: Worker) -> None:
    """Who keeps counter and ledger in step is told of every cut, and if a lease runs short."""
    told: list[tuple[str, bool]] = []
    worker.reservation.on_cut = lambda service, is_short: told.append((service, is_short))
    for service in "aaaaaba":
        await worker.reserve(service=service)
    assert told == [*[("a", False)] * 5, ("b", False), ("a", True)]
