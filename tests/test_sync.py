"""Keeping counter and ledger in step, beside the path of requests."""

from collections.abc import Awaitable, Callable

import attrs
import pytest
import trio
from trio.testing import MockClock

from idalloc_tcp.errors import Exhausted, Internal, NotOurs, Unavailable
from idalloc_tcp.metrics import Metrics
from idalloc_tcp.sync import Sync, SyncPolicy


@attrs.define(eq=False)
class Rig:
    """A queue whose steps take as long, and fail, as they are told to."""

    policy: SyncPolicy = attrs.field(factory=SyncPolicy)
    step_seconds: float = 0.0
    error: Exception | None = None
    done: list[tuple[str, str]] = attrs.field(init=False, factory=list)
    metrics: Metrics = attrs.field(init=False, factory=Metrics)
    running: int = attrs.field(init=False, default=0)
    running_most: int = attrs.field(init=False, default=0)
    sync: Sync = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.sync = Sync(self._step("extend"), self._step("compare"), self.policy, self.metrics)

    def cut(self, segments: int, service: str = "orders") -> None:
        """So many segments of a service were cut."""
        for _ in range(segments):
            self.sync.note_cut(service)

    async def finish(self) -> None:
        """Work through what is queued."""
        self.sync.stop()
        await self.sync.run()

    def _step(self, name: str) -> Callable[[str], Awaitable[None]]:
        async def step(service: str) -> None:
            self.running += 1
            self.running_most = max(self.running, self.running_most)
            await trio.sleep(self.step_seconds)
            self.running -= 1
            self.done.append((name, service))
            if self.error is not None:
                raise self.error

        return step


async def test_every_nth_segment_of_a_service_makes_a_task() -> None:
    """Each service is counted by itself, and each kind of task has its own period."""
    rig = Rig(SyncPolicy(extend_every=3, compare_every=7))
    rig.cut(2, "a")
    rig.cut(20, "b")
    rig.cut(1, "a")
    await rig.finish()
    assert rig.done.count(("extend", "a")) == 1
    assert rig.done.count(("extend", "b")) == 6
    assert rig.done.count(("compare", "b")) == 2
    assert len(rig.done) == rig.metrics.syncs_total == 9


async def test_a_lease_that_runs_short_makes_a_task_at_once() -> None:
    """It does not wait for the next turn, and the comparison is not drawn forward with it."""
    rig = Rig(SyncPolicy(extend_every=100, compare_every=100))
    rig.sync.note_cut("a", True)
    rig.sync.note_cut("a", False)
    await rig.finish()
    assert rig.done == [("extend", "a")]


async def test_a_full_queue_drops_and_never_waits() -> None:
    """What finds the queue full is dropped and counted; whoever cut goes on at once."""
    rig = Rig(SyncPolicy(queue_size=5, extend_every=1, compare_every=1_000))
    rig.cut(12)  # It is synchronous, and nobody takes anything off the queue.
    assert rig.metrics.sync_drops_total == 7
    await rig.finish()
    assert len(rig.done) == 5


async def test_only_so_many_work_at_once(autojump_clock: MockClock) -> None:
    """All workers work, and no more of them than were asked for."""
    policy = SyncPolicy(workers=3, extend_every=1, compare_every=1_000)
    rig = Rig(policy, step_seconds=1)
    rig.cut(9)
    await rig.finish()
    assert rig.running_most == 3
    assert trio.current_time() == 3


@pytest.mark.parametrize("error", [Unavailable("down"), NotOurs("no"), Exhausted("none left")])
async def test_a_store_that_fails_ends_no_worker(error: Exception) -> None:
    """What could not be done now is done with a later segment; the workers live on."""
    rig = Rig(SyncPolicy(workers=1, extend_every=1, compare_every=1_000), error=error)
    rig.cut(4)
    await rig.finish()
    assert len(rig.done) == 4


@pytest.mark.parametrize("error", [Internal("a fault"), ValueError("a fault")])
async def test_a_fault_is_not_swallowed(error: Exception) -> None:
    """Anything else is a fault of ours, and comes to light."""
    rig = Rig(SyncPolicy(workers=1, extend_every=1), error=error)
    rig.cut(2)
    with pytest.raises(ExceptionGroup) as caught:
        await rig.finish()
    assert caught.value.exceptions == (error,)
    assert len(rig.done) == 1


async def test_a_stop_works_through_the_queue(autojump_clock: MockClock) -> None:
    """After `stop` what is queued is done, nothing more is taken, and `run` ends."""
    rig = Rig(SyncPolicy(workers=2, extend_every=1, compare_every=1_000), step_seconds=1)
    async with trio.open_nursery() as nursery:
        await nursery.start(rig.sync.run)
        rig.cut(6)
        await trio.sleep(0.5)
        rig.sync.stop()
        rig.sync.stop()
        rig.cut(3)
    assert len(rig.done) == 6
    assert rig.metrics.sync_drops_total == 3


async def test_tasks_are_done_as_they_come(autojump_clock: MockClock) -> None:
    """While it runs nobody has to stop it to get something done."""
    rig = Rig(SyncPolicy(extend_every=1, compare_every=1_000))
    async with trio.open_nursery() as nursery:
        await nursery.start(rig.sync.run)
        for number in range(1, 4):
            rig.cut(1)
            await trio.sleep(1)
            assert len(rig.done) == number
        rig.sync.stop()
