"""What a process measured at one moment, as plain data; and several processes seen as one.

A name's rule for merging is in `_RULES`; a name without one adds up, as every count does.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Self, TypeAlias, cast, final

import attrs

from idalloc_tcp.metrics import Row

#: Measured values by their names, in the order in which STATS shows them.
Rows: TypeAlias = dict[str, int | float | str]
_Rule: TypeAlias = Callable[[Sequence[Any]], int | float | str]

#: Codes of a service's last failure; further to the right is worse.
_TROUBLES: Final = ("none", "unavailable", "exhausted")
#: Rates have so many digits after the point, and so have their sums.
_DIGITS: Final = 3


@final
@attrs.frozen
class Snapshot:
    """What STATS says, of the server and of single services.

    Attributes:
        rows: of the server as a whole; empty if it was not asked about.
        services: of single services, by their names.
    """

    rows: Rows = attrs.field(factory=dict)
    services: dict[str, Rows] = attrs.field(factory=dict)

    def about(self, service: str | None) -> Iterable[Row]:
        """The rows of the server (None) or of one service."""
        return (self.rows if service is None else self.services[service]).items()

    def totals(self) -> "Snapshot":
        """Only what never shrinks: the counts that outlive the process that made them."""
        return Snapshot({name: n for name, n in self.rows.items() if _is_total(name)})

    def to_json(self) -> dict[str, Any]:
        """As what `json.dumps` takes."""
        return {"rows": self.rows, "services": self.services}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """What `to_json` gave."""
        return cls(data["rows"], data["services"])


def merge(snapshots: Sequence[Snapshot]) -> Snapshot:
    """Several processes of one server, as if they were one."""
    services: dict[str, list[Rows]] = {}
    for snapshot in snapshots:
        for service, rows in snapshot.services.items():
            services.setdefault(service, []).append(rows)
    return Snapshot(
        _merge_rows([snapshot.rows for snapshot in snapshots]),
        {service: _merge_rows(several) for service, several in services.items()},
    )


def busiest(snapshot: Snapshot, services_max: int) -> Snapshot:
    """Only the services that gave out most IDs, most first, up to so many of them."""

    def served(item: tuple[str, Rows]) -> int:
        return cast(int, item[1].get("served_ids", 0))

    ranked = sorted(snapshot.services.items(), key=served, reverse=True)
    return attrs.evolve(snapshot, services=dict(ranked[:services_max]))


def _is_total(name: str) -> bool:
    return _family(name).endswith(("_total", "_buckets"))


def _family(name: str) -> str:
    """`errors_total` of `errors_total.badcount`."""
    return name.partition(".")[0]


def _add(values: Sequence[int | float]) -> int | float:
    total = sum(values)
    return total if isinstance(total, int) else round(total, _DIGITS)


def _first(values: Sequence[str]) -> str:
    return values[0]


def _worst(values: Sequence[str]) -> str:
    return max(values, key=_TROUBLES.index)


_RULES: Final[Mapping[str, _Rule]] = {
    "version": _first,  # All processes run the same code ...
    "service": _first,  # ... and were asked about the same service.
    "uptime_seconds": max,  # A server is as old as its oldest process.
    "draining": max,  # One that stops is a reason to look, and so is one ...
    "ledger_up": min,  # ... that cannot reach a store.
    "counter_up": min,
    "services": max,  # Processes use the same ones: their sum would count each many times.
    "active": max,
    "last_served": max,
    "segment_size": max,  # Each process has its own.
    "cover_seconds": min,  # The one that runs dry first is the one to look at.
    "ceiling": max,
    "counter_cut_through": max,  # Both only rise, so whoever saw more saw it later.
    "counter_lease_end": max,
    "trouble": _worst,
}


def _merge_rows(several: Sequence[Rows]) -> Rows:
    # A label (`errors_total.busy`) may occur in some only: it stands behind its family's total.
    families: dict[str, set[str]] = {}
    for rows in several:
        for name in rows:
            families.setdefault(_family(name), set()).add(name)
    return {
        name: _RULES.get(name, _add)([rows[name] for rows in several if name in rows])
        for family in families.values()
        for name in sorted(family)
    }
