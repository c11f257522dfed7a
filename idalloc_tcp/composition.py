"""The composition root: the one place that knows every part, and puts them together."""

import os
import resource
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Final, final

import attrs
import trio

from idalloc_tcp import __version__, log
from idalloc_tcp.allocator import Allocator, AllocatorPolicy
from idalloc_tcp.config import Settings
from idalloc_tcp.connection import ConnectionLimits, Gather
from idalloc_tcp.errors import Busy
from idalloc_tcp.fallback import random_range
from idalloc_tcp.lanes import HAS_EPOLL
from idalloc_tcp.limits import RateLimiter, RateLimits
from idalloc_tcp.link import Link, Query
from idalloc_tcp.listeners import (
    Listener,
    managed_listeners,
    open_listeners,
    open_shared_listeners,
)
from idalloc_tcp.log import Repeats
from idalloc_tcp.metrics import Metrics, Row
from idalloc_tcp.pool import MAX_ID
from idalloc_tcp.reload import Reload
from idalloc_tcp.server import Server, ServerLimits
from idalloc_tcp.session import Fallback, no_fallback
from idalloc_tcp.signals import Action, Stoppable, act_on_signals, stop_on_signals
from idalloc_tcp.sizing import SizePolicy
from idalloc_tcp.snapshot import Snapshot
from idalloc_tcp.stores import Stores, mysql_url, open_stores
from idalloc_tcp.systemd import ServiceManager
from idalloc_tcp.workers import GATHER_SECONDS, Workers, ready_message

#: Files open beside the connections: listeners, the ledger, Trio's own.
SPARE_FILES: Final = 32
#: So many of the busiest services are part of a status in the log.
STATUS_SERVICES_MAX: Final = 5


@final
@attrs.frozen
class Parts:
    """What settings are put into effect on while the server runs."""

    server: Server
    allocator: Allocator


def serve(read: Callable[[], Settings]) -> None:
    """Run a server until it is told to stop.

    Args:
        read: reads the settings from where they are given: now, and when they are to be reloaded.

    Raises:
        SettingsError: they are wrong.
        StartRefused: the data file or an address cannot be used.
        KeyboardInterrupt: a second signal came before the stop was over. In an ExceptionGroup.
    """
    settings = read()
    manager = ServiceManager.take(os.environ)
    repeats = log.configure(settings.log_level, settings.log_format)
    run = _serve_alone if settings.worker_count == 1 else _serve_together
    trio.run(run, settings, read, manager, repeats)


async def _serve_alone(
    settings: Settings, read: Callable[[], Settings], manager: ServiceManager, repeats: Repeats
) -> None:
    # Before the stores: an address that is taken is noticed before a data file is made.
    listeners = await _listeners(settings, manager)
    async with _open_server(settings) as (parts, described):
        server = parts.server

        async def apply(changed: Settings, names: Iterable[str]) -> None:
            _apply(parts, changed, names)

        async def gather(services_max: int) -> Snapshot:
            return server.snapshot_all(services_max)

        reload = Reload(settings, read, RELOADABLE, apply)
        actions = _actions(server, reload, gather, manager)
        async with _attended(server, actions, manager, repeats):
            await _announce(listeners, manager, described)
            await server.run(listeners)
    log.event("stopped")


async def _serve_together(
    settings: Settings, read: Callable[[], Settings], manager: ServiceManager, repeats: Repeats
) -> None:
    count = settings.worker_count
    shares = await _shares(settings, manager)
    workers = Workers(_share_of(settings, count), shares)

    async def apply(changed: Settings, names: Iterable[str]) -> None:
        log.set_level(changed.log_level)
        await workers.change(_share_of(changed, count), names)

    reload = Reload(settings, read, RELOADABLE, apply)
    actions = _actions(workers, reload, workers.gather_all, manager)
    async with _attended(workers, actions, manager, repeats):
        await workers.run(partial(_announce, shares[0], manager, workers=count))
    log.event("stopped")


