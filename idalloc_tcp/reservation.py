"""Getting the next segment, and giving the rest of one back: the rules of uniqueness.

    ledger      gives away leases, atomically, durably before use
      counter   cuts a lease into segments for all servers           (optional)
        pool    cuts a segment into the ranges that clients get

Every level gives away disjoint parts of what it owns and forgets them. IDs are unique as long as
nobody owns the same thing twice, and that is what these rules see to:

1. *Lead.* A segment is served only if the ledger committed it first. `reserve` returns parts of
   ledger leases alone: a counter cuts only below the end of the lease that it was seated on.
2. *Fence.* A counter's data counts only under the Redis that it was written under: its scripts
   compare the fence themselves, in one step with the cut. Other data is STALE here.
3. *Seat anew.* A counter that is missing, stale, used up or passed by the ledger is seated on a
   fresh lease (`_seat`), never on remembered values. Its script looks again whether the reason
   still holds; if not, the lease stays with us, and we serve from it directly.
4. *At most once.* A request that moves ownership is never sent twice. If its outcome is not known
   the range is lost: a gap. (`Exhausted` and a refusal say for certain that nothing was taken,
   so another request after them repeats nothing.)
5. *Extend by compare-and-set* (`_extend`). The ledger lengthens a lease only if its row still ends
   where the lease ends; the counter then raises its end only if fence and old end still match. If
   it refuses, what was added is ours.
6. *Floor.* The highest lease end ever seen goes with every lease, which lies above it, and a lease
   that ends below it is not extended. A ledger that lost its last commits is so repaired by
   whoever remembers.
7. *Never backwards.* About the order of replies; kept by `pool`.
8. *Give back, or leave a gap.* A tail goes back once, to where it came from, by compare-and-set:
   only if nothing above it was given away. A floor follows it down only if it stood on that tail.
   While a tail goes back to the ledger nothing is leased for its service, for that would begin
   above a floor that is about to fall, and leave a gap that nobody counts.

The original idalloc leads with its counter, and its row may be behind. What it wrote is marked by
a version below 2^63-1, and nothing of the above holds for it. Until it is taken over
(`take_over`), IDs are cut from its hash as it would cut them, but committed to its row before they
are served (`_cut_beside`); uniqueness rests on a healthy Redis then, as it did before.
"""

from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import Final, Protocol, TypeVar, final

import attrs
import trio

from idalloc_tcp import log
from idalloc_tcp.counter import Counter, Cut, Reason, Refusal, State
from idalloc_tcp.errors import Exhausted, NotOurs, Unavailable
from idalloc_tcp.health import Health
from idalloc_tcp.ledger import Ledger, SharedLedger, Tail
from idalloc_tcp.metrics import Metrics, Row
from idalloc_tcp.pool import Segment
from idalloc_tcp.recent import Recent
from idalloc_tcp.underway import Underway

_T = TypeVar("_T")

#: How many tails go back in one request to the ledger.
TAILS_MAX: Final = 1_000
#: How long a lease waits for tails of its service that are on their way back.
RETURN_SECONDS: Final = 3.0
#: Looking at a counter, mending it and looking again ends after so many turns.
TURNS_MAX: Final = 4


class _CounterDown(Unavailable):
    """The counter did not answer, so the ledger has to."""


class Lease(Protocol):
    """One of a ledger's ways to lease."""

    def __call__(
        self, service: str, size: int, /, *, floor: int, ceiling: int
    ) -> Awaitable[Segment]:
        """As `Ledger.lease`."""
        ...


