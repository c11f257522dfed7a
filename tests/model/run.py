"""A run: a world with its actors, and every single thing that can happen to them.

Each action takes one integer, its argument; an action that is not possible does nothing.
"""

from typing import final

from tests.model.original import Original
from tests.model.rules import Rules
from tests.model.worker import MAX_SEGMENT, Worker
from tests.model.world import World


@final
class Run:
    """A world, its actors, and what the scheduler can do to them."""

    def __init__(self, rules: Rules, workers: int) -> None:
        self.world = World(rules)
        master = self.world.nodes[0]
        self.workers = [Worker(self.world, master) for _ in range(workers)]
        self.originals: list[Original] = []

    # Work

    def serve(self, arg: int) -> None:
        """A client asks a worker for one or two IDs."""
        self.workers[arg % len(self.workers)].serve(1 + arg // 8 % 2)

    def reserve(self, arg: int) -> None:
        """A worker fetches a segment."""
        self.workers[arg % len(self.workers)].start_reserving(1 + arg // 8 % MAX_SEGMENT)

    def extend(self, arg: int) -> None:
        """A worker has the lease extended."""
        self.workers[arg % len(self.workers)].start_extending()

    def idle(self, arg: int) -> None:
        """A worker gives its tails back and lives on."""
        self.workers[arg % len(self.workers)].start_giving_back()

    # The network

    def settle(self, arg: int) -> None:
        """All that is under way arrives, and so do the replies."""
        for flight in list(self.world.wire):
            self.world.deliver(flight)

    def deliver(self, arg: int) -> None:
        """A request arrives, and so does its reply."""
        if self.world.wire:
            self.world.deliver(self.world.wire[arg % len(self.world.wire)])

    def execute(self, arg: int) -> None:
        """A request arrives; its reply is on the way."""
        if self.world.wire:
            self.world.execute(self.world.wire[arg % len(self.world.wire)])

    def give_up(self, arg: int) -> None:
        """A sender times out."""
        if self.world.wire:
            self.world.give_up(self.world.wire[arg % len(self.world.wire)])

    def lose(self, arg: int) -> None:
        """A request, or its reply, gets lost."""
        if self.world.wire:
            self.world.lose(self.world.wire[arg % len(self.world.wire)])

    def execute_late(self, arg: int) -> None:
        """A request arrives whose sender has given up."""
        orphans = self.world.orphans
        if orphans:
            self.world.execute(orphans.pop(arg % len(orphans)))

    # Faults of workers

    def crash(self, arg: int) -> None:
        """A worker dies and comes back without its memory."""
        if not self._remembers_a_rollback():
            index = arg % len(self.workers)
            old = self.workers[index]
            old.busy.clear()
            self.workers[index] = Worker(self.world, old.route, old.takes_over)

    def stop(self, arg: int) -> None:
        """A worker drops what is under way, gives back and starts again."""
        if not self._remembers_a_rollback():
            old = self.workers[arg % len(self.workers)]
            old.busy.clear()
            old.start_giving_back()
            while old.busy:
                self.world.deliver(self.world.wire[-1])
            self.crash(arg)

    def reroute(self, arg: int) -> None:
        """A worker takes one or the other node for the master, seldom a replica."""
        node = self.world.nodes[arg // 8 % 2]
        if not node.is_master and arg // 16 % 8:
            node = node.peer
        self.workers[arg % len(self.workers)].route = node

    # Redis and its faults

    def attach(self, arg: int) -> None:
        """A first replica attaches to a master."""
        self.world.nodes[arg % 2].attach()

    def replicate(self, arg: int) -> None:
        """A replica applies some of the writes that it lags behind."""
        for node in self.world.nodes:
            node.catch_up(1 + arg % 4)

    def flush(self, arg: int) -> None:
        """A master loses the hash: FLUSHALL, DEL, eviction."""
        node = self.world.nodes[arg % 2]
        if node.is_master:
            node.write(None)

    def restart(self, arg: int) -> None:
        """A node restarts with a snapshot of any age."""
        self.world.nodes[arg % 2].restart(arg // 2)

    def promote(self, arg: int) -> None:
        """A replica is promoted; some workers, or all, are told."""
        node = self.world.nodes[arg % 2]
        node.promote()
        for index, worker in enumerate(self.workers):
            if arg >> (2 + index) & 1:
                worker.route = node

    def demote(self, arg: int) -> None:
        """One of two masters is made a replica."""
        self.world.nodes[arg % 2].demote()

    def sync(self, arg: int) -> None:
        """A replica takes its master's data over."""
        self.world.nodes[arg % 2].sync()

    # Faults of the ledger

    def switch_ledger(self, arg: int) -> None:
        """The ledger goes down, or comes up again."""
        self.world.ledger.is_up = arg % 4 > 0

    def _remembers_a_rollback(self) -> bool:
        return self.world.ledger.value < self.world.ledger.high

    def roll_back(self, arg: int) -> None:
        """The ledger loses commits that every worker remembers, and what was under way."""
        world, ledger = self.world, self.world.ledger
        if ledger.value and all(worker.floor >= ledger.value for worker in self.workers):
            world.orphans.clear()
            while world.wire:
                world.lose(world.wire[0])
            ledger.high = max(ledger.high, ledger.value)
            ledger.value -= 1 + arg % min(ledger.value, 8)

    # The original

    @property
    def redis_may_fail(self) -> bool:
        """The original needs a healthy Redis, until everything of it is taken over."""
        return self.world.ledger.is_ours and not self.originals

    def allocate(self, arg: int) -> None:
        """An original fetches a segment and serves it."""
        if self.originals:
            self.originals[arg % len(self.originals)].start_allocating()

    def restart_original(self, arg: int) -> None:
        """An original restarts."""
        if self.originals:
            index = arg % len(self.originals)
            self.originals[index].busy.clear()
            self.originals[index] = Original(self.world, self.world.nodes[0])

    def retire_original(self, arg: int) -> None:
        """An original stops for good; what it sent may still arrive."""
        if self.originals:
            self.originals.pop(arg % len(self.originals)).busy.clear()

    def permit_take_over(self, arg: int) -> None:
        """An operator says that the originals have stopped, right or wrong."""
        self.workers[arg % len(self.workers)].takes_over = True
