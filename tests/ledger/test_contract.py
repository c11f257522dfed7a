"""What every ledger must do, asked of the fake and of the real ones alike."""

import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Final, TypeAlias

import attrs
import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from idalloc_tcp.bridge import asyncio_loop
from idalloc_tcp.errors import Exhausted, Unavailable
from idalloc_tcp.ledger import Ledger, Tail
from idalloc_tcp.ledger.mysql import MysqlLedger
from idalloc_tcp.ledger.sqlite import SqliteLedger
from idalloc_tcp.pool import MAX_ID, Segment
from tests.fakes import FakeLedger, FakeSharedLedger
from tests.ledger.conftest import url_of
from tests.real.mariadb_server import MariaDbDatabase

Opener: TypeAlias = Callable[[pytest.FixtureRequest], AbstractAsyncContextManager[Ledger]]


@asynccontextmanager
async def fake_ledger(_: pytest.FixtureRequest) -> AsyncIterator[Ledger]:
    """The fake, empty."""
    yield FakeLedger()


@asynccontextmanager
async def fake_shared_ledger(_: pytest.FixtureRequest) -> AsyncIterator[Ledger]:
    """The fake that a counter can stand on, empty."""
    yield FakeSharedLedger()


@asynccontextmanager
async def sqlite_ledger(_: pytest.FixtureRequest) -> AsyncIterator[Ledger]:
    """The embedded ledger on a new file."""
    with tempfile.TemporaryDirectory() as directory:
        ledger = await SqliteLedger.open(Path(directory) / "ids.db")
        try:
            yield ledger
        finally:
            await ledger.aclose()


@asynccontextmanager
async def mysql_ledger(request: pytest.FixtureRequest) -> AsyncIterator[Ledger]:
    """The ledger in a real database, on a new table."""
    database: MariaDbDatabase = request.getfixturevalue("mariadb_database")
    database.query("DROP TABLE IF EXISTS tbl_alloc_info")
    async with asyncio_loop():
        ledger = MysqlLedger(url_of(database), create_table=True)
        try:
            yield ledger
        finally:
            await ledger.aclose()


#: How to open an empty ledger; another store joins these tests with one line.
LEDGERS: Final[dict[str, Opener]] = {
    "fake": fake_ledger,
    "fake_shared": fake_shared_ledger,
    "sqlite": sqlite_ledger,
    "mysql": mysql_ledger,
}


@pytest.fixture(params=LEDGERS)
async def ledger(request: pytest.FixtureRequest) -> AsyncIterator[Ledger]:
    """Each kind of ledger in turn, empty."""
    async with LEDGERS[request.param](request) as opened:
        yield opened


async def lease(ledger: Ledger, service: str, size: int, floor: int = 0) -> Segment:
    """A lease under the highest ceiling."""
    return await ledger.lease(service, size, floor=floor, ceiling=MAX_ID)


async def test_leases_start_at_1_and_adjoin(ledger: Ledger) -> None:
    """The leases of a service follow each other from 1 without a gap."""
    assert await lease(ledger, "orders", 100) == Segment(1, 101)
    assert await lease(ledger, "orders", 1) == Segment(101, 102)
    assert await lease(ledger, "orders", 10_000) == Segment(102, 10_102)


async def test_services_do_not_touch_each_other(ledger: Ledger) -> None:
    """Every service has a sequence of its own."""
    await lease(ledger, "orders", 100)
    assert await lease(ledger, "users", 10) == Segment(1, 11)
    assert await lease(ledger, "orders", 10) == Segment(101, 111)


async def test_lease_lies_above_the_floor(ledger: Ledger) -> None:
    """A floor above the ledger's own value lifts it for good; one below changes nothing."""
    assert await lease(ledger, "orders", 10, floor=1_000) == Segment(1_001, 1_011)
    assert await lease(ledger, "orders", 10, floor=1_009) == Segment(1_011, 1_021)
    assert await lease(ledger, "orders", 10, floor=5_000) == Segment(5_001, 5_011)
    assert await lease(ledger, "orders", 10) == Segment(5_011, 5_021)


