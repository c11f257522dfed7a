"""A number for each of the services used most recently: memory with a bound."""

from typing import Final, final

import attrs

#: Services remembered, about 100 bytes each.
SERVICES_MAX: Final = 1_000_000


@final
@attrs.define(eq=False)
class Recent:
    """Numbers by service. Beyond `services_max` of them the one set longest ago is forgotten."""

    services_max: int = SERVICES_MAX
    _numbers: dict[str, int] = attrs.field(init=False, factory=dict)

    def get(self, service: str) -> int:
        """Its number; 0 if there is none."""
        return self._numbers.get(service, 0)

    def __len__(self) -> int:
        return len(self._numbers)

    def set(self, service: str, number: int) -> None:
        """Remember it."""
        # Taken out and put in again: the dict is in the order of setting.
        self._numbers.pop(service, None)
        self._numbers[service] = number
        if len(self._numbers) > self.services_max:
            del self._numbers[next(iter(self._numbers))]
