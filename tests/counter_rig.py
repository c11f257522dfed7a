"""Reservations on a counter and a ledger that fail as they are told to, every call noted."""

from collections.abc import Callable
from inspect import isawaitable
from typing import Any, final

import attrs

from idalloc_tcp.errors import Unavailable
from idalloc_tcp.ledger import Tail
from idalloc_tcp.metrics import Metrics
from idalloc_tcp.pool import MAX_ID, Segment
from idalloc_tcp.reservation import CounterPolicy, CounterReservation, Reservation
from tests.fakes import FakeCounter, FakeSharedLedger

#: IDs in a segment, and in a lease of the counter.
SIZE = 10
LEASE = 100


@final
@attrs.define(eq=False)
class Watched:
    """Passes every call of a store on and notes its name.

    Attributes:
        before: what happens behind our back just before the next call of a method arrives.
        lost: methods whose calls act, but whose replies are lost.
        loses: says whether any other reply is lost.
    """

    store: Any
    calls: list[str] = attrs.field(init=False, factory=list)
    before: dict[str, Callable[[], object]] = attrs.field(init=False, factory=dict)
    lost: set[str] = attrs.field(init=False, factory=set)
    loses: Callable[[], bool] = lambda: False

    def __getattr__(self, name: str) -> Any:
        async def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            happening = self.before.pop(name, lambda: None)()
            if isawaitable(happening):
                await happening
            answer = await getattr(self.store, name)(*args, **kwargs)
            if name in self.lost or self.loses():
                raise Unavailable(f"the reply to {name} was lost")
            return answer

        return call


@final
@attrs.define(eq=False)
class Worker:
    """One server's reservation, and its way to the stores."""

    counter: Watched
    ledger: Watched
    metrics: Metrics
    direct: Reservation
    reservation: CounterReservation

    async def reserve(self, size: int = SIZE, service: str = "orders") -> Segment:
        """A segment, as if the pauses after failures were over."""
        self._be_up()
        return await self.reservation.reserve(service, size)

    async def give_back(self, *segments: Segment, service: str = "orders") -> None:
        """Give tails back."""
        self._be_up()
        await self.reservation.give_back([Tail(service, segment) for segment in segments])

    async def extend_ahead(self, service: str = "orders") -> None:
        """What the sync workers do every few segments."""
        self._be_up()
        await self.reservation.extend_ahead(service)

    async def compare(self, service: str = "orders") -> None:
        """What the sync workers do now and then."""
        self._be_up()
        await self.reservation.compare(service)

    def forget_calls(self) -> None:
        """Only what is asked from now on is noted."""
        self.counter.calls.clear()
        self.ledger.calls.clear()

    @property
    def calls(self) -> tuple[list[str], list[str]]:
        """What the counter was asked, and what the ledger."""
        return self.counter.calls, self.ledger.calls

    def _be_up(self) -> None:
        self.direct.health.is_up = self.reservation.health.is_up = True


@final
@attrs.define(eq=False)
class Rig:
    """One counter on one ledger, and any number of workers."""

    counter: FakeCounter = attrs.field(init=False, factory=FakeCounter)
    ledger: FakeSharedLedger = attrs.field(init=False, factory=FakeSharedLedger)
    ceiling: int = MAX_ID

    def worker(self, *, take_over: bool = False, segment_size: int = SIZE) -> Worker:
        """Another server."""
        counter, ledger, metrics = Watched(self.counter), Watched(self.ledger), Metrics()
        shared: Any = ledger
        direct = Reservation(shared, lambda _service: self.ceiling, metrics)
        policy = CounterPolicy(segment_size, LEASE // SIZE, take_over)
        cutter: Any = counter
        reservation = CounterReservation(cutter, shared, direct, policy, metrics)
        return Worker(counter, ledger, metrics, direct, reservation)

    def row(self, service: str = "orders") -> int:
        """The last ID that the ledger gave away, whether or not it answers."""
        return self.ledger.snapshot().get(service, 0)
