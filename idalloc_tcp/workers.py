"""Several processes on the same addresses, and the parent that looks after them.

Every worker is a server of its own, with its own pools: what keeps IDs unique between servers on
one ledger keeps them unique between workers. They know of each other through the parent alone,
which asks them all when one is asked for STATS.

The parent opens the sockets, gives each worker its share and keeps them open itself. So a client
that has connected to a worker that dies before it is accepted waits for that worker's successor.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Final, final

import attrs
import trio

from idalloc_tcp import errors, log
from idalloc_tcp.backoff import Backoff
from idalloc_tcp.errors import IdallocError, StartRefused
from idalloc_tcp.link import Link, Message, Query
from idalloc_tcp.listeners import Listener, close_listeners
from idalloc_tcp.settings import Settings
from idalloc_tcp.snapshot import Rows, Snapshot, busiest, merge

#: A worker that does not answer within this time is left out of what is gathered.
ANSWER_SECONDS: Final = 0.5
#: How long a worker waits for what the parent gathers.
GATHER_SECONDS: Final = 2 * ANSWER_SECONDS
#: A worker that lived for so long is well: when it dies, its successor starts without much ado.
SETTLED_SECONDS: Final = 10.0
#: What a stop may take beyond `drain_seconds`: fetches under way, give-backs, tasks in line.
STOP_SECONDS: Final = 15.0
#: How long a process may take to be gone after it was killed.
KILL_SECONDS: Final = 2.0

#: Is told that everything serves, and what the stores are.
Ready = Callable[[Mapping[str, str]], Awaitable[None]]


def setup_message(settings: Settings, number: int, is_managed: bool) -> Message:
    """What a worker has to know first.

    Args:
        number: which worker it is.
        is_managed: does a service manager keep the listening sockets open?
    """
    values = attrs.asdict(settings, recurse=False)
    return {"settings": values, "number": number, "is_managed": is_managed}


def refusal_message(error: IdallocError) -> Message:
    """A worker cannot start, and why."""
    return {"refused": type(error).__name__, "text": str(error)}


def ready_message(described: Mapping[str, str]) -> Message:
    """A worker serves, and what its stores are."""
    return {"ready": dict(described)}


@final
@attrs.define(eq=False)
class _Worker:
    """A process that serves."""

    link: Link
    #: What never shrinks, as it last was: it still counts when the worker is silent, or dead.
    totals: Snapshot = attrs.field(init=False, factory=Snapshot)


@final
@attrs.define(eq=False)
class Workers:
    """The parent's view of its workers.

    Args:
        settings: what each of them runs with.
        shares: the listeners of each.
    """

    _settings: Settings
    _shares: Sequence[Sequence[Listener]]
    _workers: dict[int, _Worker] = attrs.field(init=False, factory=dict)
    _processes: set[trio.Process] = attrs.field(init=False, factory=set)
    _restarts_total: int = attrs.field(init=False, default=0)
    #: The names of the settings that have changed since the start.
    _changed: set[str] = attrs.field(init=False, factory=set)
    #: The totals of all that died.
    _departed: Snapshot = attrs.field(init=False, factory=Snapshot)
    _stopping: trio.Event = attrs.field(init=False, factory=trio.Event)
    #: Around the start, which a stop does not wait for.
    _starting: trio.CancelScope = attrs.field(init=False, factory=trio.CancelScope)
    _started_at: float = attrs.field(init=False, factory=time.monotonic)

    async def run(self, ready: Ready) -> None:
        """Keep all workers running until `stop`, then drain them. Closes the listeners.

        The first worker goes ahead: what it refuses the others would as well, and a new data file
        is made once.

        Args:
            ready: is called once all of them serve.

        Raises:
            StartRefused, SettingsError: as a worker does when it starts.
        """
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._drain, nursery.cancel_scope)
                with self._starting:
                    described = await nursery.start(self._supervise, 1)
                    async with trio.open_nursery() as others:
                        for number in range(2, len(self._shares) + 1):
                            others.start_soon(nursery.start, self._supervise, number)
                    await ready(described)
            if nursery.cancel_scope.cancelled_caught:
                log.warning("workers that did not stop in time were killed")
        finally:
            close_listeners(self._listeners)

    @property
    def is_stopping(self) -> bool:
        """Has a stop begun?"""
        return self._stopping.is_set()

    def stop(self) -> None:
        """Drain: let `run` come to its end."""
        self._stopping.set()

    async def change(self, settings: Settings, names: Iterable[str]) -> None:
        """Put settings into effect in all workers, and in those that start later.

        Args:
            names: those of the settings that changed.
        """
        self._settings = settings
        self._changed.update(names)
        async with trio.open_nursery() as nursery:
            for number, worker in self._workers.items():
                nursery.start_soon(self._tell, number, worker)

    async def _tell(self, number: int, worker: _Worker) -> None:
        values = {name: getattr(self._settings, name) for name in self._changed}
        if await worker.link.ask(Query(settings=values), ANSWER_SECONDS) is None:
            text = "a worker may still have the settings of before: if it lives, restart it"
            log.warning(text, worker=number)

    async def gather(self, service: str | None = None) -> Snapshot:
        """What all workers measured, as if they were one: of the server, or of one service alone.

        Who does not answer in time is left out, but for its totals, and counted.
        """
        merged = await self._gather(Query(service))
        return merged if service is None else Snapshot({}, merged.services)

    async def gather_all(self, services_max: int) -> Snapshot:
        """What all workers measured, and the services that gave out most IDs, most first.

        A worker names as many services at most; of those that it does not name it adds nothing.
        """
        return busiest(await self._gather(Query(services_max=services_max)), services_max)

    async def inspect(self, number: int, wanted: Message, within_seconds: float) -> Message | None:
        """What a worker sees in itself; None: it is not there, or does not answer in time."""
        worker = self._workers.get(number)
        return None if worker is None else await worker.link.inspect(wanted, within_seconds)

    async def _gather(self, query: Query) -> Snapshot:
        # Both as they are now: who dies while it is asked must not be counted twice.
        workers, departed = list(self._workers.values()), self._departed
        answers: dict[_Worker, Snapshot] = {}

        async def ask(worker: _Worker) -> None:
            answer = await worker.link.ask(query, ANSWER_SECONDS)
            if answer is not None:
                answers[worker] = answer
                if query.service is None:
                    worker.totals = answer.totals()

        async with trio.open_nursery() as nursery:
            for worker in workers:
                nursery.start_soon(ask, worker)
        seen = [answers.get(worker, worker.totals) for worker in workers]
        return merge([*seen, departed, self._own(query, len(self._shares) - len(answers))])

    def _own(self, query: Query, silent: int) -> Snapshot:
        if query.service is not None:
            return Snapshot({}, {query.service: {"workers_silent": silent}})
        rows: Rows = {
            "uptime_seconds": round(time.monotonic() - self._started_at),
            "workers": len(self._shares),
            "workers_silent": silent,
            "worker_restarts_total": self._restarts_total,
        }
        return Snapshot(rows)

    async def _supervise(
        self,
        number: int,
        *,
        task_status: trio.TaskStatus[dict[str, str]] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """See to it that a worker runs until the stop, whatever becomes of its process."""
        backoff = Backoff()
        await self._employ(number, task_status)
        while not self.is_stopping:
            self._restarts_total += 1
            with trio.move_on_after(backoff.next_seconds()):
                await self._stopping.wait()
                return
            began_at = trio.current_time()
            try:
                await self._employ(number)
            except IdallocError as error:
                text = "a worker cannot start"
                log.sparingly(log.WARNING, text, worker=number, reason=str(error))
            if trio.current_time() - began_at > SETTLED_SECONDS:
                backoff.reset()

    async def _employ(
        self,
        number: int,
        task_status: trio.TaskStatus[dict[str, str]] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Run one process, from its start to its end.

        Raises:
            IdallocError: it could not be started, or refused to serve.
        """
        process, link = await self._start(number)
        self._processes.add(process)
        try:
            if self.is_stopping:
                process.terminate()
            async with link:
                settings = self._settings
                is_managed = any(listener.is_managed for listener in self._listeners)
                await link.send(setup_message(settings, number, is_managed))
                said = await link.receive() or {}
                if "ready" in said:
                    task_status.started(said["ready"])
                    if task_status is trio.TASK_STATUS_IGNORED:  # Nobody waits for a successor.
                        log.event("a worker serves again", worker=number, pid=process.pid)
                    await self._listen(number, link, settings)
            status = await process.wait()
        finally:
            self._processes.discard(process)
            process.kill()
            with trio.move_on_after(KILL_SECONDS, shield=True):
                await process.wait()
        if "refused" in said:
            raise _refusal(said)
        if "ready" not in said and not self.is_stopping:
            raise StartRefused(f"worker {number} ended with status {status} before it served")
        if status or not self.is_stopping:
            fields = {"worker": number, "pid": process.pid, "status": status}
            log.sparingly(log.WARNING, "a worker ended", **fields)

    async def _start(self, number: int) -> tuple[trio.Process, Link]:
        await trio.lowlevel.checkpoint_if_cancelled()
        with _refused_for(number), ExitStack() as theirs:
            # Copies, because a stop may close ours while the process is being made.
            listening = [listener.socket.dup() for listener in self._shares[number - 1]]
            ours, control = socket.socketpair()
            descriptors = [theirs.enter_context(one).fileno() for one in (control, *listening)]
            command = [sys.executable, "-P", "-m", "idalloc_tcp.worker", *map(str, descriptors)]
            try:
                process = await trio.lowlevel.open_process(
                    command,
                    stdin=subprocess.DEVNULL,
                    pass_fds=descriptors,
                    # The same code as ours, wherever we were started.
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                    # What a terminal sends is for us alone: we pass it on.
                    start_new_session=True,
                )
            except BaseException:
                ours.close()
                raise
        return process, Link(trio.SocketStream(trio.socket.from_stdlib_socket(ours)))

    async def _listen(self, number: int, link: Link, settings: Settings) -> None:
        worker = self._workers[number] = _Worker(link)
        try:
            async with trio.open_nursery() as nursery:
                if settings is not self._settings:  # They have changed since it was told them.
                    nursery.start_soon(self._tell, number, worker)
                await link.run(self._gather)
                nursery.cancel_scope.cancel()
        finally:
            del self._workers[number]
            self._departed = merge([self._departed, worker.totals])

    async def _drain(self, scope: trio.CancelScope) -> None:
        await self._stopping.wait()
        # The workers still have theirs: they greet who waits there, and then close them.
        close_listeners(self._listeners)
        self._starting.cancel()
        scope.deadline = trio.current_time() + self._settings.drain_seconds + STOP_SECONDS
        for process in self._processes:
            process.terminate()

    @property
    def _listeners(self) -> set[Listener]:
        return {listener for share in self._shares for listener in share}


def _refusal(message: Message) -> IdallocError:
    kind: type[IdallocError] = getattr(errors, message["refused"])
    return kind(message["text"])


@contextmanager
def _refused_for(number: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StartRefused(f"cannot start worker {number}: {error.strerror or error}") from error
