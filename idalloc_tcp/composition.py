"""The composition root: the one place that knows every part, and puts them together."""

import resource
from functools import partial
from typing import Final

import trio

from idalloc_tcp import __version__, log
from idalloc_tcp.allocator import Allocator, AllocatorPolicy
from idalloc_tcp.config import Settings
from idalloc_tcp.connection import ConnectionLimits
from idalloc_tcp.ledger import Ledger
from idalloc_tcp.ledger.sqlite import SqliteLedger
from idalloc_tcp.listeners import bound_address, open_listeners
from idalloc_tcp.metrics import Metrics
from idalloc_tcp.reservation import Reservation
from idalloc_tcp.server import Server, ServerLimits, stop_on_signals
from idalloc_tcp.sizing import SizePolicy

#: Files open beside the connections: listeners, the ledger, Trio's own.
SPARE_FILES: Final = 64


def serve(settings: Settings) -> None:
    """Run a server until it is told to stop.

    Raises:
        StartRefused: the data file or an address cannot be used.
        KeyboardInterrupt: a second signal came before the stop was over. In an ExceptionGroup.
    """
    log.configure(settings.log_level, settings.log_format)
    _raise_file_limit(settings.max_connections)
    trio.run(partial(_serve, settings))


async def _serve(settings: Settings) -> None:
    ledger = await SqliteLedger.open(settings.data_path())
    try:
        server = _server(settings, ledger)
        listeners = await open_listeners(settings.addresses())
        async with trio.open_nursery() as signals:
            await signals.start(stop_on_signals, server)
            log.event(
                "serving",
                listen=[bound_address(listener) for listener in listeners],
                data=str(settings.data_path()),
                version=__version__,
            )
            await server.run(listeners)
            signals.cancel_scope.cancel()
    finally:
        await ledger.aclose()
    log.event("stopped")


def _server(settings: Settings, ledger: Ledger) -> Server:
    metrics = Metrics()

    def ceiling_of(service: str) -> int:
        return settings.ceilings.get(service, settings.ceiling)

    sizes = SizePolicy(settings.segment_size, settings.segment_size_max, settings.pool_seconds)
    allocator = Allocator(
        Reservation(ledger, ceiling_of, metrics),
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
    return Server(allocator, limits, metrics)


def _raise_file_limit(connections: int) -> None:
    """Let the process open a file for every connection, as far as the system allows it."""
    wanted = connections + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
