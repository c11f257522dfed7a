"""The composition root: the one place that knows every part, and puts them together."""

import resource
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Final

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
from idalloc_tcp.link import Link, Message, Query
from idalloc_tcp.listeners import (
    Listener,
    close_listeners,
    open_listeners,
    open_shared_listeners,
)
from idalloc_tcp.metrics import Metrics, Row
from idalloc_tcp.pool import MAX_ID
from idalloc_tcp.server import Server, ServerLimits, stop_on_signals
from idalloc_tcp.session import Fallback, no_fallback
from idalloc_tcp.sizing import SizePolicy
from idalloc_tcp.snapshot import Snapshot
from idalloc_tcp.stores import Stores, mysql_url, open_stores
from idalloc_tcp.workers import GATHER_SECONDS, Ready, Workers, ready_message

#: Files open beside the connections: listeners, the ledger, admin connections, Trio's own.
SPARE_FILES: Final = 64


def serve(settings: Settings) -> None:
    """Run a server until it is told to stop.

    Raises:
        StartRefused: the data file or an address cannot be used.
        KeyboardInterrupt: a second signal came before the stop was over. In an ExceptionGroup.
    """
    log.configure(settings.log_level, settings.log_format)
    trio.run(_serve_opened, settings)
    log.event("stopped")


async def _serve_opened(settings: Settings) -> None:
    # Before the stores: an address that is taken is noticed before a data file is made.
    shares = await open_shared_listeners(settings.addresses(), settings.worker_count)
    try:
        admin = await open_listeners(settings.admin_addresses())
    except BaseException:
        close_listeners({listener for share in shares for listener in share})
        raise
    ready = partial(_announce, shares, admin)
    if len(shares) == 1:
        await _serve(settings, shares[0], ready, admin=admin)
    else:
        await _serve_together(settings, shares, ready, admin)


async def _serve_together(
    settings: Settings,
    shares: Sequence[Sequence[Listener]],
    ready: Ready,
    admin: Sequence[Listener],
) -> None:
    workers = Workers(_share_of(settings, len(shares)), shares)
    async with trio.open_nursery() as beside:
        await beside.start(stop_on_signals, workers)
        await beside.start(_serve_admin, settings, admin, workers)
        await workers.run(ready)
        beside.cancel_scope.cancel()


def _share_of(settings: Settings, workers: int) -> Settings:
    """What each of several workers runs with: its part of what the server may do in all."""
    shared = (
        *("max_connections", "rate_limit_qps", "rate_limit_ids"),
        *("service_rate_limit_qps", "service_rate_limit_ids"),
    )
    return attrs.evolve(
        settings, **{name: -(-getattr(settings, name) // workers) for name in shared}
    )


def rate_limits(settings: Settings) -> RateLimits:
    """Those of one process."""
    return RateLimits(
        settings.rate_limit_qps,
        settings.rate_limit_ids,
        settings.service_rate_limit_qps,
        settings.service_rate_limit_ids,
    )


async def serve_linked(
    settings: Settings, listeners: Sequence[Listener], link: Link, number: int
) -> None:
    """Be worker `number` of the parent on the other side of the link, until told to stop.

    Raises:
        StartRefused: the data file cannot be used.
        SettingsError: a URL does not say what it should.
    """
    log.configure(settings.log_level, settings.log_format, worker=number)

    async def ready(described: Mapping[str, str]) -> None:
        await link.send(ready_message(described))

    await _serve(settings, listeners, ready, link=link)


async def _announce(
    shares: Sequence[Sequence[Listener]], admin: Sequence[Listener], described: Mapping[str, str]
) -> None:
    fields: dict[str, object] = {"listen": [listener.address for listener in shares[0]]}
    if admin:
        fields["admin"] = [listener.address for listener in admin]
    if len(shares) > 1:
        fields["workers"] = len(shares)
    log.event("serving", **fields, **described, version=__version__)


async def _serve_admin(
    settings: Settings,
    listeners: Sequence[Listener],
    server: Server | Workers,
    *,
    task_status: trio.TaskStatus[None],
) -> None:
    """Show what a server of one process or of several does, if anywhere."""
    if not listeners:
        task_status.started()
        return
    from idalloc_tcp.admin.listening import serve  # noqa: PLC0415
    from idalloc_tcp.admin.pages import Pages, Watched  # noqa: PLC0415
    from idalloc_tcp.admin.watched import WatchedServer, WatchedWorkers  # noqa: PLC0415

    if isinstance(server, Server):
        watched: Watched = WatchedServer(server)
    else:
        watched = WatchedWorkers(server)
    await serve(listeners, Pages(watched, settings.debug), task_status=task_status)


async def _serve(
    settings: Settings,
    listeners: Sequence[Listener],
    ready: Ready,
    *,
    link: Link | None = None,
    admin: Sequence[Listener] = (),
) -> None:
    """Run the server of this process until it is told to stop, or its parent is gone."""
    max_connections = _raise_file_limit(settings.max_connections)
    if max_connections < settings.max_connections:
        log.warning("the limit of open files allows fewer connections", max=max_connections)
        settings = attrs.evolve(settings, max_connections=max_connections)
    metrics = Metrics()
    async with open_stores(settings, metrics) as stores:
        gather = None if link is None else partial(_gather, link)
        server = _server(settings, stores, metrics, gather)
        async with trio.open_nursery() as beside:
            await beside.start(stop_on_signals, server)
            await beside.start(_serve_admin, settings, admin, server)
            await ready(stores.described)
            if link is not None:
                beside.start_soon(_answer, link, server)
            await server.run(listeners)
            beside.cancel_scope.cancel()


async def _gather(link: Link, service: str | None) -> Iterable[Row]:
    snapshot = await link.ask(Query(service), GATHER_SECONDS)
    if snapshot is None:
        raise Busy("the workers could not be asked in time; retry later")
    return snapshot.about(service)


async def _answer(link: Link, server: Server) -> None:
    from idalloc_tcp.admin.inspection import Inspection, Inspector  # noqa: PLC0415

    async def answer(query: Query) -> Snapshot:
        if query.service is not None:
            return server.snapshot(query.service)
        return await server.snapshot_all(query.services_max)

    inspector = Inspector()

    async def inspect(wanted: Message) -> Message:
        return attrs.asdict(await inspector.inspect(Inspection(**wanted)))

    await link.run(answer, inspect)
    log.warning("the parent process is gone")
    server.stop()


def _server(settings: Settings, stores: Stores, metrics: Metrics, gather: Gather | None) -> Server:
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
        sweeps=HAS_EPOLL and settings.lane == "sweep",
        connection=ConnectionLimits(
            settings.idle_seconds, settings.line_seconds, settings.send_seconds
        ),
    )
    rates = rate_limits(settings)
    limiter = RateLimiter(rates, time.monotonic) if rates else None
    fallback = _fallback(settings)
    return Server(allocator, limits, metrics, stores.rows, fallback, limiter, gather)


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
