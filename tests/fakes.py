"""Stand-ins for the stores, with hooks for every fault that they can have."""

import itertools
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import final

import attrs
import trio

from idalloc_tcp.counter import Cut, Reason, Refusal, State
from idalloc_tcp.errors import Exhausted, NotOurs, Unavailable
from idalloc_tcp.ledger import CLOSED, Ledger, Row, Tail
from idalloc_tcp.pool import Segment


@final
@attrs.frozen
class Lease:
    """What the ledger gave away through `lease`, even if the reply was lost."""

    service: str
    segment: Segment


@attrs.define(eq=False)
class FakeStore:
    """What all stores have in common: the faults.

    Attributes:
        down: every call raises `Unavailable` before it acts.
        lose_reply: every call acts, then raises `Unavailable`.
        delay_seconds: how long every call sleeps before it acts.
        reply_seconds: how long every reply is under way; a caller that is cancelled meanwhile
            never learns that the call acted.
    """

    down: bool = False
    lose_reply: bool = False
    delay_seconds: float = 0.0
    reply_seconds: float = 0.0
    _failures_to_come: int = attrs.field(init=False, default=0)
    _closed: bool = attrs.field(init=False, default=False)

    def fail_next(self, calls: int) -> None:
        """The next so many calls raise `Unavailable` before they act."""
        self._failures_to_come = calls

    async def aclose(self) -> None:
        """From now on it is down."""
        self._closed = True

    @asynccontextmanager
    async def _call(self) -> AsyncIterator[None]:
        """What happens inside is one atomic execution there."""
        await trio.sleep(self.delay_seconds)
        if self.down or self._closed:
            raise Unavailable("the fake store is down")
        if self._failures_to_come:
            self._failures_to_come -= 1
            raise Unavailable("the fake store failed, as it was told to")
        try:
            yield
        finally:  # A lost reply takes the place of any other, also of an exception.
            lose_reply = self.lose_reply
            await trio.sleep(self.reply_seconds)
            if lose_reply:
                raise Unavailable("the fake store's reply was lost")


@attrs.define(eq=False)
class FakeLedger(FakeStore):
    """A `Ledger` in memory that fails as it is told to.

    It asserts that it never gives an ID away that somebody still owns, except for those that
    it was made to forget.

    Attributes:
        leases: every lease in order, without those that were taken from outside.
    """

    leases: list[Lease] = attrs.field(init=False, factory=list)
    _last_alloc_values: dict[str, int] = attrs.field(init=False, factory=dict)
    _owned: dict[str, list[Segment]] = attrs.field(init=False, factory=dict)

    def take_from_outside(self, service: str, size: int) -> Segment:
        """Lease as another worker would: at once, and whatever fails for this one."""
        return self._give_away(service, self._last_alloc_values.get(service, 0), size)

    def forget(self, service: str, ids: int) -> None:
        """Lose the last commits of a service, worth so many IDs."""
        self._rewind(service, max(0, self._last_alloc_values[service] - ids))

    def snapshot(self) -> dict[str, int]:
        """Every row as it is now: service -> last_alloc_value."""
        return dict(self._last_alloc_values)

    def restore(self, snapshot: Mapping[str, int]) -> None:
        """Lose every commit since the snapshot, as from a backup."""
        for service in self._last_alloc_values:
            self._rewind(service, snapshot.get(service, 0))

    async def lease(self, service: str, size: int, *, floor: int, ceiling: int) -> Segment:
        """As `Ledger.lease`."""
        async with self._call():
            return self._lease(service, size, floor, ceiling)

    async def give_back(self, tails: Sequence[Tail]) -> list[bool]:
        """As `Ledger.give_back`."""
        async with self._call():
            return [self._take_back(tail) for tail in tails]

    def _lease(self, service: str, size: int, floor: int, ceiling: int) -> Segment:
        base = max(self._last_alloc_values.get(service, 0), floor)
        if base + size > ceiling:
            text = f"{service}: a lease of {size} would pass its ceiling {ceiling}"
            raise Exhausted(text, max(0, ceiling - base))
        segment = self._give_away(service, base, size)
        self.leases.append(Lease(service, segment))
        return segment

    def _give_away(self, service: str, base: int, size: int) -> Segment:
        segment = Segment(base + 1, base + size + 1)
        owned = self._owned.setdefault(service, [])
        above = [other for other in owned[-1:] if other.last >= segment.start]
        assert not above, f"{service}: {segment} is not above {above}, which somebody owns"
        owned.append(segment)
        self._last_alloc_values[service] = segment.last
        return segment

    def _take_back(self, tail: Tail) -> bool:
        if self._last_alloc_values.get(tail.service) != tail.segment.last:
            return False
        self._rewind(tail.service, tail.segment.start - 1)
        return True

    def _rewind(self, service: str, last_alloc_value: int) -> None:
        """From now on nobody counts as the owner of anything above it."""
        self._last_alloc_values[service] = last_alloc_value
        self._owned[service] = [
            Segment(owned.start, min(owned.stop, last_alloc_value + 1))
            for owned in self._owned.get(service, [])
            if owned.start <= last_alloc_value
        ]


