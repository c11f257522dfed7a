"""The stores that the settings name, ready to give segments.

The drivers, and the bridge that they need, are imported only where they are configured.
"""

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias, final

import attrs
import trio

from idalloc_tcp import log
from idalloc_tcp.allocator import Source
from idalloc_tcp.counter import Counter
from idalloc_tcp.errors import SettingsError, Unavailable
from idalloc_tcp.health import Health
from idalloc_tcp.ledger import SharedLedger, Tail
from idalloc_tcp.metrics import Metrics, Row
from idalloc_tcp.pool import Segment
from idalloc_tcp.reservation import CounterPolicy, CounterReservation, Reservation
from idalloc_tcp.settings import Settings
from idalloc_tcp.sync import Sync, SyncPolicy

if TYPE_CHECKING:
    from idalloc_tcp.ledger.mysql_url import MysqlUrl

#: How long the tasks that are queued may take when stopping.
SYNC_STOP_SECONDS: Final = 2.0
#: How often a store is asked for a sign of life while somebody may be watching ...
WATCH_SECONDS: Final = 5.0
#: ... and so that its return, or that it is there at all, is soon known.
WATCH_AGAIN_SECONDS: Final = 1.0
#: What a sign of life is about. The service need not exist.
_NOBODY: Final = "-"


class _TellingSource(Source, Protocol):
    """A source that says where a segment came from."""

    def origin(self, service: str, segment: Segment, /) -> str:
        """As `Reservation.origin`."""
        ...


@final
@attrs.frozen
class _TimedSource:
    """A source, and how long its segments take."""

    _source: _TellingSource
    _metrics: Metrics

    async def reserve(self, service: str, size: int) -> Segment:
        """As `Source.reserve`."""
        began_at = time.perf_counter()
        segment = await self._source.reserve(service, size)
        elapsed_seconds = time.perf_counter() - began_at
        self._metrics.refilled(self._source.origin(service, segment), elapsed_seconds)
        return segment

    async def give_back(self, tails: Sequence[Tail]) -> None:
        """As `Source.give_back`."""
        await self._source.give_back(tails)


#: A store, and a question to it that changes nothing.
_Sign: TypeAlias = tuple[Health, Callable[[], Awaitable[object]]]
#: What STATS says of all (None), or of one service.
_Rows: TypeAlias = Callable[[str | None], Iterable[Row]]


def _no_rows(_service: str | None) -> Iterable[Row]:
    return ()


@final
@attrs.frozen
class Stores:
    """Where segments come from, and how the stores behind it are.

    Attributes:
        described: what the log says of them at the start.
    """

    source: Source
    health: dict[str, Health]
    described: dict[str, str]
    _ceiling_of: Callable[[str], int]
    _counter_rows: _Rows = _no_rows

    def rows(self, service: str | None) -> Iterable[Row]:
        """What STATS says of them (None), or of one service in them."""
        if service is None:
            for name, health in self.health.items():
                yield f"{name}_up", int(health.is_up)
                yield f"{name}_answers_total", health.answers_total
                yield f"{name}_failures_total", health.failures_total
                yield f"{name}_probes_total", health.probes_total
        else:
            yield "ceiling", self._ceiling_of(service)
        yield from self._counter_rows(service)


def open_stores(settings: Settings, metrics: Metrics) -> AbstractAsyncContextManager[Stores]:
    """The stores, open for as long as the `async with` lasts.

    Raises:
        StartRefused: the data file cannot be used.
        SettingsError: a URL does not say what it should.
    """
    if settings.mysql is None:
        return _embedded(settings, metrics)
    return _shared(settings, metrics)


def _ceiling_of(settings: Settings) -> Callable[[str], int]:
    def ceiling_of(service: str) -> int:
        return settings.ceilings.get(service, settings.ceiling)

    return ceiling_of


@asynccontextmanager
async def _embedded(settings: Settings, metrics: Metrics) -> AsyncIterator[Stores]:
    from idalloc_tcp.ledger.sqlite import SqliteLedger  # noqa: PLC0415

    path = settings.data_path()
    is_new = not path.exists()
    ledger = await SqliteLedger.open(path)
    if is_new:
        log.warning("a new data file: every service begins at 1", data=path)
    try:
        direct = Reservation(ledger, _ceiling_of(settings), metrics)
        direct.health.answered()  # To be opened.
        described = {"data": str(path)}
        source = _TimedSource(direct, metrics)
        yield Stores(source, {"ledger": direct.health}, described, direct.ceiling_of)
    finally:
        await ledger.aclose()


