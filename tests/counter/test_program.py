"""Whatever happens to a counter, it agrees with one that is correct at a glance."""

from collections.abc import Awaitable, Callable
from typing import Final

import attrs
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from idalloc_tcp.counter import Cut, Reason, Refusal
from idalloc_tcp.ledger import Tail
from idalloc_tcp.pool import Segment
from tests.counter.rigs import RIGS, Rig


@attrs.define
class Model:
    """A counter that is correct at a glance: which IDs are left to cut, in order."""

    #: None: there is no hash.
    left: list[int] | None = None
    last: int = 0
    end: int = 0
    is_ours: bool = False
    is_live: bool = False

    def problem(self, floor: int) -> Reason | None:
        """Why it cannot cut."""
        if self.left is None:
            return Reason.MISSING
        if not self.is_ours:
            return Reason.FOREIGN
        if not self.is_live:
            return Reason.STALE
        if self.end < floor:
            return Reason.PASSED
        return None if self.left else Reason.SPENT

    def seat(self, lease: Segment) -> None:
        """Put it on a lease, which is always a fresh one."""
        self.left = list(range(lease.start, lease.stop))
        self.last, self.end = lease.start - 1, lease.last
        self.is_ours = self.is_live = True

    def cut(self, size: int) -> Segment:
        """The next IDs."""
        assert self.left
        ids, self.left = self.left[:size], self.left[size:]
        self.last = ids[-1]
        return Segment(ids[0], ids[-1] + 1)

    def extend(self, old_end: int, new_end: int) -> bool:
        """More IDs at the end."""
        if not (self.is_ours and self.is_live and self.end == old_end):
            return False
        assert self.left is not None
        self.left += range(old_end + 1, new_end + 1)
        self.end = new_end
        return True

    def give_back(self, segment: Segment) -> bool:
        """The last IDs once more."""
        if not (self.is_ours and self.is_live and self.last == segment.last):
            return False
        assert self.left is not None
        self.left = [*range(segment.start, segment.stop), *self.left]
        self.last = segment.start - 1
        return True

    def take_over(self) -> bool:
        """Ours, with nothing in it."""
        if self.left is None or self.is_ours:
            return False
        self.is_ours = self.is_live = True
        self.left, self.end = [], self.last
        return True


@attrs.define
class Program:
    """Runs steps on a counter and on the model, which must agree at every one."""

    rig: Rig
    model: Model = attrs.field(factory=Model)
    owned: set[int] = attrs.field(factory=set)
    segments: list[Segment] = attrs.field(factory=list)
    #: The end of what the ledger gave away; so every lease is a fresh one.
    ledger_end: int = 0
    refusal: Refusal | None = None
    refused_for: tuple[Reason | None, int] = (None, 0)
    floor: int = 0

    def lease(self, size: int) -> Segment:
        """A fresh lease, not adjoining the one before."""
        start = self.ledger_end + 2
        self.ledger_end = start + size - 1
        return Segment(start, start + size)

    def own(self, segment: Segment) -> None:
        """Nobody else may have any of it."""
        ids = set(range(segment.start, segment.stop))
        assert self.owned.isdisjoint(ids)
        self.owned |= ids
        self.segments.append(segment)

    def check(self, answer: Cut | Refusal, expected: Segment | None) -> None:
        """The same segment, or a refusal; and the same state after it."""
        if expected is None:
            assert isinstance(answer, Refusal)
        else:
            assert isinstance(answer, Cut)
            assert answer.segment == expected
            self.own(expected)
        assert answer.state.last_alloc_value == self.model.last
        assert answer.state.lease_end == (self.model.end if self.model.is_ours else 0)

    async def take(self, size: int) -> None:
        """Cut, or learn why not."""
        self.floor = max(0, self.model.end + size % 5 - 3)
        reason = self.model.problem(self.floor)
        answer = await self.rig.counter.take("a", size, floor=self.floor)
        self.check(answer, None if reason else self.model.cut(size))
        if isinstance(answer, Refusal):
            assert answer.reason is reason
            self.refusal, self.refused_for = answer, (reason, answer.state.lease_end)

    async def seat(self, size: int) -> None:
        """Seat for the reason that was seen last, however long ago."""
        if self.refusal is None:
            return
        lease = self.lease(size)
        end = self.model.end if self.model.is_ours else 0
        holds = (self.model.problem(self.floor), end) == self.refused_for
        if holds:
            self.model.seat(lease)
        answer = await self.rig.counter.seat("a", lease, 3, self.refusal, floor=self.floor)
        self.check(answer, self.model.cut(3) if holds else None)

    async def extend(self, size: int) -> None:
        """Lengthen the lease, or one that it had at some time."""
        old_end = self.model.end - size % 2
        new_end = max(old_end, self.ledger_end) + size
        self.ledger_end = max(self.ledger_end, new_end)
        expected = self.model.extend(old_end, new_end)
        assert await self.rig.counter.extend("a", old_end, new_end) == expected

    async def give_back(self, size: int) -> None:
        """Give the end of a segment back, the last one as a rule."""
        if not self.segments:
            return
        segment = self.segments.pop(-1 if size % 4 else 0)
        tail = Segment(max(segment.start, segment.stop - size), segment.stop)
        self.owned -= set(range(tail.start, tail.stop))
        expected = self.model.give_back(tail)
        assert await self.rig.counter.give_back(Tail("a", tail)) == expected

    async def cut_beside(self, size: int) -> None:
        """Cut as the original does."""
        expected = None
        if self.model.left is not None and not self.model.is_ours:
            expected = Segment(self.model.last + 1, self.model.last + size + 1)
            self.model.last += size
            self.ledger_end = max(self.ledger_end, self.model.last)  # It is committed to the row.
        self.check(await self.rig.counter.cut_beside("a", size), expected)

    async def take_over(self, _: int) -> None:
        """Make a hash of the original ours."""
        expected = Reason.SPENT if self.model.take_over() else None
        answer = await self.rig.counter.take_over("a")
        assert answer.reason is expected
        self.check(answer, None)

    async def flush(self, _: int) -> None:
        """Lose everything."""
        await self.rig.flush()
        self.model = Model()

    async def fail_over(self, _: int) -> None:
        """Be another Redis."""
        await self.rig.fail_over()
        self.model.is_live = False

    async def write_original(self, size: int) -> None:
        """A hash of the original, above all that was ever given away."""
        last = self.lease(size).last
        await self.rig.write_original("a", last, size)
        self.model = Model(left=[], last=last)


STEPS: Final[dict[str, Callable[[Program, int], Awaitable[None]]]] = {
    "take": Program.take,
    "take again": Program.take,
    "take once more": Program.take,
    "seat": Program.seat,
    "seat again": Program.seat,
    "extend": Program.extend,
    "give back": Program.give_back,
    "cut beside": Program.cut_beside,
    "take over": Program.take_over,
    "flush": Program.flush,
    "fail over": Program.fail_over,
    "write original": Program.write_original,
}
programs = st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(1, 12)), max_size=30)


@pytest.mark.parametrize("kind", RIGS)
@settings(
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # Each example empties it.
)
@given(program=programs)
def test_any_program_agrees_with_the_model(
    request: pytest.FixtureRequest, kind: str, program: list[tuple[str, int]]
) -> None:
    """Whatever is done to it and behind its back, no ID of a lease is cut twice."""

    async def main() -> None:
        async with RIGS[kind](request) as rig:
            run = Program(rig)
            for name, size in program:
                await STEPS[name](run, size)

    trio.run(main)
