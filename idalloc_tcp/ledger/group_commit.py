"""Group commit: what is asked while a commit runs goes into the next one, all together.

    ask ──► waiting ──► batch ──► commit ──► an answer for each

A commit costs a flush of the disk, however much is in it: a thousand tasks that ask one by one
would wait for a thousand flushes, and so wait for two. Nobody waits for company: who comes while
no commit runs begins one, and hands over to the first of those who came meanwhile.

What waits can be cancelled, and then was not asked for. What is in a batch is seen through, even
if its task or the one that began the commit is cancelled, so its outcome is always known.
"""

from collections.abc import Awaitable, Callable, Sequence
from itertools import islice
from typing import Final, Generic, TypeVar, final

import attrs
import trio
from trio.lowlevel import Abort, Task

from idalloc_tcp.errors import Unavailable

_Request = TypeVar("_Request")
_Answer = TypeVar("_Answer")

#: How many requests share a commit: further ones, also those of other processes, get their turn.
BATCH_MAX: Final = 1_000


@final
@attrs.define(eq=False)
class _Asker(Generic[_Request, _Answer]):
    """Who asked, for what, and what came of it."""

    task: Task
    request: _Request
    answer: _Answer | Unavailable | None = None


@final
@attrs.define(eq=False)
class GroupCommit(Generic[_Request, _Answer]):
    """Carries out what concurrent tasks ask for, one batch after the other.

    Args:
        commit: answers requests, in their order. It ends by itself within a bounded time, for
            it cannot be cancelled.
    """

    _commit: Callable[[Sequence[_Request]], Awaitable[Sequence[_Answer]]]
    _is_busy: bool = attrs.field(init=False, default=False)
    #: By task, in the order in which they asked.
    _waiting: dict[Task, _Asker[_Request, _Answer]] = attrs.field(init=False, factory=dict)

    async def ask(self, request: _Request) -> _Answer:
        """The answer to one request.

        Raises:
            Unavailable: the commit of its batch failed.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        asker = _Asker[_Request, _Answer](trio.lowlevel.current_task(), request)
        self._waiting[asker.task] = asker
        if self._is_busy:
            await self._called(asker.task)
        if asker.answer is None:  # So it is called to commit, as the first that waits.
            await self._commit_batch(asker.task)
        assert asker.answer is not None
        if isinstance(asker.answer, Unavailable):
            # A new one for each: an exception that many raise grows its traceback.
            raise Unavailable(*asker.answer.args) from asker.answer
        return asker.answer

    @property
    def waiting(self) -> int:
        """How many requests wait for a batch: not more than there are tasks that ask."""
        return len(self._waiting)

    async def _called(self, task: Task) -> None:
        """Wait to be answered, or for a turn to commit."""

        def abort(_: object) -> Abort:
            return Abort.SUCCEEDED if self._waiting.pop(task, None) else Abort.FAILED

        await trio.lowlevel.wait_task_rescheduled(abort)

    async def _commit_batch(self, own: Task) -> None:
        batch = list(islice(self._waiting.values(), BATCH_MAX))
        for asker in batch:
            del self._waiting[asker.task]
        self._is_busy = True
        answers: Sequence[_Answer | Unavailable]
        answers = [Unavailable("the commit was broken off by a fault")] * len(batch)
        try:
            with trio.CancelScope(shield=True):  # The commit bounds itself.
                answers = await self._commit([asker.request for asker in batch])
        except Unavailable as error:
            answers = [error] * len(batch)
        finally:
            for asker, answer in zip(batch, answers, strict=True):
                asker.answer = answer
                if asker.task is not own:
                    trio.lowlevel.reschedule(asker.task)
            self._is_busy = bool(self._waiting)
            if self._is_busy:
                trio.lowlevel.reschedule(next(iter(self._waiting)))