async def serve_linked(
    settings: Settings, listeners: Sequence[Listener], link: Link, number: int
) -> None:
    """Be worker `number` of the parent on the other side of the link, until told to stop.

    Raises:
        StartRefused: the data file cannot be used.
        SettingsError: a URL does not say what it should.
    """
    repeats = log.configure(settings.log_level, settings.log_format, worker=number)
    async with _open_server(settings, partial(_gather, link)) as (parts, described):
        server = parts.server

        async def gather(services_max: int) -> Snapshot:
            return server.snapshot_all(services_max)

        actions = {signal.SIGUSR1: partial(_log_status, gather)}
        async with _attended(server, actions, ServiceManager(), repeats) as beside:
            await link.send(ready_message(described))
            beside.start_soon(_answer, link, parts, settings)
            await server.run(listeners)


async def _listeners(settings: Settings, manager: ServiceManager) -> list[Listener]:
    managed = managed_listeners(manager.descriptors)
    return managed or await open_listeners(settings.addresses())


async def _shares(settings: Settings, manager: ServiceManager) -> list[list[Listener]]:
    count = settings.worker_count
    # There is no second socket for a port that somebody else has opened: all accept from the one.
    managed = managed_listeners(manager.descriptors)
    return (
        [managed] * count if managed else await open_shared_listeners(settings.addresses(), count)
    )


