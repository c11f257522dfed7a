"""One sequence of IDs: its pool, the task that keeps it filled, the requests that wait.

    take ──────────► Pool ◄── offer ── memory channel ◄── prefetch ◄── Reservation
      │ (no I/O)                            ▲
      └─ None: wait ────────────────────────┘

`take` is synchronous: it serves from the pool or says None. Long before the pool is empty it
rings for the prefetch task. Only a request that finds the pool empty waits, in a queue, for
what comes over the channel.

The channel holds one segment. `prefetch` fetches only when it was rung for, and `take` rings
only once the channel is empty; so there is always room to deliver, and nothing is lost to a
cancelled send.
"""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from typing import final

import attrs
import trio

from idalloc_tcp.backoff import Backoff
from idalloc_tcp.errors import Exhausted, Unavailable
from idalloc_tcp.health import record_calls
from idalloc_tcp.metrics import Row
from idalloc_tcp.pool import Pool, Segment
from idalloc_tcp.sizing import Demand

#: How a prefetch task gets the next segment: by service and number of IDs.
Reserve = Callable[[str, int], Awaitable[Segment]]


def _channel() -> tuple[
    "trio.MemorySendChannel[Segment | None]", "trio.MemoryReceiveChannel[Segment | None]"
]:
    return trio.open_memory_channel[Segment | None](1)


@final
@attrs.define(eq=False)
class Service:
    """The live state of one service in one process."""

    name: str
    pool: Pool
    demand: Demand
    #: Why the last fetch failed; whoever finds the pool empty is told so at once, until a pause
    #: has passed in which nobody asked.
    trouble: Unavailable | Exhausted | None = attrs.field(init=False, default=None)
    #: The code of the last fetch if it failed, or "none".
    last_failure: str = attrs.field(init=False, default="none")
    #: Which stores the last fetch asked, and how long each took, in words.
    last_refill: str = attrs.field(init=False, default="")
    #: Who serves many requests by one `take` adds the others.
    requests_served: int = attrs.field(init=False, default=0)
    #: IDs that requests are waiting for.
    waiting_ids: int = attrs.field(init=False, default=0)
    #: Is a segment on its way? (Not so in the pause after a failure.)
    is_fetching: bool = attrs.field(init=False, default=False)
    _channel: tuple[
        "trio.MemorySendChannel[Segment | None]", "trio.MemoryReceiveChannel[Segment | None]"
    ] = attrs.field(init=False, factory=_channel)
    _bell: trio.lowlevel.ParkingLot = attrs.field(init=False, factory=trio.lowlevel.ParkingLot)
    _is_rung: bool = attrs.field(init=False, default=False)
    _is_stopped: bool = attrs.field(init=False, default=False)
    _queue: trio.Lock = attrs.field(init=False, factory=trio.Lock)

    def take(self, count: int) -> int | None:
        """The first of `count` contiguous IDs; None if they must be waited for.

        Raises:
            Unavailable, Exhausted: they are not here, and the last attempt to get more failed.
        """
        pool = self.pool
        first = pool.take(count)
        if first is None or first + count > pool.refill_above:
            self._collect()
            if first is None:
                first = pool.take(count)
            if first is None or pool.wants_more:
                self._ring()
            if first is None and self.trouble is not None:
                # A new one each time: an exception that is raised again grows its traceback.
                raise type(self.trouble)(*self.trouble.args)
        if first is not None:
            self.requests_served += 1
        return first

    def has_run(self, ids: int) -> bool:
        """Would `take` give so many at once, and skip none for it?"""
        return self.pool.has_run(ids)

    async def wait(self, count: int) -> int:
        """As `take`, but first come, first served for what the prefetch task brings."""
        self.waiting_ids += count
        try:
            async with self._queue:
                while (first := self.take(count)) is None:
                    self._accept(await self._channel[1].receive())
                return first
        finally:
            self.waiting_ids -= count

    async def prefetch(self, reserve: Reserve) -> None:
        """Fetch a segment whenever the bell rings, until stopped."""
        backoff, calls = Backoff(), record_calls()
        has_failed = False
        while await self._rung():
            if not has_failed:  # From refill to refill: an attempt that failed is none.
                self.demand.measure(self.pool.served_ids, trio.current_time())
            size = min(max(self.demand.size, self.waiting_ids), self.demand.policy.largest)
            self.is_fetching = True
            calls.clear()
            try:
                segment = await reserve(self.name, size)
            except (Unavailable, Exhausted) as error:
                has_failed = True
                self.last_refill = ", ".join(map(str, [error.code, *calls]))
                self._fail(error)
                await self._pause(backoff.next_seconds())
                if not self._is_rung:
                    self.trouble = None  # Old news: the next request finds out how things are.
            else:
                has_failed = False
                backoff.reset()
                self.last_refill = ", ".join(map(str, calls))
                self._deliver(segment)

    def stop(self) -> None:
        """End the prefetch task once the fetch under way, if any, has ended."""
        self._is_stopped = True
        self._bell.unpark_all()

    def close(self) -> list[Segment]:
        """Stop owning IDs: what was not served, highest first."""
        self._collect()
        return self.pool.close()

    def rows(self) -> Iterator[Row]:
        """What STATS says of it."""
        yield "remaining_ids", self.pool.remaining
        yield "requests", self.requests_served
        yield "served_ids", self.pool.served_ids
        yield "last_served", self.pool.served_through
        yield "segment_size", self.demand.size
        yield "low_water_ids", self.pool.low_water
        yield "rate_ids_per_second", round(self.demand.rate, 3)
        if self.demand.rate:
            yield "cover_seconds", round(self.pool.remaining / self.demand.rate, 1)
        yield "waiting_ids", self.waiting_ids
        yield "trouble", self.last_failure

    def _collect(self) -> None:
        with suppress(trio.WouldBlock):
            self._accept(self._channel[1].receive_nowait())

    def _accept(self, arrival: Segment | None) -> None:
        if arrival is not None:
            self.pool.offer(arrival)

    def _ring(self) -> None:
        self._is_rung = True
        self._bell.unpark_all()

    async def _rung(self) -> bool:
        """Wait for the bell; False once stopped."""
        while not (self._is_rung or self._is_stopped):
            await self._bell.park()
        return not self._is_stopped

    async def _pause(self, seconds: float) -> None:
        with trio.move_on_after(seconds):
            while not self._is_stopped:
                await self._bell.park()

    def _deliver(self, segment: Segment) -> None:
        self.is_fetching = False
        self.trouble, self.last_failure = None, "none"
        self._is_rung = False
        self.pool.low_water = self.demand.low_water
        self._channel[0].send_nowait(segment)

    def _fail(self, error: Unavailable | Exhausted) -> None:
        """Tell who waits. Only another request is worth another look at the store."""
        self.is_fetching = False
        # Without its traceback, which holds frames that hold this service.
        self.trouble, self.last_failure = type(error)(*error.args), error.code
        self._is_rung = False
        if self._channel[0].statistics().tasks_waiting_receive:
            self._channel[0].send_nowait(None)
