"""A snapshot for Prometheus.

Every name begins with `idalloc_`; what only grows ends in `_total`. Labels are few: of the services
the `SERVICES_MAX` that gave out most IDs have a label of their own, the rest is `other`.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Final, final

import attrs
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from idalloc_tcp.admin.status import (
    ceiling_left,
    durations,
    labels,
    lease_headroom,
    number,
    refill_origins,
    stores,
    unreadiness,
)
from idalloc_tcp.counter import Reason
from idalloc_tcp.errors import BY_CODE
from idalloc_tcp.snapshot import Rows, Snapshot

CONTENT_TYPE: Final = CONTENT_TYPE_PLAIN_0_0_4
#: Services with a label of their own.
SERVICES_MAX: Final = 100
OTHER: Final = "other"

#: Counts by label, with the labels that are shown from the start: an alert on growth needs a zero.
_LABELLED: Final[Mapping[str, tuple[str, Iterable[str], str]]] = {
    "errors_total": ("code", BY_CODE, "ERR replies."),
    "seats_total": (
        "reason",
        [reason.value for reason in Reason],
        "How often Redis was put on a fresh lease, and why.",
    ),
    "gap_ids_total": (
        "reason",
        ["backwards", "beside", "lost", "skipped", "unreturned"],
        "IDs that nobody will ever get, and why.",
    ),
}
_COUNTERS: Final[Mapping[str, str]] = {
    "connections_total": "Connections accepted.",
    "connections_refused_total": "Connections turned away because too many were open.",
    "waits_total": "Requests that found too few IDs in memory and had to wait.",
    "random_total": "Requests answered with RANDOM.",
    "leases_total": "Leases taken from the ledger.",
    "leased_ids_total": "IDs leased from the ledger.",
    "lease_failures_total": "Requests to the ledger that failed.",
    "returned_ids_total": "IDs given back unserved.",
    "cuts_total": "Segments cut by Redis.",
    "syncs_total": "Tasks done that keep ledger and Redis in step.",
    "sync_drops_total": "Such tasks dropped because too many were waiting.",
    "worker_restarts_total": "How often a worker process was started again.",
}
_GAUGES: Final[Mapping[str, tuple[str, str]]] = {
    "uptime_seconds": ("uptime_seconds", "How long the server has been running."),
    "draining": ("draining", "1 while the server stops."),
    "services": ("services", "Services in use."),
    "connections_open": ("connections", "Connections open now."),
    "sync_queue_tasks": ("sync_queue_tasks", "Tasks waiting that keep ledger and Redis in step."),
    "workers": ("workers", "Worker processes."),
    "workers_silent": ("workers_silent", "Worker processes that did not answer in time."),
}
_SERVICE_GAUGES: Final[Mapping[str, tuple[str, str]]] = {
    "remaining_ids": ("pool_ids", "IDs in memory, ready to be served."),
    "cover_seconds": ("pool_cover_seconds", "How long the pool lasts at its demand."),
    "rate_ids_per_second": ("demand_ids_per_second", "IDs taken, from refill to refill."),
    "segment_size": ("segment_ids", "How many IDs are fetched at once."),
    "waiting_ids": ("waiting_ids", "IDs that requests are waiting for."),
}


@final
@attrs.define(eq=False)
class ByService:
    """A count by service that never steps back, and counts nothing twice.

    What processes say of a service does step back: when they let go of it, when one dies, and
    when the service is not among the busiest. The server's own total never does.

    Args:
        row: what a service calls the count, and what ...
        total_row: ... the server calls it.
    """

    _row: str
    _total_row: str
    other: int = attrs.field(init=False, default=0)
    shown: dict[str, int] = attrs.field(init=False, factory=dict)
    _measured: dict[str, int] = attrs.field(init=False, factory=dict)
    _total: int = attrs.field(init=False, default=0)

    def update(self, snapshot: Snapshot) -> None:
        """Share out what the total grew by since last time: it grew by what services grew by."""
        total = int(number(snapshot.rows, self._total_row))
        unshared, self._total = total - self._total, total
        shown: dict[str, int] = {}
        measured: dict[str, int] = {}
        for name, rows in snapshot.services.items():
            if name == OTHER or self._row not in rows:
                continue
            measured[name] = now = int(number(rows, self._row))
            before = self._measured.get(name, 0)
            grown = min(now - before if now >= before else now, unshared)
            unshared -= grown
            shown[name] = self.shown.get(name, 0) + grown
        self.other += unshared
        self.shown, self._measured = shown, measured


@final
@attrs.define(eq=False)
class Exposition(Collector):
    """Turns snapshots into what Prometheus reads, one after another."""

    _snapshot: Snapshot = attrs.field(init=False, factory=Snapshot)
    _ids: ByService = attrs.field(init=False, factory=lambda: ByService("served_ids", "ids_total"))
    _requests: ByService = attrs.field(
        init=False, factory=lambda: ByService("requests", "requests_total")
    )
    _registry: CollectorRegistry = attrs.field(init=False, factory=CollectorRegistry)

    def __attrs_post_init__(self) -> None:
        self._registry.register(self)

    def render(self, snapshot: Snapshot) -> bytes:
        """All that is in a snapshot, in the text format."""
        self._snapshot = snapshot
        self._ids.update(snapshot)
        self._requests.update(snapshot)
        return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        """No names ahead of time: they depend on what the server uses."""
        return []

    def collect(self) -> Iterator[Metric]:
        """As prometheus_client asks for it."""
        rows, services = self._snapshot.rows, self._snapshot.services
        ready = GaugeMetricFamily("idalloc_ready", "1 if requests should be sent here.")
        ready.add_metric([], not unreadiness(self._snapshot))
        yield ready
        yield InfoMetricFamily(
            "idalloc_build", "What is running.", {"version": str(rows.get("version", ""))}
        )
        yield from _of_server(rows)
        yield from _of_stores(self._snapshot)
        yield from _of_durations(rows)
        yield _by_service_count("ids", "IDs given out.", self._ids)
        yield _by_service_count("requests", "Request lines received.", self._requests)
        yield from _of_services(services)


def _of_server(rows: Rows) -> Iterator[Metric]:
    for row, text in _COUNTERS.items():
        if row in rows:
            yield CounterMetricFamily(f"idalloc_{row}", text, number(rows, row))
    for row, (name, text) in _GAUGES.items():
        if row in rows:
            yield GaugeMetricFamily(f"idalloc_{name}", text, number(rows, row))
    for row, (label, known, text) in _LABELLED.items():
        counts = dict.fromkeys(known, 0) | labels(rows, row)
        by_label = CounterMetricFamily(f"idalloc_{row}", text, labels=[label])
        for value, count in counts.items():
            by_label.add_metric([value], count)
        yield by_label


def _of_stores(snapshot: Snapshot) -> Iterator[Metric]:
    up = GaugeMetricFamily("idalloc_store_up", "0 after a failure.", labels=["store"])
    failures = CounterMetricFamily(
        "idalloc_store_failures", "Requests to the store that failed.", labels=["store"]
    )
    for store in stores(snapshot):
        up.add_metric([store.name], store.is_up)
        failures.add_metric([store.name], store.failures)
    yield from (up, failures)


def _of_durations(rows: Rows) -> Iterator[Metric]:
    refills = HistogramMetricFamily(
        "idalloc_refill_seconds",
        "How long a segment took to come: from Redis (counter), from the ledger, or direct "
        "from the ledger past a Redis that was away.",
        labels=["source"],
    )
    for origin in refill_origins(rows):
        microseconds = number(rows, f"refill_microseconds_total.{origin}")
        buckets = _buckets(durations(rows, f"refills_total.{origin}"))
        refills.add_metric([origin], buckets, microseconds / 1e6)
    yield refills
    if "latency_buckets" in rows:
        latency = HistogramMetricFamily(
            "idalloc_request_latency_seconds",
            "From when requests were heard to when they were answered; those of one round of the "
            "sweep count as if each had taken as long as the round.",
        )
        seconds = number(rows, "latency_seconds_total")
        latency.add_metric([], _buckets(durations(rows, "latency_buckets")), seconds)
        yield latency


def _buckets(counts: list[int]) -> list[tuple[str, float]]:
    """As Prometheus has it: each bucket holds those before it, and the last one has no bound."""
    bounds = [str(2**i / 1e6) for i in range(len(counts) - 1)]
    return list(zip([*bounds, "+Inf"], accumulate(counts), strict=True))


def _of_services(services: Mapping[str, Rows]) -> Iterator[Metric]:
    for row, (name, text) in _SERVICE_GAUGES.items():
        values = {service: rows.get(row) for service, rows in services.items()}
        yield _by_service(name, text, values)
    headroom = {service: lease_headroom(rows) for service, rows in services.items()}
    yield _by_service(
        "lease_headroom_ids",
        "IDs that Redis may cut before its lease ends, as this server last saw it.",
        headroom,
    )
    left = {service: ceiling_left(rows) for service, rows in services.items()}
    yield _by_service("ceiling_left_ids", "IDs left below the service's ceiling.", left)
    trouble = GaugeMetricFamily(
        "idalloc_service_trouble", "1 while fetching IDs fails.", labels=["service", "code"]
    )
    for service, rows in services.items():
        code = rows.get("trouble", "none")
        if code != "none":
            trouble.add_metric([service, str(code)], 1)
    yield trouble


def _by_service(
    name: str, text: str, values: Mapping[str, int | float | str | None]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"idalloc_{name}", text, labels=["service"])
    for service, value in values.items():
        if value is not None:
            family.add_metric([service], float(value))
    return family


def _by_service_count(name: str, text: str, counts: ByService) -> CounterMetricFamily:
    family = CounterMetricFamily(f"idalloc_{name}", text, labels=["service"])
    for service, count in {**counts.shown, OTHER: counts.other}.items():
        family.add_metric([service], count)
    return family
