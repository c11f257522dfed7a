"""Reading the settings again while the server runs."""

from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import final

import attrs
import trio

from idalloc_tcp import log
from idalloc_tcp.errors import SettingsError
from idalloc_tcp.settings import Settings


@final
@attrs.define(eq=False)
class Reload:
    """Puts into effect what changed since the settings were last read, and says what that was.

    Args:
        settings: those in effect.
        read: reads everything that was given at the start once more, as at the start.
        reloadable: the names of the settings that may change while the server runs.
        apply: puts settings into effect. It is told the names of those that changed.
    """

    settings: Settings
    _read: Callable[[], Settings]
    _reloadable: Collection[str]
    _apply: Callable[[Settings, Sequence[str]], Awaitable[None]]

    async def run(self) -> None:
        """Do so once. If anything is wrong with the new settings, all stays as it is."""
        try:
            # In a thread: a file may be on a disk that hangs.
            wanted = await trio.to_thread.run_sync(self._read, abandon_on_cancel=True)
            differing = [
                field.name
                for field in attrs.fields(Settings)
                if getattr(wanted, field.name) != getattr(self.settings, field.name)
            ]
            changed = [name for name in differing if name in self._reloadable]
            values = {name: getattr(wanted, name) for name in changed}
            settings = attrs.evolve(self.settings, **values)
        except (SettingsError, RuntimeError) as error:  # The latter: there is no thread to spare.
            log.error("not reloaded, everything stays as it is", reason=str(error))
            return
        if changed:
            self.settings = settings
            await self._apply(settings, changed)
        needs_restart = [name for name in differing if name not in self._reloadable]
        names = {"changed": changed, "needs_restart": needs_restart}
        fields = {name: value for name, value in names.items() if value}
        outcome = "reloaded" if changed else "nothing changed"
        log.answer(outcome, **fields, **settings.shown(*changed))
