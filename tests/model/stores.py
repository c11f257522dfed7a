"""The stores: two Redis nodes and the ledger. Every method is one atomic execution there.

A hash is a plain tuple `(last, end, fence, version)`: `lastAllocValue`, `leaseEnd`, `fence` and
`dataVersion`. `end` is inclusive, as `last` is; a fence of 0 stands for a hash without our two
fields, one that the original wrote.
"""

from collections.abc import Iterator
from enum import Enum
from itertools import count
from typing import Final, NamedTuple, final

from tests.model.rules import Rules

Hash = tuple[int, int, int, int]

#: The version that no HINCRBY passes (2^63-1 on a real Redis): the original fails on it.
CLOSED: Final = 10**6


class Verdict(Enum):
    """What a request came to, as far as its sender knows."""

    DONE = "done"
    CUT = "cut"
    REFUSED = "refused: the comparison failed, nothing changed"
    MISSING = "missing"
    STALE = "stale"
    EXHAUSTED = "exhausted"
    FOREIGN = "foreign: the original wrote it"
    TRAILS = "trails: the row is the original's, so it may be behind"
    DOWN = "down: certain that nothing was executed"
    UNKNOWN = "unknown: executed or not, now or later"


class Answer(NamedTuple):
    """A verdict and the numbers that come with it."""

    verdict: Verdict
    first: int = 0
    last: int = 0
    end: int = 0
    version: int = 0


DONE: Final = Answer(Verdict.DONE)
REFUSED: Final = Answer(Verdict.REFUSED)
DOWN: Final = Answer(Verdict.DOWN)
UNKNOWN: Final = Answer(Verdict.UNKNOWN)


