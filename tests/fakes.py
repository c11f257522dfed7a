"""Stand-ins for the stores, with hooks for every fault that they can have."""

from collections.abc import Mapping, Sequence
from typing import final

import attrs
import trio

from idalloc_tcp.errors import Exhausted, Unavailable
from idalloc_tcp.ledger import Ledger, Tail
from idalloc_tcp.pool import Segment


@final
@attrs.frozen
class Lease:
    """What the ledger gave away through `lease`, even if the reply was lost."""

    service: str
    segment: Segment


@final
@attrs.define(eq=False)
class FakeLedger:
    """A `Ledger` in memory that fails as it is told to.

    It asserts that it never gives an ID away that somebody still owns, except for those that
    it was made to forget.

    Attributes:
        down: every call raises `Unavailable` before it acts.
        lose_reply: every call acts, then raises `Unavailable`.
        delay_seconds: how long every call sleeps before it acts.
        reply_seconds: how long every reply is under way; a caller that is cancelled meanwhile
            never learns that the call acted.
        leases: every lease in order, without those that were taken from outside.
    """

    down: bool = False
    lose_reply: bool = False
    delay_seconds: float = 0.0
    reply_seconds: float = 0.0
    leases: list[Lease] = attrs.field(init=False, factory=list)
    _failures_to_come: int = attrs.field(init=False, default=0)
    _last_alloc_values: dict[str, int] = attrs.field(init=False, factory=dict)
    _owned: dict[str, list[Segment]] = attrs.field(init=False, factory=dict)
    _closed: bool = attrs.field(init=False, default=False)

    def fail_next(self, calls: int) -> None:
        """The next so many calls raise `Unavailable` before they act."""
        self._failures_to_come = calls

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
        await self._receive_call()
        try:
            base = max(self._last_alloc_values.get(service, 0), floor)
            if base + size > ceiling:
                raise Exhausted(f"{service}: a lease of {size} would pass its ceiling {ceiling}")
            segment = self._give_away(service, base, size)
            self.leases.append(Lease(service, segment))
            return segment
        finally:
            await self._send_reply()

    async def give_back(self, tails: Sequence[Tail]) -> list[bool]:
        """As `Ledger.give_back`."""
        await self._receive_call()
        try:
            return [self._take_back(tail) for tail in tails]
        finally:
            await self._send_reply()

    async def aclose(self) -> None:
        """As `Ledger.aclose`."""
        self._closed = True

    async def _receive_call(self) -> None:
        await trio.sleep(self.delay_seconds)
        if self.down or self._closed:
            raise Unavailable("the fake ledger is down")
        if self._failures_to_come:
            self._failures_to_come -= 1
            raise Unavailable("the fake ledger failed, as it was told to")

    async def _send_reply(self) -> None:
        """Raised from a `finally`, so that a lost reply takes the place of any other."""
        lose_reply = self.lose_reply
        await trio.sleep(self.reply_seconds)
        if lose_reply:
            raise Unavailable("the fake ledger's reply was lost")

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
            for owned in self._owned[service]
            if owned.start <= last_alloc_value
        ]


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