def _share_of(settings: Settings, workers: int) -> Settings:
    """What each of several workers runs with: its part of what the server may do in all."""
    shared = (
        *("max_connections", "rate_limit_qps", "rate_limit_ids"),
        *("service_rate_limit_qps", "service_rate_limit_ids"),
    )
    return attrs.evolve(
        settings, **{name: -(-getattr(settings, name) // workers) for name in shared}
    )


async def _announce(
    listeners: Sequence[Listener],
    manager: ServiceManager,
    described: Mapping[str, str],
    **fields: object,
) -> None:
    listen = [listener.address for listener in listeners]
    log.event("serving", listen=listen, **described, **fields, version=__version__)
    manager.ready()


@asynccontextmanager
async def _attended(
    server: Stoppable,
    actions: Mapping[signal.Signals, Action],
    manager: ServiceManager,
    repeats: Repeats,
) -> AsyncIterator[trio.Nursery]:
    """What goes on beside a server of any kind, in a nursery that ends with it."""
    async with trio.open_nursery() as beside:
        beside.start_soon(_sum_up, repeats)
        beside.start_soon(manager.keep_alive)
        await beside.start(act_on_signals, actions)
        await beside.start(stop_on_signals, server, manager.stopping)
        yield beside
        beside.cancel_scope.cancel()


def _actions(
    server: Stoppable,
    reload: Reload,
    gather: Callable[[int], Awaitable[Snapshot]],
    manager: ServiceManager,
) -> dict[signal.Signals, Action]:
    async def reload_and_tell() -> None:
        if not server.is_stopping:
            manager.reloading()
            await reload.run()
            manager.reloaded()

    return {signal.SIGHUP: reload_and_tell, signal.SIGUSR1: partial(_log_status, gather)}


async def _log_status(gather: Callable[[int], Awaitable[Snapshot]]) -> None:
    snapshot = await gather(STATUS_SERVICES_MAX)
    log.answer("status", **snapshot.rows)
    for rows in snapshot.services.values():
        log.answer("status of a service", **rows)


async def _sum_up(repeats: Repeats) -> None:
    try:
        while True:
            await trio.sleep(log.PERIOD_SECONDS)
            repeats.sum_up()
    finally:
        repeats.sum_up()


@asynccontextmanager
async def _open_server(
    settings: Settings, gather: Gather | None = None
) -> AsyncIterator[tuple[Parts, Mapping[str, str]]]:
    """The server of this process on its open stores, and what the log says of these."""
    metrics = Metrics()
    async with open_stores(settings, metrics) as stores:
        yield _parts(settings, stores, metrics, gather), stores.described


async def _gather(link: Link, service: str | None) -> Iterable[Row]:
    snapshot = await link.ask(Query(service), GATHER_SECONDS)
    if snapshot is None:
        raise Busy("the workers could not be asked in time; retry later")
    return snapshot.about(service)


async def _answer(link: Link, parts: Parts, settings: Settings) -> None:
    async def answer(query: Query) -> Snapshot:
        nonlocal settings
        if query.settings is not None:
            settings = attrs.evolve(settings, **query.settings)
            _apply(parts, settings, query.settings)
            return Snapshot()
        if query.service is not None:
            return parts.server.snapshot(query.service)
        return parts.server.snapshot_all(query.services_max)

    await link.run(answer)
    log.warning("the parent process is gone")
    parts.server.stop()


def _parts(settings: Settings, stores: Stores, metrics: Metrics, gather: Gather | None) -> Parts:
    policy = AllocatorPolicy(
        size=_sizes(settings),
        wait_seconds=settings.wait_seconds,
        idle_service_seconds=settings.idle_service_seconds,
        max_services=settings.max_services,
    )
    allocator = Allocator(stores.source, policy, metrics)
    limits, fallback, limiter = _limits(settings), _fallback(settings), _limiter(settings)
    server = Server(allocator, limits, metrics, stores.rows, fallback, limiter, gather)
    return Parts(server, allocator)


def _sizes(settings: Settings) -> SizePolicy:
    return SizePolicy(settings.segment_size, settings.segment_size_max, settings.pool_seconds)


def _limits(settings: Settings) -> ServerLimits:
    """As many connections as wanted, or as the system allows."""
    max_connections = _raise_file_limit(settings.max_connections)
    if max_connections < settings.max_connections:
        log.warning("the limit of open files allows fewer connections", max=max_connections)
    return ServerLimits(
        max_connections=max_connections,
        max_count=settings.max_count,
        drain_seconds=settings.drain_seconds,
        sweeps=HAS_EPOLL and settings.lane == "sweep",
        connection=ConnectionLimits(
            settings.idle_seconds, settings.line_seconds, settings.send_seconds
        ),
    )


def _limiter(settings: Settings) -> RateLimiter | None:
    limits = RateLimits(
        settings.rate_limit_qps,
        settings.rate_limit_ids,
        settings.service_rate_limit_qps,
        settings.service_rate_limit_ids,
    )
    return RateLimiter(limits, time.monotonic) if limits else None


def _fallback(settings: Settings) -> Fallback:
    """Random ranges if they are wanted, but never above a ceiling that somebody relies on."""

    def fall_back(service: str, count: int) -> int | None:
        ceiling = settings.ceilings.get(service, settings.ceiling)
        return random_range(count) if ceiling == MAX_ID else None

    return fall_back if settings.fallback == "random" else no_fallback


def _apply_log_level(_parts: Parts, settings: Settings) -> None:
    log.set_level(settings.log_level)


def _apply_limits(parts: Parts, settings: Settings) -> None:
    parts.server.limits = _limits(settings)


def _apply_rates(parts: Parts, settings: Settings) -> None:
    parts.server.limit(_limiter(settings))


def _apply_fallback(parts: Parts, settings: Settings) -> None:
    parts.server.fallback = _fallback(settings)


def _apply_sizes(parts: Parts, settings: Settings) -> None:
    parts.allocator.resize(_sizes(settings))


#: The settings that may change while the server runs -> what puts them into effect, in the process
#: that serves. It gets all settings, and cannot fail.
RELOADABLE: Final[Mapping[str, Callable[[Parts, Settings], None]]] = {
    "fallback": _apply_fallback,
    "pool_seconds": _apply_sizes,
    "idle_seconds": _apply_limits,
    "line_seconds": _apply_limits,
    "send_seconds": _apply_limits,
    "max_connections": _apply_limits,
    "rate_limit_qps": _apply_rates,
    "rate_limit_ids": _apply_rates,
    "service_rate_limit_qps": _apply_rates,
    "service_rate_limit_ids": _apply_rates,
    "log_level": _apply_log_level,
}


def _apply(parts: Parts, settings: Settings, names: Iterable[str]) -> None:
    for put_into_effect in dict.fromkeys(RELOADABLE[name] for name in names):
        put_into_effect(parts, settings)


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
