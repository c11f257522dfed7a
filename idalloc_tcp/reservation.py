"""Getting the next segment, and giving the rest of one back: the rules of uniqueness.

Every level of the hierarchy gives away disjoint parts of what it owns and forgets them. IDs are
unique as long as nobody owns the same thing twice, and that is what these rules see to:

* *Lead.* A segment is served only if the ledger committed it first. `reserve` returns nothing
  but what `Ledger.lease` returned, and that returns only after its commit.
* *At most once.* A request that moves ownership is never sent twice. If its outcome is not
  known the range is lost: a gap. `reserve` lets `Unavailable` through, and whoever asks again
  asks for another lease; `give_back` counts its tails as gaps and forgets them. (`Exhausted`
  says for certain that nothing was taken, so a smaller request after it repeats nothing.)
* *Floor.* The highest lease end ever seen goes with every request, and the ledger leases above
  it. A ledger that lost its last commits is so repaired by whoever remembers.
* *Give back, or leave a gap.* A tail goes back once, by compare-and-set: only if nothing above
  it was given away. The floor follows it down only if the floor stood on that very tail.

*Never backwards*, the rule about the order of replies, is kept by `pool`.
"""

from collections.abc import Callable, Sequence
from typing import Final, final

import attrs

from idalloc_tcp import log
from idalloc_tcp.errors import Exhausted, Unavailable
from idalloc_tcp.ledger import Ledger, Tail
from idalloc_tcp.metrics import Metrics
from idalloc_tcp.pool import Segment

#: How many services' floors are remembered after the services went idle.
FLOORS_MAX: Final = 1_000_000
#: How many tails go back in one request to the ledger.
TAILS_MAX: Final = 1_000


@final
@attrs.define(eq=False)
class Reservation:
    """Where segments come from and tails go back to.

    Args:
        ledger: the durable authority.
        ceiling_of: the last ID that a service may ever use.
        metrics: counts leases, failures and gaps.
    """

    _ledger: Ledger
    _ceiling_of: Callable[[str], int]
    _metrics: Metrics
    _floors: dict[str, int] = attrs.field(init=False, factory=dict)
    _is_down: bool = attrs.field(init=False, default=False)

    async def reserve(self, service: str, size: int) -> Segment:
        """A segment of `size` IDs that nobody else ever gets; smaller only near the ceiling.

        Raises:
            Exhausted: not one ID is left below the ceiling.
            Unavailable: no ledger answered; the range asked for is lost.
        """
        floor = self._floors.get(service, 0)
        segment = await self._lease(service, size, floor)
        self._note(None)
        if segment.start <= floor:
            raise Unavailable(f"the ledger leased {service} below its floor; it lost commits")
        self._remember(service, segment.last)
        self._metrics.leases_total += 1
        self._metrics.leased_ids_total += segment.size
        return segment

    async def _lease(self, service: str, size: int, floor: int) -> Segment:
        ceiling = self._ceiling_of(service)
        while True:
            try:
                return await self._ledger.lease(service, size, floor=floor, ceiling=ceiling)
            except Exhausted:
                if size == 1:
                    raise
                size //= 2
            except Unavailable as error:
                self._metrics.lease_failures_total += 1
                self._note(error)
                raise Unavailable("the store of IDs does not answer; retry later") from error

    def _note(self, problem: Unavailable | None) -> None:
        """Log when the ledger goes and when it is back, each once."""
        if problem is not None and not self._is_down:
            log.warning("the ledger is down", reason=problem)
        elif problem is None and self._is_down:
            log.event("the ledger is back")
        self._is_down = problem is not None

    def _remember(self, service: str, lease_end: int) -> None:
        # Never lower: replies may overtake each other. Taken out and put in again, for the dict
        # is in the order of last use.
        self._floors[service] = max(lease_end, self._floors.pop(service, 0))
        if len(self._floors) > FLOORS_MAX:
            del self._floors[next(iter(self._floors))]

    async def give_back(self, tails: Sequence[Tail]) -> None:
        """Return what was not served; what cannot be returned is counted as a gap."""
        for start in range(0, len(tails), TAILS_MAX):
            batch = tails[start : start + TAILS_MAX]
            try:
                returned = await self._ledger.give_back(batch)
            except Unavailable:
                returned = [False] * len(batch)
            for tail, is_back in zip(batch, returned, strict=True):
                self._settle(tail, is_back=is_back)

    def _settle(self, tail: Tail, *, is_back: bool) -> None:
        if not is_back:
            self._metrics.gap("unreturned", tail.segment.size)
            return
        self._metrics.returned_ids_total += tail.segment.size
        if self._floors.get(tail.service) == tail.segment.last:
            self._floors[tail.service] = tail.segment.start - 1
