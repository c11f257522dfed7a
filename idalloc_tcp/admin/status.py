"""A snapshot as what the page shows, and whether the server is ready."""

from bisect import bisect_left
from itertools import accumulate
from typing import Any, cast, final

import attrs

from idalloc_tcp.metrics import DURATION_BUCKETS
from idalloc_tcp.snapshot import Rows, Snapshot


@final
@attrs.frozen
class Store:
    """What is known of a store."""

    name: str
    is_up: bool
    #: Did it answer anybody since the server started?
    has_answered: bool
    failures: int

    @property
    def state(self) -> str:
        """In a word."""
        if not self.is_up:
            return "down"
        return "up" if self.has_answered else "not asked yet"


def stores(snapshot: Snapshot) -> list[Store]:
    """All that the server uses."""
    rows = snapshot.rows
    names = [row.removesuffix("_up") for row in rows if row.endswith("_up")]
    return [
        Store(
            name,
            bool(rows[f"{name}_up"]),
            bool(number(rows, f"{name}_answers_total")),
            int(number(rows, f"{name}_failures_total")),
        )
        for name in names
    ]


def unreadiness(snapshot: Snapshot) -> str:
    """Why no requests should be sent here; "" if the server is ready for them.

    It is once any store has answered, and stays so: if all stores go away later, clients are told
    so by an error code, and their requests are what finds out that a store is back.
    """
    rows = snapshot.rows
    if number(rows, "draining"):
        return "stopping"
    if "workers" in rows and rows["workers"] == rows["workers_silent"]:
        return "no worker answers"
    can_serve = any(number(service, "remaining_ids") for service in snapshot.services.values())
    if can_serve or any(store.has_answered for store in stores(snapshot)):
        return ""
    return "no store has answered yet"


def readiness_text(snapshot: Snapshot) -> str:
    """Lines for a person who runs into it: ready or not, then each store."""
    problem = unreadiness(snapshot)
    lines = [f"not ready: {problem}" if problem else "ready"]
    lines += [f"{store.name}: {store.state}" for store in stores(snapshot)]
    return "".join(f"{line}\n" for line in lines)


def status(snapshot: Snapshot, at_seconds: float) -> dict[str, Any]:
    """What `/status.json` answers.

    Args:
        at_seconds: when the snapshot was taken, by any clock that does not step.
    """
    rows = snapshot.rows
    return {
        "at_seconds": at_seconds,
        "version": rows.get("version"),
        "uptime_seconds": rows.get("uptime_seconds"),
        "not_ready": unreadiness(snapshot) or None,
        "stores": [
            {"name": store.name, "state": store.state, "failures": store.failures}
            for store in stores(snapshot)
        ],
        "services_in_use": rows.get("services"),
        "services": [_service(name, of) for name, of in snapshot.services.items()],
        "errors": labels(rows, "errors_total"),
        "seats": labels(rows, "seats_total"),
        "gaps": labels(rows, "gap_ids_total"),
        "refills": {origin: _refills(rows, origin) for origin in refill_origins(rows)},
        "latency_seconds": _latency(rows),
        "rows": rows,
    }


def _service(name: str, rows: Rows) -> dict[str, Any]:
    return {
        "name": name,
        "served_ids": rows.get("served_ids", 0),
        "remaining_ids": rows.get("remaining_ids", 0),
        "segment_size": rows.get("segment_size", 0),
        "low_water_ids": rows.get("low_water_ids", 0),
        "rate_ids_per_second": rows.get("rate_ids_per_second", 0),
        "cover_seconds": rows.get("cover_seconds"),
        "waiting_ids": rows.get("waiting_ids", 0),
        "trouble": rows.get("trouble", "none"),
        # As text: a number is exact only up to 2^53 in JavaScript.
        "last_served": str(rows.get("last_served", 0)),
        "lease_headroom_ids": lease_headroom(rows),
        "ceiling_left_ids": ceiling_left(rows),
    }


def lease_headroom(rows: Rows) -> int | None:
    """How many IDs the counter may still cut of a service; None: it has cut none."""
    if "counter_lease_end" not in rows:
        return None
    headroom = number(rows, "counter_lease_end") - number(rows, "counter_cut_through")
    return int(max(headroom, 0))


def ceiling_left(rows: Rows) -> int | None:
    """How many IDs of a service are left below its ceiling; None: it is not known."""
    if "ceiling" not in rows:
        return None
    return int(max(number(rows, "ceiling") - number(rows, "last_served"), 0))


def number(rows: Rows, name: str) -> int | float:
    """A value that is a number; 0 if nobody measured it."""
    return cast(int | float, rows.get(name, 0))


def labels(rows: Rows, family: str) -> dict[str, int]:
    """The values of a family by their labels."""
    prefix = f"{family}."
    return {
        name.removeprefix(prefix): int(number(rows, name))
        for name in rows
        if name.startswith(prefix)
    }


def refill_origins(rows: Rows) -> list[str]:
    """Where segments came from so far."""
    return list(labels(rows, "refill_microseconds_total"))


def durations(rows: Rows, family: str) -> list[int]:
    """How many took less than 2^i microseconds but not less than half of that, for every i."""
    counted = labels(rows, family)
    return [counted.get(f"{i:02}", 0) for i in range(DURATION_BUCKETS)]


def quantile(counts: list[int], share: float) -> float | None:
    """A time in seconds that this share of all were faster than; None: there were none."""
    so_far = list(accumulate(counts))
    if not so_far[-1]:
        return None
    return float(2 ** bisect_left(so_far, so_far[-1] * share) / 1e6)


def _refills(rows: Rows, origin: str) -> dict[str, Any]:
    counts = durations(rows, f"refills_total.{origin}")
    return {"count": sum(counts), **_quantiles(counts)}


def _latency(rows: Rows) -> dict[str, Any]:
    return _quantiles(durations(rows, "latency_buckets"))


def _quantiles(counts: list[int]) -> dict[str, float | None]:
    return {"p50": quantile(counts, 0.5), "p99": quantile(counts, 0.99)}
