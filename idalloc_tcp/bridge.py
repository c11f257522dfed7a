"""Calling asyncio drivers from Trio, one whole unit of work at a time.

A unit is a coroutine that leaves nothing behind: it takes a connection, talks, and puts it back
or closes it, all on asyncio's side. So a cancellation, which is delivered there once, finds the
clean-up inside the unit, where it still runs.

Crossing costs about 0.3 ms of CPU. That is why nothing on the path of a request does it.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar, cast

import trio
import trio_asyncio

from idalloc_tcp import log
from idalloc_tcp.errors import Crowded, Unavailable

_T = TypeVar("_T")

#: Drivers time out after one second by themselves; this is for when they do not.
UNIT_SECONDS: Final = 2.5
#: How long the loop may take to come to its end.
LAST_TURN_SECONDS: Final = 0.5


@asynccontextmanager
async def asyncio_loop() -> AsyncIterator[None]:
    """An asyncio event loop for the drivers, for as long as the `async with` lasts."""
    async with trio_asyncio.open_loop() as loop:
        # The default handler would end the process when any task of a driver dies unobserved.
        loop.set_exception_handler(_log_exception)
        try:
            yield
        finally:
            # asyncio lets go of a connection that was closed one turn of its loop later.
            with trio.move_on_after(LAST_TURN_SECONDS, shield=True):
                await trio_asyncio.aio_as_trio(asyncio.sleep)(0)


def _log_exception(_loop: object, context: dict[str, Any]) -> None:
    reason = str(context.get("exception") or context["message"])
    log.sparingly(log.WARNING, "a driver's task failed", reason=reason)


@asynccontextmanager
async def turn(slots: trio.CapacityLimiter, within_seconds: float) -> AsyncIterator[None]:
    """One of so many slots, for as long as the `async with` lasts.

    Raises:
        Crowded: none became free in time.
    """
    with trio.move_on_after(within_seconds) as patience:
        await slots.acquire()
    if patience.cancelled_caught:
        raise Crowded("all connections are busy")
    try:
        yield
    finally:
        slots.release()


async def run_unit(unit: Callable[..., Awaitable[_T]], *arguments: object) -> _T:
    """Run one unit of work.

    Raises:
        Unavailable: it did not end in time. What it did to the store is not known.
    """
    with trio.move_on_after(UNIT_SECONDS):
        return cast(_T, await trio_asyncio.aio_as_trio(unit)(*arguments))
    raise Unavailable(f"no answer within {UNIT_SECONDS:g} s")