async def test_ceiling_is_met_exactly_and_never_passed(ledger: Ledger) -> None:
    """A lease may end at the ceiling; one that would pass it takes nothing."""
    assert await ledger.lease("orders", 90, floor=0, ceiling=100) == Segment(1, 91)
    with pytest.raises(Exhausted, match="orders"):
        await ledger.lease("orders", 11, floor=0, ceiling=100)
    assert await ledger.lease("orders", 10, floor=0, ceiling=100) == Segment(91, 101)
    with pytest.raises(Exhausted):
        await ledger.lease("orders", 1, floor=0, ceiling=100)


async def test_exhausted_says_how_many_are_left(ledger: Ledger) -> None:
    """Whoever asks for too much learns what may be asked for instead, by row and by floor."""
    for last, floor, left in [(0, 0, 100), (60, 0, 40), (60, 95, 5), (100, 0, 0)]:
        service = f"orders-{last}-{floor}"
        if last:
            await lease(ledger, service, last)
        with pytest.raises(Exhausted) as caught:
            await ledger.lease(service, left + 1, floor=floor, ceiling=100)
        assert caught.value.left_ids == left
        if left:
            segment = await ledger.lease(service, left, floor=floor, ceiling=100)
            assert segment == Segment(101 - left, 101)
    with pytest.raises(Exhausted) as caught:
        await ledger.lease("orders-100-0", 1, floor=0, ceiling=50)
    assert caught.value.left_ids == 0


async def test_exhausted_by_the_floor_remembers_nothing(ledger: Ledger) -> None:
    """A floor that leaves too little room is refused, and is not kept."""
    for service in ("new", "old"):
        start = (await lease(ledger, service, 1)).start if service == "old" else 0
        with pytest.raises(Exhausted):
            await ledger.lease(service, 11, floor=90, ceiling=100)
        assert (await lease(ledger, service, 1)).start == start + 1


async def test_the_last_of_all_ids_is_leased_exactly(ledger: Ledger) -> None:
    """Near 2^63 every ID is exact, the last one is given away, and none after it."""
    assert await lease(ledger, "orders", 10, floor=MAX_ID - 11) == Segment(MAX_ID - 10, MAX_ID)
    for size in (2, 10_000, MAX_ID):
        with pytest.raises(Exhausted):
            await lease(ledger, "orders", size)
    assert await lease(ledger, "orders", 1) == Segment(MAX_ID, MAX_ID + 1)
    for floor in (0, MAX_ID):
        with pytest.raises(Exhausted):
            await lease(ledger, "orders", 1, floor=floor)
    assert await lease(ledger, "all", MAX_ID) == Segment(1, MAX_ID + 1)


async def test_last_tail_is_taken_back_once(ledger: Ledger) -> None:
    """The end of the last lease is leased again after it was given back, but only once."""
    await lease(ledger, "orders", 100)
    tail = Tail("orders", Segment(61, 101))
    assert await ledger.give_back([tail]) == [True]
    assert await ledger.give_back([tail]) == [False]
    assert await lease(ledger, "orders", 10) == Segment(61, 71)


async def test_whole_first_lease_is_taken_back(ledger: Ledger) -> None:
    """A lease that was not used at all leaves nothing behind."""
    segment = await lease(ledger, "orders", 100)
    assert await ledger.give_back([Tail("orders", segment)]) == [True]
    assert await lease(ledger, "orders", 7) == Segment(1, 8)


async def test_tail_below_another_lease_is_refused(ledger: Ledger) -> None:
    """Nothing is taken back once something above it was given away."""
    await lease(ledger, "orders", 100)
    await lease(ledger, "orders", 100)
    assert await ledger.give_back([Tail("orders", Segment(50, 101))]) == [False]
    assert await lease(ledger, "orders", 1) == Segment(201, 202)


