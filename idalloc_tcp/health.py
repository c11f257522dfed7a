"""Whether a store is worth asking: so that a dead one costs one probe a second, not one each."""

import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Final, TypeVar, final

import attrs
import trio

from idalloc_tcp import log
from idalloc_tcp.backoff import Backoff
from idalloc_tcp.errors import Crowded, Exhausted, NotOurs, Unavailable

_T = TypeVar("_T")

#: How long others wait for a probe that is under way: a store that is well answers sooner, also to
#: a process that has a flood of requests to see to.
PROBE_SECONDS: Final = 0.5
#: So many outages a minute are logged one by one; of a store that comes and goes the others are
#: counted.
CHANGES_LOGGED: Final = 5


@final
@attrs.frozen
class Call:
    """A store was asked, and took so long."""

    store: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.store.removeprefix('the ')} {self.seconds * 1000:.2f} ms"


_calls: ContextVar[list[Call] | None] = ContextVar("calls", default=None)


def record_calls() -> list[Call]:
    """A list to which whatever this task asks of stores is added from now on."""
    calls: list[Call] = []
    _calls.set(calls)
    return calls


@final
@attrs.define(eq=False)
class Health:
    """What is known of one store, from how it answered.

    Args:
        name: what the log calls it.
    """

    name: str
    is_up: bool = attrs.field(init=False, default=True)
    #: How often it was asked while it was down.
    probes_total: int = attrs.field(init=False, default=0)
    failures_total: int = attrs.field(init=False, default=0)
    #: How often it went down or came back. A request that was under way meanwhile says nothing
    #: of how it is now: those that were pending when it went fail one by one, for seconds perhaps.
    _changes: int = attrs.field(init=False, default=0)
    answers_total: int = attrs.field(init=False, default=0)
    _backoff: Backoff = attrs.field(init=False, factory=Backoff)
    _pause_seconds: float = attrs.field(init=False, default=0.0)
    _ask_again_at: float = attrs.field(init=False, default=0.0)
    #: Set by the answer to the last probe, or its end without one.
    _probe_ended: trio.Event = attrs.field(init=False, factory=trio.Event)

    async def ask(self, request: Callable[[], Awaitable[_T]]) -> _T:
        """The store's answer to one request, if it is worth asking.

        Raises:
            Unavailable: it did not answer, or is down and not due to be asked again.
        """
        await self._admit()
        changes, began_at = self._changes, time.perf_counter()
        try:
            result = await request()
        except (NotOurs, Exhausted):
            self._succeeded(changes)
            raise
        except Crowded as error:  # It was not asked, so nothing is known.
            text = f"too many requests wait for {self.name}"
            log.sparingly(log.WARNING, text, reason=str(error))
            raise
        except Unavailable as error:
            self._failed(error, changes)
            raise
        finally:
            self._probe_ended.set()
            calls = _calls.get()
            if calls is not None:
                calls.append(Call(self.name, time.perf_counter() - began_at))
        self._succeeded(changes)
        return result

    def answered(self) -> None:
        """It has just answered."""
        self._succeeded(self._changes)

    async def _admit(self) -> None:
        """While it is down, at most one caller in each pause gets through.

        Who comes just behind it learns what it finds: after an outage that nobody noticed
        the end of, the first to ask would else be served, and all with it refused.
        """
        if self.is_up:
            return
        if trio.current_time() >= self._ask_again_at:
            self.probes_total += 1
            self._begin_pause(self._backoff.next_seconds())
            self._probe_ended = trio.Event()
            return
        with trio.move_on_after(PROBE_SECONDS):
            await self._probe_ended.wait()
        if not self.is_up:
            raise Unavailable(f"{self.name} is down")

    def _succeeded(self, changes: int) -> None:
        self.answers_total += 1
        if not self.is_up and changes == self._changes:
            log.sparingly(log.INFO, f"{self.name} is back", CHANGES_LOGGED)
            self.is_up = True
            self._changes += 1
            self._backoff.reset()

    def _failed(self, error: Unavailable, changes: int) -> None:
        self.failures_total += 1
        if changes != self._changes:
            return
        if self.is_up:
            text = f"{self.name} is down"
            log.sparingly(log.WARNING, text, CHANGES_LOGGED, reason=str(error))
            self.is_up = False
            self._changes += 1
            self._begin_pause(self._backoff.next_seconds())
        else:
            # Once more, from now on: a store that hangs would else be asked without a pause.
            self._begin_pause(self._pause_seconds)

    def _begin_pause(self, seconds: float) -> None:
        self._pause_seconds = seconds
        self._ask_again_at = trio.current_time() + seconds