@asynccontextmanager
async def _shared(settings: Settings, metrics: Metrics) -> AsyncIterator[Stores]:
    from idalloc_tcp.bridge import asyncio_loop  # noqa: PLC0415
    from idalloc_tcp.ledger.mysql import MysqlLedger  # noqa: PLC0415

    # What may be refused comes first: the loop would wrap it in a group.
    ledger = MysqlLedger(mysql_url(settings), settings.create_table)
    counter = _counter(settings)
    direct = Reservation(ledger, _ceiling_of(settings), metrics)
    described = settings.shown("mysql", "redis")
    signs: list[_Sign] = [(direct.health, partial(ledger.read, _NOBODY))]
    async with asyncio_loop():
        try:
            if counter is None:
                async with _watched(settings, signs):
                    source = _TimedSource(direct, metrics)
                    health = {"ledger": direct.health}
                    yield Stores(source, health, described, direct.ceiling_of)
                return
            async with _on_counter(settings, metrics, counter, ledger, direct) as on_counter:
                reservation, rows = on_counter
                signs += [(reservation.health, partial(counter.inspect, _NOBODY))]
                async with _watched(settings, signs):
                    source = _TimedSource(reservation, metrics)
                    health = {"ledger": direct.health, "counter": reservation.health}
                    yield Stores(source, health, described, direct.ceiling_of, rows)
        finally:
            await ledger.aclose()


def _counter(settings: Settings) -> Counter | None:
    """The counter that the settings name. Nothing is sent yet."""
    if settings.redis is None:
        return None
    from idalloc_tcp.counter.redis import RedisCounter, connect  # noqa: PLC0415

    try:
        return RedisCounter(connect(settings.redis), settings.redis_key_prefix)
    except ValueError as error:
        raise SettingsError(f"redis: {error}") from None


@asynccontextmanager
async def _on_counter(
    settings: Settings,
    metrics: Metrics,
    counter: Counter,
    ledger: SharedLedger,
    direct: Reservation,
) -> AsyncIterator[tuple[CounterReservation, _Rows]]:
    policy = CounterPolicy(settings.segment_size, settings.lease_segments, settings.take_over)
    reservation = CounterReservation(counter, ledger, direct, policy, metrics)
    sync = Sync(
        reservation.extend_ahead,
        reservation.compare,
        SyncPolicy(
            settings.sync_queue_size,
            settings.sync_workers,
            settings.write_db_every_n_versions,
            settings.recover_redis_every_n_versions,
        ),
        metrics,
    )
    reservation.on_cut = sync.note_cut

    def rows(service: str | None) -> Iterable[Row]:
        return reservation.rows(service) if service else [("sync_queue_tasks", sync.queued)]

    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(sync.run)
            yield reservation, rows
            sync.stop()
            nursery.cancel_scope.deadline = trio.current_time() + SYNC_STOP_SECONDS
    finally:
        await counter.aclose()


@asynccontextmanager
async def _watched(settings: Settings, signs: Sequence[_Sign]) -> AsyncIterator[None]:
    """While somebody may be watching, see to it that what they see is true."""
    async with trio.open_nursery() as nursery:
        if settings.admin is not None:
            for health, sign in signs:
                nursery.start_soon(_watch, health, sign)
        yield
        nursery.cancel_scope.cancel()


async def _watch(health: Health, sign: Callable[[], Awaitable[object]]) -> None:
    while True:
        with suppress(Unavailable):
            await health.ask(sign)
        await trio.sleep(WATCH_SECONDS if health.is_up else WATCH_AGAIN_SECONDS)


def mysql_url(settings: Settings) -> "MysqlUrl":
    """The parsed URL of the database.

    Raises:
        SettingsError: there is none, or it does not say what it should.
    """
    from idalloc_tcp.ledger.mysql_url import MysqlUrl  # noqa: PLC0415

    try:
        return MysqlUrl.parse(settings.mysql or "")
    except ValueError as error:
        raise SettingsError(f"mysql: {error}") from None
