"""Keeping the garbage collector away from what lives long.

Python's full collections look at every object there is, and nobody is served meanwhile: with
100,000 services in use that took two seconds. But services and connections are freed by their
reference counts, without any collector. So what has come to stay is put where none looks.
"""

import ctypes
import gc
import linecache
from typing import Final, final

import attrs

#: After so many new services and connections, about 20 objects each, the rest is put away.
NEWCOMERS_MAX: Final = 1_000


def clear_up() -> None:
    """Give back to the system what only the start of the process needed: about a megabyte."""
    linecache.clearcache()  # The source of every method that attrs made.
    gc.collect()  # Parsers of command lines are rings.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # Not in every C library.
        trim(0)


@final
@attrs.define(eq=False)
class Residents:
    """Counts what has come to stay."""

    _newcomers: int = attrs.field(init=False, default=0)

    def settle(self) -> None:
        """Put away all there is now."""
        self._newcomers = 0
        gc.collect(1)  # Not what is garbage already, as far as that is quick to see.
        gc.freeze()

    def add(self) -> None:
        """Something has come to stay."""
        self._newcomers += 1
        if self._newcomers >= NEWCOMERS_MAX:
            self.settle()