async def test_tails_are_taken_back_in_order(ledger: Ledger) -> None:
    """Tails that adjoin are all taken back if the highest comes first; the answers line up."""
    for service in ("orders", "users"):
        await lease(ledger, service, 100)
        await lease(ledger, service, 100)
    low, high = Segment(51, 101), Segment(101, 201)
    tails = [
        Tail("orders", high),
        Tail("users", low),
        Tail("nobody", low),
        Tail("orders", low),
        Tail("users", high),
    ]
    assert await ledger.give_back(tails) == [True, False, False, True, True]
    assert await lease(ledger, "orders", 1) == Segment(51, 52)
    assert await lease(ledger, "users", 1) == Segment(101, 102)
    assert await lease(ledger, "nobody", 1) == Segment(1, 2)


async def test_giving_nothing_back_is_fine(ledger: Ledger) -> None:
    """No tails, no answers."""
    assert await ledger.give_back([]) == []


async def test_concurrent_leases_are_disjoint(ledger: Ledger) -> None:
    """Tasks that lease at the same time share the sequence without overlap or gap."""
    segments: list[Segment] = []

    async def lease_some() -> None:
        segments.extend([await lease(ledger, "orders", 7) for _ in range(5)])

    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(lease_some)
    assert sorted(segments) == [Segment(start, start + 7) for start in range(1, 351, 7)]


async def test_cancelled_before_it_began_takes_nothing(ledger: Ledger) -> None:
    """A lease in a scope that is cancelled already does not happen."""
    with trio.CancelScope() as scope:
        scope.cancel()
        await lease(ledger, "orders", 100)
    assert scope.cancelled_caught
    assert await lease(ledger, "orders", 1) == Segment(1, 2)


async def test_closed_ledger_is_unavailable(ledger: Ledger) -> None:
    """After closing, which may be repeated, every call says that the ledger is not there."""
    await ledger.aclose()
    await ledger.aclose()
    with pytest.raises(Unavailable):
        await lease(ledger, "orders", 1)
    with pytest.raises(Unavailable):
        await ledger.give_back([Tail("orders", Segment(1, 2))])


async def test_closes_while_being_cancelled(ledger: Ledger) -> None:
    """Closing is done even in a cancelled scope, and does not raise there."""
    with trio.CancelScope() as scope:
        scope.cancel()
        await ledger.aclose()
    assert not scope.cancelled_caught
    with pytest.raises(Unavailable):
        await lease(ledger, "orders", 1)


@attrs.frozen
class LeaseStep:
    """Lease so many IDs, under a floor and a ceiling."""

    service: str
    size: int
    floor: int
    ceiling: int


@attrs.frozen
class GiveBackStep:
    """Give back the ends of earlier leases: which lease, and how many IDs to keep of it.

    A lease that somebody keeps using is never named; nor is anything named twice, unless the
    ledger refused it. So whatever is given back has an owner, however late it comes.
    """

    leases: list[tuple[int, int]]


@attrs.define
class Model:
    """A ledger that is correct at a glance: it remembers the owner of every ID."""

    owned: dict[str, set[int]] = attrs.field(factory=dict)
    last: dict[str, int] = attrs.field(factory=dict)

    def lease(self, step: LeaseStep) -> Segment | None:
        """What the ledger must answer; None for `Exhausted`."""
        start = max(self.last.get(step.service, 0), step.floor) + 1
        if start + step.size - 1 > step.ceiling:
            return None
        segment = Segment(start, start + step.size)
        ids = set(range(segment.start, segment.stop))
        assert self.owned.setdefault(step.service, set()).isdisjoint(ids)
        self.owned[step.service] |= ids
        self.last[step.service] = segment.last
        return segment

    def give_back(self, tail: Tail) -> bool:
        """What the ledger must answer."""
        if self.last[tail.service] != tail.segment.last:
            return False
        self.owned[tail.service] -= set(range(tail.segment.start, tail.segment.stop))
        self.last[tail.service] = tail.segment.start - 1
        return True


async def run_program(ledger: Ledger, program: list[LeaseStep | GiveBackStep]) -> None:
    """Run it on the ledger and on the model; they must agree at every step."""
    model = Model()
    leased: list[Tail] = []
    for step in program:
        if isinstance(step, LeaseStep):
            expected = model.lease(step)
            try:
                segment = await ledger.lease(
                    step.service, step.size, floor=step.floor, ceiling=step.ceiling
                )
            except Exhausted:
                assert expected is None
            else:
                assert segment == expected
                leased.append(Tail(step.service, segment))
        else:
            tails = list(cut_tails(leased, step))
            assert await ledger.give_back(tails) == [model.give_back(tail) for tail in tails]


