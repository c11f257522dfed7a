"""How fast a server gives IDs away: token buckets, in requests and in IDs.

A bucket that holds anything affords one request, whatever its count, and is in debt afterwards:
so a large count is possible at a low rate, and in the long run the rate is kept exactly. It looks
at the clock only when it holds too little, so that nearly every request costs a comparison.
"""

from collections.abc import Callable, Mapping
from math import ceil
from typing import Final, final

import attrs

from idalloc_tcp import log
from idalloc_tcp.errors import RateLimited

#: A bucket holds what its rate gives in so many seconds: enough for clients that come together,
#: and too little to count against a rate that is measured over a second or more.
BURST_SECONDS: Final = 0.1
#: Services whose buckets are remembered; beyond it one that is full is forgotten, and
#: without one close at hand the newcomers share theirs.
SERVICES_MAX: Final = 100_000
LOOKS_MAX: Final = 8
#: To refuse has to be cheap: the log hears of it only once in so many seconds.
NOTE_SECONDS: Final = 1.0

#: As `allocator.Allocator.take`.
Take = Callable[[str, int], int | None]


@final
@attrs.frozen
class RateLimits:
    """Requests (ALLOCs) and IDs a second, of the server and of each service; 0 is no limit."""

    requests: int = 0
    ids: int = 0
    service_requests: int = 0
    service_ids: int = 0

    def __bool__(self) -> bool:
        return any(attrs.astuple(self))


@final
@attrs.define(eq=False)
class Bucket:
    """Tokens that come at a rate, and are spent: one for each request, or for each ID.

    Args:
        rate: tokens a second.
        in_ids: what a token stands for.
        clock: seconds, and never back.
    """

    _rate: int
    in_ids: bool
    _clock: Callable[[], float]
    #: What it holds; below 0 it is in debt. Spent from outside, by who has looked at all buckets.
    level: float = attrs.field(init=False)
    _full: float = attrs.field(init=False)
    _filled_at: float = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.level = self._full = max(1.0, self._rate * BURST_SECONDS)
        self._filled_at = self._clock()

    def afford(self, times: int, count: int) -> int:
        """How many of so many requests for `count` IDs each it can pay for by now."""
        cost = count if self.in_ids else 1
        self._fill()
        if self.level >= times * cost:
            return times
        return max(1, int(self.level // cost)) if self.level > 0 else 0

    def affords(self, requests: int, ids: int) -> bool:
        """Does it hold what all of these cost together?"""
        self._fill()
        return self.level >= (ids if self.in_ids else requests)

    def pay(self, requests: int, ids: int) -> None:
        """Spend what they cost."""
        self.level -= ids if self.in_ids else requests

    def wait_seconds(self) -> float:
        """How long until it holds anything, from when it was last filled."""
        return -self.level / self._rate

    def is_full(self) -> bool:
        """Would a new one hold no more?"""
        self._fill()
        return self.level >= self._full

    def _fill(self) -> None:
        now = self._clock()
        level = self.level + (now - self._filled_at) * self._rate
        self.level = level if level < self._full else self._full
        self._filled_at = now


@final
@attrs.define(eq=False)
class RateLimiter:
    """The limits of one process.

    Args:
        clock: seconds, and never back.
    """

    _limits: RateLimits
    _clock: Callable[[], float]
    _server: tuple[Bucket, ...] = attrs.field(init=False, default=())
    _limits_services: bool = attrs.field(init=False, default=False)
    #: By service: its own.
    _services: dict[str, tuple[Bucket, ...]] = attrs.field(init=False, factory=dict)
    #: Of all for which there is no room.
    _others: tuple[Bucket, ...] = attrs.field(init=False, default=())
    _note_again_at: float = attrs.field(init=False, default=0.0)

    def __attrs_post_init__(self) -> None:
        limits = self._limits
        self._server = self._buckets(limits.requests, limits.ids)
        self._limits_services = bool(limits.service_requests or limits.service_ids)
        self._others = self._new()

    def admit(self, service: str, times: int, count: int) -> int:
        """How many of so many requests for `count` IDs each may be served; they are paid for."""
        buckets = self._server
        if self._limits_services:
            buckets += self._services.get(service) or self._of(service)
        ids = times * count
        for bucket in buckets:
            if bucket.level < (ids if bucket.in_ids else times):
                times = bucket.afford(times, count)
                ids = times * count
        if times:
            for bucket in buckets:
                bucket.level -= ids if bucket.in_ids else times
        return times

    def admit_all(self, requests: Mapping[str, int], ids: Mapping[str, int]) -> bool:
        """May so many requests of each service, for so many IDs in all, be served together?

        If so, they are paid for.
        """
        total_requests, total_ids = sum(requests.values()), sum(ids.values())
        if not all(bucket.affords(total_requests, total_ids) for bucket in self._server):
            return False
        own = [(bucket, name) for name in requests for bucket in self._of(name)]
        if not all(bucket.affords(requests[name], ids[name]) for bucket, name in own):
            return False
        for bucket in self._server:
            bucket.pay(total_requests, total_ids)
        for bucket, name in own:
            bucket.pay(requests[name], ids[name])
        return True

    def wait_ms(self, service: str) -> int:
        """After how many milliseconds, at least 1, what was just not admitted may be.

        That it was not is noted in the log.
        """
        self._note(service)
        seconds = 0.001
        for bucket in self._server + self._of(service):
            seconds = max(seconds, bucket.wait_seconds())
        return ceil(seconds * 1000)

    def limited(self, take: Take) -> Take:
        """The same, but raising RateLimited when it is called too often."""

        def take_slowly(service: str, count: int) -> int | None:
            if not self.admit(service, 1, count):
                raise RateLimited.after(self.wait_ms(service))
            return take(service, count)

        return take_slowly

    def _note(self, service: str) -> None:
        now = self._clock()
        if now >= self._note_again_at:
            self._note_again_at = now + NOTE_SECONDS
            log.limiting("requests", service=service)

    def _of(self, service: str) -> tuple[Bucket, ...]:
        """Those of a service alone; none if only the server is limited."""
        buckets = self._services.get(service)
        if buckets is None and self._limits_services:
            if len(self._services) >= SERVICES_MAX and not self._forget_one():
                return self._others
            buckets = self._new()
            self._services[service] = buckets
        return buckets or ()

    def _forget_one(self) -> bool:
        """Make room, but not by forgetting what a service owes."""
        for _ in range(LOOKS_MAX):
            name = next(iter(self._services))
            buckets = self._services.pop(name)
            if all(bucket.is_full() for bucket in buckets):
                return True
            self._services[name] = buckets
        return False

    def _new(self) -> tuple[Bucket, ...]:
        return self._buckets(self._limits.service_requests, self._limits.service_ids)

    def _buckets(self, requests: int, ids: int) -> tuple[Bucket, ...]:
        rates = ((requests, False), (ids, True))
        return tuple(Bucket(rate, in_ids, self._clock) for rate, in_ids in rates if rate)
