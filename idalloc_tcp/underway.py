"""What is under way for which service, so that what must not overlap can wait."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import final

import attrs
import trio


@final
@attrs.define(eq=False)
class Underway:
    """Actions that have begun and not ended, by service. Only as many as tasks that act."""

    _actions: dict[str, int] = attrs.field(init=False, factory=dict)
    _waiting: trio.lowlevel.ParkingLot = attrs.field(init=False, factory=trio.lowlevel.ParkingLot)

    def __contains__(self, service: str) -> bool:
        """Is an action under way for it?"""
        return service in self._actions

    @contextmanager
    def begin(self, services: Iterable[str]) -> Iterator[None]:
        """An action for some services is under way inside."""
        services = set(services)
        for service in services:
            self._actions[service] = self._actions.get(service, 0) + 1
        try:
            yield
        finally:
            for service in services:
                self._actions[service] -= 1
                if not self._actions[service]:
                    del self._actions[service]
            self._waiting.unpark_all()

    async def end(self, service: str) -> None:
        """Wait until none is under way for it; it lasts until the caller waits again."""
        while service in self:
            await self._waiting.park()