@final
@attrs.define(eq=False)
class FakeSharedLedger(FakeLedger):
    """A `SharedLedger` in memory, in which the original idalloc may write, too."""

    #: The versions of rows that the original wrote; every other row is ours.
    _versions: dict[str, int] = attrs.field(init=False, factory=dict)

    def write_original(self, service: str, last: int, version: int) -> None:
        """As the original does: the greater version wins, even if it lowers the value."""
        row = self._row(service)
        if row is None or row.data_version < version:
            self._last_alloc_values[service], self._versions[service] = last, version

    async def lease(self, service: str, size: int, *, floor: int, ceiling: int) -> Segment:
        """As `SharedLedger.lease`."""
        async with self._call():
            if service in self._versions:
                raise NotOurs(f"{service}: its row is the original's")
            return self._lease(service, size, floor, ceiling)

    async def give_back(self, tails: Sequence[Tail]) -> list[bool]:
        """As `Ledger.give_back`."""
        async with self._call():
            return [tail.service not in self._versions and self._take_back(tail) for tail in tails]

    async def take_over(self, service: str, size: int, *, floor: int, ceiling: int) -> Segment:
        """As `SharedLedger.take_over`."""
        async with self._call():
            segment = self._lease(service, size, floor, ceiling)
            self._versions.pop(service, None)
            return segment

    async def extend(self, service: str, old_end: int, new_end: int) -> bool:
        """As `SharedLedger.extend`."""
        async with self._call():
            if self._row(service) != Row(old_end, CLOSED):
                return False
            self._give_away(service, old_end, new_end - old_end)
            return True

    async def commit_beside(self, service: str, last: int, version: int) -> bool:
        """As `SharedLedger.commit_beside`."""
        async with self._call():
            row = self._row(service) or Row(0, 0)
            if row.is_ours:
                return False
            self._last_alloc_values[service] = max(row.last_alloc_value, last)
            self._versions[service] = max(row.data_version, version)
            return True

    async def raise_to(self, service: str, lease_end: int) -> None:
        """As `SharedLedger.raise_to`."""
        async with self._call():
            row = self._row(service)
            if row is not None and row.is_ours:
                self._last_alloc_values[service] = max(row.last_alloc_value, lease_end)

    async def read(self, service: str) -> Row | None:
        """As `SharedLedger.read`."""
        async with self._call():
            return self._row(service)

    def _row(self, service: str) -> Row | None:
        if service not in self._last_alloc_values:
            return None
        return Row(self._last_alloc_values[service], self._versions.get(service, CLOSED))


