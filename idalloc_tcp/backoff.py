"""How long to leave a failing store alone before the next attempt."""

import random
from typing import Final, final

import attrs

FIRST_SECONDS: Final = 0.05
#: A store that was gone is noticed to be back within this time.
LONGEST_SECONDS: Final = 1.0


@final
@attrs.define(eq=False)
class Backoff:
    """Pauses that double up to a cap, with jitter so that many who wait do not move in step."""

    _seconds: float = attrs.field(init=False, default=FIRST_SECONDS)

    def next_seconds(self) -> float:
        """The pause before the next attempt."""
        longest = self._seconds
        self._seconds = min(2 * longest, LONGEST_SECONDS)
        return random.uniform(longest / 2, longest)

    def reset(self) -> None:
        """It worked: the next failure starts over."""
        self._seconds = FIRST_SECONDS