@final
class Node:
    """One Redis: a master, or a replica that lags by any number of writes.

    As on a real one `run_id` changes at a restart, `master_replid` at a restart and at every
    promotion; a replica carries its master's. A replica refuses to write.
    """

    __slots__ = (
        "_ids",
        "behind",
        "hash",
        "is_master",
        "live",
        "past",
        "peer",
        "replid",
        "rules",
        "run_id",
        "synced",
    )

    def __init__(self, rules: Rules, ids: Iterator[int]) -> None:
        self.rules = rules
        self._ids = ids
        self.hash: Hash | None = None
        self.past: list[Hash | None] = [None]  # every state it had: what a snapshot may hold
        self.behind: list[Hash | None] = []  # a replica's writes still to come
        self.is_master = True
        self.synced = False
        self.peer: Node = self
        self.run_id = self.replid = 0
        self.live = 0  # the fence as the scripts read it
        self._new_run()

    # Faults and failover

    def _new_run(self) -> None:
        self.run_id = next(self._ids)
        self._new_replid(next(self._ids))

    def _new_replid(self, replid: int) -> None:
        self.replid = replid
        self.live = self.run_id * 10_000 + (replid if self.rules.fence_replid else 0)

    def write(self, state: Hash | None) -> None:
        """Replace the hash; a synced replica will see it some time later."""
        self.hash = state
        self.past.append(state)
        if self.peer.synced:
            self.peer.behind.append(state)

    def catch_up(self, writes: int) -> None:
        """As a replica, apply the next so many writes."""
        if self.behind:
            self.hash = self.behind[:writes][-1]
            self.past.append(self.hash)
            del self.behind[:writes]

    def promote(self) -> None:
        """Become a master with what has arrived; the old master may not have noticed."""
        if not self.is_master:
            self.is_master = True
            self.synced = False
            self.behind.clear()
            self._new_replid(next(self._ids))

    def demote(self) -> None:
        """Become the other master's replica; the data stays until the first sync."""
        if self.is_master and self.peer.is_master:
            self.is_master = False

    def sync(self) -> None:
        """As a replica, throw the own data away for the master's."""
        if not self.is_master and self.peer.is_master:
            self.hash = self.peer.hash
            self.past.append(self.hash)
            self.behind.clear()
            self.synced = True
            self._new_replid(self.peer.replid)

    def restart(self, age: int) -> None:
        """Come back with a snapshot of any age: the newest state, an old one or nothing."""
        self.hash = self.past[-1 - age % len(self.past)]
        self._new_run()
        self.synced = self.peer.synced = False
        self.behind.clear()
        self.peer.behind.clear()

    def attach(self) -> None:
        """A first replica attaches: a new `master_replid`, and the data is as good as before."""
        if self.is_master:
            self._new_replid(next(self._ids))

    # Scripts

    def _obstacle(self, size: int) -> Verdict | None:
        """Why nothing can be cut, if so: the head that `take` and `seat` share."""
        if self.hash is None:
            return Verdict.MISSING
        last, end, fence, _ = self.hash
        if not fence:
            return Verdict.FOREIGN
        if self.rules.fence and fence != self.live:
            return Verdict.STALE
        if last + size > end and self.rules.lead:
            return Verdict.EXHAUSTED
        return None

    def take(self, size: int) -> Answer:
        """Cut a segment off the counter's lease."""
        if not self.is_master:
            return DOWN
        obstacle = self._obstacle(size)
        last, end, fence, version = self.hash or (0, 0, 0, 0)
        if obstacle:
            return Answer(obstacle, last=last, end=end, version=version)
        version = min(version + 1, CLOSED)
        self.write((last + size, end, fence, version))
        return Answer(Verdict.CUT, last + 1, last + size, end, version)

    def seat(self, lease: Answer, reason: Verdict, seen_end: int, size: int) -> Answer:
        """Put the counter on a fresh lease, if what `take` answered still holds."""
        if not self.is_master:
            return DOWN
        _, end, _, version = self.hash or (0, 0, 0, 0)
        if self.rules.seat_recheck and (self._obstacle(size) != reason or end != seen_end):
            return REFUSED
        if self.rules.seat_carries_version:
            version = max(version, lease.version)
        self.write((lease.first - 1, lease.last, self.live, version))
        return DONE

    def raise_end(self, old: int, new: int) -> Answer:
        """Let the counter's lease end at `new` instead of `old`."""
        if not self.is_master:
            return DOWN
        if self.hash is None:
            return REFUSED
        last, end, fence, version = self.hash
        if self.rules.raise_compares_end and end != old:
            return REFUSED
        if self.rules.raise_compares_fence and fence != self.live:
            return REFUSED
        self.write((last, new, fence, version))
        return DONE

    def give_back(self, first: int, last: int) -> Answer:
        """Take `[first, last]` back, if it is what was cut last."""
        if not self.is_master:
            return DOWN
        if self.hash is None or (self.hash[0] != last and self.rules.give_back_compares):
            return REFUSED
        _, end, fence, version = self.hash
        if fence and fence != self.live and self.rules.give_back_compares_fence:
            return REFUSED
        self.write((first - 1, end, fence, version))
        return DONE

    def restore(self, value: int, version: int) -> Answer:
        """Instead of a seat: write the row's value, as the original would.

        Refused unless its version is greater than the hash's, or the fence is stale.
        """
        if not self.is_master:
            return DOWN
        _, end, fence, own = self.hash or (0, value, self.live, -1)
        if fence == self.live and version <= own:
            return REFUSED
        self.write((value, end, self.live, version))
        return DONE

    # Scripts for a hash that the original wrote, too

    def cut_beside(self, size: int) -> Answer:
        """Cut as the original does, as long as nobody has taken the hash over."""
        if not self.is_master:
            return DOWN
        if self.hash is None or self.hash[2]:
            return REFUSED
        last, _, _, version = self.hash
        self.write((last + size, 0, 0, version + 1))
        return Answer(Verdict.CUT, last + 1, last + size, version=version + 1)

    def close(self) -> Answer:
        """Take the hash over, with an empty lease: from here on the original fails."""
        if not self.is_master:
            return DOWN
        if self.hash is None or self.hash[2]:
            return REFUSED
        last = self.hash[0]
        self.write((last, last, self.live, CLOSED))
        return Answer(Verdict.EXHAUSTED, last=last, end=last)

    # What the original sends

    def bump_last(self, size: int) -> Answer:
        """HINCRBY lastAllocValue: no look at a lease, a fence or anything else."""
        if not self.is_master:
            return DOWN
        last, end, fence, version = self.hash or (0, 0, 0, 0)
        self.write((last + size, end, fence, version))
        return Answer(Verdict.CUT, last + 1, last + size)

    def bump_version(self) -> Answer:
        """HINCRBY dataVersion, which fails where it would overflow."""
        last, end, fence, version = self.hash or (0, 0, 0, 0)
        if version >= CLOSED or not self.is_master:
            return REFUSED
        self.write((last, end, fence, version + 1))
        return Answer(Verdict.DONE, version=version + 1)

    def restore_original(self, row: Answer) -> Answer:
        """The original's restore script: the greater version wins, whatever the value."""
        if self.hash is None or self.hash[3] < row.version:
            _, end, fence, _ = self.hash or (0, 0, 0, 0)
            self.write((row.last, end, fence, row.version))
        return DONE


