"""Keeping counter and ledger in step, off the path of every request.

Every so many segments of a service, and at once where a lease runs short, a task is put on a
bounded channel: to see that enough of a lease lies ahead of the counter, or that the row still
leads. A few workers take them off. A task that finds the channel full is dropped and counted;
another one comes with the next segments.
"""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import final

import attrs
import trio

from idalloc_tcp import log
from idalloc_tcp.errors import Exhausted, Unavailable
from idalloc_tcp.metrics import Metrics
from idalloc_tcp.recent import Recent

#: What a worker does for one service.
Step = Callable[[str], Awaitable[None]]


@final
@attrs.frozen
class SyncPolicy:
    """How much, and how often in segments of one service."""

    queue_size: int = 10_000
    workers: int = 10
    extend_every: int = 10
    compare_every: int = 100


@final
@attrs.define(eq=False)
class Sync:
    """The queue and its workers.

    Args:
        extend: lengthens the lease ahead of a counter.
        compare: raises a row that is behind its counter.
    """

    _extend: Step
    _compare: Step
    _policy: SyncPolicy
    _metrics: Metrics
    _cuts: Recent = attrs.field(init=False, factory=Recent)
    _queue: trio.MemorySendChannel[tuple[Step, str]] = attrs.field(init=False)
    _tasks: trio.MemoryReceiveChannel[tuple[Step, str]] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._queue, self._tasks = trio.open_memory_channel(self._policy.queue_size)

    def note_cut(self, service: str, is_short: bool = False) -> None:
        """A segment of the service was cut; is its lease running short? Never waits or raises."""
        cuts = self._cuts.get(service) + 1
        self._cuts.set(service, cuts)
        if is_short or cuts % self._policy.extend_every == 0:
            self._put(self._extend, service)
        if cuts % self._policy.compare_every == 0:
            self._put(self._compare, service)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Work until `stop`, then through what is queued."""
        async with trio.open_nursery() as nursery:
            for _ in range(self._policy.workers):
                nursery.start_soon(self._work)
            task_status.started()

    @property
    def queued(self) -> int:
        """How many tasks wait for a worker."""
        return self._tasks.statistics().current_buffer_used

    def stop(self) -> None:
        """Take no more tasks; let `run` come to its end."""
        self._queue.close()

    def _put(self, step: Step, service: str) -> None:
        try:
            self._queue.send_nowait((step, service))
        except trio.WouldBlock:
            self._metrics.sync_drops_total += 1
            log.sparingly(log.WARNING, "a store's task found no room and was dropped")
        except trio.ClosedResourceError:  # It is stopping.
            self._metrics.sync_drops_total += 1

    async def _work(self) -> None:
        async for step, service in self._tasks:
            # Health has logged that a store is gone; what is not done now is done next time.
            with suppress(Unavailable, Exhausted):
                await step(service)
            self._metrics.syncs_total += 1
