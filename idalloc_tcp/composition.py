"""The composition root: the one place that knows every part, and puts them together."""

import resource
from functools import partial
from typing import Final

import attrs
import trio

from idalloc_tcp import __version__, log
from idalloc_tcp.allocator import Allocator, AllocatorPolicy
from idalloc_tcp.config import Settings
from idalloc_tcp.connection import ConnectionLimits
from idalloc_tcp.fallback import random_range
from idalloc_tcp.lanes import HAS_EPOLL, Sweep
from idalloc_tcp.listeners import open_listeners
from idalloc_tcp.metrics import Metrics
from idalloc_tcp.pool import MAX_ID
from idalloc_tcp.server import Server, ServerLimits, stop_on_signals
from idalloc_tcp.session import Fallback, no_fallback
from idalloc_tcp.sizing import SizePolicy
from idalloc_tcp.stores import Stores, mysql_url, open_stores

#: Files open beside the connections: listeners, the ledger, Trio's own.
SPARE_FILES: Final = 32


def serve(settings: Settings) -> None:
    """Run a server until it is told to stop.

    Raises:
        StartRefused: the data file or an address cannot be used.
        KeyboardInterrupt: a second signal came before the stop was over. In an ExceptionGroup.
    """
    log.configure(settings.log_level, settings.log_format)
    max_connections = _raise_file_limit(settings.max_connections)
    if max_connections < settings.max_connections:
        log.warning("the limit of open files allows fewer connections", max=max_connections)
        settings = attrs.evolve(settings, max_connections=max_connections)
    trio.run(partial(_serve, settings))


async def _serve(settings: Settings) -> None:
    metrics = Metrics()
    # Before the stores: an address that is taken is noticed before a data file is made.
    listeners = await open_listeners(settings.addresses())
    async with open_stores(settings, metrics) as stores:
        server = _server(settings, stores, metrics)
        async with trio.open_nursery() as signals:
            await signals.start(stop_on_signals, server)
            listen = [listener.address for listener in listeners]
            log.event("serving", listen=listen, **stores.described, version=__version__)
            await server.run(listeners)
            signals.cancel_scope.cancel()
    log.event("stopped")


def _server(settings: Settings, stores: Stores, metrics: Metrics) -> Server:
    sizes = SizePolicy(settings.segment_size, settings.segment_size_max, settings.pool_seconds)
    allocator = Allocator(
        stores.source,
        AllocatorPolicy(
            size=sizes,
            wait_seconds=settings.wait_seconds,
            idle_service_seconds=settings.idle_service_seconds,
            max_services=settings.max_services,
        ),
        metrics,
    )
    limits = ServerLimits(
        max_connections=settings.max_connections,
        max_count=settings.max_count,
        drain_seconds=settings.drain_seconds,
        connection=ConnectionLimits(
            settings.idle_seconds, settings.line_seconds, settings.send_seconds
        ),
    )
    sweep = Sweep() if HAS_EPOLL and settings.lane != "stream" else None
    return Server(allocator, limits, metrics, stores.rows, _fallback(settings), sweep)


def _fallback(settings: Settings) -> Fallback:
    """Random ranges if they are wanted, but never above a ceiling that somebody relies on."""

    def fall_back(service: str, count: int) -> int | None:
        ceiling = settings.ceilings.get(service, settings.ceiling)
        return random_range(count) if ceiling == MAX_ID else None

    return fall_back if settings.fallback == "random" else no_fallback


async def init_db(settings: Settings) -> None:
    """Make the table in the database that the settings name.

    Raises:
        SettingsError: they name none.
        Unavailable: it does not answer, or refuses.
    """
    from idalloc_tcp.bridge import asyncio_loop  # noqa: PLC0415
    from idalloc_tcp.ledger.mysql import MysqlLedger  # noqa: PLC0415

    ledger = MysqlLedger(mysql_url(settings))
    async with asyncio_loop():
        try:
            await ledger.prepare()
        finally:
            await ledger.aclose()


def _raise_file_limit(connections: int) -> int:
    """Let the process open a file for every connection, and how many the system allows."""
    wanted = connections + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        soft = allowed
    return (
        connections
        if soft == resource.RLIM_INFINITY
        else min(connections, max(1, soft - SPARE_FILES))
    )
