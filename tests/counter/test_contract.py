"""What every counter must do, asked of the fake and of the real one alike."""

from collections.abc import AsyncIterator
from typing import Final

import attrs
import pytest
import trio

from idalloc_tcp.counter import Cut, Reason, Refusal, State
from idalloc_tcp.errors import Unavailable
from idalloc_tcp.ledger import CLOSED, Tail
from idalloc_tcp.pool import MAX_ID, Segment
from tests.counter.rigs import RIGS, FakeRig, Rig
from tests.fakes import FakeCounter

LEASE: Final = Segment(101, 201)


@pytest.fixture(params=RIGS)
async def rig(request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    """Each kind of counter in turn, empty."""
    async with RIGS[request.param](request) as opened:
        yield opened


async def take(rig: Rig, size: int, *, floor: int = 0) -> Cut | Refusal:
    """Cut a segment of `orders`."""
    return await rig.counter.take("orders", size, floor=floor)


async def refusal_of(rig: Rig, *, floor: int = 0) -> Refusal:
    """Why nothing can be cut."""
    answer = await take(rig, 10, floor=floor)
    assert isinstance(answer, Refusal)
    return answer


async def seat(rig: Rig, lease: Segment = LEASE, size: int = 10, *, floor: int = 0) -> Segment:
    """Seat it on a lease, for whatever reason it has; the first segment."""
    refusal = await refusal_of(rig, floor=floor)
    answer = await rig.counter.seat("orders", lease, size, refusal, floor=floor)
    assert isinstance(answer, Cut)
    return answer.segment


async def state_of(rig: Rig) -> State:
    """What it holds for `orders`."""
    return (await rig.counter.inspect("orders"))[0]


# Taking and seating


async def test_nothing_is_missing(rig: Rig) -> None:
    """A counter that knows nothing of a service says so, and that it holds nothing."""
    assert await take(rig, 10) == Refusal(Reason.MISSING, State())
    assert await rig.counter.inspect("orders") == (State(), False)


async def test_seat_cuts_the_first_segment(rig: Rig) -> None:
    """A seat answers with the start of the lease, and the next segments adjoin it."""
    assert await seat(rig) == Segment(101, 111)
    answer = await take(rig, 20)
    assert isinstance(answer, Cut)
    assert answer.segment == Segment(111, 131)
    assert answer.state == attrs.evolve(answer.state, last_alloc_value=130, lease_end=200)
    assert answer.state.data_version == CLOSED
    assert await rig.counter.inspect("orders") == (answer.state, True)


async def test_lease_is_cut_to_its_last_id(rig: Rig) -> None:
    """The last segment of a lease is as small as what is left; after it the lease is spent."""
    await seat(rig, size=95)
    answer = await take(rig, 10)
    assert isinstance(answer, Cut)
    assert answer.segment == Segment(196, 201)
    assert (await refusal_of(rig)).reason is Reason.SPENT
    assert (await state_of(rig)).last_alloc_value == 200


async def test_seat_cuts_no_more_than_the_lease(rig: Rig) -> None:
    """A lease that is smaller than a segment is given away whole."""
    assert await seat(rig, Segment(1, 6), size=10) == Segment(1, 6)
    assert (await refusal_of(rig)).reason is Reason.SPENT


async def test_services_do_not_touch_each_other(rig: Rig) -> None:
    """Every service has a hash of its own."""
    await seat(rig)
    answer = await rig.counter.take("users", 10, floor=0)
    assert answer == Refusal(Reason.MISSING, State())


async def test_floor_passes_a_lease(rig: Rig) -> None:
    """A lease that ends below the floor is not cut; one that ends at it is."""
    await seat(rig)
    assert isinstance(await take(rig, 10, floor=200), Cut)
    assert (await refusal_of(rig, floor=201)).reason is Reason.PASSED
    assert await seat(rig, Segment(301, 401), floor=201) == Segment(301, 311)


async def test_another_redis_makes_it_stale(rig: Rig) -> None:
    """Data that was written under another Redis is not cut from, until it is seated anew."""
    await seat(rig)
    await rig.fail_over()
    refusal = await refusal_of(rig)
    assert refusal.reason is Reason.STALE
    assert refusal.state.last_alloc_value == 110
    assert (await rig.counter.inspect("orders"))[1] is False
    assert not await rig.counter.extend("orders", 200, 300)
    assert not await rig.counter.give_back(Tail("orders", Segment(105, 111)))
    assert await seat(rig, Segment(201, 301)) == Segment(201, 211)


async def test_flushed_counter_is_missing(rig: Rig) -> None:
    """A counter that lost everything starts on a lease of its own again."""
    await seat(rig)
    await rig.flush()
    assert (await refusal_of(rig)).reason is Reason.MISSING
    assert await seat(rig, Segment(201, 301)) == Segment(201, 211)


async def test_of_two_seats_for_one_reason_one_is_refused(rig: Rig) -> None:
    """Who comes second keeps the lease, and the counter stays where the first has put it."""
    refusal = await refusal_of(rig)
    assert isinstance(await rig.counter.seat("orders", LEASE, 10, refusal, floor=0), Cut)
    other = Segment(201, 301)
    answer = await rig.counter.seat("orders", other, 10, refusal, floor=0)
    assert answer == Refusal(None, await state_of(rig))
    assert (await state_of(rig)).lease_end == 200


async def test_seat_for_a_spent_lease_is_refused_after_another_was_spent(rig: Rig) -> None:
    """The same reason about another lease is another reason."""
    await seat(rig, Segment(1, 11))
    refusal = await refusal_of(rig)
    await seat(rig, Segment(21, 31))
    assert (await refusal_of(rig)).reason is refusal.reason
    answer = await rig.counter.seat("orders", Segment(11, 21), 10, refusal, floor=0)
    assert answer == Refusal(None, await state_of(rig))


async def test_seat_is_refused_once_its_reason_is_gone(rig: Rig) -> None:
    """A lease from which somebody gave back is no longer spent, and is not replaced."""
    await seat(rig, size=100)
    refusal = await refusal_of(rig)
    assert await rig.counter.give_back(Tail("orders", Segment(191, 201)))
    answer = await rig.counter.seat("orders", Segment(301, 401), 10, refusal, floor=0)
    assert answer == Refusal(None, await state_of(rig))
    assert (await state_of(rig)).lease_end == 200


# Extending and giving back


async def test_extension_goes_on_where_the_lease_ended(rig: Rig) -> None:
    """A lease that was lengthened is cut without a gap; a second time is refused."""
    await seat(rig, size=100)
    assert await rig.counter.extend("orders", 200, 300)
    assert not await rig.counter.extend("orders", 200, 300)
    answer = await take(rig, 10)
    assert isinstance(answer, Cut)
    assert answer.segment == Segment(201, 211)


async def test_nothing_is_not_extended(rig: Rig) -> None:
    """Without a lease, or on an original's hash, there is nothing to lengthen."""
    assert not await rig.counter.extend("orders", 0, 100)
    await rig.write_original("orders", 50, 7)
    assert not await rig.counter.extend("orders", 0, 100)
    assert not await rig.counter.extend("orders", 50, 100)


async def test_last_tail_is_taken_back_once(rig: Rig) -> None:
    """The end of the last segment is cut again after it was given back, but only once."""
    await seat(rig)
    tail = Tail("orders", Segment(104, 111))
    assert await rig.counter.give_back(tail)
    assert not await rig.counter.give_back(tail)
    answer = await take(rig, 2)
    assert isinstance(answer, Cut)
    assert answer.segment == Segment(104, 106)


async def test_tail_below_another_segment_is_refused(rig: Rig) -> None:
    """Nothing is taken back once something after it was cut."""
    await seat(rig)
    await take(rig, 10)
    assert not await rig.counter.give_back(Tail("orders", Segment(105, 111)))
    assert not await rig.counter.give_back(Tail("nobody", Segment(105, 111)))


async def test_tail_of_a_spent_lease_is_taken_back(rig: Rig) -> None:
    """A lease whose end was given back is no longer spent."""
    await seat(rig, size=100)
    assert await rig.counter.give_back(Tail("orders", Segment(150, 201)))
    answer = await take(rig, 100)
    assert isinstance(answer, Cut)
    assert answer.segment == Segment(150, 201)


# Beside the original, and after it


async def test_hash_of_the_original_is_foreign(rig: Rig) -> None:
    """A hash without our fields is not cut from as if it were ours, and is left as it is."""
    await rig.write_original("orders", 50, 7)
    assert await take(rig, 10) == Refusal(Reason.FOREIGN, State(50, 7))
    assert await rig.counter.inspect("orders") == (State(50, 7), False)
    assert not await rig.counter.give_back(Tail("orders", Segment(41, 51)))


async def test_cuts_beside_the_original(rig: Rig) -> None:
    """Beside the original both numbers move as it would move them."""
    await rig.write_original("orders", 50, 7)
    answer = await rig.counter.cut_beside("orders", 10)
    assert answer == Cut(Segment(51, 61), State(60, 8))
    assert await state_of(rig) == State(60, 8)


async def test_cuts_not_beside_where_the_original_is_gone(rig: Rig) -> None:
    """Without a hash, or with one that is ours, nothing is cut beside anybody."""
    assert await rig.counter.cut_beside("orders", 10) == Refusal(Reason.MISSING, State())
    await seat(rig)
    state = await state_of(rig)
    assert await rig.counter.cut_beside("orders", 10) == Refusal(None, state)
    assert await state_of(rig) == state


@pytest.mark.parametrize("last", [0, 50, 2**53 + 1])
async def test_takes_over(rig: Rig, last: int) -> None:
    """A hash that was taken over is ours, has nothing in its lease, and is seated as any other."""
    await rig.write_original("orders", last, 7)
    refusal = await rig.counter.take_over("orders")
    assert refusal.reason is Reason.SPENT
    assert (refusal.state.last_alloc_value, refusal.state.lease_end) == (last, last)
    assert refusal.state.data_version == CLOSED
    assert await rig.counter.take_over("orders") == Refusal(None, refusal.state)
    assert await refusal_of(rig) == refusal
    lease = Segment(last + 11, last + 21)
    answer = await rig.counter.seat("orders", lease, 5, refusal, floor=last)
    assert isinstance(answer, Cut)
    assert answer.segment == Segment(last + 11, last + 16)


async def test_nothing_is_not_taken_over(rig: Rig) -> None:
    """Where there is no hash there is nothing of the original."""
    assert await rig.counter.take_over("orders") == Refusal(None, State())
    assert await state_of(rig) == State()


async def test_foreign_hash_is_seated(rig: Rig) -> None:
    """If the original never comes back its hash may be replaced like any other."""
    await rig.write_original("orders", 50, 7)
    assert await seat(rig) == Segment(101, 111)
    assert (await state_of(rig)).data_version == CLOSED


# Numbers


@pytest.mark.parametrize("start", [2**53 - 15, 2**62 + 1, MAX_ID - 99])
async def test_numbers_are_exact(rig: Rig, start: int) -> None:
    """Where doubles are no longer exact every ID still is, up to the last of all."""
    lease = Segment(start, start + 100)
    segments = [await seat(rig, lease, 7)]
    while isinstance(answer := await take(rig, 7), Cut):
        segments.append(answer.segment)
    assert answer.reason is Reason.SPENT
    assert [segment.start for segment in segments] == list(range(start, start + 100, 7))
    assert [segment.stop for segment in segments][:-1] == [each.start for each in segments][1:]
    assert segments[-1].stop == lease.stop
    assert await rig.counter.give_back(Tail("orders", Segment(start + 99, start + 100)))
    assert (await state_of(rig)).last_alloc_value == start + 98


async def test_enormous_size_takes_what_there_is(rig: Rig) -> None:
    """A size that would overflow ends at the lease's end."""
    await seat(rig, Segment(MAX_ID - 99, MAX_ID + 1), 10)
    answer = await take(rig, MAX_ID)
    assert isinstance(answer, Cut)
    assert answer.segment == Segment(MAX_ID - 89, MAX_ID + 1)


async def test_concurrent_cuts_are_disjoint(rig: Rig) -> None:
    """Tasks that cut at the same time share the lease without overlap or gap."""
    await seat(rig, Segment(1, 1_001), 50)
    segments: list[Segment] = []

    async def take_some() -> None:
        for _ in range(5):
            answer = await take(rig, 10)
            assert isinstance(answer, Cut)
            segments.append(answer.segment)

    async with trio.open_nursery() as nursery:
        for _ in range(12):
            nursery.start_soon(take_some)
    assert sorted(segments) == [Segment(start, start + 10) for start in range(51, 651, 10)]


async def test_closes_while_being_cancelled(rig: Rig) -> None:
    """Closing is done even in a cancelled scope, does not raise there, and may be repeated."""
    await take(rig, 10)
    with trio.CancelScope() as scope:
        scope.cancel()
        await rig.counter.aclose()
    assert not scope.cancelled_caught
    await rig.counter.aclose()


# The fake fails as it is told to, so that tests can rely on it


@pytest.mark.parametrize("acts", [False, True])
async def test_fake_fails_before_or_after_it_acts(acts: bool) -> None:
    """A fake that is down cuts nothing; one whose reply is lost has cut the segment."""
    fake = FakeCounter()
    await seat(FakeRig(fake))
    fake.down, fake.lose_reply = not acts, acts
    with pytest.raises(Unavailable):
        await fake.take("orders", 10, floor=0)
    fake.down = fake.lose_reply = False
    answer = await fake.take("orders", 10, floor=0)
    assert isinstance(answer, Cut)
    assert answer.segment.start == (121 if acts else 111)


async def test_fake_restarts_with_old_data_or_none() -> None:
    """A restart brings a snapshot back, or nothing, under another fence."""
    fake = FakeCounter()
    await seat(FakeRig(fake))
    backup, fence = fake.snapshot(), fake.fence
    await fake.take("orders", 10, floor=0)
    fake.restart(backup)
    assert fake.fence != fence
    assert await fake.take("orders", 10, floor=0) == Refusal(Reason.STALE, backup["orders"])
    fake.restart()
    assert await fake.take("orders", 10, floor=0) == Refusal(Reason.MISSING, State())


async def test_fake_plays_the_original() -> None:
    """The original cuts from its own hash; on one of ours it burns IDs and fails."""
    fake = FakeCounter()
    fake.write_original("orders", 50, 7)
    assert fake.cut_original("orders", 10) == Segment(51, 61)
    assert (await fake.inspect("orders"))[0] == State(60, 8)
    await seat(FakeRig(fake))
    assert fake.cut_original("orders", 40) is None
    answer = await fake.take("orders", 10, floor=0)
    assert isinstance(answer, Cut)
    assert answer.segment == Segment(151, 161)
