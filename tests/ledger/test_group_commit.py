"""Group commit in virtual time: who shares a commit with whom, and what a cancel may do."""

from collections.abc import Sequence

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from idalloc_tcp.errors import Unavailable
from idalloc_tcp.ledger import group_commit as module
from idalloc_tcp.ledger.group_commit import GroupCommit


@attrs.define(eq=False)
class Disk:
    """Commits numbers, in a second each time, and answers with their text.

    Attributes:
        trouble: what every commit raises at its end, if anything.
        batches: what was committed together.
    """

    trouble: Exception | None = None
    batches: list[list[int]] = attrs.field(factory=list)

    async def commit(self, requests: Sequence[int]) -> list[str]:
        """A commit, as slow as a bad disk."""
        self.batches.append(list(requests))
        await trio.sleep(1)
        if self.trouble is not None:
            raise self.trouble
        return [str(request) for request in requests]


async def test_what_comes_during_a_commit_shares_the_next_one(autojump_clock: MockClock) -> None:
    """The first commits at once and alone; all that come meanwhile are the second batch."""
    disk = Disk()
    commits = GroupCommit(disk.commit)
    answers: list[str] = []

    async def ask(request: int) -> None:
        answers.append(await commits.ask(request))

    async with trio.open_nursery() as nursery:
        for request in range(1_000):
            nursery.start_soon(ask, request)
    assert sorted(map(len, disk.batches)) == [1, 999]
    assert sorted(answers) == sorted(map(str, range(1_000)))
    assert trio.current_time() == 2
    assert await commits.ask(7) == "7"
    assert trio.current_time() == 3


async def test_batches_are_bounded_and_in_order(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No commit holds more than the bound, and who asked first is committed first."""
    monkeypatch.setattr(module, "BATCH_MAX", 3)
    disk = Disk()
    commits = GroupCommit(disk.commit)
    async with trio.open_nursery() as nursery:
        for request in range(8):
            nursery.start_soon(commits.ask, request)
            await wait_all_tasks_blocked()
    assert disk.batches == [[0], [1, 2, 3], [4, 5, 6], [7]]


async def test_who_waits_can_be_cancelled(autojump_clock: MockClock) -> None:
    """What was cancelled before its commit began is not asked for, wherever it stood."""
    disk = Disk()
    commits = GroupCommit(disk.commit)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(commits.ask, 0)
        await wait_all_tasks_blocked()
        async with trio.open_nursery() as impatient:
            impatient.start_soon(commits.ask, 1)
            await wait_all_tasks_blocked()
            nursery.start_soon(commits.ask, 2)
            await wait_all_tasks_blocked()
            impatient.start_soon(commits.ask, 3)
            await wait_all_tasks_blocked()
            assert commits.waiting == 3
            impatient.cancel_scope.cancel()
    assert disk.batches == [[0], [2]]


@pytest.mark.parametrize("cancelled", [0, 1, 2])
async def test_who_is_in_a_batch_is_seen_through(autojump_clock: MockClock, cancelled: int) -> None:
    """A cancel during the commit, of who began it or of another, changes nobody's answer."""
    disk = Disk()
    commits = GroupCommit(disk.commit)
    scopes = [trio.CancelScope() for _ in range(4)]
    answers: list[str] = []

    async def ask(request: int) -> None:
        with scopes[request]:
            answers.append(await commits.ask(request))

    async with trio.open_nursery() as nursery:
        for request in range(3):
            nursery.start_soon(ask, request)
            await wait_all_tasks_blocked()
        await trio.sleep(0.5 if cancelled == 0 else 1.5)
        nursery.start_soon(ask, 3)
        await wait_all_tasks_blocked()
        scopes[cancelled].cancel()
    assert answers[0] == "0"
    assert sorted(answers) == ["0", "1", "2", "3"]
    assert commits.waiting == 0


async def test_cancelled_as_its_turn_comes(autojump_clock: MockClock) -> None:
    """A cancel in the very moment of a handover leaves nobody behind without a commit."""
    disk = Disk()
    commits = GroupCommit(disk.commit)
    answers: list[str] = []

    async def ask(request: int, patience_seconds: float) -> None:
        with trio.move_on_after(patience_seconds):
            answers.append(await commits.ask(request))

    async with trio.open_nursery() as nursery:
        for request in range(6):
            nursery.start_soon(ask, request, 1 if request % 2 else 9)
            await wait_all_tasks_blocked()
    assert set(answers) >= {"0", "2", "4"}
    assert await commits.ask(7) == "7"


async def test_failure_is_everybodys(autojump_clock: MockClock) -> None:
    """All of a batch are told, each by an exception of its own; the next batch is another try."""
    disk = Disk(Unavailable("the disk is full"))
    commits = GroupCommit(disk.commit)
    told: list[Unavailable] = []

    async def ask(request: int) -> None:
        with pytest.raises(Unavailable, match="the disk is full") as caught:
            await commits.ask(request)
        told.append(caught.value)

    async with trio.open_nursery() as nursery:
        for request in range(4):
            nursery.start_soon(ask, request)
    assert len(set(map(id, told))) == 4
    disk.trouble = None
    assert await commits.ask(7) == "7"


async def test_fault_of_the_program_hangs_nobody(autojump_clock: MockClock) -> None:
    """Whatever a commit raises comes out where it began, and the others learn that it failed."""
    disk = Disk(LookupError("a fault"))
    commits = GroupCommit(disk.commit)

    async def ask(request: int, expected: type[Exception]) -> None:
        with pytest.raises(expected, match="fault"):
            await commits.ask(request)

    async with trio.open_nursery() as nursery:
        for request, expected in enumerate([LookupError, LookupError, Unavailable]):
            nursery.start_soon(ask, request, expected)
            await wait_all_tasks_blocked()
    disk.trouble = None
    assert await commits.ask(7) == "7"
