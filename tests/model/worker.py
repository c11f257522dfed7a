"""One worker: a pool, a memory and the procedures of the lease hierarchy.

Each `yield` is a request to a store and evaluates to its answer. `Verdict.UNKNOWN` may mean
that the store acted, did not, or will; `Verdict.DOWN` and `Verdict.REFUSED` are certain.
"""

from collections.abc import Generator
from functools import partial
from typing import Final, final

from tests.model.stores import Answer, Node, Verdict
from tests.model.world import Procedure, Request, Task, Violation, World

#: IDs per segment at most, per lease of a counter and per extension of it: small, so that
#: boundaries meet often.
MAX_SEGMENT: Final = 3
LEASE: Final = 6
EXTENSION: Final = 4

#: First and last ID, and the counter that it was cut by; None: leased from the ledger.
Piece = tuple[int, int, Node | None]


@final
class Worker:
    """One worker process. Its memory dies with it."""

    __slots__ = (
        "_edge",
        "_pool",
        "_seen",
        "_world",
        "busy",
        "floor",
        "route",
        "rules",
        "served_through",
        "takes_over",
    )

    def __init__(self, world: World, route: Node, takes_over: bool = True) -> None:
        self._world = world
        self.rules = world.rules
        self.route = route  # the Redis that it believes to be the master
        self.takes_over = takes_over
        self.busy: set[str] = set()
        self.floor = 0  # rule 6: the highest lease end seen
        self.served_through = 0
        self._pool: list[Piece] = []
        self._edge = 0
        self._seen: Answer | None = None  # the last cut: what an extension starts from

    # The pool

    def _offer(self, first: int, last: int, origin: Node | None) -> None:
        if first > self._edge or not self.rules.forward:
            self._pool.append((first, last, origin))
            self._edge = last

    def serve(self, count: int) -> None:
        """Answer a request for so many IDs, or for as many as the first piece has."""
        if self._pool:
            first, last, origin = self._pool[0]
            stop = min(first + count, last + 1)
            if first <= self.served_through:
                raise Violation("order", f"{first} after {self.served_through}")
            self._world.serve(first, stop - 1)
            self.served_through = stop - 1
            self._world.top = max(self._world.top, stop - 1)
            if stop > last:
                del self._pool[0]
            else:
                self._pool[0] = (stop, last, origin)

    @property
    def held(self) -> list[tuple[int, int]]:
        """First and last ID of every piece in the pool."""
        return [(first, last) for first, last, _ in self._pool]

    def drain(self) -> None:
        """Serve all that is left."""
        while self._pool:
            self.serve(MAX_SEGMENT)

    # Starting procedures

    def start_reserving(self, size: int) -> None:
        """Fetch the next segment, as prefetch does."""
        if not self.busy & {"reserve", "give_back"} and len(self._pool) < 3:
            Task(self._world, self.busy, "reserve", self._reserve(size))

    def start_extending(self) -> None:
        """Have the counter's lease extended, off the request path."""
        if not self.busy & {"extend", "give_back"} and self._seen:
            Task(self._world, self.busy, "extend", self._sync(self.route, self._seen))

    def start_giving_back(self) -> None:
        """Give all unserved tails back: an idle service, or the first half of a clean stop."""
        if not self.busy & {"reserve", "give_back"} and self._pool:
            tails = self._pool[::-1]
            self._pool = []
            self._edge = self.served_through
            Task(self._world, self.busy, "give_back", self._give_back(tails))

    # The procedures

    def _learn(self, end: int) -> None:
        self.floor = max(self.floor, end)

    def _reserve(self, size: int) -> Procedure:
        node = self.route
        answer = yield partial(node.take, size)
        self._learn(answer.end)
        match answer.verdict:
            case Verdict.CUT:
                self._seen = answer
                self._offer(answer.first, answer.last, node)
            case Verdict.EXHAUSTED:
                if not (yield from self._extend(node, answer)):
                    yield from self._seat(node, size, answer)
            case Verdict.MISSING | Verdict.STALE:
                yield from self._recover(node, size, answer)
            case Verdict.FOREIGN:
                yield from self._take_over(node, size, answer)
            case _:
                yield from self._lease_directly(size)

    def _lease(self, size: int, takes_over: bool = False) -> Request:
        floor = self.floor if self.rules.floor else 0
        return partial(self._world.ledger.lease, size, floor, takes_over)

    def _lease_directly(self, size: int) -> Procedure:
        lease = yield self._lease(size)
        if lease.verdict is Verdict.DONE:
            self._learn(lease.last)
            self._offer(lease.first, lease.last, None)

    def _recover(self, node: Node, size: int, turned_away: Answer) -> Procedure:
        if self.rules.reseat:
            yield from self._seat(node, size, turned_away)
        else:
            row = yield self._world.ledger.read
            yield partial(node.restore, row.last, row.version)

    def _seat(self, node: Node, size: int, turned_away: Answer) -> Procedure:
        # A row is taken over only above a hash: without one nothing says how far it is behind.
        takes_over = self.takes_over and turned_away.verdict is not Verdict.MISSING
        lease = yield self._lease(LEASE, takes_over)
        if lease.verdict is not Verdict.DONE:
            return
        self._learn(lease.last)
        seat = partial(node.seat, lease, turned_away.verdict, turned_away.end, size)
        answer = yield seat
        if answer.verdict is Verdict.UNKNOWN and not self.rules.seat_once:
            answer = yield seat
        keeps = answer.verdict in (Verdict.REFUSED, Verdict.DOWN)
        if keeps or (answer.verdict is Verdict.UNKNOWN and not self.rules.unknown_is_lost):
            self._offer(lease.first, lease.last, None)

    def _extend(self, node: Node, seen: Answer) -> Generator[Request, Answer, bool]:
        """False: this lease cannot grow, the ledger has moved past it."""
        if self.floor > seen.end and self.rules.extend_heeds_floor:
            return False
        end, new_end = seen.end, seen.end + EXTENSION
        answer = yield partial(self._world.ledger.extend, end, EXTENSION, seen.version)
        if answer.verdict is Verdict.DONE:
            self._learn(new_end)
            grow = partial(node.raise_end, end, new_end)
            answer = yield grow
            if answer.verdict is Verdict.UNKNOWN and not self.rules.raise_once:
                answer = yield grow
            if answer.verdict in (Verdict.REFUSED, Verdict.DOWN):
                self._offer(end + 1, new_end, None)
        return answer.verdict is not Verdict.REFUSED

    def _sync(self, node: Node, seen: Answer) -> Procedure:
        if self.rules.lead:
            yield from self._extend(node, seen)
        else:
            yield partial(self._world.ledger.trail, seen.last)

    def _give_back(self, tails: list[Piece]) -> Procedure:
        for first, last, origin in tails:
            store = origin or self._world.ledger
            tail = partial(store.give_back, first, last)
            answer = yield tail
            if answer.verdict is Verdict.UNKNOWN and not self.rules.give_back_once:
                yield tail

    # Beside and after the original

    def _take_over(self, node: Node, size: int, turned_away: Answer) -> Procedure:
        if not self.takes_over and (yield from self._cut_beside(node, size)):
            return
        if self.rules.close:
            turned_away = yield node.close
            if turned_away.verdict is not Verdict.EXHAUSTED:
                return
        self._learn(turned_away.last)
        yield from self._seat(node, size, turned_away)

    def _cut_beside(self, node: Node, size: int) -> Generator[Request, Answer, bool]:
        """False: the row is ours already, so is the hash to be."""
        cut = yield partial(node.cut_beside, size)
        if cut.verdict is not Verdict.CUT:
            return True
        version = cut.version + (0 if self.rules.version_beside else 3)
        if self.rules.commit_beside:
            answer = yield partial(self._world.ledger.commit_beside, cut.last, version)
            if answer.verdict is not Verdict.DONE:
                return answer.verdict is not Verdict.REFUSED
        self._offer(cut.first, cut.last, node)
        return True
