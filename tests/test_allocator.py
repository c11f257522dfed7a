"""All services of a process in virtual time: bounds, idle services, and stopping without a gap."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from math import inf

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from idalloc_tcp import reservation as reservation_module
from idalloc_tcp.allocator import REAPS_PER_IDLE_TIME, Allocator, AllocatorPolicy
from idalloc_tcp.backoff import LONGEST_SECONDS
from idalloc_tcp.errors import Busy, Draining, Exhausted, Unavailable
from idalloc_tcp.metrics import Metrics
from idalloc_tcp.pool import MAX_ID
from idalloc_tcp.reservation import Reservation
from idalloc_tcp.sizing import SizePolicy
from tests.fakes import FakeLedger, RecordingLedger

POLICY = AllocatorPolicy(
    SizePolicy(smallest=100, largest=1_000_000, pool_seconds=0),
    wait_seconds=2,
    idle_service_seconds=60,
    stop_seconds=5,
)
#: No test lasts longer, in virtual time: whatever goes wrong, it ends.
TEST_SECONDS_MAX = 10_000
#: However the reaper's looks fall, an idle service is gone after this.
REAPED_SECONDS = POLICY.idle_service_seconds * (1 + 2 / REAPS_PER_IDLE_TIME)


@attrs.define(eq=False)
class Rig:
    """An allocator on a ledger that can fail, with every call noted."""

    ledger: FakeLedger
    policy: AllocatorPolicy = POLICY
    ceiling: int = MAX_ID
    recorder: RecordingLedger = attrs.field(init=False)
    metrics: Metrics = attrs.field(init=False, factory=Metrics)
    allocator: Allocator = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.recorder = RecordingLedger(self.ledger)
        reservation = Reservation(self.recorder, lambda _service: self.ceiling, self.metrics)
        self.allocator = Allocator(reservation, self.policy, self.metrics)

    async def ask(self, service: str, count: int = 1) -> int:
        """What every client does."""
        first = self.allocator.take(service, count)
        return await self.allocator.wait(service, count) if first is None else first

    @property
    def services(self) -> int:
        return int(dict(self.allocator.rows())["services"])


@asynccontextmanager
async def running(ledger: FakeLedger, policy: AllocatorPolicy = POLICY) -> AsyncIterator[Rig]:
    """A rig whose allocator runs until the end of the block, and has stopped after it."""
    rig = Rig(ledger, policy)
    with trio.fail_after(TEST_SECONDS_MAX):
        async with trio.open_nursery() as nursery:
            await nursery.start(rig.allocator.run)
            yield rig
            rig.allocator.stop()


@pytest.fixture
def ledger() -> FakeLedger:
    """One ledger, empty and well."""
    return FakeLedger()


def prefetch_tasks(task: trio.lowlevel.Task | None = None) -> Iterator[str]:
    """The names of all prefetch tasks that live."""
    task = task or trio.lowlevel.current_root_task()
    assert task is not None
    if task.name.startswith("prefetch "):
        yield task.name
    for nursery in task.child_nurseries:
        for child in nursery.child_tasks:
            yield from prefetch_tasks(child)


async def test_services_are_independent(ledger: FakeLedger, autojump_clock: MockClock) -> None:
    """Each name has a sequence of its own, from 1, made on demand."""
    async with running(ledger) as rig:
        assert rig.services == 0
        assert [await rig.ask(name, 3) for name in ("orders", "users", "orders")] == [1, 1, 4]
        assert sorted(prefetch_tasks()) == ["prefetch orders", "prefetch users"]
    assert list(prefetch_tasks()) == []


async def test_steady_client_does_not_wait(ledger: FakeLedger, autojump_clock: MockClock) -> None:
    """With a ledger that takes 50 ms, every request after warm-up is served at once."""
    ledger.delay_seconds = 0.05
    async with running(ledger, AllocatorPolicy()) as rig:
        for turn in range(3_000):
            first = rig.allocator.take("orders", 1_000)
            if first is None:
                assert turn < 100
                await rig.allocator.wait("orders", 1_000)
            await trio.sleep(0.01)


async def test_wait_has_a_bound(ledger: FakeLedger, autojump_clock: MockClock) -> None:
    """A hung ledger keeps nobody for longer than `wait_seconds`, however many wait."""
    ledger.delay_seconds = inf
    ended_at: list[float] = []

    async def wait(count: int) -> None:
        with pytest.raises(Busy, match="within 2 s"):
            await rig.ask("orders", count)
        ended_at.append(trio.current_time())

    async with running(ledger) as rig:
        async with trio.open_nursery() as nursery:
            for count in (1, 1_000_000, 7):
                nursery.start_soon(wait, count)
        assert ended_at == pytest.approx([2, 2, 2])


async def test_error_comes_at_once(ledger: FakeLedger, autojump_clock: MockClock) -> None:
    """With the ledger down and nothing to serve, no request waits for its deadline."""
    ledger.down = True
    async with running(ledger) as rig:
        for _ in range(3):
            with pytest.raises(Unavailable):
                await rig.ask("orders")
        assert trio.current_time() == 0


async def test_every_id_up_to_the_ceiling_is_served(
    ledger: FakeLedger, autojump_clock: MockClock
) -> None:
    """A service is exhausted only when its last ID has gone, and then says so at once."""
    async with running(ledger) as rig:
        rig.ceiling = 1_234
        assert [await rig.ask("orders") for _ in range(1_234)] == list(range(1, 1_235))
        for _ in range(3):
            with pytest.raises(Exhausted):
                await rig.ask("orders")


async def test_number_of_services_is_bounded(ledger: FakeLedger, autojump_clock: MockClock) -> None:
    """A further service is refused until another one has been reaped; those in use go on."""
    async with running(ledger, attrs.evolve(POLICY, max_services=2)) as rig:
        for service in ("a", "b"):
            await rig.ask(service)
        for _ in range(2):
            with pytest.raises(Busy, match="2 services are in use"):
                await rig.ask("c")
        assert await rig.ask("a") == 2
        await trio.sleep(REAPED_SECONDS)
        assert await rig.ask("c") == 1


async def test_statistics_start_nothing(ledger: FakeLedger, autojump_clock: MockClock) -> None:
    """Asking about a service does not make it."""
    async with running(ledger) as rig:
        assert dict(rig.allocator.service_rows("orders")) == {"service": "orders", "active": 0}
        await rig.ask("orders", 7)
        rows = dict(rig.allocator.service_rows("orders"))
        assert (rows["active"], rows["served_ids"]) == (1, 7)
        assert rig.services == 1


async def test_idle_service_is_reaped(ledger: FakeLedger, autojump_clock: MockClock) -> None:
    """It gives its rest back, its task ends, and it goes on later without a gap."""
    async with running(ledger) as rig:
        for first in (1, 8, 15):
            assert await rig.ask("orders", 7) == first
            await trio.sleep(POLICY.idle_service_seconds)
            await rig.ask("users")
            await trio.sleep(REAPED_SECONDS - POLICY.idle_service_seconds)
            assert list(prefetch_tasks()) == ["prefetch users"]
            assert rig.services == 1
            assert ledger.snapshot()["orders"] == first + 6
        assert not rig.metrics.gap_ids_total


async def test_service_in_use_is_not_reaped(ledger: FakeLedger, autojump_clock: MockClock) -> None:
    """A service that serves now and then keeps its pool."""
    async with running(ledger) as rig:
        for _ in range(20):
            await rig.ask("orders")
            await trio.sleep(POLICY.idle_service_seconds * 0.9)
        assert len(rig.recorder.lease_calls) == 1
        assert rig.recorder.give_back_calls == []


@pytest.mark.parametrize("patience_seconds", [1, inf])
async def test_fetch_under_way_keeps_a_service(
    ledger: FakeLedger, autojump_clock: MockClock, patience_seconds: float
) -> None:
    """However long a fetch takes, what it brings is served or given back, not lost."""
    ledger.delay_seconds = 10 * POLICY.idle_service_seconds
    got: list[int] = []
    async with running(ledger, attrs.evolve(POLICY, wait_seconds=inf)) as rig:
        with trio.move_on_after(patience_seconds):
            got.append(await rig.ask("orders"))
        await trio.sleep(3 * ledger.delay_seconds)
        assert ledger.snapshot()["orders"] == len(got) == (patience_seconds == inf)
        assert rig.services == 0


async def test_service_in_trouble_is_reaped(ledger: FakeLedger, autojump_clock: MockClock) -> None:
    """In an outage, too, a service that nobody asks for any more ends and asks for nothing."""
    ledger.down = True
    async with running(ledger) as rig:
        for service in ("orders", "users"):
            with pytest.raises(Unavailable):
                await rig.ask(service)
        await trio.sleep(REAPED_SECONDS)
        assert rig.services == 0
        calls = len(rig.recorder.lease_calls)
        await trio.sleep(REAPED_SECONDS)
        assert len(rig.recorder.lease_calls) == calls
        ledger.down = False
        assert await rig.ask("orders") == 1


async def test_first_requests_after_an_outage_are_all_served(
    ledger: FakeLedger, autojump_clock: MockClock
) -> None:
    """A ledger that came back while nobody asked serves whoever asks first, and all with it."""
    services = [f"service{number}" for number in range(50)]
    async with running(ledger) as rig:
        ledger.down = True
        for service in services:
            with pytest.raises(Unavailable):
                await rig.ask(service)
        await trio.sleep(2 * LONGEST_SECONDS)
        ledger.down, ledger.delay_seconds = False, 0.01
        async with trio.open_nursery() as clients:
            for service in services:
                clients.start_soon(rig.ask, service)


async def test_request_at_the_moment_of_reaping(
    ledger: FakeLedger, autojump_clock: MockClock
) -> None:
    """A request that begins to wait just as the reaper looks is served.

    Several times, since the tasks' order is random.
    """
    for _ in range(20):
        async with running(ledger) as rig:
            first = await rig.ask("orders")
            await trio.sleep(POLICY.idle_service_seconds * (1 + 1 / REAPS_PER_IDLE_TIME))
            assert await rig.ask("orders", 1_000) > first


@pytest.mark.parametrize("floors_max", [1, 1_000])
async def test_reaped_service_never_goes_backwards(
    ledger: FakeLedger,
    autojump_clock: MockClock,
    floors_max: int,
) -> None:
    """Never backwards: the IDs rise over an idle time even if ledger and floors forgot."""
    async with running(ledger) as rig:
        assert isinstance(rig.allocator._reservation, Reservation)
        rig.allocator._reservation._floors.services_max = floors_max
        assert await rig.ask("orders", 730) == 1
        await rig.ask("users")
        await trio.sleep(REAPED_SECONDS)
        assert rig.services == 0
        ledger.forget("orders", 530)
        assert await rig.ask("orders", 10) > 730


@pytest.mark.parametrize("asked_after_seconds", [0, 0.5, 1, 1.5, 2, 2.5])
@pytest.mark.parametrize(("delay_seconds", "reply_seconds"), [(0, 2), (1, 1), (2, 0)])
async def test_request_during_a_give_back(
    ledger: FakeLedger,
    autojump_clock: MockClock,
    asked_after_seconds: float,
    delay_seconds: float,
    reply_seconds: float,
) -> None:
    """A request that meets its service on the way out is served, with higher IDs."""
    async with running(ledger, attrs.evolve(POLICY, wait_seconds=9)) as rig:
        assert await rig.ask("orders", 7) == 1
        ledger.delay_seconds, ledger.reply_seconds = delay_seconds, reply_seconds
        await trio.sleep(POLICY.idle_service_seconds * (1 + 1 / REAPS_PER_IDLE_TIME))
        await wait_all_tasks_blocked()
        assert len(rig.recorder.give_back_calls) == 1
        await trio.sleep(asked_after_seconds)
        first = await rig.ask("orders", 200)
        assert first > 7
        assert await rig.ask("orders", 200) >= first + 200
        await trio.sleep(2 * REAPED_SECONDS)
    metrics = rig.metrics
    assert metrics.leased_ids_total == 407 + metrics.returned_ids_total + (
        metrics.gap_ids_total.total()
    )


async def test_memory_of_idle_services_is_bounded(
    ledger: FakeLedger, autojump_clock: MockClock
) -> None:
    """Only so many idle services' last IDs are remembered."""
    async with running(ledger) as rig:
        rig.allocator._served_through.services_max = 3
        for index in range(10):
            await rig.ask(f"service{index}")
        await trio.sleep(REAPED_SECONDS)
        remembered = [rig.allocator._served_through.get(f"service{index}") for index in range(10)]
        assert remembered == [0] * 7 + [1] * 3
        assert not rig.allocator._seen