@final
@attrs.define(eq=False)
class Reservation:
    """Segments straight from the ledger.

    Args:
        ledger: the durable authority.
        ceiling_of: the last ID that a service may ever use.
        metrics: counts leases, failures and gaps.
    """

    _ledger: Ledger
    ceiling_of: Callable[[str], int]
    metrics: Metrics
    health: Health = attrs.field(init=False, factory=lambda: Health("the ledger"))
    _floors: Recent = attrs.field(init=False, factory=Recent)
    #: Never both for one service.
    _leases: Underway = attrs.field(init=False, factory=Underway)
    _returns: Underway = attrs.field(init=False, factory=Underway)

    async def reserve(self, service: str, size: int, way: Lease | None = None) -> Segment:
        """A segment of `size` IDs that nobody else ever gets; smaller only near the ceiling.

        Args:
            way: how to lease it, if not by `Ledger.lease`.

        Raises:
            Exhausted: not one ID is left below the ceiling.
            Unavailable: no store answered; the range asked for is lost.
        """
        while True:
            try:
                return await self.lease(service, size, way or self._ledger.lease)
            except Exhausted as error:
                # Always fewer: whoever leases from the same ledger moves what is left.
                size = min(error.left_ids, size - 1)
                if size < 1:
                    ceiling = self.ceiling_of(service)
                    text = f"fewer IDs than asked for are left below the ceiling {ceiling}"
                    raise Exhausted(text) from None

    async def lease(self, service: str, size: int, lease: Lease) -> Segment:
        """One lease of just `size` IDs, above the floor.

        Raises:
            Exhausted, Unavailable: as `reserve`.
        """
        with trio.move_on_after(RETURN_SECONDS) as patience:
            await self._returns.end(service)
        if patience.cancelled_caught:
            raise Unavailable("the store of IDs is slow to take some back; retry later")
        with self._leases.begin([service]):
            floor, ceiling = self.floor(service), self.ceiling_of(service)
            segment = await self.ask(partial(lease, service, size, floor=floor, ceiling=ceiling))
        if segment.start <= floor:
            raise Unavailable(f"the ledger leased {service} below its floor; it lost commits")
        self.remember(service, segment.last)
        self.metrics.leases_total += 1
        self.metrics.leased_ids_total += segment.size
        return segment

    async def ask(self, request: Callable[[], Awaitable[_T]]) -> _T:
        """The ledger's answer to one request, unless it is known to be down."""
        try:
            return await self.health.ask(request)
        except NotOurs as error:
            log.sparingly(log.WARNING, "a service is not ours yet", reason=str(error))
            raise
        except Unavailable as error:
            self.metrics.lease_failures_total += 1
            raise Unavailable("the store of IDs does not answer; retry later") from error

    async def give_back(self, tails: Sequence[Tail]) -> None:
        """Return what was not served; what cannot be returned is counted as a gap."""
        free = []
        for tail in tails:
            if tail.service in self._leases:  # Above it, for all we know.
                self.settle(tail, is_back=False)
            else:
                free.append(tail)
        with self._returns.begin(tail.service for tail in free):
            for start in range(0, len(free), TAILS_MAX):
                await self._give_back(free[start : start + TAILS_MAX])

    async def _give_back(self, tails: Sequence[Tail]) -> None:
        try:
            returned = await self.ask(partial(self._ledger.give_back, tails))
        except Unavailable as error:
            returned = [False] * len(tails)
            _note_unreturned(tails, error)
        for tail, is_back in zip(tails, returned, strict=True):
            self.settle(tail, is_back=is_back)
            if is_back and self.floor(tail.service) == tail.segment.last:
                self._floors.set(tail.service, tail.segment.start - 1)

    def origin(self, _service: str, _segment: Segment) -> str:
        """Where a segment that `reserve` has just given came from."""
        return "ledger"

    def settle(self, tail: Tail, *, is_back: bool) -> None:
        """Count what became of a tail."""
        if is_back:
            self.metrics.returned_ids_total += tail.segment.size
        else:
            self.metrics.gap("unreturned", tail.segment.size)

    def floor(self, service: str) -> int:
        """The highest lease end seen."""
        return self._floors.get(service)

    def remember(self, service: str, lease_end: int) -> None:
        """Note the end of a lease that somebody holds."""
        # Never lower: replies may overtake each other.
        self._floors.set(service, max(lease_end, self._floors.get(service)))


def _note_unreturned(tails: Sequence[Tail], error: Unavailable) -> None:
    ids = sum(tail.segment.size for tail in tails)
    log.sparingly(
        log.WARNING,
        "IDs could not be given back",
        services=len(tails),
        ids=ids,
        reason=str(error.__cause__ or error),
    )


@final
@attrs.frozen
class CounterPolicy:
    """How a counter is used."""

    #: The smallest segment, in IDs.
    segment_size: int = 10_000
    #: How many segments a lease of the counter holds.
    lease_segments: int = 100
    #: Make rows and hashes of the original idalloc ours.
    take_over: bool = False


