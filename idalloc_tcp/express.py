"""The short way from a chunk of requests to its replies.

Most chunks are nothing but whole lines that were seen before, often one line over and over. They
need no parsing, their IDs can be taken as one run for each service, and their replies be made by
one format. Whatever is not as plain as that is left to the session, which can do everything, and
does to the very same effect.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Protocol, final

import attrs

from idalloc_tcp.errors import IdallocError, RateLimited
from idalloc_tcp.limits import RateLimiter
from idalloc_tcp.metrics import Metrics
from idalloc_tcp.protocol import KnownLine, err


class Supply(Protocol):
    """The IDs of one service."""

    #: Requests that were served; `take` counts one.
    requests_served: int

    def take(self, count: int) -> int | None:
        """The first of `count` contiguous IDs; None if they must be waited for."""
        ...

    def has_run(self, ids: int) -> bool:
        """Would `take` give so many at once, and skip none for it?"""
        ...


@final
@attrs.define(eq=False)
class Express:
    """Shared by all sessions of a server.

    Args:
        known: the lines that were seen before, with their LF.
        supplies: those of the services that are in use.
        limiter: how fast IDs may go; without one as fast as they can. It may be replaced.
    """

    _known: Mapping[bytes, KnownLine]
    _supplies: Mapping[str, Supply]
    _metrics: Metrics
    limiter: RateLimiter | None = None

    def answer(self, chunks: Iterable[bytes]) -> list[bytes]:
        """All replies to each of these chunks, which come from sessions that are at rest.

        b"", and nothing done, for a chunk that has to go the long way.
        """
        if self.limiter is not None:
            return self._answer_limited(chunks, self.limiter)
        known_lines, supplies = self._known.get, self._supplies.get
        replies, requests, ids = [], 0, 0
        for data in chunks:
            known = known_lines(data)
            if known is None:
                replies.append(self._answer_lines(data))
                continue
            # By far the most common case, so there is nothing in it that is not needed.
            supply, count = supplies(known.service), known.count
            try:
                first = None if supply is None else supply.take(count)
            except IdallocError:
                first = None
            if first is None:
                replies.append(b"")
            else:
                requests += 1
                ids += count
                replies.append(known.reply % first)
        self._count(requests, ids)
        return replies

    def _answer_limited(self, chunks: Iterable[bytes], limiter: RateLimiter) -> list[bytes]:
        replies = []
        #: Milliseconds until a service may have more. Between two chunks no time passes.
        hasty: dict[str, int] = {}
        for data in chunks:
            known = self._known.get(data)
            if known is None:
                replies.append(self._answer_lines(data))
                continue
            supply, count = self._supplies.get(known.service), known.count
            if supply is None or not supply.has_run(count):
                replies.append(b"")
            elif known.service in hasty:
                replies.append(self._refuse(known, 1, hasty[known.service]))
            elif limiter.admit(known.service, 1, count):
                self._count(1, count)
                replies.append(known.reply % supply.take(count))
            else:
                hasty[known.service] = wait_ms = limiter.wait_ms(known.service)
                replies.append(self._refuse(known, 1, wait_ms))
        return replies

    def close(self) -> None:
        """From now on everything goes the long way."""
        self._known = {}

    def _answer_lines(self, data: bytes) -> bytes:
        end = data.find(b"\n") + 1
        line = data[:end]
        known = self._known.get(line)
        if known is None:
            return b""
        times, odd = divmod(len(data), end)
        if not odd and data == line * times:
            return self._answer_repeated(known, times)
        lines = data.splitlines(keepends=True)
        every = [found for found in map(self._known.get, lines) if found is not None]
        return self._answer_each(every) if len(every) == len(lines) else b""

    def _answer_repeated(self, known: KnownLine, asked: int) -> bytes:
        service, count = known.service, known.count
        supply, served = self._supplies.get(service), asked
        if supply is None or not supply.has_run(asked * count):
            return b""
        if self.limiter is not None:
            served = self.limiter.admit(service, asked, count)
        if not served:
            return self._refuse_hasty(known, asked)
        ids = served * count
        first = supply.take(ids)
        assert first is not None, "it was looked before"
        supply.requests_served += served - 1
        self._count(served, ids)
        replies = known.reply * served % tuple(range(first, first + ids, count))
        if served < asked:
            replies += self._refuse_hasty(known, asked - served)
        return replies

    def _answer_each(self, lines: Sequence[KnownLine]) -> bytes:
        total = sum([known.count for known in lines])
        supplies: dict[str, Supply] = {}
        for known in lines:
            if known.service not in supplies:
                supply = self._supplies.get(known.service)
                if supply is None or not supply.has_run(total):
                    return b""
                supplies[known.service] = supply
        if self.limiter is not None and not self._admit(self.limiter, lines):
            return b""
        self._count(len(lines), total)
        firsts = [supplies[known.service].take(known.count) for known in lines]
        return b"".join([known.reply for known in lines]) % tuple(firsts)

    def _admit(self, limiter: RateLimiter, lines: Sequence[KnownLine]) -> bool:
        ids = dict.fromkeys([known.service for known in lines], 0)
        for known in lines:
            ids[known.service] += known.count
        return limiter.admit_all(Counter(known.service for known in lines), ids)

    def _refuse_hasty(self, known: KnownLine, times: int) -> bytes:
        assert self.limiter is not None
        return self._refuse(known, times, self.limiter.wait_ms(known.service))

    def _refuse(self, known: KnownLine, times: int, wait_ms: int) -> bytes:
        self._metrics.requests_total += times
        self._metrics.errors_total[RateLimited.code] += times
        return _refusal(wait_ms, known.end) * times

    def _count(self, requests: int, ids: int) -> None:
        self._metrics.requests_total += requests
        self._metrics.ids_total += ids


@lru_cache(maxsize=1024)
def _refusal(wait_ms: int, end: bytes) -> bytes:
    return err(RateLimited.after(wait_ms)) + end
