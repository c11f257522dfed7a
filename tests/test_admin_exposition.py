"""What Prometheus is told: every count, never a step back, few labels."""

from collections.abc import Mapping
from typing import Final

from idalloc_tcp.admin.exposition import OTHER, SERVICES_MAX, ByService, Exposition
from idalloc_tcp.admin.status import quantile, readiness_text, status, unreadiness
from idalloc_tcp.metrics import DURATION_BUCKETS, Metrics, duration_bucket
from idalloc_tcp.snapshot import Rows, Snapshot, merge
from tests.admin import Samples, parse
from tests.serving import serving

#: Rows that are exposed in another form, or say what others say.
TOLD_OTHERWISE: Final = frozenset({"version", "ids_total", "requests_total"})


def expose(snapshot: Snapshot) -> Samples:
    """The samples that a snapshot becomes."""
    return Samples(dict(parse(Exposition().render(snapshot).decode())))


def of(total: int, **served: int) -> Snapshot:
    """What a server says that gave out so many IDs, these of services that are named."""
    services: dict[str, Rows] = {name: {"served_ids": ids} for name, ids in served.items()}
    return Snapshot({"ids_total": total}, services)


def shown(counts: ByService) -> Mapping[str, int]:
    """All of it."""
    return {**counts.shown, OTHER: counts.other}


def test_counts_by_service_never_step_back_and_add_up() -> None:
    """Whatever a service does, its count goes on; what nobody is named for is `other`'s."""
    counts = ByService("served_ids", "ids_total")
    counts.update(of(100, a=60, b=30))
    assert shown(counts) == {"a": 60, "b": 30, OTHER: 10}
    counts.update(of(150, a=10, b=40))  # One worker let go of `a`, which gave out 10 since.
    assert shown(counts) == {"a": 70, "b": 40, OTHER: 40}
    counts.update(of(150, a=0, b=40))
    assert shown(counts) == {"a": 70, "b": 40, OTHER: 40}
    counts.update(of(200, a=5, b=40, c=1_000))  # Counted before it was named, but for the last.
    assert shown(counts) == {"a": 75, "b": 40, "c": 45, OTHER: 40}
    assert sum(shown(counts).values()) == 200


def test_a_service_named_as_the_rest_is_part_of_it() -> None:
    """No label occurs twice."""
    counts = ByService("served_ids", "ids_total")
    counts.update(of(100, a=60, other=40))
    assert shown(counts) == {"a": 60, OTHER: 40}


async def test_every_row_of_the_server_is_exposed() -> None:
    """Whoever counts something new has to tell Prometheus as well."""
    async with serving() as running, await running.connect() as peer:
        running.metrics.errors_total["busy"] += 1
        running.metrics.gap("skipped", 3)
        running.metrics.seats_total["stale"] += 1
        running.metrics.refilled("ledger", 0.001)
        assert await peer.ask(b"ALLOC orders 7\n") == b"OK 1 7\n"
        snapshot = await running.server.gather_all(SERVICES_MAX)
    names = {name for name, _ in expose(snapshot).values}
    for row in snapshot.rows.keys() - TOLD_OTHERWISE:
        family = row.partition(".")[0].removesuffix("_total")
        exposed = {
            "refills": "refill_seconds",
            "refill_microseconds": "refill_seconds",
            "latency_buckets": "request_latency_seconds",
            "latency_seconds": "request_latency_seconds",
            "connections_open": "connections",
        }.get(family, family)
        assert any(name.startswith(f"idalloc_{exposed}") for name in names), row


