"""The counter: cuts one ledger lease into segments for all servers.

An accelerator and nothing more: what it says counts only while its fence is the live one, and
nothing that it forgets, restores or repeats can put an ID into two hands (see `reservation`).
"""

from enum import Enum
from typing import Protocol

import attrs

from idalloc_tcp.ledger import Tail
from idalloc_tcp.pool import Segment


class Reason(Enum):
    """Why a counter cannot cut."""

    #: There is no hash, or not all of our fields are in it.
    MISSING = "missing"
    #: The original idalloc wrote it, and it has not been taken over.
    FOREIGN = "foreign"
    #: It was written under another Redis than the one that answers: it may be old data.
    STALE = "stale"
    #: The ledger has moved past its lease.
    PASSED = "passed"
    #: Its lease is used up.
    SPENT = "spent"


@attrs.frozen
class State:
    """What a counter holds; zeros and "" where it holds nothing."""

    #: The last ID that was cut off.
    last_alloc_value: int = 0
    #: The original's count of cuts; 2^63-1 once the hash is ours.
    data_version: int = 0
    #: The last ID of the lease.
    lease_end: int = 0
    #: Which Redis it was seated on.
    fence: str = ""


@attrs.frozen
class Cut:
    """A segment, and the state that the counter is in after it."""

    segment: Segment
    state: State


@attrs.frozen
class Refusal:
    """No segment, why (None: nothing is wrong any more), and the state that says so."""

    reason: Reason | None
    state: State


class Counter(Protocol):
    """What every counter can do. All methods are safe to call from concurrent tasks.

    Each raises Unavailable if there is no answer; what it did is then not known, and whatever
    it would have moved is lost.
    """

    async def take(self, service: str, size: int, *, floor: int) -> Cut | Refusal:
        """Cut a segment of `size` IDs off the lease; a smaller one where the lease ends.

        Refused as PASSED if the lease ends below `floor`.
        """
        ...

    async def seat(
        self, service: str, lease: Segment, size: int, refusal: Refusal, *, floor: int
    ) -> Cut | Refusal:
        """Put the counter on a fresh lease, if the reason of `refusal` still holds.

        The answer is the first segment of it. Refused: the lease still belongs to the caller.
        """
        ...

    async def extend(self, service: str, old_end: int, new_end: int) -> bool:
        """Move the lease's end, if the fence is live and the end is still `old_end`."""
        ...

    async def give_back(self, tail: Tail) -> bool:
        """Take a tail back, if the fence is live and nothing was cut after it."""
        ...

    async def inspect(self, service: str) -> tuple[State, bool]:
        """What it holds, and whether its fence is the live one."""
        ...

    async def cut_beside(self, service: str, size: int) -> Cut | Refusal:
        """Cut as the original idalloc does, from a hash that it still owns."""
        ...

    async def take_over(self, service: str) -> Refusal:
        """Make a hash of the original idalloc ours: SPENT, with nothing in its lease."""
        ...

    async def aclose(self) -> None:
        """Let go of connections. Never raises, never blocks for long."""
        ...
