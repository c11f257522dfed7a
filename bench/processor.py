"""CPU time of other processes."""

import time
from collections.abc import Iterable
from typing import Final

#: In Linux, the clock of a process's user and system time is made of its id and this.
_PROCESS_CLOCK: Final = 2


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time of these processes, all their threads, to the nanosecond."""
    return sum(time.clock_gettime((~pid << 3) | _PROCESS_CLOCK) for pid in pids)
