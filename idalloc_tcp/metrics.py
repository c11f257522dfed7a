"""What one process has done so far, as plain integers.

Written from the hot path, so there is no lock, no registry and no label object: one event loop
owns them. STATS and exporters read snapshots.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Final, final

import attrs

#: One measured value, ready to be shown: its name and its value.
Row = tuple[str, int | float | str]

#: Durations are counted by powers of two: bucket i is for less than 2^i microseconds, and the
#: last one also for whatever took longer.
DURATION_BUCKETS: Final = 25


_LABELS: Final = tuple(f"{bucket:02}" for bucket in range(DURATION_BUCKETS))


def duration_bucket(seconds: float) -> int:
    """The bucket that a duration is counted in."""
    return min(int(seconds * 1e6).bit_length(), DURATION_BUCKETS - 1)


@final
@attrs.define(eq=False)
class Metrics:
    """The counters of one process. Names of what only grows end in `_total`."""

    connections_open: int = 0
    connections_total: int = 0
    connections_refused_total: int = 0
    requests_total: int = 0
    ids_total: int = 0
    waits_total: int = 0
    leases_total: int = 0
    leased_ids_total: int = 0
    lease_failures_total: int = 0
    returned_ids_total: int = 0
    cuts_total: int = 0
    syncs_total: int = 0
    sync_drops_total: int = 0
    random_total: int = 0
    #: Error code -> how many replies carried it.
    errors_total: Counter[str] = attrs.field(factory=Counter)
    #: Reason -> how often the counter was put on a fresh lease for it.
    seats_total: Counter[str] = attrs.field(factory=Counter)
    #: Reason -> how many IDs will never be served.
    gap_ids_total: Counter[str] = attrs.field(factory=Counter)
    #: How many requests were answered; the label is the bucket of how long it took. Requests of one
    #: round of the sweep count as if each had taken as long as the round.
    latency_buckets: Counter[str] = attrs.field(factory=Counter)
    latency_seconds_total: float = 0.0
    #: How many segments came; the label is where from, and the bucket of how long it took.
    refills_total: Counter[str] = attrs.field(factory=Counter)
    #: Where segments came from -> how long that took in all.
    refill_microseconds_total: Counter[str] = attrs.field(factory=Counter)

    def gap(self, reason: str, ids: int) -> None:
        """Count IDs that will never be served."""
        self.gap_ids_total[reason] += ids

    def took(self, seconds: float, requests: int) -> None:
        """Count requests that were answered within so long."""
        self.latency_buckets[_LABELS[duration_bucket(seconds)]] += requests
        self.latency_seconds_total += seconds * requests

    @property
    def answered_total(self) -> int:
        """Requests that needed no waiting."""
        return self.requests_total - self.waits_total

    def refilled(self, origin: str, seconds: float) -> None:
        """Count a segment that came from `origin` after so long."""
        self.refills_total[f"{origin}.{duration_bucket(seconds):02}"] += 1
        self.refill_microseconds_total[origin] += int(seconds * 1e6)

    def rows(self) -> Iterator[Row]:
        """Every counter, labels as a suffix of the name (`errors_total.badcount`)."""
        for field in attrs.fields(Metrics):
            value = getattr(self, field.name)
            if isinstance(value, Counter):
                yield field.name, value.total()
                yield from ((f"{field.name}.{label}", n) for label, n in sorted(value.items()))
            else:
                yield field.name, round(value, 6)
