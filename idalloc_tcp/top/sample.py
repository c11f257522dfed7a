"""What a server said at one moment, and what two moments say together."""

from collections.abc import Mapping
from typing import TypeAlias, final

import attrs

Value: TypeAlias = int | float | str | None
Values: TypeAlias = Mapping[str, Value]


@final
@attrs.frozen
class Sample:
    """The rows of STATS at one moment.

    Attributes:
        at_seconds: when, by a clock that only goes forwards.
        rows: of the server.
        services: of single services, by name.
    """

    at_seconds: float
    rows: Values
    services: Mapping[str, Values]


@final
@attrs.frozen
class Pace:
    """How fast things go between two samples. Every rate is None where it is not known."""

    before: Sample | None
    now: Sample

    def of_server(self, name: str) -> float | None:
        """The growth of one of the server's counts, per second."""
        before = self.before.rows if self.before else {}
        return self._rate(before, self.now.rows, name)

    def of_service(self, service: str, name: str = "served_ids") -> float | None:
        """The growth of one of a service's counts, per second."""
        before = self.before.services.get(service, {}) if self.before else {}
        return self._rate(before, self.now.services[service], name)

    def _rate(self, before: Values, now: Values, name: str) -> float | None:
        then, later = before.get(name), now.get(name)
        if self.before is None or isinstance(then, str) or isinstance(later, str):
            return None
        elapsed = self.now.at_seconds - self.before.at_seconds
        # A count that shrank began anew: the server was restarted, or the service was idle.
        if then is None or later is None or later < then or elapsed <= 0:
            return None
        return (later - then) / elapsed


def cover_seconds(service: Values) -> float | None:
    """How long what is in memory lasts at the service's demand; None: nobody asks for it."""
    if isinstance(told := service.get("cover_seconds"), int | float):
        return told
    remaining, rate = service.get("remaining_ids"), service.get("rate_ids_per_second")
    if isinstance(remaining, int | float) and isinstance(rate, int | float) and rate > 0:
        return remaining / rate
    return None


def parsed(text: str) -> int | float | str:
    """A value of STATS: a number where it is one."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
