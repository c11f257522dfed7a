"""Units of work of asyncio drivers, called from Trio."""

import asyncio
import gc

import pytest
import trio
from trio.testing import MockClock

from idalloc_tcp.bridge import UNIT_SECONDS, asyncio_loop, run_unit, turn
from idalloc_tcp.errors import Crowded, Unavailable


async def test_unit_gets_arguments_and_returns(autojump_clock: MockClock) -> None:
    """A unit runs on asyncio's side, may wait there, and its result comes back."""

    async def add(a: int, b: int) -> int:
        await asyncio.sleep(1)
        return a + b

    async with asyncio_loop():
        assert await run_unit(add, 2, 3) == 5


async def test_exception_comes_through() -> None:
    """What a unit raises is raised here, as it is."""
    error = Unavailable("gone")

    async def fail() -> None:
        await asyncio.sleep(0)
        raise error

    async with asyncio_loop():
        with pytest.raises(Unavailable) as caught:
            await run_unit(fail)
        assert caught.value is error


async def test_unit_that_hangs_is_unavailable(autojump_clock: MockClock) -> None:
    """A unit that does not end in time is cancelled, cleans up, and counts as no answer."""
    cleaned_up = []

    async def hang() -> None:
        try:
            await asyncio.sleep(100)
        finally:
            await asyncio.sleep(0)  # Delivered once: clean-up may wait.
            cleaned_up.append(True)

    async with asyncio_loop():
        began = trio.current_time()
        with pytest.raises(Unavailable, match=r"^no answer within 2\.5 s$"):
            await run_unit(hang)
        assert trio.current_time() - began == pytest.approx(UNIT_SECONDS)
    assert cleaned_up == [True]


async def test_cancelled_unit_cleans_up_first(autojump_clock: MockClock) -> None:
    """Who is cancelled gets away only after the unit has cleaned up."""
    steps: list[str] = []

    async def hang() -> None:
        try:
            steps.append("begun")
            await asyncio.sleep(100)
        finally:
            await asyncio.sleep(0.1)
            steps.append("cleaned up")

    async with asyncio_loop():
        with trio.move_on_after(1) as scope:
            await run_unit(hang)
        assert scope.cancelled_caught
        assert steps == ["begun", "cleaned up"]


async def test_unit_in_a_cancelled_scope_does_not_begin() -> None:
    """A scope that is cancelled already runs no unit at all."""
    begun = []

    async def begin() -> None:
        begun.append(True)

    async with asyncio_loop():
        with trio.CancelScope() as scope:
            scope.cancel()
            await run_unit(begin)
        assert scope.cancelled_caught
    assert not begun


async def test_units_run_side_by_side(autojump_clock: MockClock) -> None:
    """Units of many tasks wait at the same time, not in turn."""

    async def wait() -> None:
        await asyncio.sleep(1)

    async with asyncio_loop():
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(run_unit, wait)
        assert trio.current_time() - began < 1.5


async def test_task_that_dies_unobserved_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A task that a driver left behind does not end the program when it fails."""

    async def leave_a_task_behind() -> None:
        async def fail() -> None:
            raise OSError("connection lost")

        task = asyncio.ensure_future(fail())
        await asyncio.sleep(0.01)
        assert task.done()

    async with asyncio_loop():
        await run_unit(leave_a_task_behind)
        gc.collect()
        await trio.sleep(0.01)
        await run_unit(asyncio.sleep, 0)
    [record] = caplog.records
    assert record.getMessage() == "a driver's task failed"
    assert str(record.__dict__["fields"]["reason"]) == "connection lost"


async def test_who_waits_too_long_for_a_turn_is_told(autojump_clock: MockClock) -> None:
    """Only so many go at once; others wait their time, and a slot is always given back."""
    slots = trio.CapacityLimiter(2)
    done: list[int] = []

    async def go(number: int) -> None:
        try:
            async with turn(slots, within_seconds=1.5):
                await trio.sleep(1)
                done.append(number)
        except Crowded:
            done.append(-number)

    async with trio.open_nursery() as nursery:
        for number in range(1, 7):
            nursery.start_soon(go, number)
    assert sum(number > 0 for number in done) == 4
    assert slots.borrowed_tokens == 0
