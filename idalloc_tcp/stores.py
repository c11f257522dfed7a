"""The stores that the settings name, ready to give segments.

The drivers, and the bridge that they need, are imported only where they are configured.
"""

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Final, final

import attrs
import trio

from idalloc_tcp import log
from idalloc_tcp.allocator import Source
from idalloc_tcp.config import Settings
from idalloc_tcp.counter import Counter
from idalloc_tcp.errors import SettingsError
from idalloc_tcp.health import Health
from idalloc_tcp.ledger import SharedLedger
from idalloc_tcp.ledger.mysql_url import MysqlUrl
from idalloc_tcp.metrics import Metrics, Row
from idalloc_tcp.reservation import CounterPolicy, CounterReservation, Reservation
from idalloc_tcp.sync import Sync, SyncPolicy

#: How long the tasks that are queued may take when stopping.
SYNC_STOP_SECONDS: Final = 2.0


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

    def rows(self) -> Iterable[Row]:
        """What STATS says of them."""
        for name, health in self.health.items():
            yield f"{name}_up", int(health.is_up)
            yield f"{name}_failures_total", health.failures_total
            yield f"{name}_probes_total", health.probes_total


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
        source = Reservation(ledger, _ceiling_of(settings), metrics)
        described = {"data": str(path)}
        yield Stores(source, {"ledger": source.health}, described)
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
    async with asyncio_loop():
        try:
            if counter is None:
                yield Stores(direct, {"ledger": direct.health}, described)
                return
            async with _on_counter(settings, metrics, counter, ledger, direct) as reservation:
                health = {"ledger": direct.health, "counter": reservation.health}
                yield Stores(reservation, health, described)
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
) -> AsyncIterator[CounterReservation]:
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
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(sync.run)
            yield reservation
            sync.stop()
            nursery.cancel_scope.deadline = trio.current_time() + SYNC_STOP_SECONDS
    finally:
        await counter.aclose()


def mysql_url(settings: Settings) -> MysqlUrl:
    """The parsed URL of the database.

    Raises:
        SettingsError: there is none, or it does not say what it should.
    """
    try:
        return MysqlUrl.parse(settings.mysql or "")
    except ValueError as error:
        raise SettingsError(f"mysql: {error}") from None
