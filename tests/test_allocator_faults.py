"""Random programs in virtual time: clients that come and go, a ledger with every fault it can have.

A program is a list of steps. It runs on one or two allocators that share a ledger; every ID that a
client gets is noted in the order of taking, and what must hold is checked as it happens.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeAlias

import attrs
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from idalloc_tcp.allocator import Allocator, AllocatorPolicy
from idalloc_tcp.backoff import LONGEST_SECONDS
from idalloc_tcp.errors import Busy, Draining, Exhausted, Unavailable
from idalloc_tcp.metrics import Metrics
from idalloc_tcp.pool import MAX_ID, Segment
from idalloc_tcp.reservation import Reservation
from idalloc_tcp.sizing import SizePolicy
from tests.fakes import FakeLedger

POLICY = AllocatorPolicy(
    SizePolicy(smallest=1_000, largest=2_000_000, pool_seconds=10),
    wait_seconds=2,
    idle_service_seconds=8,
    stop_seconds=5,
)
#: The service `short` comes to its end now and then; the others never do.
CEILINGS = {"short": 1_200_000}
SERVICES = ("orders", "users", "short")
DELAY_SECONDS_MAX = 2.5
REPLY_SECONDS_MAX = 1.0
#: Virtual time is a float.
ROUNDING_SECONDS = 1e-6


@attrs.frozen
class Ask:
    """So many clients ask for so many IDs each; they give up after a while."""

    worker: int
    service: str
    count: int
    clients: int
    patience_seconds: float


@attrs.frozen
class GiveUp:
    """A client that still waits, if there is one, goes away."""

    index: int


@attrs.frozen
class Rest:
    """Time passes; what is due happens."""

    seconds: float


@attrs.frozen
class Weather:
    """From now on the ledger behaves like this."""

    down: bool = False
    lose_reply: bool = False
    delay_seconds: float = 0.0
    reply_seconds: float = 0.0
    failures: int = 0


@attrs.frozen
class Forget:
    """The ledger loses commits worth so many IDs."""

    service: str
    ids: int


@attrs.frozen
class Outside:
    """Somebody else leases from the ledger."""

    service: str
    size: int


Step: TypeAlias = Ask | GiveUp | Rest | Weather | Forget | Outside


@attrs.define(eq=False)
class Request:
    """A client's request, from when it was sent."""

    deadline: float
    scope: trio.CancelScope

    @property
    def is_over(self) -> bool:
        """Has it been, or is it due to be, ended before it was served?"""
        return self.scope.cancel_called or trio.current_time() >= self.deadline


@attrs.define(eq=False)
class Worker:
    """One process: an allocator, and what its clients got and still wait for."""

    ledger: FakeLedger
    metrics: Metrics = attrs.field(init=False, factory=Metrics)
    allocator: Allocator = attrs.field(init=False)
    #: Service -> the ranges that were taken, in that order.
    served: dict[str, list[Segment]] = attrs.field(init=False)
    #: Service -> the requests that wait, in the order in which they began to.
    waiting: dict[str, list[Request]] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        reservation = Reservation(
            self.ledger, lambda name: CEILINGS.get(name, MAX_ID), self.metrics
        )
        self.allocator = Allocator(reservation, POLICY, self.metrics)
        self.served = {name: [] for name in SERVICES}
        self.waiting = {name: [] for name in SERVICES}

    async def ask(self, name: str, count: int, patience_seconds: float) -> None:
        """Be a client."""
        began_at = trio.current_time()
        scope = trio.CancelScope(deadline=began_at + patience_seconds)
        request = Request(began_at + POLICY.wait_seconds, scope)
        with scope:
            try:
                first = self.allocator.take(name, count)
                if first is None:
                    first = await self._wait(name, count, request)
                self._note(name, first, count)
            except Exhausted:
                assert name in CEILINGS
            except (Busy, Unavailable):
                pass
        elapsed_seconds = trio.current_time() - began_at
        assert elapsed_seconds <= min(POLICY.wait_seconds, patience_seconds) + ROUNDING_SECONDS

    async def _wait(self, name: str, count: int, request: Request) -> int:
        queue = self.waiting[name]
        queue.append(request)
        try:
            first = await self.allocator.wait(name, count)
            before = queue[: queue.index(request)]
            assert all(other.is_over for other in before), "served before who came first"
            return first
        finally:
            queue.remove(request)

    def _note(self, name: str, first: int, count: int) -> None:
        """Right after taking: nothing else has run in between."""
        taken = Segment(first, first + count)
        served = self.served[name]
        assert not served or taken.start >= served[-1].stop, "not above what was served before"
        assert self._is_leased(name, taken), "served before it was leased"
        served.append(taken)

    def _is_leased(self, name: str, taken: Segment) -> bool:
        """Has the ledger committed all of it, in one lease or in several that adjoin?"""
        leased_until = taken.start
        for lease in sorted(lease.segment for lease in self.ledger.leases if lease.service == name):
            if lease.start <= leased_until:
                leased_until = max(leased_until, lease.stop)
        return leased_until >= taken.stop


