"""One service in virtual time: who gets what, who waits how long, and how often is fetched."""

import traceback
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from idalloc_tcp.backoff import FIRST_SECONDS, LONGEST_SECONDS
from idalloc_tcp.errors import Exhausted, Unavailable
from idalloc_tcp.pool import Pool, Segment
from idalloc_tcp.service import Service
from idalloc_tcp.sizing import GROWTH_MAX, Demand, SizePolicy

BIG = 1_000_000
#: No test lasts longer, in virtual time, or fetches more often: whatever goes wrong, it ends.
TEST_SECONDS_MAX = 10_000
ATTEMPTS_MAX = 2_000
#: More attempts than this in so many seconds would be spinning.
ATTEMPTS_PER_SECOND_MAX = 2 / LONGEST_SECONDS


@attrs.define(eq=False)
class Source:
    """Where a test's segments come from: one after the other, as slowly and badly as it likes.

    Attributes:
        delay_seconds: how long every call takes.
        trouble: what every call raises, if anything.
        next_id: where the next segment begins; a test may move it.
        sizes: what was asked for, call by call.
    """

    delay_seconds: float = 0.0
    trouble: Unavailable | Exhausted | None = None
    next_id: int = 1
    sizes: list[int] = attrs.field(factory=list)

    async def reserve(self, _service: str, size: int) -> Segment:
        """As `Reservation.reserve`."""
        self.sizes.append(size)
        assert len(self.sizes) <= ATTEMPTS_MAX, "fetches without end"
        await trio.sleep(self.delay_seconds)
        if self.trouble is not None:
            raise type(self.trouble)(*self.trouble.args)
        segment = Segment(self.next_id, self.next_id + size)
        self.next_id = segment.stop
        return segment

    @contextmanager
    def failing(self, trouble: Unavailable | Exhausted) -> Iterator[None]:
        """Fail for a while."""
        self.trouble = trouble
        yield
        self.trouble = None


@asynccontextmanager
async def running(source: Source, policy: SizePolicy | None = None) -> AsyncIterator[Service]:
    """A service whose prefetch task runs until the end of the block."""
    service = Service("orders", Pool(), Demand(policy or SizePolicy(), trio.current_time()))
    with trio.fail_after(TEST_SECONDS_MAX):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(service.prefetch, source.reserve)
            yield service
            service.stop()


async def take_or_wait(service: Service, count: int) -> int:
    """What every client does."""
    first = service.take(count)
    return await service.wait(count) if first is None else first