@final
@attrs.define(eq=False)
class FakeCounter(FakeStore):
    """A `Counter` in memory: a Redis that is restarted, restored and failed over at will.

    Attributes:
        fence: which Redis it is, and under which replication history.
    """

    fence: str = attrs.field(init=False)
    _fence_numbers: Iterator[int] = attrs.field(init=False, factory=lambda: itertools.count(1))
    _hashes: dict[str, State] = attrs.field(init=False, factory=dict)

    def __attrs_post_init__(self) -> None:
        self._new_fence()

    def flush(self) -> None:
        """Lose everything; it is still the same Redis."""
        self._hashes.clear()

    def snapshot(self) -> dict[str, State]:
        """Every hash as it is now: a backup, or what a replica has received."""
        return dict(self._hashes)

    def restart(self, snapshot: Mapping[str, State] | None = None) -> None:
        """Come back as another Redis with the data of the snapshot, by default without any.

        So does a failover look, to a replica that had received just that.
        """
        self._hashes = dict(snapshot or {})
        self._new_fence()

    def fail_over(self) -> None:
        """Be replaced by a replica that has received everything."""
        self.restart(self._hashes)

    def write_original(self, service: str, last: int, version: int) -> None:
        """Hold a hash of the original idalloc instead of whatever was there."""
        self._hashes[service] = State(last, version)

    def cut_original(self, service: str, size: int) -> Segment | None:
        """Cut as the original does; None if it failed, as it does on a hash of ours."""
        state = self._hashes.get(service, State())
        last = state.last_alloc_value + size
        self._hashes[service] = attrs.evolve(state, last_alloc_value=last)
        if state.data_version == CLOSED:
            return None
        self._hashes[service] = attrs.evolve(
            self._hashes[service], data_version=state.data_version + 1
        )
        return Segment(last - size + 1, last + 1)

    async def take(self, service: str, size: int, *, floor: int) -> Cut | Refusal:
        """As `Counter.take`."""
        async with self._call():
            reason = self._problem(service, floor)
            return Refusal(reason, self._state(service)) if reason else self._cut(service, size)

    async def seat(
        self, service: str, lease: Segment, size: int, refusal: Refusal, *, floor: int
    ) -> Cut | Refusal:
        """As `Counter.seat`."""
        assert refusal.reason is not None
        async with self._call():
            state = self._state(service)
            seen = (self._problem(service, floor), state.lease_end)
            if seen != (refusal.reason, refusal.state.lease_end):
                return Refusal(None, state)
            self._hashes[service] = State(lease.start - 1, CLOSED, lease.last, self.fence)
            return self._cut(service, size)

    async def extend(self, service: str, old_end: int, new_end: int) -> bool:
        """As `Counter.extend`."""
        async with self._call():
            state = self._state(service)
            if (state.fence, state.lease_end) != (self.fence, old_end):
                return False
            self._hashes[service] = attrs.evolve(state, lease_end=new_end)
            return True

    async def give_back(self, tail: Tail) -> bool:
        """As `Counter.give_back`."""
        async with self._call():
            state = self._state(tail.service)
            if (state.fence, state.last_alloc_value) != (self.fence, tail.segment.last):
                return False
            self._hashes[tail.service] = attrs.evolve(
                state, last_alloc_value=tail.segment.start - 1
            )
            return True

    async def inspect(self, service: str) -> tuple[State, bool]:
        """As `Counter.inspect`."""
        async with self._call():
            state = self._state(service)
            return state, state.fence == self.fence

    async def cut_beside(self, service: str, size: int) -> Cut | Refusal:
        """As `Counter.cut_beside`."""
        async with self._call():
            state = self._state(service)
            if service not in self._hashes:
                return Refusal(Reason.MISSING, state)
            if state.fence:
                return Refusal(None, state)
            before, version = state.last_alloc_value, state.data_version
            state = State(before + size, version + 1)
            self._hashes[service] = state
            return Cut(Segment(before + 1, before + size + 1), state)

    async def take_over(self, service: str) -> Refusal:
        """As `Counter.take_over`."""
        async with self._call():
            state = self._state(service)
            if service not in self._hashes or state.fence:
                return Refusal(None, state)
            last = state.last_alloc_value
            self._hashes[service] = State(last, CLOSED, last, self.fence)
            return Refusal(Reason.SPENT, self._hashes[service])

    def _new_fence(self) -> None:
        self.fence = f"run-{next(self._fence_numbers)}"

    def _state(self, service: str) -> State:
        return self._hashes.get(service, State())

    def _problem(self, service: str, floor: int) -> Reason | None:
        state = self._state(service)
        problems = {
            Reason.MISSING: service not in self._hashes,
            Reason.FOREIGN: not state.fence,
            Reason.STALE: state.fence != self.fence,
            Reason.PASSED: state.lease_end < floor,
            Reason.SPENT: state.last_alloc_value >= state.lease_end,
        }
        return next((reason for reason, holds in problems.items() if holds), None)

    def _cut(self, service: str, size: int) -> Cut:
        before = self._hashes[service]
        last = min(before.last_alloc_value + size, before.lease_end)
        after = attrs.evolve(before, last_alloc_value=last)
        self._hashes[service] = after
        return Cut(Segment(before.last_alloc_value + 1, last + 1), after)


@final
@attrs.frozen
class LeaseCall:
    """What somebody asked a ledger for."""

    service: str
    size: int
    floor: int
    ceiling: int


@final
@attrs.define(eq=False)
class RecordingLedger:
    """A `Ledger` that notes every call, in order, and passes it on."""

    _ledger: Ledger
    lease_calls: list[LeaseCall] = attrs.field(init=False, factory=list)
    give_back_calls: list[list[Tail]] = attrs.field(init=False, factory=list)

    async def lease(self, service: str, size: int, *, floor: int, ceiling: int) -> Segment:
        """As `Ledger.lease`."""
        self.lease_calls.append(LeaseCall(service, size, floor, ceiling))
        return await self._ledger.lease(service, size, floor=floor, ceiling=ceiling)

    async def give_back(self, tails: Sequence[Tail]) -> list[bool]:
        """As `Ledger.give_back`."""
        self.give_back_calls.append(list(tails))
        return await self._ledger.give_back(tails)

    async def aclose(self) -> None:
        """As `Ledger.aclose`."""
        await self._ledger.aclose()
