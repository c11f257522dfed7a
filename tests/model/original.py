"""The original idalloc server, as an actor beside ours on a healthy Redis.

It cuts with HINCRBY alone, serves at once, and writes the row some versions later, guarded by
the version only. Every so many versions, and at its start, it restores the hash from the row
if the row's version is greater. Here both periods are short, so that much happens.
"""

from functools import partial
from typing import Final, final

from tests.model.stores import Node, Verdict
from tests.model.world import Procedure, Task, World

SEGMENT: Final = 3
WRITES_ROW_EVERY_VERSIONS: Final = 2
RESTORES_HASH_EVERY_VERSIONS: Final = 3


@final
class Original:
    """One process of the original."""

    __slots__ = ("_node", "_world", "busy")

    def __init__(self, world: World, node: Node) -> None:
        self._world = world
        self._node = node
        self.busy: set[str] = set()
        Task(world, self.busy, "restore", self._restore())

    def start_allocating(self) -> None:
        """Fetch and serve one segment."""
        if "allocate" not in self.busy:
            Task(self._world, self.busy, "allocate", self._allocate())

    def _allocate(self) -> Procedure:
        # A pipeline, not a transaction: others may come in between.
        cut = yield partial(self._node.bump_last, SEGMENT)
        bumped = yield self._node.bump_version
        if cut.verdict is not Verdict.CUT or bumped.verdict is not Verdict.DONE:
            return
        self._world.serve(cut.first, cut.last)
        if bumped.version % RESTORES_HASH_EVERY_VERSIONS == 0 and "restore" not in self.busy:
            Task(self._world, self.busy, "restore", self._restore())
        if bumped.version % WRITES_ROW_EVERY_VERSIONS == 0 and "write" not in self.busy:
            Task(self._world, self.busy, "write", self._write(cut.last, bumped.version))

    def _restore(self) -> Procedure:
        row = yield self._world.ledger.read
        if row.verdict is Verdict.DONE:
            yield partial(self._node.restore_original, row)

    def _write(self, last: int, version: int) -> Procedure:
        yield partial(self._world.ledger.write_original, last, version)