async def take_steadily(service: Service, ids_per_second: int, seconds: float) -> int:
    """Ten takes a second; how many of them found the pool empty."""
    waits = 0
    for _ in range(round(seconds * 10)):
        first = service.take(ids_per_second // 10)
        if first is None:
            waits += 1
            await service.wait(ids_per_second // 10)
        await trio.sleep(0.1)
    return waits


async def attempts_of_an_impatient_client(service: Service, source: Source) -> int:
    """How often is fetched while a client asks a hundred times a second, for ten seconds."""
    before = len(source.sizes)
    for _ in range(1_000):
        with pytest.raises((Unavailable, Exhausted)):
            await take_or_wait(service, 1)
        await trio.sleep(0.01)
    return len(source.sizes) - before


async def test_first_request_waits_for_the_first_segment(autojump_clock: MockClock) -> None:
    """An empty pool says None at once; whoever waits is served as soon as a segment is here."""
    source = Source(delay_seconds=0.5)
    async with running(source) as service:
        assert service.take(3) is None
        assert await service.wait(3) == 1
        assert trio.current_time() == pytest.approx(0.5)
        assert [service.take(2), service.take(1)] == [4, 6]


async def test_waiters_are_served_in_their_order(autojump_clock: MockClock) -> None:
    """First come, first served, whatever the counts: a small request does not overtake."""
    source = Source(delay_seconds=1)
    got: list[tuple[int, int]] = []

    async def wait(service: Service, turn: int, count: int) -> None:
        await trio.sleep(turn / 100)
        got.append((turn, await take_or_wait(service, count)))

    policy = SizePolicy(smallest=10)
    async with running(source, policy) as service, trio.open_nursery() as nursery:
        for turn, count in enumerate([5, BIG, 1, 20, BIG, 1, 1]):
            nursery.start_soon(wait, service, turn, count)
    assert [turn for turn, _ in got] == list(range(7))
    assert [first for _, first in got] == sorted({first for _, first in got})


async def test_waiting_requests_are_fetched_for_together(autojump_clock: MockClock) -> None:
    """A fetch asks for all that is waited for, up to the largest size."""
    source = Source(delay_seconds=1)
    policy = SizePolicy(smallest=10, largest=1_000)
    async with running(source, policy) as service, trio.open_nursery() as nursery:
        for count in (1, 300, 600, 300):
            nursery.start_soon(take_or_wait, service, count)
            await wait_all_tasks_blocked()
    assert source.sizes[:2] == [10, 1_000]


async def test_cancelled_waiter_loses_nothing_and_blocks_nobody(autojump_clock: MockClock) -> None:
    """Requests that give up, first in the queue or behind, take no IDs; the rest is served."""
    source = Source(delay_seconds=2)
    got: list[int] = []

    async def wait(service: Service, patience_seconds: float) -> None:
        with trio.move_on_after(patience_seconds):
            got.append(await take_or_wait(service, 10))

    async with running(source) as service:
        async with trio.open_nursery() as nursery:
            for patience_seconds in (1, 9, 1, 1, 9, 1, 9):
                nursery.start_soon(wait, service, patience_seconds)
                await wait_all_tasks_blocked()
        assert got == [1, 11, 21]
        assert service.waiting_ids == 0


async def test_segment_that_all_gave_up_on_is_kept(autojump_clock: MockClock) -> None:
    """What was fetched for a request that is gone serves the next one."""
    source = Source(delay_seconds=2)
    async with running(source) as service:
        with trio.move_on_after(1):
            await take_or_wait(service, 10)
        await trio.sleep(9)
        assert service.take(10) == 1
    assert len(source.sizes) == 1


async def test_big_request_with_five_ids_left(autojump_clock: MockClock) -> None:
    """A million IDs with five left: the five serve others first, are then skipped, never reused."""
    source = Source(delay_seconds=1)
    async with running(source, SizePolicy(smallest=10, pool_seconds=0)) as service:
        assert await take_or_wait(service, 5) == 1
        source.next_id = 1_001
        got = []

        async def take_big() -> None:
            got.append(await take_or_wait(service, BIG))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(take_big)
            await wait_all_tasks_blocked()
            assert [service.take(1), service.take(2)] == [6, 7]
        assert got[0] > 1_000
        assert await take_or_wait(service, 1) >= got[0] + BIG


async def test_backwards_segment_is_skipped_for_the_waiter(autojump_clock: MockClock) -> None:
    """A segment below what was served serves nobody; the waiter gets the one after it."""
    source = Source()
    async with running(source, SizePolicy(smallest=10, pool_seconds=0)) as service:
        assert await take_or_wait(service, 10) == 1
        source.next_id = 1
        assert await take_or_wait(service, 5) == 11


@pytest.mark.parametrize("ids_per_second", [100, 5_000, 80_000])
async def test_steady_client_does_not_wait(autojump_clock: MockClock, ids_per_second: int) -> None:
    """The next segment is here before the pool is empty, though the ledger takes its time."""
    source = Source(delay_seconds=0.05)
    async with running(source) as service:
        await take_steadily(service, ids_per_second, seconds=20)
        assert await take_steadily(service, ids_per_second, seconds=100) == 0


async def test_outage_shorter_than_the_cover_is_not_noticed(autojump_clock: MockClock) -> None:
    """A warm pool serves for `pool_seconds` as if the ledger were there."""
    source = Source(delay_seconds=0.05)
    async with running(source, SizePolicy(pool_seconds=60)) as service:
        await take_steadily(service, 5_000, seconds=30)
        with source.failing(Unavailable("down")):
            assert await take_steadily(service, 5_000, seconds=58) == 0
        assert await take_steadily(service, 5_000, seconds=100) == 0


async def test_waiters_are_told_of_the_first_failure(autojump_clock: MockClock) -> None:
    """With nothing to serve, one failed attempt answers all who wait; later ones at once."""
    source = Source(delay_seconds=0.5, trouble=Unavailable("down"))
    told: list[float] = []

    async def wait(service: Service) -> None:
        with pytest.raises(Unavailable, match="down"):
            await take_or_wait(service, 1)
        told.append(trio.current_time())

    async with running(source) as service:
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(wait, service)
        assert told == pytest.approx([0.5] * 5)
        with pytest.raises(Unavailable, match="down"):
            service.take(1)


async def test_first_request_after_an_outage_gets_ids(autojump_clock: MockClock) -> None:
    """However long nobody asked, trouble that is over is not told of: the request waits for IDs."""
    source = Source(delay_seconds=0.5)
    async with running(source) as service:
        with source.failing(Unavailable("down")):
            for _ in range(10):
                with pytest.raises(Unavailable):
                    await take_or_wait(service, 1)
                await trio.sleep(1)
            await trio.sleep(4 * LONGEST_SECONDS)
        asked_at = trio.current_time()
        assert await take_or_wait(service, 1) == 1
        assert trio.current_time() == pytest.approx(asked_at + 0.5)
        assert service.trouble is None


async def test_clients_who_keep_asking_are_served_soon(autojump_clock: MockClock) -> None:
    """A request that was refused has the store looked at again as soon as the pause is over."""
    source = Source()
    async with running(source) as service:
        with source.failing(Unavailable("down")):
            await attempts_of_an_impatient_client(service, source)
        with pytest.raises(Unavailable):
            service.take(1)
        await trio.sleep(LONGEST_SECONDS)
        assert service.take(1) == 1


async def test_trouble_does_not_keep_a_pool_from_serving(autojump_clock: MockClock) -> None:
    """Whatever the pool holds is served during an outage; only then comes the error."""
    source = Source()
    async with running(source, SizePolicy(smallest=10)) as service:
        assert await take_or_wait(service, 5) == 1
        with source.failing(Unavailable("down")):
            assert service.take(1) == 6
            await trio.sleep(10)
            assert [service.take(3), service.take(1)] == [7, 10]
            with pytest.raises(Unavailable):
                await take_or_wait(service, 1)


@pytest.mark.parametrize("trouble", [Unavailable("down"), Exhausted("none left")])
async def test_raising_again_and_again_does_not_grow(
    autojump_clock: MockClock, trouble: Unavailable | Exhausted
) -> None:
    """The hundredth error is as small as the first: no traceback or context piles up."""
    lengths = set()
    async with running(Source(trouble=trouble)) as service:
        with pytest.raises(type(trouble)):
            await service.wait(1)
        assert service.trouble is not None
        kept = len(traceback.extract_tb(service.trouble.__traceback__))
        for _ in range(100):
            with pytest.raises(type(trouble)) as caught:
                service.take(1)
            lengths.add(len(traceback.extract_tb(caught.value.__traceback__)))
            assert caught.value.__context__ is None
        assert len(traceback.extract_tb(service.trouble.__traceback__)) == kept
    assert len(lengths) == 1


@pytest.mark.parametrize("trouble", [Unavailable("down"), Exhausted("none left")])
async def test_attempts_are_bounded(
    autojump_clock: MockClock, trouble: Unavailable | Exhausted
) -> None:
    """However many ask, a store in trouble is left alone for longer and longer."""
    source = Source(trouble=trouble)
    async with running(source) as service:
        warm_up = await attempts_of_an_impatient_client(service, source)
        assert 10 / LONGEST_SECONDS <= warm_up <= 10 * ATTEMPTS_PER_SECOND_MAX + 6
        attempts = await attempts_of_an_impatient_client(service, source)
        assert 10 / LONGEST_SECONDS - 1 <= attempts <= 10 * ATTEMPTS_PER_SECOND_MAX


async def test_first_attempts_follow_each_other_quickly(autojump_clock: MockClock) -> None:
    """A short hiccup costs a short pause, also after a long outage that has ended."""
    source = Source()
    async with running(source, SizePolicy(smallest=10, pool_seconds=0)) as service:
        for outage_seconds in (30, 0):
            with source.failing(Unavailable("down")):
                with pytest.raises(Unavailable):
                    await take_or_wait(service, 10)
                await trio.sleep(outage_seconds)
            await trio.sleep(FIRST_SECONDS if outage_seconds == 0 else LONGEST_SECONDS)
            asked_at = trio.current_time()
            assert await take_or_wait(service, 10) == source.next_id - 10
            assert trio.current_time() == asked_at


@pytest.mark.parametrize("trouble", [Unavailable("down"), Exhausted("none left")])
async def test_service_in_trouble_is_fetched_for_only_on_demand(
    autojump_clock: MockClock, trouble: Unavailable | Exhausted
) -> None:
    """A refusal is an answer: nothing is fetched again until somebody asks again."""
    source = Source(trouble=trouble)
    async with running(source) as service:
        with pytest.raises(type(trouble)):
            await take_or_wait(service, 1)
        await trio.sleep(10)
        attempts = len(source.sizes)
        assert attempts <= 2
        await trio.sleep(1_000)
        assert len(source.sizes) == attempts
        source.trouble = None
        assert await take_or_wait(service, 1) == 1


async def test_nothing_is_fetched_without_demand(autojump_clock: MockClock) -> None:
    """A service that nobody asks leaves the ledger alone, before and after its first segment."""
    source = Source()
    async with running(source) as service:
        await trio.sleep(1_000)
        assert source.sizes == []
        assert await take_or_wait(service, 1) == 1
        await trio.sleep(1_000)
        assert service.take(4_000) == 2
        await trio.sleep(1_000)
        assert len(source.sizes) == 1


async def test_outage_does_not_inflate_the_next_segment(autojump_clock: MockClock) -> None:
    """The growth bound is one of segments, not of attempts: a burst in an outage stays one."""
    source = Source()
    async with running(source) as service:
        assert await take_or_wait(service, 1) == 1
        with source.failing(Unavailable("down")):
            assert service.take(6_000) == 2
            await trio.sleep(0.01)
            assert service.take(3_000) == 6_002
            await trio.sleep(5)
        await trio.sleep(LONGEST_SECONDS)
    assert max(source.sizes) <= 10_000 * GROWTH_MAX


async def test_size_survives_an_outage(autojump_clock: MockClock) -> None:
    """After a long outage the first segment is as large as the demand before it was."""
    source = Source(delay_seconds=0.05)
    async with running(source) as service:
        await take_steadily(service, 5_000, seconds=60)
        with source.failing(Unavailable("down")):
            with pytest.raises(Unavailable):
                await take_steadily(service, 5_000, seconds=600)
            await trio.sleep(60)
        await trio.sleep(LONGEST_SECONDS + 0.1)
        assert service.pool.remaining + source.sizes[-1] >= 5_000 * 60


async def test_stop_ends_an_idle_task_at_once(autojump_clock: MockClock) -> None:
    """A prefetch task that rests, or pauses after a failure, ends without delay."""
    async with running(Source()) as service:
        await trio.sleep(1)
    async with running(Source(trouble=Unavailable("down"))) as service:
        with pytest.raises(Unavailable):
            await take_or_wait(service, 1)
        for _ in range(10):
            await trio.sleep(LONGEST_SECONDS)
        stopped_at = trio.current_time()
    assert trio.current_time() == stopped_at


async def test_fetch_under_way_at_a_stop_is_closed_over(autojump_clock: MockClock) -> None:
    """A stop lets the fetch come in, and close gives up what it brought, highest first."""
    source = Source(delay_seconds=1)
    async with running(source, SizePolicy(smallest=10, pool_seconds=0)) as service:
        assert await take_or_wait(service, 7) == 1
        source.next_id = 101
        assert service.take(1) == 8
        await wait_all_tasks_blocked()
    assert service.close() == [Segment(101, 111), Segment(9, 11)]
    assert service.close() == []
    assert service.take(1) is None


async def test_rows_say_what_is_going_on(autojump_clock: MockClock) -> None:
    """The rows show the pool, the demand, who waits, and the trouble by its code."""
    source = Source()
    async with running(source) as service:
        assert await take_or_wait(service, 9_000) == 1
        rows = dict(service.rows())
        assert rows["served_ids"] == rows["last_served"] == 9_000
        assert (rows["remaining_ids"], rows["trouble"]) == (1_000, "none")
        source.trouble = Unavailable("down")
        service.take(1)
        await trio.sleep(1)
        source.delay_seconds = 1
        async with trio.open_nursery() as nursery:
            nursery.start_soon(service.wait, 5_000)
            await wait_all_tasks_blocked()
            assert dict(service.rows())["waiting_ids"] == 5_000
            nursery.cancel_scope.cancel()
        source.delay_seconds = 0
        with pytest.raises(Unavailable):
            await take_or_wait(service, 5_000)
        assert dict(service.rows())["trouble"] == "unavailable"
        await trio.sleep(4 * LONGEST_SECONDS)
        assert dict(service.rows())["trouble"] == "unavailable", "nothing has come since"
        source.trouble = None
        await service.wait(5_000)
        assert dict(service.rows())["trouble"] == "none"
