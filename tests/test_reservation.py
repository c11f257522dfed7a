"""The rules of uniqueness where segments come from and tails go back to, one by one."""

import itertools
from collections.abc import Sequence

import attrs
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from idalloc_tcp import reservation as module
from idalloc_tcp.errors import Exhausted, Unavailable
from idalloc_tcp.ledger import Tail
from idalloc_tcp.metrics import Metrics
from idalloc_tcp.pool import MAX_ID, Segment
from idalloc_tcp.reservation import Reservation
from tests.fakes import FakeLedger, RecordingLedger


@attrs.define
class Rig:
    """A reservation on a ledger that can fail, with every call noted."""

    ceiling: int = MAX_ID
    ledger: FakeLedger = attrs.field(init=False, factory=FakeLedger)
    recorder: RecordingLedger = attrs.field(init=False)
    metrics: Metrics = attrs.field(init=False, factory=Metrics)
    reservation: Reservation = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.recorder = RecordingLedger(self.ledger)
        self.reservation = Reservation(self.recorder, lambda _service: self.ceiling, self.metrics)

    async def reserve(self, size: int, service: str = "orders") -> Segment:
        self.reservation.health.is_up = True  # As if the pause after a failure were over.
        return await self.reservation.reserve(service, size)

    async def give_back(self, *segments: Segment, service: str = "orders") -> None:
        self.reservation.health.is_up = True
        await self.reservation.give_back([Tail(service, segment) for segment in segments])

    @property
    def floors(self) -> list[int]:
        return [call.floor for call in self.recorder.lease_calls]

    @property
    def sizes(self) -> list[int]:
        return [call.size for call in self.recorder.lease_calls]


@pytest.fixture
def rig() -> Rig:
    """One rig without a ceiling."""
    return Rig()


@attrs.define
class ForgetfulLedger:
    """A ledger that has lost its commits and heeds no floor: it leases what it was told to."""

    segments: list[Segment]

    async def lease(self, _service: str, _size: int, *, floor: int, ceiling: int) -> Segment:
        """As `Ledger.lease`, but wrong."""
        assert floor <= ceiling
        return self.segments.pop(0)

    async def give_back(self, tails: Sequence[Tail]) -> list[bool]:
        """As `Ledger.give_back`."""
        return [False for _ in tails]

    async def aclose(self) -> None:
        """As `Ledger.aclose`."""


async def test_segment_is_what_the_ledger_committed(rig: Rig, autojump_clock: MockClock) -> None:
    """Lead: nothing is reserved before the ledger committed it, and nothing else than that."""
    rig.ledger.delay_seconds = rig.ledger.reply_seconds = 1
    for size in (100, 7, 1):
        began_at = trio.current_time()
        segment = await rig.reserve(size)
        assert segment.size == size
        assert segment == rig.ledger.leases[-1].segment
        assert trio.current_time() == began_at + 2
    assert (rig.metrics.leases_total, rig.metrics.leased_ids_total) == (3, 108)


async def test_nothing_is_reserved_without_the_ledger(rig: Rig) -> None:
    """Lead: a ledger that does not answer, or whose answer is lost, leaves nothing to serve."""
    await rig.reserve(100)
    rig.ledger.down = True
    with pytest.raises(Unavailable):
        await rig.reserve(100)
    rig.ledger.down, rig.ledger.lose_reply = False, True
    with pytest.raises(Unavailable):
        await rig.reserve(100)
    assert (rig.metrics.leases_total, rig.metrics.lease_failures_total) == (1, 2)


async def test_lease_is_sent_at_most_once(rig: Rig) -> None:
    """At most once: a failed lease is not repeated, and one whose reply was lost is a gap."""
    rig.ledger.fail_next(1)
    with pytest.raises(Unavailable):
        await rig.reserve(100)
    rig.ledger.lose_reply = True
    with pytest.raises(Unavailable):
        await rig.reserve(100)
    rig.ledger.lose_reply = False
    assert rig.sizes == [100, 100]
    assert await rig.reserve(100) == Segment(101, 201)


async def test_cancelled_lease_is_lost(rig: Rig, autojump_clock: MockClock) -> None:
    """At most once: what a cancelled call may have leased is never served."""
    rig.ledger.reply_seconds = 5
    with trio.move_on_after(1):
        await rig.reserve(100)
    assert len(rig.sizes) == 1
    assert await rig.reserve(100) == Segment(101, 201)


async def test_floor_is_the_highest_lease_end(rig: Rig) -> None:
    """Floor: every request carries the highest end seen so far, for each service its own."""
    for service, size in [("orders", 100), ("users", 7), ("orders", 50), ("orders", 1)]:
        await rig.reserve(size, service)
    rig.ledger.take_from_outside("orders", 1_000)
    await rig.reserve(1)
    await rig.reserve(1)
    assert rig.floors == [0, 0, 100, 150, 151, 1_152]


async def test_floor_repairs_a_ledger_that_lost_commits(rig: Rig) -> None:
    """Floor: what was seen once is never leased again, whatever the ledger forgot."""
    await rig.reserve(100)
    await rig.reserve(100)
    rig.ledger.forget("orders", 150)
    assert await rig.reserve(100) == Segment(201, 301)


