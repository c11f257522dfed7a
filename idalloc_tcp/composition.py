"""The composition root: the one place that knows every part, and puts them together."""

import os
import signal
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Final, final

import attrs
import trio

from idalloc_tcp import __version__, log
from idalloc_tcp.assembly import RELOADABLE, Parts, apply, open_server, share_of
from idalloc_tcp.errors import Busy
from idalloc_tcp.garbage import clear_up
from idalloc_tcp.listeners import (
    Listener,
    close_listeners,
    managed_listeners,
    open_listeners,
    open_shared_listeners,
)
from idalloc_tcp.log import Repeats
from idalloc_tcp.metrics import Row
from idalloc_tcp.reload import Reload
from idalloc_tcp.server import Server
from idalloc_tcp.settings import Settings
from idalloc_tcp.signals import Action, act_on_signals, stop_on_signals
from idalloc_tcp.snapshot import Snapshot
from idalloc_tcp.stores import mysql_url
from idalloc_tcp.systemd import ServiceManager

if TYPE_CHECKING:
    # A server of one process needs none of them: they are imported where there are several.
    from idalloc_tcp.link import Link, Message, Query
    from idalloc_tcp.workers import Workers

#: So many of the busiest services are part of a status in the log.
STATUS_SERVICES_MAX: Final = 5


@final
@attrs.frozen
class _Process:
    """What a process that people start knows before it serves.

    Attributes:
        read: reads the settings from where they are given, as they are now.
        shares: the listeners of each process that will serve.
        admin: where the admin pages are.
    """

    settings: Settings
    read: Callable[[], Settings]
    manager: ServiceManager
    repeats: Repeats
    shares: Sequence[Sequence[Listener]]
    admin: Sequence[Listener]


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
    clear_up()
    trio.run(_serve, settings, read, manager, repeats)
    log.event("stopped")


async def _serve(
    settings: Settings, read: Callable[[], Settings], manager: ServiceManager, repeats: Repeats
) -> None:
    # Before the stores: an address that is taken is noticed before a data file is made.
    shares = await _open_shares(settings, manager)
    try:
        admin = await open_listeners(settings.admin_addresses())
    except BaseException:
        close_listeners({listener for share in shares for listener in share})
        raise
    process = _Process(settings, read, manager, repeats, shares, admin)
    await (_serve_alone if len(shares) == 1 else _serve_together)(process)


async def _open_shares(settings: Settings, manager: ServiceManager) -> list[list[Listener]]:
    managed = managed_listeners(manager.descriptors)
    if managed:
        # There is no second socket for a port that somebody else has opened: all share the one.
        return [managed] * settings.worker_count
    return await open_shared_listeners(settings.addresses(), settings.worker_count)


async def _serve_alone(process: _Process) -> None:
    async with open_server(process.settings) as (parts, described):
        server = parts.server

        async def put_into_effect(changed: Settings, names: Iterable[str]) -> None:
            apply(parts, changed, names)

        reload = Reload(process.settings, process.read, RELOADABLE, put_into_effect)
        actions = _actions(server, reload, process.manager)
        async with _attended(server, actions, process.manager, process.repeats) as beside:
            await beside.start(_serve_admin, process, server)
            await _announce(process, described)
            await server.run(process.shares[0])


async def _serve_together(process: _Process) -> None:
    from idalloc_tcp.workers import Workers  # noqa: PLC0415

    count = len(process.shares)
    workers = Workers(share_of(process.settings, count), process.shares)

    async def put_into_effect(changed: Settings, names: Iterable[str]) -> None:
        log.set_level(changed.log_level)
        await workers.change(share_of(changed, count), names)

    reload = Reload(process.settings, process.read, RELOADABLE, put_into_effect)
    actions = _actions(workers, reload, process.manager)
    async with _attended(workers, actions, process.manager, process.repeats) as beside:
        await beside.start(_serve_admin, process, workers)
        await workers.run(partial(_announce, process))


async def serve_linked(
    settings: Settings, listeners: Sequence[Listener], link: "Link", number: int
) -> None:
    """Be worker `number` of the parent on the other side of the link, until told to stop.

    Raises:
        StartRefused: the data file cannot be used.
        SettingsError: a URL does not say what it should.
    """
    from idalloc_tcp.workers import ready_message  # noqa: PLC0415

    repeats = log.configure(settings.log_level, settings.log_format, worker=number)
    async with open_server(settings, partial(_gather, link)) as (parts, described):
        actions = {signal.SIGUSR1: partial(_log_status, parts.server)}
        async with _attended(parts.server, actions, ServiceManager(), repeats) as beside:
            await link.send(ready_message(described))
            beside.start_soon(_answer, link, parts, settings)
            await parts.server.run(listeners)


async def _announce(process: _Process, described: Mapping[str, str]) -> None:
    fields: dict[str, object] = {"listen": [one.address for one in process.shares[0]]}
    if process.admin:
        fields["admin"] = [one.address for one in process.admin]
    if len(process.shares) > 1:
        fields["workers"] = len(process.shares)
    log.event("serving", **fields, **described, version=__version__)
    process.manager.ready()


async def _serve_admin(
    process: _Process, server: "Server | Workers", *, task_status: trio.TaskStatus[None]
) -> None:
    """Show what a server of one process or of several does, if anywhere."""
    if not process.admin:
        task_status.started()
        return
    from idalloc_tcp.admin.listening import serve  # noqa: PLC0415
    from idalloc_tcp.admin.pages import Pages, Watched  # noqa: PLC0415
    from idalloc_tcp.admin.watched import WatchedServer, WatchedWorkers  # noqa: PLC0415

    if isinstance(server, Server):
        watched: Watched = WatchedServer(server)
    else:
        watched = WatchedWorkers(server)
    pages = Pages(watched, process.settings.debug)
    await serve(process.admin, pages, task_status=task_status)


@asynccontextmanager
async def _attended(
    server: "Server | Workers",
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
    server: "Server | Workers", reload: Reload, manager: ServiceManager
) -> dict[signal.Signals, Action]:
    async def reload_and_tell() -> None:
        if not server.is_stopping:
            manager.reloading()
            await reload.run()
            manager.reloaded()

    return {signal.SIGHUP: reload_and_tell, signal.SIGUSR1: partial(_log_status, server)}


async def _log_status(server: "Server | Workers") -> None:
    snapshot = await server.gather_all(STATUS_SERVICES_MAX)
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


async def _gather(link: "Link", service: str | None) -> Iterable[Row]:
    from idalloc_tcp.link import Query  # noqa: PLC0415
    from idalloc_tcp.workers import GATHER_SECONDS  # noqa: PLC0415

    snapshot = await link.ask(Query(service), GATHER_SECONDS)
    if snapshot is None:
        raise Busy("the workers could not be asked in time; retry later")
    return snapshot.about(service)


async def _answer(link: "Link", parts: Parts, settings: Settings) -> None:
    from idalloc_tcp.admin.inspection import Inspection, Inspector  # noqa: PLC0415

    async def answer(query: "Query") -> Snapshot:
        nonlocal settings
        if query.settings is not None:
            settings = attrs.evolve(settings, **query.settings)
            apply(parts, settings, query.settings)
            return Snapshot()
        if query.service is not None:
            return parts.server.snapshot(query.service)
        return await parts.server.gather_all(query.services_max)

    inspector = Inspector()

    async def inspect(wanted: "Message") -> "Message":
        return attrs.asdict(await inspector.inspect(Inspection(**wanted)))

    await link.run(answer, inspect)
    log.warning("the parent process is gone")
    parts.server.stop()


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
