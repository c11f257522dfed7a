"""Accepting connections, and stopping so that nothing is lost.

Three nurseries, one inside the other: the allocator's outermost, because connections need it
to their end; then the connections'; then the accepting one. A stop cancels from the inside out:
no new connections, then each connection answers what has arrived and closes (the idle ones at
once, the busy ones within `drain_seconds`), then the allocator gives back what was not served.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from socket import socket
from typing import final

import attrs
import trio

from idalloc_tcp import __version__, log
from idalloc_tcp.allocator import Allocator
from idalloc_tcp.connection import (
    FAREWELL_SECONDS,
    Connection,
    ConnectionLimits,
    Gather,
    no_gathering,
)
from idalloc_tcp.errors import Busy
from idalloc_tcp.express import Express
from idalloc_tcp.garbage import Residents, clear_up
from idalloc_tcp.lanes import HAS_EPOLL, Sweep
from idalloc_tcp.limits import RateLimiter
from idalloc_tcp.listeners import BACKLOG, Listener, close_listeners
from idalloc_tcp.metrics import Metrics, Row
from idalloc_tcp.observation import Observer
from idalloc_tcp.protocol import RequestParser, err
from idalloc_tcp.session import Fallback, Session, Take, no_fallback
from idalloc_tcp.snapshot import Snapshot


def _no_rows(_service: str | None) -> Iterable[Row]:
    return ()


@final
@attrs.frozen
class ServerLimits:
    """The bounds of a server."""

    max_connections: int = 16_384
    max_count: int = 1_000_000
    #: How long busy connections get on a clean stop.
    drain_seconds: float = 2.5
    #: Serve in the fast lane what needs no waiting; else every connection is on its own.
    sweeps: bool = HAS_EPOLL
    connection: ConnectionLimits = attrs.field(factory=ConnectionLimits)


@final
@attrs.define(eq=False)
class Server:
    """Serves an allocator's IDs on any number of listeners.

    Args:
        store_rows: what STATS says of the stores, or of one service in them.
        limits: new ones hold for connections that come then.
        fallback: what stands in for IDs that are unavailable; a new one holds at once.
        limiter: how fast IDs may go; without one as fast as they can.
        gather: what STATS answers, if this process is one of several.
    """

    _allocator: Allocator
    limits: ServerLimits
    _metrics: Metrics
    _store_rows: Callable[[str | None], Iterable[Row]] = _no_rows
    fallback: Fallback = no_fallback
    _limiter: RateLimiter | None = None
    _gather: Gather | None = None
    _residents: Residents = attrs.field(factory=Residents)
    _parser: RequestParser = attrs.field(init=False)
    _express: Express = attrs.field(init=False)
    _observer: Observer = attrs.field(init=False)
    _sweep: Sweep | None = attrs.field(init=False)
    #: The allocator's, within the rates.
    _allowed_take: Take = attrs.field(init=False)
    _connections: set[Connection] = attrs.field(init=False, factory=set)
    _stopping: trio.Event = attrs.field(init=False, factory=trio.Event)
    _started_at: float = attrs.field(init=False, factory=time.monotonic)

    def __attrs_post_init__(self) -> None:
        self._parser = RequestParser(self.limits.max_count)
        known, services = self._parser.known, self._allocator.services
        self._express = Express(known, services, self._metrics)
        self._observer = Observer(self._metrics, self._allocator.refill_of)
        self._sweep = Sweep(self._observer, self._express.answer) if self.limits.sweeps else None
        self.limit(self._limiter)

    async def run(
        self,
        listeners: Sequence[Listener],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until `stop`, then drain. Closes the listeners."""
        self._residents.settle()
        clear_up()
        async with trio.open_nursery() as stores:
            await stores.start(self._allocator.run)
            async with trio.open_nursery() as lanes:
                if self._sweep is not None:
                    await lanes.start(self._sweep.run)
                async with trio.open_nursery() as connections:
                    await self._accept(listeners, connections, task_status)
                    self._drain(connections.cancel_scope)
                lanes.cancel_scope.cancel()
            self._allocator.stop()

    async def _accept(
        self,
        listeners: Sequence[Listener],
        connections: trio.Nursery,
        task_status: trio.TaskStatus[None],
    ) -> None:
        def welcome(client: socket) -> None:
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(client))
            connections.start_soon(self.serve_stream, stream, client)

        try:
            async with trio.open_nursery() as accepting:
                for listener in listeners:
                    accepting.start_soon(listener.accept, welcome)
                task_status.started()
                await self._stopping.wait()
                accepting.cancel_scope.cancel()
            for listener in listeners:
                if not listener.is_managed:  # Who has connected before the stop is told of it.
                    listener.accept_waiting(welcome, BACKLOG)
        finally:
            close_listeners(listeners)

    @property
    def is_stopping(self) -> bool:
        """Has a stop begun?"""
        return self._stopping.is_set()

    def limit(self, limiter: RateLimiter | None) -> None:
        """Have IDs go as fast as this limiter allows from now on."""
        take = self._allocator.take
        self._allowed_take = take if limiter is None else limiter.limited(take)
        self._express.limiter = limiter

    def stop(self) -> None:
        """Drain: let `run` come to its end."""
        self._stopping.set()

    async def serve_stream(
        self, stream: trio.abc.HalfCloseableStream, connected: socket | None = None
    ) -> None:
        """Serve one client. With the socket that the stream is on, it may use the fast lane."""
        if len(self._connections) >= self.limits.max_connections:
            await self._turn_away(stream)
            return
        session = Session(
            self._parser,
            self._take,
            self._report,
            self._metrics,
            self._fall_back,
        )
        rider = None
        if self._sweep is not None and connected is not None:
            rider = self._sweep.rider(connected, session)
        connection = Connection(
            stream,
            session,
            self._allocator.wait,
            self.limits.connection,
            self._observer,
            rider,
            self._gather or no_gathering,
        )
        self._connections.add(connection)
        self._metrics.connections_total += 1
        self._metrics.connections_open += 1
        self._residents.add()
        if self._stopping.is_set():
            connection.drain()
        try:
            await connection.run()
        finally:
            self._connections.discard(connection)
            self._metrics.connections_open -= 1

    def rows(self, service: str | None = None) -> Iterator[Row]:
        """What STATS answers of this process."""
        if service is not None:
            yield from self._allocator.service_rows(service)
            yield from self._store_rows(service)
            return
        yield "version", __version__
        yield "uptime_seconds", round(time.monotonic() - self._started_at)
        yield "draining", int(self._stopping.is_set())
        yield from self._store_rows(None)
        yield from self._allocator.rows()
        yield from self._metrics.rows()

    def _take(self, service: str, count: int) -> int | None:
        return self._allowed_take(service, count)

    def _fall_back(self, service: str, count: int) -> int | None:
        return self.fallback(service, count)

    def _report(self, service: str | None) -> Iterable[Row] | None:
        return self.rows(service) if self._gather is None else None

    def snapshot(self, service: str | None = None) -> Snapshot:
        """What this process measured: of the server, or of one service alone."""
        rows = dict(self.rows(service))
        return Snapshot(rows) if service is None else Snapshot({}, {service: rows})

    async def gather_all(self, services_max: int) -> Snapshot:
        """What this process measured, and the services that gave out most IDs, most first."""
        names = await self._allocator.busiest(services_max)
        return Snapshot(dict(self.rows()), {name: dict(self.rows(name)) for name in names})

    def _drain(self, scope: trio.CancelScope) -> None:
        log.event("draining", connections=len(self._connections))
        scope.deadline = trio.current_time() + self.limits.drain_seconds
        self._express.close()
        for connection in self._connections:
            connection.drain()

    async def _turn_away(self, stream: trio.abc.HalfCloseableStream) -> None:
        self._metrics.connections_refused_total += 1
        log.limiting("connections", max=self.limits.max_connections)
        error = Busy(f"{self.limits.max_connections} connections are open; retry later")
        with trio.move_on_after(FAREWELL_SECONDS):
            async with stream:
                with suppress(trio.BrokenResourceError):  # It left first.
                    await stream.send_all(err(error) + b"\n")
                    await stream.send_eof()