def cut_tails(leased: list[Tail], step: GiveBackStep) -> Iterator[Tail]:
    """The ends that the step names; each lease is then no longer anybody's to give back."""
    for index, kept in step.leases:
        if leased:
            lease = leased.pop(index % len(leased))
            start = lease.segment.start + kept % lease.segment.size
            yield Tail(lease.service, Segment(start, lease.segment.stop))


services = st.sampled_from(["a", "b"])
sizes = st.integers(1, 9)
lease_steps = st.builds(LeaseStep, services, sizes, st.integers(0, 60), st.integers(40, 100))
give_back_steps = st.builds(
    GiveBackStep, st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 8)), max_size=4)
)
programs = st.lists(lease_steps | give_back_steps, max_size=30)


@pytest.mark.parametrize("kind", LEDGERS)
@settings(
    deadline=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # Each example empties it.
)
@given(program=programs)
def test_any_program_agrees_with_the_model(
    request: pytest.FixtureRequest, kind: str, program: list[LeaseStep | GiveBackStep]
) -> None:
    """Whatever is leased and given back, in time or late, no ID has two owners."""

    async def main() -> None:
        async with LEDGERS[kind](request) as ledger:
            await run_program(ledger, program)

    trio.run(main)


# The fake fails as it is told to, so that tests can rely on it


@pytest.mark.parametrize("acts", [False, True])
async def test_fake_fails_before_or_after_it_acts(acts: bool) -> None:
    """A fake that is down takes nothing; one whose reply is lost has taken the lease."""
    fake = FakeLedger(down=not acts, lose_reply=acts)
    with pytest.raises(Unavailable):
        await lease(fake, "orders", 10)
    fake.down = fake.lose_reply = False
    assert [given.segment for given in fake.leases] == [Segment(1, 11)] * acts
    assert (await lease(fake, "orders", 1)).start == (11 if acts else 1)


async def test_fake_fails_so_many_times() -> None:
    """Exactly the next calls fail."""
    fake = FakeLedger()
    fake.fail_next(2)
    for _ in range(2):
        with pytest.raises(Unavailable):
            await lease(fake, "orders", 10)
    assert await lease(fake, "orders", 10) == Segment(1, 11)


async def test_fake_is_slow(autojump_clock: trio.testing.MockClock) -> None:
    """A slow fake can be cancelled before it acts."""
    fake = FakeLedger(delay_seconds=60.0)
    with trio.move_on_after(59.0) as scope:
        await lease(fake, "orders", 10)
    assert scope.cancelled_caught
    assert await lease(fake, "orders", 10) == Segment(1, 11)
    assert trio.current_time() >= 119.0


async def test_fake_interleaves_and_forgets() -> None:
    """Others may lease in between, and commits may be lost; the log keeps what was answered."""
    fake = FakeLedger()
    await lease(fake, "orders", 10)
    assert fake.take_from_outside("orders", 5) == Segment(11, 16)
    before = fake.snapshot()
    await lease(fake, "orders", 10)
    fake.forget("orders", 10)
    assert fake.snapshot() == before
    assert await lease(fake, "orders", 10) == Segment(16, 26)
    assert await lease(fake, "users", 10) == Segment(1, 11)
    fake.restore(before)
    assert await lease(fake, "orders", 10, floor=25) == Segment(26, 36)
    assert await lease(fake, "users", 10) == Segment(1, 11)
    starts = [given.segment.start for given in fake.leases if given.service == "orders"]
    assert starts == [1, 16, 16, 26]


async def test_fake_notices_when_it_gives_an_id_away_twice() -> None:
    """A row that is lowered behind its back is a fault of the test, and fails it."""
    fake = FakeLedger()
    await lease(fake, "orders", 10)
    fake._last_alloc_values["orders"] = 5
    with pytest.raises(AssertionError, match="somebody owns"):
        await lease(fake, "orders", 1)