async def test_failure_keeps_the_floor(rig: Rig) -> None:
    """Floor: a failed request does not touch it."""
    await rig.reserve(100)
    rig.ledger.fail_next(1)
    with pytest.raises(Unavailable):
        await rig.reserve(100)
    await rig.reserve(100)
    assert rig.floors == [0, 100, 100]


async def test_floor_never_sinks_by_a_late_reply(rig: Rig, autojump_clock: MockClock) -> None:
    """Floor: of two replies that overtake each other the higher one counts."""
    async with trio.open_nursery() as nursery:
        rig.ledger.reply_seconds = 2
        nursery.start_soon(rig.reserve, 100)
        await trio.sleep(1)
        rig.ledger.reply_seconds = 0
        await rig.reserve(100)
    rig.ledger.forget("orders", 200)
    assert await rig.reserve(1) == Segment(201, 202)


@pytest.mark.parametrize("stale", [Segment(1, 101), Segment(51, 101), Segment(100, 200)])
async def test_lease_below_the_floor_is_refused(stale: Segment) -> None:
    """Floor: a ledger that leases what was seen before, even in part, is not believed."""
    ledger = ForgetfulLedger([Segment(1, 101), stale, Segment(101, 201)])
    reservation = Reservation(ledger, lambda _service: MAX_ID, Metrics())
    await reservation.reserve("orders", 100)
    with pytest.raises(Unavailable, match="below its floor"):
        await reservation.reserve("orders", 100)
    assert await reservation.reserve("orders", 100) == Segment(101, 201)


async def test_floors_are_bounded(rig: Rig) -> None:
    """Only so many floors are remembered: the longest unused one goes first."""
    rig.reservation._floors.services_max = 2
    for service in ("a", "b", "a", "c", "a", "b", "c"):
        await rig.reserve(10, service)
    assert rig.floors == [0, 0, 10, 0, 20, 0, 0]


async def test_tail_goes_back_and_is_leased_anew(rig: Rig) -> None:
    """Give back: a tail that was taken back leaves no gap, for the floor follows it down."""
    await rig.reserve(100)
    await rig.give_back(Segment(61, 101))
    assert await rig.reserve(100) == Segment(61, 161)
    assert rig.metrics.returned_ids_total == 40
    assert not rig.metrics.gap_ids_total


async def test_tail_below_another_lease_stays_a_gap(rig: Rig) -> None:
    """Give back: what somebody leased above is never put at risk; the tail is a gap."""
    await rig.reserve(100)
    rig.ledger.take_from_outside("orders", 50)
    await rig.give_back(Segment(61, 101))
    assert await rig.reserve(100) == Segment(151, 251)
    assert rig.metrics.returned_ids_total == 0
    assert rig.metrics.gap_ids_total == {"unreturned": 40}


async def test_floor_stays_if_it_did_not_stand_on_the_tail(rig: Rig) -> None:
    """Give back: a ledger that lost commits may take a low tail back; the floor stays above."""
    await rig.reserve(100)
    await rig.reserve(100)
    rig.ledger.forget("orders", 100)
    await rig.give_back(Segment(51, 101))
    assert rig.metrics.returned_ids_total == 50
    assert await rig.reserve(1) == Segment(201, 202)


@pytest.mark.parametrize("acts", [False, True])
async def test_tail_is_sent_back_at_most_once(rig: Rig, acts: bool) -> None:
    """Give back, once: if the outcome is not known the tail is a gap, and the floor stays."""
    await rig.reserve(100)
    rig.ledger.down, rig.ledger.lose_reply = not acts, acts
    await rig.give_back(Segment(61, 101))
    rig.ledger.down = rig.ledger.lose_reply = False
    assert len(rig.recorder.give_back_calls) == 1
    assert rig.metrics.returned_ids_total == 0
    assert rig.metrics.gap_ids_total == {"unreturned": 40}
    assert await rig.reserve(1) == Segment(101, 102)


async def test_tails_go_back_in_batches(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give back: no request is larger than the bound, and the order is kept."""
    monkeypatch.setattr(module, "TAILS_MAX", 3)
    services = [f"service{index}" for index in range(8)]
    for service in services:
        await rig.reserve(10, service)
    tails = [Tail(service, Segment(2, 11)) for service in services]
    await rig.reservation.give_back(tails)
    assert rig.recorder.give_back_calls == [tails[:3], tails[3:6], tails[6:]]
    assert rig.metrics.returned_ids_total == 8 * 9
    assert [(await rig.reserve(1, service)).start for service in services] == [2] * 8


async def test_a_ledger_that_went_is_not_asked_for_every_batch(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Give back: after a failure the rest is a gap at once, so that a stop does not take long."""
    monkeypatch.setattr(module, "TAILS_MAX", 3)
    services = [f"service{index}" for index in range(8)]
    for service in services:
        await rig.reserve(10, service)
    rig.ledger.down = True
    await rig.reservation.give_back([Tail(service, Segment(2, 11)) for service in services])
    assert len(rig.recorder.give_back_calls) == 1
    assert rig.metrics.gap_ids_total == {"unreturned": 8 * 9}


async def test_giving_nothing_back_asks_nobody(rig: Rig) -> None:
    """No tails, no request."""
    await rig.give_back()
    assert rig.recorder.give_back_calls == []


async def test_lease_waits_for_the_tails_of_its_service(
    rig: Rig, autojump_clock: MockClock
) -> None:
    """Give back: a lease that comes meanwhile begins where the tail did; others do not wait."""
    await rig.reserve(100)
    rig.ledger.delay_seconds = rig.ledger.reply_seconds = 1
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.give_back, Segment(61, 101))
        await wait_all_tasks_blocked()
        nursery.start_soon(rig.reserve, 10, "users")
        assert await rig.reserve(100) == Segment(61, 161)
    assert trio.current_time() == 4
    assert rig.metrics.returned_ids_total == 40
    assert not rig.metrics.gap_ids_total


