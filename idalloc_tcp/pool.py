"""Segments of IDs, and the pool that cuts them into the ranges that clients get.

Synchronous and pure: no I/O, no clock. Together with `reservation` this is where uniqueness
is argued; the numbers are those of the rules listed there.

* A pool owns its segments alone. `take` moves forward over IDs and never back, so it gives
  every ID of a segment away at most once, and in rising order.
* `offer` refuses a segment that does not lie wholly above all that this pool owns or served
  (rule 7, *never backwards*): a gap, never a step back.
* `close` forgets the unserved tails before it hands them out to be given back (rule 8).

What is neither served nor given back is a gap. Gaps are counted by reason, so that a hole in
a sequence of IDs can be explained.
"""

from collections import deque
from collections.abc import Callable
from typing import Final, final

import attrs

#: Every ID fits a signed 64-bit integer.
MAX_ID: Final = 2**63 - 1


@final
@attrs.frozen(order=True)
class Segment:
    """The IDs from `start` up to but not including `stop`, owned by exactly one holder.

    Raises:
        ValueError: if it is empty or leaves the range 1 to `MAX_ID`.
    """

    start: int
    stop: int

    def __attrs_post_init__(self) -> None:
        if not 1 <= self.start < self.stop <= MAX_ID + 1:
            raise ValueError(f"not a segment of IDs: [{self.start}, {self.stop})")

    @property
    def size(self) -> int:
        """How many IDs it holds."""
        return self.stop - self.start

    @property
    def last(self) -> int:
        """The last ID in it: what `last_alloc_value` is once it has been leased."""
        return self.stop - 1


def _forget_gap(reason: str, ids: int) -> None:
    """The default gap counter: none."""


@final
@attrs.define(eq=False)
class Pool:
    """One worker's segments for one service.

    Args:
        served_through: IDs up to this one count as served already.
        low_water: the number of IDs below which the pool wants the next segment. Whoever
            sizes the segments may change it at any time.
        on_gap: called with a reason (`skipped`, `backwards`) and a number of IDs.
    """

    _served_through: int = 0
    _low_water: int = 1
    _on_gap: Callable[[str, int], None] = _forget_gap
    _next: int = attrs.field(init=False)
    _stop: int = attrs.field(init=False)
    _later: deque[Segment] = attrs.field(init=False, factory=deque)
    _later_ids: int = attrs.field(init=False, default=0)
    _owned_ids: int = attrs.field(init=False, default=0)
    #: It wants more once the next ID lies above this one. Kept up to date where segments come and
    #: go, so that a request need only compare.
    refill_above: int = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._next = self._stop = self._served_through + 1
        self._note_supply()

    def take(self, count: int) -> int | None:
        """The first of `count` contiguous IDs that now belong to the caller.

        None, and nothing changed, if no segment here holds as many: a range is never clamped.
        A segment's rest that is too small is skipped only once a later segment can serve.
        """
        first = self._next
        stop = first + count
        if stop <= self._stop:
            self._next = stop
            return first
        if self._skip_to(count):
            return self.take(count)
        return None

    def has_run(self, ids: int) -> bool:
        """Would the segment in use serve so many contiguous IDs?"""
        return self._next + ids <= self._stop

    def _skip_to(self, count: int) -> bool:
        if not any(segment.size >= count for segment in self._later):
            return False
        while self._stop - self._next < count:
            self._drop(self._stop - self._next)
            self._enter(self._later.popleft())
        self._note_supply()
        return True

    def _enter(self, segment: Segment) -> None:
        self._later_ids -= segment.size
        self._next, self._stop = segment.start, segment.stop

    def _drop(self, ids: int) -> None:
        if ids:
            self._owned_ids -= ids
            self._on_gap("skipped", ids)

    def offer(self, segment: Segment) -> bool:
        """Own `segment` from now on. False: it did not lie above everything else (rule 7)."""
        if segment.start < self._edge:
            self._on_gap("backwards", segment.size)
            return False
        self._owned_ids += segment.size
        if self._later:
            self._append(segment)
        elif segment.start == self._stop:
            self._stop = segment.stop
        elif self._next == self._stop:
            self._next, self._stop = segment.start, segment.stop
        else:
            self._append(segment)
        self._note_supply()
        return True

    def _append(self, segment: Segment) -> None:
        """Keep it for later, merged with the one before it where they adjoin."""
        self._later_ids += segment.size
        if self._later and self._later[-1].stop == segment.start:
            segment = Segment(self._later.pop().start, segment.stop)
        self._later.append(segment)

    def close(self) -> list[Segment]:
        """Stop owning anything: the unserved segments, highest first.

        The highest comes first because a store takes a tail back only if nothing above it is
        given away, so only that order can return more than one.
        """
        tails = list(self._later)
        if self._next < self._stop:
            tails.insert(0, Segment(self._next, self._stop))
        self._owned_ids -= self.remaining
        self._stop = self._next
        self._later.clear()
        self._later_ids = 0
        self._note_supply()
        return tails[::-1]

    def _note_supply(self) -> None:
        self.refill_above = self._stop + self._later_ids - self._low_water

    @property
    def low_water(self) -> int:
        """The number of IDs below which it wants the next segment."""
        return self._low_water

    @low_water.setter
    def low_water(self, ids: int) -> None:
        self._low_water = ids
        self._note_supply()

    @property
    def remaining(self) -> int:
        """How many IDs it could still serve."""
        return self._stop - self._next + self._later_ids

    @property
    def wants_more(self) -> bool:
        """Is it time to fetch the next segment?"""
        return self._next > self.refill_above

    @property
    def served_ids(self) -> int:
        """How many IDs it has given away."""
        return self._owned_ids - self.remaining

    @property
    def served_through(self) -> int:
        """No ID above this one was ever served from here."""
        return self._next - 1

    @property
    def _edge(self) -> int:
        """The lowest ID that is neither owned nor served, nor below one that is."""
        return self._later[-1].stop if self._later else self._stop