def replicated_pair(rules: Rules) -> tuple[Node, Node]:
    """A master and its replica."""
    ids = count(1)
    master, replica = Node(rules, ids), Node(rules, ids)
    master.peer, replica.peer = replica, master
    replica.is_master = False
    replica.sync()
    return master, replica


@final
class Ledger:
    """The durable row. What it has committed it keeps, unless `roll_back` says otherwise."""

    __slots__ = ("high", "is_ours", "is_up", "rules", "value", "version")

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.value = 0
        self.version = 0
        self.is_ours = True  # the mark: kept in the version, which is `CLOSED` then
        self.is_up = True
        self.high = 0  # the highest value that a rollback has lost

    def lease(self, size: int, floor: int, takes_over: bool) -> Answer:
        """Give `size` IDs above the row and the floor away."""
        if not self.is_up:
            return DOWN
        if takes_over and not self.is_ours:
            self.is_ours = True
            self.version = CLOSED if self.rules.close else self.version
        if self.rules.mark and not self.is_ours:
            return Answer(Verdict.TRAILS)
        first = max(self.value, floor) + 1
        self.value = first + size - 1
        return Answer(Verdict.DONE, first, self.value, version=self.version)

    def extend(self, end: int, size: int, version: int) -> Answer:
        """Make the lease that ends at `end` longer, if the row still ends there."""
        if not self.is_up:
            return DOWN
        if not self.is_ours or (self.value != end and self.rules.extend_compares_row):
            return REFUSED
        self.value += size
        self.version = max(self.version, version)
        return DONE

    def give_back(self, first: int, last: int) -> Answer:
        """Take `[first, last]` back, if it is what was leased last."""
        if not self.is_up:
            return DOWN
        if self.value != last and self.rules.give_back_compares:
            return REFUSED
        self.value = first - 1
        return DONE

    def trail(self, last: int) -> Answer:
        """Without the rule of lead: note afterwards what was cut."""
        self.value = max(self.value, last)
        return DONE

    def commit_beside(self, last: int, version: int) -> Answer:
        """Commit what was cut beside the original, unless the row was taken over."""
        if not self.is_up:
            return DOWN
        if self.is_ours:
            return REFUSED
        self.value = max(self.value, last)
        self.version = max(self.version, version)
        return DONE

    def read(self) -> Answer:
        """The row as it is."""
        return Answer(Verdict.DONE, last=self.value, version=self.version)

    def write_original(self, last: int, version: int) -> Answer:
        """The original's write: guarded by the version only, so it may lower the value."""
        if self.version < version:
            self.value, self.version = last, version
        return DONE
