"""Random ranges for when no store answers: rather likely unique than none at all.

They lie in the upper half of what 63 bits hold, which no sequence ever reaches, and travel under
a reply word of their own, so that nobody takes one for an ID that is safe.
"""

import secrets
from typing import Final

from idalloc_tcp.pool import MAX_ID

#: The lowest ID of a random range.
LOWEST: Final = 2**62


def random_range(count: int) -> int:
    """The first of `count` IDs from `LOWEST` to `MAX_ID`."""
    return LOWEST + secrets.randbelow(MAX_ID - LOWEST - count + 2)