def test_durations_become_a_histogram() -> None:
    """Buckets hold those before them, the last one is without bound, and the sum is in seconds."""
    metrics = Metrics()
    for seconds in (0.0, 0.000_001, 0.000_9, 0.000_9, 1_000.0):
        metrics.refilled("counter", seconds)
    samples = expose(Snapshot(dict(metrics.rows())))

    def within(bound: str) -> float | None:
        return samples.get("refill_seconds_bucket", source="counter", le=bound)

    assert within("1e-06") == 1
    assert within("2e-06") == 2
    assert within("0.000512") == 2
    assert within("0.001024") == 4
    assert within(str(2 ** (DURATION_BUCKETS - 2) / 1e6)) == 4
    assert within("+Inf") == samples.get("refill_seconds_count", source="counter") == 5
    assert samples.get("refill_seconds_sum", source="counter") == 1000.001801


def test_a_duration_is_in_the_bucket_of_its_power_of_two() -> None:
    """Bucket i is for less than 2^i microseconds; the last one also for more."""
    assert [duration_bucket(n / 1e6) for n in (0, 1, 2, 3, 4, 1023, 1024)] == [
        0,
        1,
        2,
        2,
        3,
        10,
        11,
    ]
    assert duration_bucket(1e6) == DURATION_BUCKETS - 1


def test_latency_is_exposed_where_it_is_measured() -> None:
    """Its rows become a histogram that survives a worker's death; without rows there is none."""
    assert expose(Snapshot()).get("request_latency_seconds_count") is None
    rows: Rows = {"latency_buckets": 5, "latency_buckets.04": 3, "latency_buckets.10": 2}
    dead = Snapshot({**rows, "latency_seconds_total": 0.25}).totals()
    samples = expose(merge([dead, dead]))
    assert samples.get("request_latency_seconds_count") == 10
    assert samples.get("request_latency_seconds_sum") == 0.5
    assert samples.get("request_latency_seconds_bucket", le="1.6e-05") == 6
    assert status(dead, 0.0)["latency_seconds"] == {"p50": 16e-6, "p99": 1024e-6}


def test_a_quantile_is_the_bound_of_its_bucket() -> None:
    """None if nothing was measured."""
    assert quantile([0, 0], 0.5) is None
    assert quantile([0, 50, 49, 1], 0.5) == 2e-6
    assert quantile([0, 50, 49, 1], 0.99) == 4e-6
    assert quantile([0, 50, 49, 1], 1.0) == 8e-6


def test_what_is_derived_of_a_service() -> None:
    """Headroom, what is left to the ceiling and trouble; what is not known is left out."""
    rows: Rows = {
        **{"last_served": 90, "ceiling": 100, "trouble": "exhausted", "cover_seconds": 1.5},
        **{"counter_lease_end": 80, "counter_cut_through": 50},
    }
    samples = expose(Snapshot({}, {"orders": rows, "new": {"trouble": "none"}}))
    assert samples.get("lease_headroom_ids", service="orders") == 30
    assert samples.get("ceiling_left_ids", service="orders") == 10
    assert samples.get("pool_cover_seconds", service="orders") == 1.5
    assert samples.get("service_trouble", service="orders", code="exhausted") == 1
    of_new = {name for name, labels in samples.values if ("service", "new") in labels}
    assert not of_new


def test_ready_once_a_store_has_answered() -> None:
    """Before that it is not, nor while it stops or no worker answers; later outages are told."""
    new: Rows = {"ledger_up": 1, "ledger_answers_total": 0, "counter_up": 0}
    assert unreadiness(Snapshot(new)) == "no store has answered yet"
    assert readiness_text(Snapshot(new)) == (
        "not ready: no store has answered yet\nledger: not asked yet\ncounter: down\n"
    )
    down: Rows = {"ledger_up": 0, "ledger_answers_total": 1}
    assert readiness_text(Snapshot(down)) == "ready\nledger: down\n"
    assert unreadiness(Snapshot({**down, "draining": 1})) == "stopping"
    assert unreadiness(Snapshot({**down, "workers": 2, "workers_silent": 1})) == ""
    assert unreadiness(Snapshot({"workers": 2, "workers_silent": 2})) == "no worker answers"
    assert unreadiness(Snapshot(new, {"orders": {"remaining_ids": 5}})) == ""
