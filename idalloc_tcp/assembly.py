"""A server from its settings, and those of them that may change while it runs."""

import resource
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Final, final

import attrs

from idalloc_tcp import log
from idalloc_tcp.allocator import Allocator, AllocatorPolicy
from idalloc_tcp.connection import ConnectionLimits, Gather
from idalloc_tcp.fallback import random_range
from idalloc_tcp.lanes import HAS_EPOLL
from idalloc_tcp.limits import RateLimiter, RateLimits
from idalloc_tcp.metrics import Metrics
from idalloc_tcp.pool import MAX_ID
from idalloc_tcp.server import Server, ServerLimits
from idalloc_tcp.session import Fallback, no_fallback
from idalloc_tcp.settings import Settings
from idalloc_tcp.sizing import SizePolicy
from idalloc_tcp.stores import Stores, open_stores

#: Files open beside the connections: listeners, the ledger, admin connections, Trio's own.
SPARE_FILES: Final = 64


@final
@attrs.frozen
class Parts:
    """What settings are put into effect on while the server runs."""

    server: Server
    allocator: Allocator


@asynccontextmanager
async def open_server(
    settings: Settings, gather: Gather | None = None
) -> AsyncIterator[tuple[Parts, Mapping[str, str]]]:
    """The server of this process on its open stores, and what the log says of these."""
    metrics = Metrics()
    async with open_stores(settings, metrics) as stores:
        yield _parts(settings, stores, metrics, gather), stores.described


def share_of(settings: Settings, workers: int) -> Settings:
    """What each of several workers runs with: its part of what the server may do in all."""
    shared = (
        *("max_connections", "rate_limit_qps", "rate_limit_ids"),
        *("service_rate_limit_qps", "service_rate_limit_ids"),
    )
    return attrs.evolve(
        settings, **{name: -(-getattr(settings, name) // workers) for name in shared}
    )


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


def apply(parts: Parts, settings: Settings, names: Iterable[str]) -> None:
    """Put those of the settings that changed into effect."""
    for put_into_effect in dict.fromkeys(RELOADABLE[name] for name in names):
        put_into_effect(parts, settings)


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