async def test_restart_leaves_no_gap(
    ledger: FakeLedger, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop gives the tails of all services back: the next process goes on where this stopped."""
    monkeypatch.setattr(reservation_module, "TAILS_MAX", 7)
    expected = dict.fromkeys([f"service{index}" for index in range(50)], 1)
    for count in (1, 99, 250):
        async with running(ledger) as rig:
            for service, first in expected.items():
                assert await rig.ask(service, count) == first
                expected[service] = first + count
        assert ledger.snapshot() == {service: next_ - 1 for service, next_ in expected.items()}
        assert max(map(len, rig.recorder.give_back_calls)) == 7
        assert not rig.metrics.gap_ids_total


async def test_all_tails_are_accounted_for(ledger: FakeLedger, autojump_clock: MockClock) -> None:
    """Of several tails those that can go back do; the others are counted as gaps."""
    async with running(ledger) as rig:
        for service in ("orders", "users"):
            await rig.ask(service, 30)
            ledger.take_from_outside(service, 1_000)
            assert rig.allocator.take(service, 25) == 31
            await wait_all_tasks_blocked()
            assert rig.allocator.take(service, 1) == 56
    assert ledger.snapshot() == {"orders": 1_100, "users": 1_100}
    assert rig.metrics.gap_ids_total == {"unreturned": 2 * 44}
    assert rig.metrics.returned_ids_total == 2 * 100


async def test_fetch_under_way_at_a_stop_is_given_back(
    ledger: FakeLedger, autojump_clock: MockClock
) -> None:
    """What arrives after the stop began goes back as well."""
    async with running(ledger) as rig:
        assert await rig.ask("orders", 60) == 1
        ledger.delay_seconds = 3
        assert rig.allocator.take("orders", 1) == 61
        await wait_all_tasks_blocked()
    assert ledger.snapshot() == {"orders": 61}
    assert not rig.metrics.gap_ids_total


async def test_request_that_waits_at_a_stop(ledger: FakeLedger, autojump_clock: MockClock) -> None:
    """A fetch that comes in after the stop began serves who waits for it; the rest goes back.

    Several times, since the tasks' order is random.
    """
    ledger.delay_seconds = 1
    for turn in range(20):
        got: list[int] = []

        async def wait(rig: Rig, got: list[int]) -> None:
            got.append(await rig.ask("orders", 10))

        async with trio.open_nursery() as clients, running(ledger) as rig:
            clients.start_soon(wait, rig, got)
            await wait_all_tasks_blocked()
        assert got == [10 * turn + 1]
        assert ledger.snapshot() == {"orders": 10 * turn + 10}


@pytest.mark.parametrize("hung", ["delay_seconds", "reply_seconds"])
async def test_hung_ledger_does_not_keep_a_stop(
    ledger: FakeLedger, autojump_clock: MockClock, hung: str
) -> None:
    """A stop has a deadline for the fetches under way, and one for the give-backs."""
    async with running(ledger) as rig:
        await rig.ask("users")
        await rig.ask("orders", 60)
        setattr(ledger, hung, inf)
        rig.allocator.take("orders", 1)
        await wait_all_tasks_blocked()
        began_at = trio.current_time()
    assert trio.current_time() - began_at == pytest.approx(2 * POLICY.stop_seconds)
    assert list(prefetch_tasks()) == []


async def test_stop_in_an_outage_is_quick(ledger: FakeLedger, autojump_clock: MockClock) -> None:
    """A ledger that is down costs the tails, as counted gaps, and no time."""
    async with running(ledger) as rig:
        await rig.ask("orders", 60)
        ledger.down = True
        rig.allocator.take("orders", 1)
        await trio.sleep(10 * LONGEST_SECONDS)
        began_at = trio.current_time()
    assert trio.current_time() == began_at
    assert rig.metrics.gap_ids_total == {"unreturned": 39}


async def test_stopped_allocator_serves_nothing(
    ledger: FakeLedger, autojump_clock: MockClock
) -> None:
    """After a stop every request, of a known or a new service, is told to go elsewhere."""
    async with running(ledger) as rig:
        await rig.ask("orders")
        rig.allocator.stop()
        with pytest.raises(Draining):
            await rig.ask("users")
    for service in ("orders", "users"):
        with pytest.raises(Draining):
            rig.allocator.take(service, 1)
        with pytest.raises(Draining):
            await rig.allocator.wait(service, 1)
    assert rig.services == 0
