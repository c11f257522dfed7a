"""What the pages are about: a server of one process, or of several."""

from typing import Final, final

import attrs

from idalloc_tcp.admin.inspection import Finding, Inspection, Inspector
from idalloc_tcp.server import Server
from idalloc_tcp.snapshot import Snapshot
from idalloc_tcp.workers import Workers

#: What a worker may take over its own measurement, beyond the time that it measures.
INSPECT_SECONDS: Final = 15.0
#: Which worker is looked into if nobody says.
_ANY_WORKER: Final = 1
#: Ourselves, among the numbers of workers.
_PARENT: Final = 0


@final
@attrs.frozen
class WatchedServer:
    """A server of this process alone."""

    _server: Server
    _inspector: Inspector = attrs.field(init=False, factory=Inspector)

    async def gather_all(self, services_max: int) -> Snapshot:
        """As `Watched.gather_all`."""
        return await self._server.gather_all(services_max)

    async def inspect(self, wanted: Inspection, worker: int | None) -> Finding | None:
        """As `Watched.inspect`."""
        return None if worker else await self._inspector.inspect(wanted)


@final
@attrs.frozen
class WatchedWorkers:
    """A server of several processes, seen by their parent, which is this one."""

    _workers: Workers
    _inspector: Inspector = attrs.field(init=False, factory=Inspector)

    async def gather_all(self, services_max: int) -> Snapshot:
        """As `Watched.gather_all`."""
        return await self._workers.gather_all(services_max)

    async def inspect(self, wanted: Inspection, worker: int | None) -> Finding | None:
        """As `Watched.inspect`."""
        if worker == _PARENT:
            return await self._inspector.inspect(wanted)
        number = _ANY_WORKER if worker is None else worker
        patience_seconds = wanted.seconds + INSPECT_SECONDS
        found = await self._workers.inspect(number, attrs.asdict(wanted), patience_seconds)
        return None if found is None else Finding(**found)