@attrs.define(eq=False)
class World:
    """A ledger, the workers on it, and their clients."""

    workers: list[Worker]
    ledger: FakeLedger
    clients: trio.Nursery

    async def play(self, program: Sequence[Step]) -> None:
        """Do one step after the other."""
        for step in program:
            match step:
                case Ask(worker, service, count, clients, patience_seconds):
                    ask = self.workers[worker % len(self.workers)].ask
                    for _ in range(clients):
                        self.clients.start_soon(ask, service, count, patience_seconds)
                case GiveUp(index):
                    self._give_up(index)
                case Rest(seconds):
                    await trio.sleep(seconds)
                case Weather():
                    self._change(step)
                case Forget(service, ids):
                    if service in self.ledger.snapshot():
                        self.ledger.forget(service, ids)
                case Outside(service, size):
                    self.ledger.take_from_outside(service, size)

    def _give_up(self, index: int) -> None:
        queues = [queue for worker in self.workers for queue in worker.waiting.values()]
        requests = [request for queue in queues for request in queue]
        if requests:
            requests[index % len(requests)].scope.cancel()

    def _change(self, weather: Weather) -> None:
        self.ledger.down = weather.down
        self.ledger.lose_reply = weather.lose_reply
        self.ledger.delay_seconds = weather.delay_seconds
        self.ledger.reply_seconds = weather.reply_seconds
        self.ledger.fail_next(weather.failures)

    async def recover(self) -> None:
        """Once the ledger is back, everybody is served again, at once or after one fetch."""
        self._change(Weather())
        await trio.sleep(DELAY_SECONDS_MAX + REPLY_SECONDS_MAX + LONGEST_SECONDS)
        for worker in self.workers:
            for name in SERVICES:
                before = len(worker.served[name])
                await worker.ask(name, 1, POLICY.wait_seconds)
                assert name in CEILINGS or len(worker.served[name]) == before + 1

    def check_accounts(self) -> None:
        """Every ID went to one client; every leased ID was served, returned, or is a gap."""
        for name in SERVICES:
            taken = sorted(range_ for worker in self.workers for range_ in worker.served[name])
            assert all(low.stop <= high.start for low, high in pairwise(taken))
        for worker in self.workers:
            metrics, ranges = worker.metrics, worker.served.values()
            served_ids = sum(taken.size for served in ranges for taken in served)
            gone = served_ids + metrics.returned_ids_total + metrics.gap_ids_total.total()
            assert metrics.leased_ids_total == gone


async def play(program: Sequence[Step], workers: int) -> None:
    """Run a program; then the ledger is well again, and all stop."""
    ledger = FakeLedger()
    async with trio.open_nursery() as allocators, trio.open_nursery() as clients:
        world = World([Worker(ledger) for _ in range(workers)], ledger, clients)
        for worker in world.workers:
            await allocators.start(worker.allocator.run)
        await world.play(program)
        await world.recover()
        stopped_at = trio.current_time()
        for worker in world.workers:
            worker.allocator.stop()
    assert trio.current_time() - stopped_at <= 2 * POLICY.stop_seconds + ROUNDING_SECONDS
    world.check_accounts()
    for worker in world.workers:
        assert dict(worker.allocator.rows()) == {"services": 0}
        with pytest.raises(Draining):
            worker.allocator.take("orders", 1)


services = st.sampled_from(SERVICES)
asks = st.builds(
    Ask,
    worker=st.integers(0, 1),
    service=services,
    count=st.sampled_from([1, 2, 7, 995, 1_000, 20_000, 1_000_000]),
    clients=st.sampled_from([1, 1, 2, 5]),
    patience_seconds=st.sampled_from([0.2, 1.0, 9.0, 9.0]),
)
weathers = st.builds(
    Weather,
    down=st.sampled_from([False, False, True]),
    lose_reply=st.sampled_from([False, False, True]),
    delay_seconds=st.sampled_from([0, 0.05, 1, DELAY_SECONDS_MAX]),
    reply_seconds=st.sampled_from([0, 0.05, REPLY_SECONDS_MAX]),
    failures=st.sampled_from([0, 1, 4]),
)
rests = st.builds(Rest, st.sampled_from([0.0, 0.01, 0.3, 1.0, 3.0, 20.0]))
outsides = st.builds(Outside, services, st.sampled_from([1, 500, 100_000]))
forgets = st.builds(Forget, services, st.sampled_from([1, 999, 10**9]))
steps = asks | asks | asks | rests | rests | weathers | st.builds(GiveUp, st.integers(0, 9))


@settings(deadline=None, max_examples=100)
@given(program=st.lists(steps | outsides | forgets, min_size=60, max_size=200))
def test_one_worker_survives_everything(program: list[Step]) -> None:
    """Nothing that ledger or clients do makes a worker repeat, reorder, hang or lose count."""
    trio.run(play, program, 1, clock=MockClock(autojump_threshold=0))


@settings(deadline=None, max_examples=100)
@given(program=st.lists(steps | outsides, min_size=60, max_size=200))
def test_two_workers_share_a_ledger(program: list[Step]) -> None:
    """As long as the ledger keeps its commits, no ID goes to clients of two workers either."""
    trio.run(play, program, 2, clock=MockClock(autojump_threshold=0))