@final
@attrs.define(eq=False)
class CounterReservation:
    """Segments from the counter, which stands on the ledger; from the ledger without it.

    Args:
        direct: the way to the ledger.
        on_cut: told of every segment that the counter cut: its service, and whether its lease is
            running short.
    """

    _counter: Counter
    _ledger: SharedLedger
    _direct: Reservation
    _policy: CounterPolicy
    _metrics: Metrics
    on_cut: Callable[[str, bool], None] = lambda _service, _is_short: None
    health: Health = attrs.field(init=False, factory=lambda: Health("the counter"))
    #: The last ID that the counter cut for us: so a tail is known to be its.
    _last_cut: Recent = attrs.field(init=False, factory=Recent)
    #: Where the counter's lease ends, as far as we saw.
    _lease_ends: Recent = attrs.field(init=False, factory=Recent)
    #: The size of the last segment asked for: what a lease is measured in.
    _last_size: Recent = attrs.field(init=False, factory=Recent)

    async def reserve(self, service: str, size: int) -> Segment:
        """As `Reservation.reserve`."""
        try:
            for _ in range(TURNS_MAX):
                segment = await self._from_counter(service, size)
                if segment is not None:
                    return segment
        except _CounterDown:
            pass
        return await self._direct.reserve(service, size)

    async def _from_counter(self, service: str, size: int) -> Segment | None:
        """A segment; None if the counter was mended, and should be asked again."""
        floor = self._direct.floor(service)
        self._last_size.set(service, size)
        answer = await self._ask(partial(self._counter.take, service, size, floor=floor))
        self._direct.remember(service, answer.state.lease_end)
        match answer:
            case Cut():
                return self._own(service, answer)
            case Refusal(Reason.SPENT):
                grown, segment = await self._extend(service, size, answer.state)
                return segment if grown else await self._seat(service, size, answer, floor)
            case Refusal(Reason.FOREIGN):
                return await self._from_original(service, size)
            case Refusal():
                return await self._seat(service, size, answer, floor)

    async def _seat(self, service: str, size: int, refusal: Refusal, floor: int) -> Segment | None:
        """Rule 3. `floor` is the one that the refusal was given for."""
        # A row is taken over only above a hash: without one nothing says how far it is behind.
        takes_over = self._policy.take_over and refusal.reason is not Reason.MISSING
        way = self._ledger.take_over if takes_over else self._ledger.lease
        try:
            lease = await self._direct.lease(service, self._lease_ids(size), way)
        except Exhausted:
            return await self._direct.reserve(service, size, way)
        seat = partial(self._counter.seat, service, lease, size, refusal, floor=floor)
        answer = await self._ask_at_once(seat, lease)
        if isinstance(answer, Refusal):
            return lease
        assert refusal.reason is not None
        reason = refusal.reason.value
        self._metrics.seats_total[reason] += 1
        log.sparingly(log.INFO, f"a counter was seated anew: it was {reason}", service=service)
        return self._own(service, answer)

    async def _extend(self, service: str, size: int, seen: State) -> tuple[bool, Segment | None]:
        """Rule 5. Could the ledger lengthen the lease; and what the counter refused of it."""
        old_end = seen.lease_end
        new_end = min(old_end + self._lease_ids(size), self._direct.ceiling_of(service))
        if self._direct.floor(service) > old_end or new_end <= old_end:
            return False, None
        if not await self._direct.ask(partial(self._ledger.extend, service, old_end, new_end)):
            return False, None
        added = Segment(old_end + 1, new_end + 1)
        grow = partial(self._counter.extend, service, old_end, new_end)
        try:
            is_grown = await self._ask_at_once(grow, added)
            if is_grown:
                self._lease_ends.set(service, new_end)
        finally:
            # Not before: a cut meanwhile would find its counter passed, and leave its lease.
            self._direct.remember(service, new_end)
        return True, None if is_grown else added

    async def _from_original(self, service: str, size: int) -> Segment | None:
        if not self._policy.take_over:
            row = await self._direct.ask(partial(self._ledger.read, service))
            if row is None or not row.is_ours:
                return await self._cut_beside(service, size)
        # The row is ours or is to be: so is the hash. What it cut so far lies below the floor.
        refusal = await self._ask(partial(self._counter.take_over, service))
        if refusal.reason is not Reason.SPENT:
            return None
        floor = refusal.state.lease_end
        self._direct.remember(service, floor)
        return await self._seat(service, size, refusal, floor)

    async def _cut_beside(self, service: str, size: int) -> Segment | None:
        """Cut as the original does, but commit before serving."""
        answer = await self._ask(partial(self._counter.cut_beside, service, size))
        if isinstance(answer, Refusal):
            return None
        last, version = answer.state.last_alloc_value, answer.state.data_version
        commit = partial(self._ledger.commit_beside, service, last, version)
        if not await self._direct.ask(commit):
            self._metrics.gap("beside", answer.segment.size)
            return None
        # The original knows of no ceiling, so its hash passes one.
        stop = min(answer.segment.stop, self._direct.ceiling_of(service) + 1)
        if answer.segment.start >= stop:
            raise Exhausted(f"no IDs are left below the ceiling {stop - 1}")
        return Segment(answer.segment.start, stop)

    async def extend_ahead(self, service: str) -> None:
        """Lengthen the counter's lease so that `lease_segments` lie ahead of it."""
        state, is_live = await self._ask(partial(self._counter.inspect, service))
        size = self._last_size.get(service)
        if is_live and state.lease_end - state.last_alloc_value < self._lease_ids(size):
            _, refused = await self._extend(service, size, state)
            if refused is not None:
                await self._direct.give_back([Tail(service, refused)])

    async def compare(self, service: str) -> None:
        """See that the row leads, and raise it if it does not: somebody lowered it."""
        state, is_live = await self._ask(partial(self._counter.inspect, service))
        row = await self._direct.ask(partial(self._ledger.read, service))
        if is_live and row is not None and row.last_alloc_value < state.lease_end:
            log.sparingly(log.WARNING, "a row was behind its counter", service=service)
            raising = partial(self._ledger.raise_to, service, state.lease_end)
            await self._direct.ask(raising)

    async def give_back(self, tails: Sequence[Tail]) -> None:
        """As `Reservation.give_back`; a tail that the counter cut goes back to the counter."""
        to_ledger = []
        for tail in tails:
            if self._last_cut.get(tail.service) != tail.segment.last:
                to_ledger.append(tail)
                continue
            try:
                is_back = await self._ask(partial(self._counter.give_back, tail))
            except Unavailable as error:
                is_back = False
                _note_unreturned([tail], error)
            self._direct.settle(tail, is_back=is_back)
        await self._direct.give_back(to_ledger)

    def origin(self, service: str, segment: Segment) -> str:
        """As `Reservation.origin`: the counter, or direct where it had no part in it."""
        return "counter" if self._last_cut.get(service) == segment.last else "direct"

    def rows(self, service: str) -> Iterator[Row]:
        """What STATS says of a service's place in the counter, as far as we saw."""
        if self._lease_ends.get(service):
            yield "counter_cut_through", self._last_cut.get(service)
            yield "counter_lease_end", self._lease_ends.get(service)

    def _own(self, service: str, cut: Cut) -> Segment:
        self._direct.remember(service, cut.state.lease_end)
        self._last_cut.set(service, cut.segment.last)
        self._lease_ends.set(service, cut.state.lease_end)
        self._metrics.cuts_total += 1
        ahead_ids = cut.state.lease_end - cut.state.last_alloc_value
        self.on_cut(service, 2 * ahead_ids < self._lease_ids(self._last_size.get(service)))
        return cut.segment

    def _lease_ids(self, size: int) -> int:
        return self._policy.lease_segments * max(size, self._policy.segment_size)

    async def _ask(self, request: Callable[[], Awaitable[_T]]) -> _T:
        """The counter's answer to one request, unless it is known to be down."""
        try:
            return await self.health.ask(request)
        except Unavailable as error:
            raise _CounterDown(*error.args) from error

    async def _ask_at_once(self, request: Callable[[], Awaitable[_T]], carried: Segment) -> _T:
        """As `_ask`, for a request that carries a range: without an answer it is lost (rule 4)."""
        try:
            return await self._ask(request)
        except _CounterDown:
            self._metrics.gap("lost", carried.size)
            raise
