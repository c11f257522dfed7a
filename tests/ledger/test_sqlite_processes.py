"""Several processes on one file, and processes that die: no ID is ever given away twice."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Final

import pytest

from idalloc_tcp.ledger.sqlite import LedgerFile
from idalloc_tcp.pool import Segment
from tests.ledger.test_sqlite import lease

PROJECT: Final = Path(__file__).parents[2]
PROCESSES: Final = 4
LEASES: Final = 100
DEADLINE_SECONDS: Final = 30

Process = subprocess.Popen[str]
Start = Callable[..., Process]
StartLeasing = Callable[[Path, int, int], Process]

#: Waits for a line, then leases so many times; prints each segment once it owns it.
LEASE: Final = f"""
import signal, sys
from pathlib import Path
from idalloc_tcp.ledger.sqlite import LeaseRequest, LedgerFile

signal.alarm({DEADLINE_SECONDS})
path, leases, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
file = LedgerFile.open(path)
for _ in range(leases):
    [segment] = file.lease_all([LeaseRequest("orders", size, 0, 2**63 - 1)])
    print(segment.start, segment.stop, flush=True)
file.close()
"""

#: Opens the file, but dies as by kill -9 just before or after a step of making it.
DIE_WHILE_MAKING: Final = f"""
import os, signal, sys
from pathlib import Path
from idalloc_tcp.ledger.sqlite import LedgerFile

signal.alarm({DEADLINE_SECONDS})
name, moment, path = sys.argv[1], sys.argv[2], Path(sys.argv[3])
step = getattr(os, name)

def die(*arguments):
    if moment == "after":
        step(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)

setattr(os, name, die)
LedgerFile.open(path)
"""


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a Python of its own that runs a script; whatever still runs at the end is killed."""
    started: list[Process] = []

    def start_one(script: str, *arguments: object) -> Process:
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", script, *map(str, arguments)],
            cwd=PROJECT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start_one
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def start_leasing(start: Start) -> StartLeasing:
    """Starts a process that has loaded its program and waits for `go`."""

    def start_one(path: Path, leases: int, size: int) -> Process:
        process = start(LEASE, path, leases, size)
        assert read_line(process) == "ready\n"
        return process

    return start_one


def go(process: Process) -> None:
    """Let it open the file."""
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def read_line(process: Process) -> str:
    """The next line that it printed."""
    assert process.stdout is not None
    return process.stdout.readline()


def finish(process: Process) -> list[Segment]:
    """The segments that it printed and nobody has read so far."""
    assert process.stdout is not None
    lines = [line for line in process.stdout if line.endswith("\n")]
    process.wait(DEADLINE_SECONDS)
    return [Segment(*map(int, line.split())) for line in lines]


def test_processes_share_one_new_file(tmp_path: Path, start_leasing: StartLeasing) -> None:
    """Processes that race to make a file and lease from it share it, without overlap or gap."""
    path = tmp_path / "new" / "ids.db"
    processes = [start_leasing(path, LEASES, size) for size in range(1, PROCESSES + 1)]
    for process in processes:
        go(process)
    segments = sorted(segment for process in processes for segment in finish(process))
    assert [process.returncode for process in processes] == [0] * PROCESSES
    assert len(segments) == PROCESSES * LEASES
    assert segments[0].start == 1
    for lower, higher in pairwise(segments):
        assert lower.stop == higher.start
    assert os.listdir(path.parent) == ["ids.db"]


def test_nothing_repeats_after_kill_9(tmp_path: Path, start_leasing: StartLeasing) -> None:
    """What a process owned when it was killed in the middle of leasing is never leased again."""
    path = tmp_path / "ids.db"
    highest = 0
    for leases_to_read in (1, 20, 77):
        process = start_leasing(path, 1_000_000, 10)
        go(process)
        lines = [read_line(process) for _ in range(leases_to_read)]
        process.kill()
        segments = [Segment(*map(int, line.split())) for line in lines] + finish(process)
        assert process.returncode == -signal.SIGKILL
        with closing(LedgerFile.open(path)) as file:
            segments.append(lease(file, 10))
        for segment in segments:
            assert segment.start > highest
            highest = segment.last


def test_processes_go_on_after_one_was_killed(tmp_path: Path, start_leasing: StartLeasing) -> None:
    """The death of one process neither blocks the others nor touches what they own."""
    path = tmp_path / "ids.db"
    victim, survivor = start_leasing(path, 1_000_000, 10), start_leasing(path, LEASES, 7)
    go(victim)
    read_line(victim)
    go(survivor)
    first_line = read_line(survivor)
    victim.kill()
    segments = [Segment(*map(int, first_line.split())), *finish(survivor)]
    assert survivor.returncode == 0
    assert len(segments) == LEASES
    segments += finish(victim)
    segments.sort()
    for lower, higher in pairwise(segments):
        assert lower.stop <= higher.start


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("step", ["link", "fsync"])
def test_file_is_there_as_a_whole_or_not_at_all(
    tmp_path: Path, start: Start, step: str, moment: str
) -> None:
    """A process killed while it makes the file leaves nothing that stops the next one."""
    path = tmp_path / "ids.db"
    process = start(DIE_WHILE_MAKING, step, moment, path)
    assert finish(process) == []
    assert process.returncode == -signal.SIGKILL
    is_made = (step, moment) == ("link", "after")
    assert path.exists() == is_made
    with closing(LedgerFile.open(path)) as file:
        assert path.stat().st_nlink == 1
        assert lease(file, 10) == Segment(1, 11)
    if is_made:
        assert os.listdir(tmp_path) == ["ids.db"]
