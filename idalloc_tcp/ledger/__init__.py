"""The ledger: the durable authority that gives away leases.

An adapter translates its driver's exceptions to ours, here and nowhere else, and holds no
policy: retries, back-off and the rules of uniqueness live in `reservation`.
"""

from collections.abc import Sequence
from typing import Final, Protocol

import attrs

from idalloc_tcp.pool import MAX_ID, Segment

#: The `data_version` of a row that is ours. The original idalloc writes a row only with a greater
#: version, and there is none.
CLOSED: Final = MAX_ID


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
            Exhausted: it would pass the ceiling; certain that nothing was taken. It says how many
                IDs are left.
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


@attrs.frozen
class Row:
    """A service's row, and whether it is ours: one that leads, not one that the original wrote."""

    last_alloc_value: int
    data_version: int

    @property
    def is_ours(self) -> bool:
        """Does it lead?"""
        return self.data_version == CLOSED


class SharedLedger(Ledger, Protocol):
    """A ledger that a counter can stand on, and that the original idalloc may have written.

    `lease` raises NotOurs for a row that was not taken over.
    """

    async def take_over(self, service: str, size: int, *, floor: int, ceiling: int) -> Segment:
        """As `lease`, and make a row of the original ours. `floor` is above all it gave away."""
        ...

    async def extend(self, service: str, old_end: int, new_end: int) -> bool:
        """Lease the IDs above `old_end` up to `new_end`, if `old_end` is the last one leased.

        Raises:
            Unavailable: whether they were leased is not known; they are lost.
        """
        ...

    async def commit_beside(self, service: str, last: int, version: int) -> bool:
        """Note a cut that was made beside the original. False: the row is ours, drop the cut.

        Raises:
            Unavailable: it may or may not be noted; the cut is lost.
        """
        ...

    async def raise_to(self, service: str, lease_end: int) -> None:
        """Let a row of ours stand at least at `lease_end`. Raising a row is always safe."""
        ...

    async def read(self, service: str) -> Row | None:
        """What stands in the service's row now; None if it has none.

        Raises:
            Unavailable: no answer.
        """
        ...
