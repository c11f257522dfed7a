"""The sum of a storm."""

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Final, final

import attrs

from tests.hammer import overlaps
from tests.real.storm.clients import Failure, Log

SLOW_SECONDS: Final = 2.0
#: A refusal while both stores are down is immediate, give or take a busy machine.
REFUSAL_SECONDS: Final = 0.05


@final
@attrs.frozen
class Verdict:
    """What all clients together got. The last six should be 0."""

    ids: int
    requests: int
    errors: dict[str, int]
    faults: int
    row_samples: int
    slowest_ms: float
    slowest_refusal_in_darkness_ms: float
    duplicates: int
    order_violations: int
    rows_behind: int
    errors_outside_darkness: int
    slow_requests: int
    slow_refusals: int

    @property
    def is_good(self) -> bool:
        """Did everything hold?"""
        return not any(attrs.astuple(self)[-6:])

    def __str__(self) -> str:
        rows = attrs.asdict(self).items()
        return "\n".join(f"{name.replace('_', ' '):31} {value}" for name, value in rows)


def judge(
    logs: Sequence[Log],
    dark: Sequence[tuple[float, float]],
    *,
    happened: Sequence[tuple[float, str]],
    row_samples: int,
    rows_behind: int,
) -> Verdict:
    """Lay everything side by side."""

    def is_dark(at: float) -> bool:
        return any(began <= at <= ended for began, ended in dark)

    def fault_at(at: float) -> str:
        return next((name for began, name in reversed(happened) if began <= at), "calm")

    failures = list(chain.from_iterable(log.failures for log in logs))
    refusals = [one.seconds for one in failures if is_dark(one.at) and one.code == "unavailable"]
    slowest = list(chain.from_iterable(log.slowest for log in logs))
    return Verdict(
        ids=sum(log.ids for log in logs),
        requests=sum(log.requests for log in logs),
        errors=dict(Counter(f"{one.code} in {fault_at(one.at)}" for one in failures)),
        faults=len(happened),
        row_samples=row_samples,
        slowest_ms=round(1e3 * max((seconds for _, seconds in slowest), default=0), 1),
        slowest_refusal_in_darkness_ms=round(1e3 * max(refusals, default=0), 1),
        duplicates=_duplicates(logs),
        order_violations=sum(log.order_violations for log in logs),
        rows_behind=rows_behind,
        errors_outside_darkness=sum(not is_dark(one.at) for one in failures),
        slow_requests=sum(seconds > SLOW_SECONDS for _, seconds in slowest),
        slow_refusals=_slow(failures, dark),
    )


def _duplicates(logs: Sequence[Log]) -> int:
    duplicates = 0
    for ranges in zip(*(log.ranges for log in logs), strict=True):
        pairs = (pair for one in ranges for pair in zip(one[::2], one[1::2], strict=True))
        duplicates += overlaps(pairs)[0]
    return duplicates


def _slow(failures: Sequence[Failure], dark: Sequence[tuple[float, float]]) -> int:
    """Refusals that took long, though the first of its darkness had told the server why."""
    slow = 0
    for began, ended in dark:
        inside = sorted(
            (one for one in failures if began <= one.at <= ended), key=lambda one: one.at
        )
        slow += sum(one.seconds > REFUSAL_SECONDS for one in inside[24:])
    return slow
