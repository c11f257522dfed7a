"""Uniqueness under everything that a counter and a ledger may do, at random."""

from collections.abc import Awaitable, Callable
from random import Random
from typing import Final, final

import attrs
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from idalloc_tcp.counter import State
from idalloc_tcp.errors import Exhausted, Unavailable
from idalloc_tcp.ledger import Tail
from idalloc_tcp.pool import Pool
from tests.counter_rig import LEASE, SIZE, Rig, Worker

WORKERS: Final = 3
STEPS: Final = 60
SERVICES: Final = ("a", "b")


@final
@attrs.define(eq=False)
class Storm:
    """Workers that serve, stores that fail, and a list of every ID that was served."""

    random: Random
    rig: Rig
    served: dict[str, set[int]] = attrs.field(factory=lambda: {name: set() for name in SERVICES})
    snapshots: list[dict[str, State]] = attrs.field(factory=list)

    async def work(self, worker: Worker) -> None:
        """What one server does all day: refill, serve, sync, give back."""
        worker.counter.loses = worker.ledger.loses = lambda: self.random.random() < 0.1
        pools = {name: Pool() for name in SERVICES}
        last = dict.fromkeys(SERVICES, 0)
        for _ in range(STEPS):
            name = self.random.choice(SERVICES)
            with trio.move_on_after(self.random.choice((0.3, 9))):
                await self.step(worker, name, pools)
            first = pools[name].take(count := self.random.randint(1, SIZE))
            if first is not None:
                assert first > last[name], "backwards"
                last[name] = first + count - 1
                self.serve(name, first, count)
            await trio.sleep(self.random.random())

    async def step(self, worker: Worker, name: str, pools: dict[str, Pool]) -> None:
        """One thing that goes to the stores."""
        reservation, pool = worker.reservation, pools[name]
        try:
            match self.random.randrange(10):
                case 0:
                    tails = [Tail(name, segment) for segment in pool.close()]
                    await reservation.give_back(tails)
                case 1:
                    await reservation.extend_ahead(name)
                case 2:
                    await reservation.compare(name)
                case _:
                    pool.offer(await reservation.reserve(name, self.random.randint(1, 2 * SIZE)))
        except (Unavailable, Exhausted):
            pass

    def serve(self, name: str, first: int, count: int) -> None:
        """Note what a client got."""
        ids = set(range(first, first + count))
        assert not ids & self.served[name], (
            f"{name} served twice: {sorted(ids & self.served[name])}"
        )
        assert max(ids) <= self.rig.row(name), "served above what the ledger committed"
        self.served[name] |= ids

    async def rage(self, faults: list[Callable[[], None]]) -> None:
        """Let one fault after the other happen."""
        while True:
            self.random.choice(faults)()
            await trio.sleep(self.random.random())

    def fail(self) -> None:
        """Either store is up or down, and slow or quick."""
        for store in (self.rig.counter, self.rig.ledger):
            store.down = self.random.random() < 0.15
            store.delay_seconds = self.random.choice((0.0, 0.0, 0.2))
            store.reply_seconds = self.random.choice((0.0, 0.0, 0.2))

    def remember(self) -> None:
        """A backup, or what a replica has received."""
        self.snapshots.append(self.rig.counter.snapshot())

    def restart(self) -> None:
        """Come back with any of them, or empty."""
        self.rig.counter.restart(self.random.choice([{}, *self.snapshots]))

    def lease_elsewhere(self) -> None:
        """A server without a counter leases from the same ledger; what it got it serves."""
        segment = self.rig.ledger.take_from_outside("a", self.random.randint(1, LEASE))
        self.serve("a", segment.start, segment.size)


def run(main: Callable[[], Awaitable[None]]) -> None:
    """In virtual time."""
    trio.run(main, clock=MockClock(autojump_threshold=0))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32))
def test_no_id_twice_whatever_the_stores_do(seed: int) -> None:
    """Flushes, failovers, old backups, outages, lost replies and cancellations: never twice."""

    async def main() -> None:
        storm = Storm(Random(seed), Rig())
        rig = storm.rig
        faults = [storm.fail, storm.fail, storm.remember, storm.restart, rig.counter.fail_over]
        faults += [rig.counter.flush, storm.lease_elsewhere]
        async with trio.open_nursery() as faulty:
            faulty.start_soon(storm.rage, faults)
            async with trio.open_nursery() as workers:
                for _ in range(WORKERS):
                    workers.start_soon(storm.work, rig.worker())
            faulty.cancel_scope.cancel()
        assert len(storm.served["b"]) > SIZE

    run(main)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32))
def test_no_id_twice_while_the_original_is_replaced(seed: int) -> None:
    """The original, servers beside it and those that take over: on a healthy Redis never twice."""

    async def main() -> None:
        storm = Storm(Random(seed), Rig())
        counter, ledger = storm.rig.counter, storm.rig.ledger
        for name in SERVICES:
            counter.write_original(name, 1_000, 20)
            ledger.write_original(name, 900, 10)

        def cut_original() -> None:
            for name in SERVICES:
                segment = counter.cut_original(name, SIZE)
                if segment is not None:
                    ids = set(range(segment.start, segment.stop))
                    assert not ids & storm.served[name]
                    storm.served[name] |= ids

        async with trio.open_nursery() as faulty:
            faulty.start_soon(storm.rage, [storm.fail, cut_original, cut_original])
            async with trio.open_nursery() as workers:
                workers.start_soon(storm.work, storm.rig.worker())
                workers.start_soon(storm.work, storm.rig.worker())
                await trio.sleep(STEPS / 4)
                workers.start_soon(storm.work, storm.rig.worker(take_over=True))
            faulty.cancel_scope.cancel()

    run(main)
