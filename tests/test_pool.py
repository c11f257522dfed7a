"""Segments and the pool: every ID at most once, in rising order, and every gap accounted for."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from idalloc_tcp.pool import MAX_ID, Pool, Segment


@pytest.mark.parametrize(
    ("start", "stop"), [(1, 1), (2, 1), (0, 1), (-1, 5), (MAX_ID + 1, MAX_ID + 2), (1, MAX_ID + 2)]
)
def test_segment_refuses_what_is_empty_or_out_of_range(start: int, stop: int) -> None:
    """A segment holds at least one ID, and only IDs from 1 to 2^63-1."""
    with pytest.raises(ValueError, match="not a segment"):
        Segment(start, stop)


def test_segment_knows_its_size_and_its_last_id() -> None:
    """A segment is half-open, and may hold everything from 1 to 2^63-1."""
    assert (Segment(5, 8).size, Segment(5, 8).last) == (3, 7)
    assert (Segment(1, MAX_ID + 1).size, Segment(1, MAX_ID + 1).last) == (MAX_ID, MAX_ID)


def test_new_pool_has_nothing() -> None:
    """A pool serves nothing before it was offered anything, and wants it."""
    pool = Pool()
    assert pool.take(1) is None
    assert pool.wants_more
    assert (pool.remaining, pool.served_ids, pool.served_through) == (0, 0, 0)
    assert pool.close() == []


def test_range_is_never_clamped() -> None:
    """A take that the pool cannot serve whole changes nothing."""
    pool = Pool()
    pool.offer(Segment(1, 11))
    assert pool.take(11) is None
    assert pool.take(10) == 1
    assert pool.take(1) is None


def test_adjoining_segments_serve_as_one() -> None:
    """A range may reach over the border of segments that adjoin, the current one or later ones."""
    pool = Pool()
    for segment in (Segment(1, 11), Segment(11, 21), Segment(31, 41), Segment(41, 51)):
        assert pool.offer(segment)
    assert pool.take(15) == 1
    assert pool.take(20) == 31


def test_small_rest_is_kept_until_a_later_segment_can_serve() -> None:
    """A rest is skipped, and counted, only in favour of a segment that is large enough."""
    gaps: Counter[str] = Counter()
    pool = Pool(on_gap=lambda reason, ids: gaps.update({reason: ids}))
    pool.offer(Segment(1, 6))
    pool.offer(Segment(11, 16))
    assert pool.take(6) is None
    assert pool.take(2) == 1
    pool.offer(Segment(21, 31))
    assert not gaps
    assert pool.take(6) == 21
    assert gaps == {"skipped": 3 + 5}
    assert (pool.remaining, pool.served_ids) == (4, 8)


def test_backwards_segment_is_refused() -> None:
    """What does not lie above all that was owned or served is a gap: never backwards."""
    gaps: Counter[str] = Counter()
    pool = Pool(served_through=100, on_gap=lambda reason, ids: gaps.update({reason: ids}))
    assert not pool.offer(Segment(91, 101))
    assert not pool.offer(Segment(100, 110))
    assert pool.offer(Segment(101, 111))
    assert pool.offer(Segment(121, 131))
    assert not pool.offer(Segment(112, 120))
    assert not pool.offer(Segment(130, 140))
    assert gaps == {"backwards": 10 + 10 + 8 + 10}
    assert pool.take(10) == 101
    assert not pool.offer(Segment(101, 111))


def test_close_gives_up_the_tails_highest_first() -> None:
    """A closed pool owns nothing, serves nothing, and remembers what it served."""
    pool = Pool()
    for segment in (Segment(1, 11), Segment(21, 31), Segment(41, 51)):
        pool.offer(segment)
    assert pool.take(4) == 1
    assert pool.close() == [Segment(41, 51), Segment(21, 31), Segment(5, 11)]
    assert pool.take(1) is None
    assert pool.close() == []
    assert (pool.remaining, pool.served_ids, pool.served_through) == (0, 4, 4)
    assert not pool.offer(Segment(4, 5))
    assert pool.offer(Segment(5, 11))


def test_last_id_of_all_is_served() -> None:
    """The pool ends at 2^63-1 and does not run over."""
    pool = Pool(served_through=MAX_ID - 3)
    assert pool.offer(Segment(MAX_ID - 2, MAX_ID + 1))
    assert pool.take(4) is None
    assert pool.take(2) == MAX_ID - 2
    assert pool.take(1) == MAX_ID
    assert pool.take(1) is None
    assert (pool.close(), pool.served_through) == ([], MAX_ID)
    assert Pool(served_through=MAX_ID).take(1) is None


@pytest.mark.parametrize("owned", [4, 5])
def test_low_water_counts_later_segments(owned: int) -> None:
    """The pool wants more as long as all that it holds is below the low water."""
    pool = Pool(low_water=5)
    pool.offer(Segment(1, 3))
    pool.offer(Segment(11, 11 + owned - 2))
    assert pool.wants_more == (owned < 5)


class PoolMachine(RuleBasedStateMachine):
    """A pool beside a model that is correct at a glance: the list of ranges it may serve."""

    def __init__(self) -> None:
        super().__init__()
        self.gaps: Counter[str] = Counter()
        self.expected_gaps: Counter[str] = Counter()
        self.free: list[Segment] = []
        self.offered_ids = self.served_ids = self.closed_ids = 0
        self.last_served = 0
        self.pool = Pool()

    @initialize(
        served_through=st.sampled_from([0, 7, 2**53, MAX_ID - 80, MAX_ID]),
        low_water=st.integers(1, 40),
    )
    def begin(self, served_through: int, low_water: int) -> None:
        """Start from 1, from anywhere, or close to the last ID."""
        self.last_served = served_through
        self.pool = Pool(
            served_through, low_water, on_gap=lambda reason, ids: self.gaps.update({reason: ids})
        )

    @property
    def edge(self) -> int:
        return self.free[-1].stop if self.free else self.pool.served_through + 1

    @rule(distance=st.integers(0, 12) | st.just(0), size=st.integers(1, 25))
    def offer_above(self, distance: int, size: int) -> None:
        """Anything above is accepted, and merged where it adjoins."""
        start = self.edge + distance
        stop = min(start + size, MAX_ID + 1)
        if start >= stop:
            return
        assert self.pool.offer(Segment(start, stop))
        self.offered_ids += stop - start
        if self.free and self.free[-1].stop == start:
            start = self.free.pop().start
        self.free.append(Segment(start, stop))

    @rule(distance=st.integers(1, 60), size=st.integers(1, 80))
    def offer_stale(self, distance: int, size: int) -> None:
        """Whatever begins below the edge is refused, even if it reaches above."""
        start = self.edge - distance
        stop = min(start + size, MAX_ID + 1)
        if start < 1:
            return
        assert not self.pool.offer(Segment(start, stop))
        self.expected_gaps["backwards"] += stop - start

    @rule(count=st.integers(1, 40))
    def take(self, count: int) -> None:
        """The first range that is large enough serves; those before it are skipped."""
        first = self.pool.take(count)
        if not any(segment.size >= count for segment in self.free):
            assert first is None
            return
        while self.free[0].size < count:
            self.expected_gaps["skipped"] += self.free.pop(0).size
        segment = self.free.pop(0)
        assert first == segment.start > self.last_served
        if count < segment.size:
            self.free.insert(0, Segment(first + count, segment.stop))
        self.last_served = first + count - 1
        self.served_ids += count
        assert self.pool.served_through == self.last_served

    @rule()
    def close(self) -> None:
        """Everything unserved comes out, once, highest first."""
        assert self.pool.close() == self.free[::-1]
        self.closed_ids += sum(segment.size for segment in self.free)
        self.free.clear()

    @invariant()
    def accounts_are_exact(self) -> None:
        """What was offered was served, skipped, given up, or is still here."""
        remaining = sum(segment.size for segment in self.free)
        assert self.pool.remaining == remaining
        assert self.pool.wants_more == (remaining < self.pool.low_water)
        assert self.pool.served_ids == self.served_ids
        assert self.pool.served_through >= self.last_served
        assert +self.gaps == +self.expected_gaps
        gone = self.served_ids + self.gaps["skipped"] + self.closed_ids
        assert self.offered_ids == gone + remaining


PoolMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
test_pool_agrees_with_the_model = PoolMachine.TestCase
