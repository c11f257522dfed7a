"""A live view of a server in a terminal, or one table where there is no terminal."""

import os
import signal
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import trio
from rich.console import Console
from rich.live import Live

from idalloc_tcp.errors import IdallocError
from idalloc_tcp.top.sample import Pace, Sample
from idalloc_tcp.top.screen import screen
from idalloc_tcp.top.source import Source

LEAVE_KEYS: Final = frozenset(b"qQ")
_KEYS_MAX: Final = 64
#: A table that goes into a file or a pipe may be so wide.
LINE_CHARS: Final = 240


async def run(source: Source, title: str, interval_seconds: float) -> None:
    """Show samples until `q`, Ctrl-C or SIGTERM; without a terminal only once.

    Raises:
        IdallocError: the first sample could not be had.
    """
    console = Console()
    try:
        first = await source.sample()
        if console.is_terminal and not console.is_dumb_terminal and sys.stdin.isatty():
            await _watch(console, source, first, title, interval_seconds)
        else:
            await trio.sleep(interval_seconds)
            _print_once(console, Pace(first, await source.sample()), title)
    finally:
        await source.aclose()


def _print_once(console: Console, pace: Pace, title: str) -> None:
    if not console.is_terminal:
        console.width = LINE_CHARS  # Else it would cut lines where no terminal ends them.
    console.print(screen(pace, title))


async def _watch(
    console: Console, source: Source, first: Sample, title: str, interval_seconds: float
) -> None:
    keyboard = sys.stdin.fileno()
    async with trio.open_nursery() as nursery:
        scope = nursery.cancel_scope
        # First of all: a signal that ends the process would leave the terminal as it is then.
        await nursery.start(_leave_on_signal, scope)
        with (
            _single_keys(keyboard),
            Live(console=console, screen=True, auto_refresh=False) as live,
        ):
            nursery.start_soon(_leave_on_key, keyboard, scope)
            pace, trouble = Pace(None, first), ""
            while True:
                live.update(screen(pace, title, trouble, console.height), refresh=True)
                await trio.sleep(interval_seconds)
                try:
                    pace, trouble = Pace(pace.now, await source.sample()), ""
                except IdallocError as error:
                    trouble = f"{error}; asking again"


@contextmanager
def _single_keys(keyboard: int) -> Iterator[None]:
    """Each key is read as it is pressed, and not shown; at the end all is as it was."""
    before = termios.tcgetattr(keyboard)
    tty.setcbreak(keyboard)
    try:
        yield
    finally:
        termios.tcsetattr(keyboard, termios.TCSAFLUSH, before)


async def _leave_on_key(keyboard: int, scope: trio.CancelScope) -> None:
    while True:
        await trio.lowlevel.wait_readable(keyboard)
        keys = os.read(keyboard, _KEYS_MAX)
        if not keys or LEAVE_KEYS & set(keys):  # Nothing: the terminal is gone.
            scope.cancel()
            return


async def _leave_on_signal(
    scope: trio.CancelScope, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started()
        async for _ in signals:
            scope.cancel()