async def test_lease_does_not_wait_for_tails_for_ever(rig: Rig, autojump_clock: MockClock) -> None:
    """Give back: while a ledger hangs on tails, a lease fails in time, and is not sent."""
    await rig.reserve(100)
    rig.ledger.delay_seconds = 100
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.give_back, Segment(61, 101))
        await wait_all_tasks_blocked()
        with pytest.raises(Unavailable, match="slow"):
            await rig.reserve(100)
        assert trio.current_time() == module.RETURN_SECONDS
        nursery.cancel_scope.cancel()
    rig.ledger.delay_seconds = 0
    assert rig.sizes == [100]
    assert await rig.reserve(100) == Segment(101, 201)


async def test_tail_stays_a_gap_while_its_service_is_leased(
    rig: Rig, autojump_clock: MockClock
) -> None:
    """Give back: a lease under way may begin above the tail, so it counts as a gap at once."""
    await rig.reserve(100)
    rig.ledger.delay_seconds = 1
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.reserve, 100)
        await wait_all_tasks_blocked()
        await rig.give_back(Segment(61, 101))
    assert rig.ledger.leases[-1].segment == Segment(101, 201)
    assert rig.recorder.give_back_calls == []
    assert rig.metrics.returned_ids_total == 0
    assert rig.metrics.gap_ids_total == {"unreturned": 40}


async def test_size_is_what_is_left_near_the_ceiling() -> None:
    """Exhausted is certain, so one request for all that is left may follow; without, none."""
    rig = Rig(ceiling=11)
    assert await rig.reserve(8) == Segment(1, 9)
    assert await rig.reserve(8) == Segment(9, 12)
    for size in (8, 1):
        with pytest.raises(Exhausted, match="below the ceiling 11"):
            await rig.reserve(size)
    assert rig.sizes == [8, 8, 3, 8, 1]
    assert (rig.metrics.leases_total, rig.metrics.lease_failures_total) == (2, 0)


async def test_what_is_left_shrinks_while_it_is_asked_for(autojump_clock: MockClock) -> None:
    """Others take from what is left: each request is for less, and so there is a last one."""
    rig = Rig(ceiling=100)
    rig.ledger.delay_seconds = 1

    async def take_from_outside() -> None:
        await trio.sleep(0.5)
        for size in (95, 2):
            rig.ledger.take_from_outside("orders", size)
            await trio.sleep(1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take_from_outside)
        assert await rig.reserve(50) == Segment(98, 101)
    assert rig.sizes == [50, 5, 3]


async def test_failure_near_the_ceiling_is_the_end(rig: Rig) -> None:
    """At most once: only a certain answer is followed by another request."""
    rig.ceiling = 10
    rig.ledger.lose_reply = True
    with pytest.raises(Unavailable):
        await rig.reserve(8)
    assert rig.sizes == [8]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 300), st.lists(st.integers(1, 100), min_size=1, max_size=5))
def test_every_id_up_to_the_ceiling_is_used(room: int, sizes: list[int]) -> None:
    """Whatever is asked for, the segments follow each other up to the very last ID."""

    async def main() -> None:
        rig = Rig(ceiling=MAX_ID)
        rig.ledger.take_from_outside("orders", MAX_ID - room)
        expected = MAX_ID - room + 1
        for size in itertools.cycle(sizes):
            try:
                segment = await rig.reserve(size)
            except Exhausted:
                break
            assert segment.start == expected
            expected = segment.stop
        assert expected == MAX_ID + 1

    trio.run(main)


async def test_the_ledgers_absence_is_logged_once(
    rig: Rig, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    """However often it is asked for, a ledger that goes and comes back is two lines of the log."""
    caplog.set_level("INFO")
    rig.ledger.down = True
    for _ in range(9):
        with pytest.raises(Unavailable):
            await rig.reservation.reserve("orders", 10)
        await trio.sleep(0.3)
    rig.ledger.down = False
    await trio.sleep(1)
    for _ in range(3):
        await rig.reservation.reserve("orders", 10)
    assert caplog.messages == ["the ledger is down", "the ledger is back"]
