"""What a signal makes a server do."""

import math
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Final, Protocol

import trio

from idalloc_tcp import log

#: A stop by these is a clean one; a second one ends the process at once.
STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
#: Wrappers pass a signal on that the process group has got as well: so close, two are one.
ECHO_SECONDS: Final = 0.25

#: What a signal other than a stop asks for.
Action = Callable[[], Awaitable[None]]


class Stoppable(Protocol):
    """What can be drained."""

    @property
    def is_stopping(self) -> bool:
        """Has a stop begun?"""
        ...

    def stop(self) -> None:
        """Begin it."""
        ...


async def stop_on_signals(
    server: Stoppable,
    on_stop: Callable[[], None] = lambda: None,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Drain at the first stop signal; at the second, give up everything at once.

    Once this is cancelled, because the server has come to its end, stop signals are ignored for
    good: there is nothing left to stop, and one that comes in the last moment must not turn a
    clean end into a death by a signal.

    Args:
        on_stop: is called when the drain begins.

    Raises:
        KeyboardInterrupt: at the second signal.
    """
    # Trio puts back what it found. So between its handler and what follows there is ours, and at
    # no time the default, which kills.
    early: list[int] = []
    found = {
        number: signal.signal(number, lambda got, _frame: early.append(got))
        for number in STOP_SIGNALS
    }
    try:
        with trio.open_signal_receiver(*STOP_SIGNALS) as signals:
            task_status.started()
            if early:
                _stop(server, on_stop, early[0])
            await _stop_at(signals, server, on_stop)
    except trio.Cancelled:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        raise
    except KeyboardInterrupt:
        for number, handler in found.items():
            signal.signal(number, handler)
        raise


async def _stop_at(
    signals: AsyncIterator[int], server: Stoppable, on_stop: Callable[[], None]
) -> None:
    stopping_since = -math.inf
    async for number in signals:
        if server.is_stopping:
            if trio.current_time() - stopping_since < ECHO_SECONDS:
                continue
            raise KeyboardInterrupt
        stopping_since = trio.current_time()
        _stop(server, on_stop, number)


def _stop(server: Stoppable, on_stop: Callable[[], None], number: int) -> None:
    log.event("stopping", signal=signal.Signals(number).name)
    on_stop()
    server.stop()


async def act_on_signals(
    actions: Mapping[signal.Signals, Action],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Do what each signal asks for, one after the other."""
    with trio.open_signal_receiver(*actions) as signals:
        task_status.started()
        async for number in signals:
            await actions[signal.Signals(number)]()
