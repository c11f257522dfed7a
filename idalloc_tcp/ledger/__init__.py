"""The ledger: the durable authority that gives away leases.

An adapter translates its driver's exceptions to ours, here and nowhere else, and holds no
policy: retries, back-off and the rules of uniqueness live in `reservation`.
"""

from collections.abc import Sequence
from typing import Protocol

import attrs

from idalloc_tcp.pool import Segment


@attrs.frozen
class Tail:
    """The unserved end of a lease, on its way back to the ledger."""

    service: str
    segment: Segment


class Ledger(Protocol):
    """What every ledger can do. All methods are safe to call from concurrent tasks."""

    async def lease(self, service: str, size: int, *, floor: int, ceiling: int) -> Segment:
        """Give `size` contiguous IDs away for ever, durably before this returns.

        The lease lies above everything leased before and above `floor`, and ends at or below
        `ceiling`. An unknown service starts at 1 (or above the floor).

        Raises:
            Exhausted: it would pass the ceiling; certain that nothing was taken.
            Unavailable: anything else; whether the lease was taken is not known, so the
                caller never sends the same request again but asks for a new lease.
        """
        ...

    async def give_back(self, tails: Sequence[Tail]) -> list[bool]:
        """Take tails back, each only if its last ID is still the last that was given away.

        In the order given, all in one go; the answer says for each whether it was taken back.

        Raises:
            Unavailable: whether any was taken back is not known; they are all lost (a gap).
        """
        ...

    async def aclose(self) -> None:
        """Let go of files and connections. Never raises, never blocks for long."""
        ...
