"""A session without a network: what a lane does for it, and bytes as they arrive, cut anywhere."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Final, final

import attrs

from idalloc_tcp.errors import Busy, Exhausted
from idalloc_tcp.express import Express
from idalloc_tcp.metrics import Metrics, Row
from idalloc_tcp.protocol import Alloc, RequestParser, Stats
from idalloc_tcp.session import Session

MAX_COUNT: Final = 1_000_000
#: Its IDs must be waited for; those of every other service are there at once.
SLOW: Final = "slow"
#: Of this one there are no more.
SPENT: Final = "spent"
#: No test needs more steps to have all its requests answered.
STEPS_MAX: Final = 1_000


def chunks(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    """`data`, cut at those of these places that lie in it; no piece is empty."""
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    return [data[start:stop] for start, stop in pairwise(edges)]


def report(service: str | None) -> Iterable[Row] | None:
    """What STATS answers here; asking about `SPENT` is refused, and `SLOW` must be waited for."""
    return None if service == SLOW else rows(service)


def rows(service: str | None) -> Iterable[Row]:
    """The measured values of any service."""
    if service == SPENT:
        raise Busy("ask again later")
    yield "about", service or "all"
    yield "ratio", 0.5


@final
@attrs.define(eq=False)
class Lane:
    """A session, and what moves its bytes. Every service's IDs start at 1.

    Args:
        is_short: take the short way where it is open, as the sweep does.
    """

    is_short: bool = False
    #: Service -> the last ID of it that was given away.
    taken: dict[str, int] = attrs.field(init=False, factory=dict)
    metrics: Metrics = attrs.field(init=False, factory=Metrics)
    session: Session = attrs.field(init=False)
    express: Express = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        parser = RequestParser(MAX_COUNT)
        self.express = Express(parser.known, Supplies(self), self.metrics)
        self.session = Session(parser, self.take, report, self.metrics)

    def take(self, service: str, count: int) -> int | None:
        """The first of `count` IDs, if they need no waiting for."""
        if service == SPENT:
            raise Exhausted("no IDs are left")
        return None if service == SLOW else self.give(service, count)

    def give(self, service: str, count: int) -> int:
        """The first of `count` IDs."""
        first = self.taken.get(service, 0) + 1
        self.taken[service] = first + count - 1
        return first

    def send(self, data: bytes) -> bytes:
        """All replies that `data`, or with b"" its end, brings; what waits gets its IDs."""
        session, replies = self.session, b""
        if self.is_short and session.is_at_rest:
            [replies] = self.express.answer([data])
        if not replies:
            session.receive(data)
        for _ in range(STEPS_MAX):
            replies += session.advance()
            if session.waiting:
                self.settle(session.waiting)
            elif not session.has_work:
                return replies
        raise AssertionError("the session never comes to rest")

    def settle(self, request: Alloc | Stats) -> None:
        """Give the session what it waits for."""
        match request:
            case Alloc(service, count):
                self.session.resolve(self.give(service, count))
            case Stats(about):
                self.session.describe(rows(about))

    def converse(self, pieces: Iterable[bytes]) -> bytes:
        """All replies to a client that sends these pieces and then no more."""
        replies = b""
        for piece in [*pieces, b""]:
            replies += self.send(piece)
            if self.session.finished:
                break
        assert self.session.finished
        assert not self.session.has_work
        return replies


@final
@attrs.define(eq=False)
class Supply:
    """The IDs of one service of a lane."""

    lane: Lane
    service: str
    requests_served: int = 0

    def take(self, count: int) -> int | None:
        """The first of `count` IDs, if they need no waiting for."""
        return self.lane.take(self.service, count)

    def has_run(self, _ids: int) -> bool:
        """Of most services there are as many as one likes."""
        return self.service not in {SLOW, SPENT}


@final
@attrs.frozen
class Supplies(Mapping[str, Supply]):
    """Those of a lane: any service has one."""

    lane: Lane

    def __getitem__(self, service: str) -> Supply:
        return Supply(self.lane, service)

    def __iter__(self) -> Iterator[str]:
        return iter(self.lane.taken)

    def __len__(self) -> int:
        return len(self.lane.taken)


def converse(*pieces: bytes) -> bytes:
    """All replies that a new session gives to a client that sends these pieces and ends."""
    return Lane().converse(pieces)
