"""All services of one process, made on demand and let go when idle."""

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, Protocol, final

import attrs
import trio

from idalloc_tcp import log
from idalloc_tcp.errors import Busy, Draining
from idalloc_tcp.garbage import Residents
from idalloc_tcp.ledger import Tail
from idalloc_tcp.metrics import Metrics, Row
from idalloc_tcp.pool import Pool, Segment
from idalloc_tcp.recent import Recent
from idalloc_tcp.service import Service
from idalloc_tcp.sizing import Demand, SizePolicy

#: The reaper looks this often within the time after which a service counts as idle ...
REAPS_PER_IDLE_TIME: Final = 4
#: ... and lets requests in between after so many services.
REAP_BATCH: Final = 1_000
#: Whoever ranks services lets requests in between after so many, which takes 2 ms.
RANK_BATCH: Final = 10_000


class Source(Protocol):
    """Where segments come from, and tails go back to."""

    async def reserve(self, service: str, size: int) -> Segment:
        """As `Reservation.reserve`."""
        ...

    async def give_back(self, tails: Sequence[Tail]) -> None:
        """As `Reservation.give_back`."""
        ...


@final
@attrs.frozen
class AllocatorPolicy:
    """The bounds of an allocator; times in seconds."""

    size: SizePolicy = attrs.field(factory=SizePolicy)
    #: How long a request may wait for IDs.
    wait_seconds: float = 2.0
    #: A service that served nothing for so long gives its rest back.
    idle_service_seconds: float = 300.0
    #: How long the fetches under way, and then the give-backs, may take when stopping.
    stop_seconds: float = 5.0
    #: How many services may be in use at once.
    max_services: int = 100_000


@final
@attrs.define
class _LastSeen:
    """When the reaper last saw a service serve."""

    served_ids: int
    at: float


@final
@attrs.define(eq=False)
class Allocator:
    """Gives out IDs of any service. `run` must be running for anything but `rows`."""

    _reservation: Source
    _policy: AllocatorPolicy
    _metrics: Metrics
    _residents: Residents = attrs.field(factory=Residents)
    _services: dict[str, Service] = attrs.field(init=False, factory=dict)
    #: Rule 7 outlives a service's idle time: its next pool starts above what the last served.
    _served_through: Recent = attrs.field(init=False, factory=Recent)
    _seen: dict[str, _LastSeen] = attrs.field(init=False, factory=dict)
    _prefetchers: trio.Nursery | None = attrs.field(init=False, default=None)
    _stopping: trio.Event = attrs.field(init=False, factory=trio.Event)

    def take(self, name: str, count: int) -> int | None:
        """The first of `count` contiguous IDs of a service; None if they must be waited for.

        Raises:
            Busy, Draining, Unavailable, Exhausted: they are not to be had, and why.
        """
        service = self._services.get(name)
        if service is None:
            service = self._start(name)
        return service.take(count)

    def refill_of(self, name: str) -> str:
        """What is known of the last segment that was fetched for a service, in words."""
        service = self._services.get(name)
        return "" if service is None else service.last_refill

    @property
    def services(self) -> Mapping[str, Service]:
        """Those that are in use."""
        return self._services

    async def wait(self, name: str, count: int) -> int:
        """As `take`, but waits, up to `wait_seconds`.

        Raises:
            Busy, Draining, Unavailable, Exhausted: they are not to be had, and why.
        """
        with trio.move_on_after(self._policy.wait_seconds):
            service = self._services.get(name) or self._start(name)
            return await service.wait(count)
        raise Busy(f"no IDs came within {self._policy.wait_seconds:g} s; retry")

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the pools filled until `stop`, then give back what was not served."""
        async with trio.open_nursery() as prefetchers:
            self._prefetchers = prefetchers
            prefetchers.start_soon(self._reap_idle)
            task_status.started()
            await self._stopping.wait()
            prefetchers.cancel_scope.deadline = trio.current_time() + self._policy.stop_seconds
            for service in self._services.values():
                service.stop()
        # What was fetched last may be on its way to a request that waits: let it arrive first.
        await trio.lowlevel.checkpoint()
        with trio.move_on_after(self._policy.stop_seconds) as patience:
            await self._retire(list(self._services.values()))
        if patience.cancelled_caught:
            log.warning(
                "not all IDs could be given back in time", seconds=self._policy.stop_seconds
            )

    def stop(self) -> None:
        """Let `run` come to its end; nothing can be taken any more."""
        self._stopping.set()

    def resize(self, size: SizePolicy) -> None:
        """Let segments be of these sizes from each service's next one on."""
        self._policy = attrs.evolve(self._policy, size=size)
        for service in self._services.values():
            service.demand.policy = size

    def rows(self) -> Iterator[Row]:
        """What STATS says of all services together."""
        yield "services", len(self._services)

    def service_rows(self, name: str) -> Iterable[Row]:
        """What STATS says of one service; asking starts nothing."""
        service = self._services.get(name)
        yield "service", name
        yield "active", int(service is not None)
        if service is not None:
            yield from service.rows()

    async def busiest(self, services_max: int) -> list[str]:
        """The services in use that gave out most IDs, most first, up to so many."""
        services = list(self._services.values())
        most: list[Service] = []
        for start in range(0, len(services), RANK_BATCH):
            batch = most + services[start : start + RANK_BATCH]
            most = heapq.nlargest(services_max, batch, key=lambda one: one.pool.served_ids)
            await trio.lowlevel.checkpoint()
        return [service.name for service in most]

    def _start(self, name: str) -> Service:
        if self._stopping.is_set():
            raise Draining("the server is stopping; connect again")
        if len(self._services) >= self._policy.max_services:
            raise Busy(f"{self._policy.max_services} services are in use; retry later")
        assert self._prefetchers is not None, "the allocator is not running"
        pool = Pool(self._served_through.get(name), on_gap=self._metrics.gap)
        service = Service(name, pool, Demand(self._policy.size, trio.current_time()))
        self._services[name] = service
        self._residents.add()
        self._prefetchers.start_soon(
            service.prefetch, self._reservation.reserve, name=f"prefetch {name}"
        )
        return service

    async def _reap_idle(self) -> None:
        period = self._policy.idle_service_seconds / REAPS_PER_IDLE_TIME
        while True:
            with trio.move_on_after(period):
                await self._stopping.wait()
                return
            services = list(self._services.values())
            for start in range(0, len(services), REAP_BATCH):
                batch = services[start : start + REAP_BATCH]
                await self._retire([service for service in batch if self._is_idle(service)])

    def _is_idle(self, service: Service) -> bool:
        served_ids, now = service.pool.served_ids, trio.current_time()
        seen = self._seen.setdefault(service.name, _LastSeen(served_ids, now))
        if seen.served_ids != served_ids or service.waiting_ids:
            seen.served_ids, seen.at = served_ids, now
        is_quiet = now - seen.at >= self._policy.idle_service_seconds
        return is_quiet and not service.is_fetching

    async def _retire(self, services: list[Service]) -> None:
        """Forget services, then give back what they did not serve.

        In this order: a request that comes meanwhile starts a pool of its own, above.
        """
        tails: list[Tail] = []
        for service in services:
            service.stop()
            tails += [Tail(service.name, segment) for segment in service.close()]
            self._served_through.set(service.name, service.pool.served_through)
            del self._services[service.name]
            self._seen.pop(service.name, None)
        await self._reservation.give_back(tails)
        await trio.lowlevel.checkpoint()
