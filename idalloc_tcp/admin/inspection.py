"""What this process is doing right now: where its time goes, and its tasks.

What comes back is what HTTP answers, as plain data: a worker sends it to its parent.
"""

import os
from collections.abc import Iterator
from itertools import islice
from typing import Any, Final, Literal, TypeAlias, final

import attrs
import trio

SECONDS_MAX: Final = 60.0
#: Samples are taken a thousand times a second, and less often if there would be more than so many.
SAMPLES_MAX: Final = 10_000
SAMPLE_SECONDS_MIN: Final = 0.001
#: Lines of the task tree; a server may have a task for each of its connections.
TASKS_MAX: Final = 2_000
#: The longest text: it has to fit into a message of a worker to its parent.
CHARS_MAX: Final = 8_000_000

Kind: TypeAlias = Literal["profile", "tasks"]

_MISSING: Final = """\
Profiles need pyinstrument, which is not installed here. Install it beside idalloc-tcp:

    pip install 'idalloc-tcp[profile]'

and start the server again.
"""
_BUSY: Final = "A profile of this process is being taken. One at a time: ask again later.\n"


@final
@attrs.frozen
class Inspection:
    """What is wanted.

    Attributes:
        seconds: for how long to look, 0 < seconds <= SECONDS_MAX.
    """

    kind: Kind
    seconds: float = 0.0


@final
@attrs.frozen
class Finding:
    """What came of it: an HTTP status and a text."""

    status: int
    text: str
    is_html: bool = False


@final
@attrs.define(eq=False)
class Inspector:
    """Looks at the process that it is in."""

    _is_profiling: bool = attrs.field(init=False, default=False)

    async def inspect(self, wanted: Inspection) -> Finding:
        """Do what is wanted."""
        if wanted.kind == "tasks":
            return Finding(200, "".join(islice(_tree(), TASKS_MAX)))
        if self._is_profiling:
            return Finding(409, _BUSY)
        self._is_profiling = True
        try:
            return await _profile(wanted.seconds)
        finally:
            self._is_profiling = False


async def _profile(seconds: float) -> Finding:
    try:
        from pyinstrument import Profiler  # noqa: PLC0415 - an extra
    except ImportError:
        return Finding(501, _MISSING)

    interval_seconds = max(SAMPLE_SECONDS_MIN, seconds / SAMPLES_MAX)
    # All tasks of the thread are of interest, not just the one that asks.
    profiler = Profiler(interval=interval_seconds, async_mode="disabled")
    profiler.start(target_description=f"idalloc-tcp, process {os.getpid()}")
    try:
        await trio.sleep(seconds)
    finally:
        profiler.stop()
    # A while of pure computing: in a thread, clients are served meanwhile.
    html = await trio.to_thread.run_sync(profiler.output_html)
    if len(html) > CHARS_MAX:
        return Finding(500, "The profile is too large to be shown. Take a shorter one.\n")
    return Finding(200, html, is_html=True)


def _tree() -> Iterator[str]:
    root = trio.lowlevel.current_root_task()
    assert root is not None, "Trio is running"
    yield from _branch(root, 0)


def _branch(task: trio.lowlevel.Task, depth: int) -> Iterator[str]:
    yield f"{'  ' * depth}{task.name}{_place(task.coro)}\n"
    for nursery in task.child_nurseries:
        for child in sorted(nursery.child_tasks, key=lambda one: one.name):
            yield from _branch(child, depth + 1)


def _place(coro: Any) -> str:
    """Where a task waits: the innermost function of ours, or else of anybody's."""
    places = []
    while frame := getattr(coro, "cr_frame", None) or getattr(coro, "ag_frame", None):
        places.append(f"{frame.f_globals.get('__name__')}:{frame.f_lineno} {frame.f_code.co_name}")
        coro = coro.cr_await if hasattr(coro, "cr_await") else coro.ag_await
    ours = [place for place in places if place.startswith("idalloc_tcp.")]
    return f"  at {(ours or places)[-1]}" if places else ""
