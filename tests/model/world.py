"""The world: the network between workers and stores, and what is checked after every step.

A procedure is a generator that yields requests; each is in flight from then on. Whether and
when it is executed, whether its reply arrives and whether its sender still waits for it are
three separate events, so a request can be lost, its reply can be lost, and it can be executed
long after its sender gave up.
"""

from collections.abc import Callable, Generator
from typing import Final, final

from tests.model.rules import Rules
from tests.model.stores import UNKNOWN, Answer, Ledger, replicated_pair

Request = Callable[[], Answer]
Procedure = Generator[Request, Answer, None]

#: Flights that nobody waits for any more; beyond this the oldest is lost for good.
MAX_ORPHANS: Final = 12


class Violation(Exception):
    """An invariant broke: `duplicate`, `order` or `lead`."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


@final
class Flight:
    """A request on its way, and the procedure that waits for its answer, if it still does."""

    __slots__ = ("answer", "request", "task")

    def __init__(self, request: Request, task: "Task") -> None:
        self.request = request
        self.task: Task | None = task
        self.answer: Answer | None = None


@final
class Task:
    """A procedure under way. `busy` holds its name for as long."""

    __slots__ = ("_busy", "_name", "_procedure", "_world")

    def __init__(self, world: "World", busy: set[str], name: str, procedure: Procedure) -> None:
        self._world = world
        self._busy = busy
        self._name = name
        self._procedure = procedure
        busy.add(name)
        try:
            world.wire.append(Flight(next(procedure), self))
        except StopIteration:
            busy.discard(name)

    def resume(self, answer: Answer) -> None:
        """Go on with this answer to the next request, or to the end."""
        if self._name not in self._busy:
            return  # its process is gone
        try:
            self._world.wire.append(Flight(self._procedure.send(answer), self))
        except StopIteration:
            self._busy.discard(self._name)


@final
class World:
    """Stores, network and the record of every ID that was ever served."""

    __slots__ = ("ledger", "nodes", "orphans", "rules", "served", "top", "watches_lead", "wire")

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.nodes = replicated_pair(rules)
        self.ledger = Ledger(rules)
        self.wire: list[Flight] = []
        self.orphans: list[Flight] = []
        self.served: set[int] = set()
        self.top = 0  # the highest ID that a worker served
        self.watches_lead = rules.lead

    # The network

    def execute(self, flight: Flight) -> None:
        """Let the store act on it; once."""
        if flight.answer is None:
            flight.answer = flight.request()

    def deliver(self, flight: Flight) -> None:
        """Execute and bring the reply back."""
        self.execute(flight)
        self.wire.remove(flight)
        if flight.task and flight.answer:
            flight.task.resume(flight.answer)

    def give_up(self, flight: Flight) -> None:
        """The sender stops waiting; the request may still be executed later."""
        self.wire.remove(flight)
        task, flight.task = flight.task, None
        if flight.answer is None:
            self.orphans.append(flight)
            del self.orphans[:-MAX_ORPHANS]
        if task:
            task.resume(UNKNOWN)

    def lose(self, flight: Flight) -> None:
        """The request, or its reply if there is one already, never arrives."""
        self.wire.remove(flight)
        if flight.task:
            flight.task.resume(UNKNOWN)

    # The invariants

    def serve(self, first: int, last: int) -> None:
        """Record that a client got `[first, last]`."""
        for number in range(first, last + 1):
            if number in self.served:
                raise Violation("duplicate", f"{number} was served before")
            self.served.add(number)

    def check_lead(self) -> None:
        """The ledger covers all that the workers served."""
        if self.ledger.value < self.top and self.watches_lead and self.ledger.is_ours:
            raise Violation("lead", f"row {self.ledger.value}, served {self.top}")

    def drain(self) -> None:
        """Serve what every live counter still holds: latent double ownership comes out."""
        for node in self.nodes:
            if node.hash and node.is_master:
                last, end, fence, _ = node.hash
                if fence and (fence == node.live or not self.rules.fence):
                    self.serve(last + 1, end)
