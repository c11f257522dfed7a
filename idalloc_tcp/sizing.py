"""How many IDs a pool asks for at once, from how fast it loses them.

A pool tries to hold `pool_seconds` of demand: that is the outage of the stores that its
clients do not notice. Pure: the time is passed in.
"""

from typing import Final, final

import attrs

#: A segment grows at most by this factor over the one before, so that a single burst does not
#: carry millions of IDs away from a quiet service.
GROWTH_MAX: Final = 4
#: Rates over shorter times than this say more about the clock than about the demand.
ELAPSED_SECONDS_MIN: Final = 0.001


@final
@attrs.frozen
class SizePolicy:
    """The bounds of a segment's size, in IDs, and the demand it should cover, in seconds."""

    smallest: int = 10_000
    largest: int = 10_000_000
    pool_seconds: float = 60.0


@final
@attrs.define(eq=False)
class Demand:
    """How fast one service's IDs go, measured from refill to refill."""

    policy: SizePolicy
    _measured_at: float
    _served_ids: int = 0
    #: IDs per second: up at once, down by halves.
    rate: float = 0.0
    #: The number of IDs to ask for next.
    size: int = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.size = self.policy.smallest

    def measure(self, served_ids: int, now: float) -> None:
        """Note that `served_ids` in all have gone until `now` (seconds of any clock)."""
        elapsed = max(now - self._measured_at, ELAPSED_SECONDS_MIN)
        current = (served_ids - self._served_ids) / elapsed
        self.rate = current if current >= self.rate else (current + self.rate) / 2
        self._served_ids, self._measured_at = served_ids, now
        largest = min(self.size * GROWTH_MAX, self.policy.largest)
        self.size = round(max(self.policy.smallest, min(self._cover, largest)))

    @property
    def low_water(self) -> int:
        """The rest of a pool below which it should be refilled, in IDs."""
        return round(max(1, min(max(self._cover, self.policy.smallest / 2), self.size)))

    @property
    def _cover(self) -> float:
        return self.rate * self.policy.pool_seconds
