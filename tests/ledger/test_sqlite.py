"""The embedded ledger's own promises: how a file is made, kept and lost."""

import os
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

import pytest
import trio
import trio.testing

from idalloc_tcp.errors import Exhausted, StartRefused, Unavailable
from idalloc_tcp.ledger import Tail
from idalloc_tcp.ledger import sqlite as module
from idalloc_tcp.ledger.sqlite import APPLICATION_ID, LeaseRequest, LedgerFile, SqliteLedger
from idalloc_tcp.pool import MAX_ID, Segment

PROJECT: Final = Path(__file__).parents[2]


@contextmanager
def opened(path: Path, busy_timeout_seconds: float = 5.0) -> Iterator[LedgerFile]:
    """The ledger's file, closed at the end."""
    with closing(LedgerFile.open(path, busy_timeout_seconds=busy_timeout_seconds)) as file:
        yield file


def lease(file: LedgerFile, size: int, service: str = "orders") -> Segment:
    """A lease without a floor, under the highest ceiling."""
    [answer] = file.lease_all([LeaseRequest(service, size, 0, MAX_ID)])
    assert isinstance(answer, Segment)
    return answer


def make(path: Path) -> None:
    """A ledger at `path` that has leased 100 IDs of `orders`."""
    with opened(path) as file:
        lease(file, 100)


def run_sql(path: Path, *statements: str) -> list[tuple[object, ...]]:
    """Run them as another program would; the rows of the last one."""
    rows: list[tuple[object, ...]] = []
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        for statement in statements:
            rows = db.execute(statement).fetchall()
    return rows


def run_child(script: str, *arguments: object, wrapper: tuple[str, ...] = ()) -> list[str]:
    """Run a script in a Python of its own; the lines that it printed."""
    done = subprocess.run(
        [*wrapper, sys.executable, "-W", "error", "-c", script, *map(str, arguments)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def refusal_of(path: Path) -> str:
    """Why the ledger does not open: one line that names the file first."""
    with pytest.raises(StartRefused) as caught:
        LedgerFile.open(path, busy_timeout_seconds=0.05)
    text = str(caught.value)
    assert text.startswith(f"{path} ")
    assert text.isprintable()
    return text.removeprefix(f"{path} ")


# A new file


def test_new_ledger_is_one_private_file(tmp_path: Path) -> None:
    """A new ledger and its new directories are its owner's alone; a close leaves one file."""
    path = tmp_path / "a" / "b" / "ids.db"
    make(path)
    assert os.listdir(path.parent) == ["ids.db"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [stat.S_IMODE(path.parents[i].stat().st_mode) for i in (0, 1)] == [0o700, 0o700]


def test_format_on_disk(tmp_path: Path) -> None:
    """The file says whose it is, and holds the table that the MySQL ledger holds too."""
    path = tmp_path / "ids.db"
    with opened(path) as file:
        lease(file, 100)
        lease(file, 100)
        file.give_back([Tail("orders", Segment(151, 201))])
    header = path.read_bytes()[:100]
    assert header[68:72] == APPLICATION_ID.to_bytes(4)
    assert header[60:64] == (1).to_bytes(4)
    columns = "service_name, last_alloc_value, typeof(last_alloc_value), data_version"
    rows = run_sql(path, f"SELECT {columns} FROM tbl_alloc_info")
    assert rows == [("orders", 150, "integer", 3)]


def test_new_file_is_durable_before_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is synced, then linked into place, then its directory is synced, then opened."""
    events: list[str] = []
    path = tmp_path / "new" / "ids.db"
    fsync, link, connect = os.fsync, os.link, sqlite3.connect

    def record_fsync(descriptor: int) -> None:
        events.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def record_link(source: Path, target: Path) -> None:
        assert source.stat().st_size > 0
        events.append(f"link {target.name}")
        link(source, target)

    def record_connect(database: str, **options: object) -> sqlite3.Connection:
        events.append(f"open {database.rpartition('/')[2]}")
        return connect(database, **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "link", record_link)
    monkeypatch.setattr(sqlite3, "connect", record_connect)
    LedgerFile.open(path).close()
    assert events == [
        f"fsync {tmp_path.name}",
        "open ledger?mode=rw",
        "fsync ledger",
        "link ids.db",
        "fsync new",
        "open ids.db?mode=rw",
    ]


def test_loser_of_the_race_to_create_uses_the_winners_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who finds that another process has just made the file goes on where that one is."""
    path = tmp_path / "ids.db"
    link = os.link

    def link_too_late(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "link", link)
        make(path)
        link(source, target)

    monkeypatch.setattr(os, "link", link_too_late)
    with opened(path) as file:
        assert lease(file, 1) == Segment(101, 102)
    assert os.listdir(tmp_path) == ["ids.db"]


def test_file_is_used_by_others_while_its_draft_is_still_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that has just been made has two names for a moment; that keeps nobody from it."""
    path = tmp_path / "ids.db"
    link = os.link

    def link_and_be_overtaken(source: Path, target: Path) -> None:
        link(source, target)
        make(path)
        assert not source.exists()

    monkeypatch.setattr(os, "link", link_and_be_overtaken)
    with opened(path) as file:
        assert lease(file, 1) == Segment(101, 102)
        assert path.stat().st_nlink == 1


def test_reopened_ledger_goes_on(tmp_path: Path) -> None:
    """What was leased before a restart stays leased."""
    make(tmp_path / "ids.db")
    with opened(tmp_path / "ids.db") as file:
        assert lease(file, 1) == Segment(101, 102)


@pytest.mark.parametrize("name", ["a b.db", "50%41.db", "what?.db", "#1.db", "ünï.db", "..."])
def test_any_file_name_will_do(tmp_path: Path, name: str) -> None:
    """A name is taken as it is, whatever it would mean in a URI."""
    make(tmp_path / name)
    assert os.listdir(tmp_path) == [name]


def test_relative_path_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path means the directory at the time of opening."""
    monkeypatch.chdir(tmp_path)
    with opened(Path("ids.db")) as file:
        monkeypatch.chdir("/")
        assert lease(file, 1) == Segment(1, 2)


def test_link_to_a_ledger_is_followed(tmp_path: Path) -> None:
    """A symbolic link and the file that it names are one ledger."""
    make(tmp_path / "ids.db")
    (tmp_path / "link.db").symlink_to("ids.db")
    with opened(tmp_path / "ids.db") as file, opened(tmp_path / "link.db") as linked:
        assert [lease(linked, 1).start, lease(file, 1).start] == [101, 102]


def test_durability_settings(tmp_path: Path) -> None:
    """Every COMMIT reaches the disk, and a locked file is waited for as long as promised."""
    with opened(tmp_path / "ids.db") as file:
        settings = {
            name: file._db.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("journal_mode", "synchronous", "busy_timeout")
        }
    assert settings == {"journal_mode": "wal", "synchronous": 2, "busy_timeout": 5000}


# While it is in use


def test_locked_file_is_unavailable_for_now(tmp_path: Path) -> None:
    """A lease waits for another program's lock, then fails without a gap."""
    path = tmp_path / "ids.db"
    with opened(path, busy_timeout_seconds=0.05) as file:
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(Unavailable, match=r"ids\.db is locked: "):
                lease(file, 100)
            with pytest.raises(Unavailable, match=r"ids\.db is locked: "):
                file.give_back([])
            other.execute("ROLLBACK")
        assert lease(file, 1) == Segment(1, 2)


def test_reader_does_not_get_in_the_way(tmp_path: Path) -> None:
    """A program that only reads, as a backup does, keeps nobody from leasing."""
    path = tmp_path / "ids.db"
    with (
        opened(path, busy_timeout_seconds=0.0) as file,
        closing(sqlite3.connect(path, isolation_level=None)) as other,
    ):
        other.execute("BEGIN")
        other.execute("SELECT * FROM tbl_alloc_info").fetchall()
        assert lease(file, 1) == Segment(1, 2)


def test_failed_lease_leaves_no_lock_behind(tmp_path: Path) -> None:
    """Whatever a lease failed with, the next program can lock the file at once."""
    path = tmp_path / "ids.db"
    with (
        opened(path) as file,
        closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as other,
    ):
        lease(file, 100)
        [answer] = file.lease_all([LeaseRequest("orders", 1, 0, 100)])
        assert isinstance(answer, Exhausted)
        other.execute("BEGIN IMMEDIATE")
        other.execute("ROLLBACK")
        for size in (0, -50):
            with pytest.raises((ValueError, Unavailable)):  # never asked for, but harmless
                lease(file, size)
            other.execute("BEGIN IMMEDIATE")
            other.execute("ROLLBACK")
        assert lease(file, 1) == Segment(101, 102)


def test_file_that_may_not_grow_is_unavailable(tmp_path: Path) -> None:
    """When no page can be added, services that are there go on and a new one is not made."""
    path = tmp_path / "ids.db"
    with opened(path) as file:
        [(pages,)] = file._db.execute("PRAGMA page_count").fetchall()
        file._db.execute(f"PRAGMA max_page_count = {pages}")
        lease(file, 100)

        def lease_for_many_services() -> None:
            for number in range(1_000):
                lease(file, 1, f"service-{number}")

        with pytest.raises(Unavailable, match=r"ids\.db cannot grow: make room on the disk"):
            lease_for_many_services()
        assert lease(file, 1) == Segment(101, 102)


def test_moved_file_gives_no_more_leases(tmp_path: Path) -> None:
    """While the path names another file or none, nothing is leased or taken back."""
    path, elsewhere, copy = (tmp_path / name for name in ("ids.db", "elsewhere.db", "copy.db"))
    make(path)
    copy.write_bytes(path.read_bytes())
    with opened(path) as file:
        segment = lease(file, 100)
        path.rename(elsewhere)
        assert_gone(file, segment)
        copy.rename(path)
        assert_gone(file, segment)
        elsewhere.replace(path)
        assert lease(file, 1) == Segment(201, 202)
        path.unlink()
        assert_gone(file, segment)


def assert_gone(file: LedgerFile, segment: Segment) -> None:
    """Every call says that the file is not there any more."""
    problem = f"{file.path} was moved, deleted or replaced while in use: "
    with pytest.raises(Unavailable, match=problem):
        lease(file, 1)
    with pytest.raises(Unavailable, match=problem):
        file.give_back([Tail("orders", segment)])


@pytest.mark.parametrize("suffix", ["-wal", "-shm"])
@pytest.mark.parametrize("replaced", [False, True])
def test_log_that_went_missing_gives_no_more_leases(
    tmp_path: Path, suffix: str, replaced: bool
) -> None:
    """Servers see each other by these files alone; nothing is lost once all have stopped."""
    path = tmp_path / "ids.db"
    companion = Path(f"{path}{suffix}")
    with opened(path) as file:
        lease(file, 100)
        content = companion.read_bytes()
        companion.unlink()
        if replaced:
            companion.write_bytes(content)
        for _ in range(2):
            with pytest.raises(Unavailable, match=f"{companion} was moved, deleted or replaced"):
                lease(file, 1)
    with opened(path) as file:
        assert lease(file, 1) == Segment(101, 102)


def test_two_servers_agree_on_the_log(tmp_path: Path) -> None:
    """A server that opens or closes the file leaves the log of the others in its place."""
    path = tmp_path / "ids.db"
    with opened(path) as first:
        for start in range(1, 10, 2):
            with opened(path) as second:
                assert lease(second, 1).start == start
            assert lease(first, 1).start == start + 1


async def test_file_moved_while_a_lease_waits_gives_nothing(tmp_path: Path) -> None:
    """A lease that waits for its turn looks only then whether the file is still in its place."""
    path = tmp_path / "ids.db"
    ledger = await SqliteLedger.open(path)

    async def lease_in_vain() -> None:
        with pytest.raises(Unavailable, match="was moved, deleted or replaced while in use"):
            await ledger.lease("orders", 100, floor=0, ceiling=MAX_ID)

    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lease_in_vain)
            await trio.sleep(0.05)  # the time of the thread, which no virtual clock can pass
            path.rename(tmp_path / "elsewhere.db")
            other.execute("ROLLBACK")
    await ledger.aclose()


def test_replaced_file_is_closed_without_harm(tmp_path: Path) -> None:
    """Closing a file that was replaced leaves its successor, and its log, as they are."""
    path = tmp_path / "ids.db"
    with opened(path) as old:
        lease(old, 100)
        for leftover in tmp_path.iterdir():
            leftover.unlink()
        with opened(path) as new:
            assert lease(new, 10) == Segment(1, 11)
            old.close()
            assert lease(new, 10) == Segment(11, 21)
    with opened(path) as new:
        assert lease(new, 10) == Segment(21, 31)


def test_deleted_file_is_missed_by_the_next_server(tmp_path: Path) -> None:
    """A file deleted under a running server is not begun anew: its log is still there."""
    path = tmp_path / "ids.db"
    with opened(path) as file:
        lease(file, 100)
        path.unlink()
        assert refusal_of(path).startswith(f"is missing but {path}-wal is there: ")


async def test_lease_under_way_is_seen_through_a_cancel(tmp_path: Path) -> None:
    """A lease that reached the thread returns its segment even if cancelled meanwhile."""
    path = tmp_path / "ids.db"
    ledger = await SqliteLedger.open(path)
    segments: list[Segment] = []

    async def lease_one() -> None:
        segments.append(await ledger.lease("orders", 100, floor=0, ceiling=MAX_ID))

    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lease_one)
            nursery.start_soon(lease_one)
            await trio.testing.wait_all_tasks_blocked()
            assert (ledger._one_at_a_time.borrowed_tokens, ledger._leases.waiting) == (1, 1)
            nursery.cancel_scope.cancel()
            other.execute("ROLLBACK")
    assert segments == [Segment(1, 101)]
    assert await ledger.lease("orders", 1, floor=0, ceiling=MAX_ID) == Segment(101, 102)
    await ledger.aclose()
    assert os.listdir(tmp_path) == ["ids.db"]


async def test_flood_of_new_services_is_a_few_commits(tmp_path: Path) -> None:
    """However many lease at once, the disk is flushed for few of them; each gets its own."""
    services, flushes = 500, 0
    ledger = await SqliteLedger.open(tmp_path / "ids.db")
    answers: list[Segment | Exhausted] = []

    def count_commits(statement: str) -> None:
        nonlocal flushes
        flushes += statement == "COMMIT"

    async def lease_one(number: int) -> None:
        ceiling = 9 if number % 10 == 0 else MAX_ID
        try:
            segment = await ledger.lease(f"service-{number}", 10, floor=0, ceiling=ceiling)
        except Exhausted as error:
            answers.append(error)
        else:
            answers.append(segment)

    ledger._file._db.set_trace_callback(count_commits)
    async with trio.open_nursery() as nursery:
        for number in range(services):
            nursery.start_soon(lease_one, number)
    assert flushes == 2
    assert sum(isinstance(answer, Exhausted) for answer in answers) == services // 10
    assert answers.count(Segment(1, 11)) == services - services // 10
    await ledger.aclose()


async def test_closing_does_not_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lease that hangs holds up the close for its deadline, and no longer."""
    monkeypatch.setattr(module, "CLOSE_TIMEOUT_SECONDS", 0.01)
    ledger = await SqliteLedger.open(tmp_path / "ids.db")
    async with ledger._one_at_a_time:
        await ledger.aclose()
    assert await ledger.lease("orders", 1, floor=0, ceiling=MAX_ID) == Segment(1, 2)
    await ledger.aclose()


async def test_machine_without_a_thread_to_spare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the limit of processes a lease fails but nothing ends, and the file can be closed."""

    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    path = tmp_path / "ids.db"
    ledger = await SqliteLedger.open(path)
    assert await ledger.lease("orders", 100, floor=0, ceiling=MAX_ID) == Segment(1, 101)
    with monkeypatch.context() as limited:
        limited.setattr("trio._threads.start_thread_soon", refuse)
        with pytest.raises(Unavailable, match="can't start new thread"):
            await ledger.lease("orders", 1, floor=0, ceiling=MAX_ID)
        with pytest.raises(Unavailable, match="can't start new thread"):
            await ledger.give_back([Tail("orders", Segment(1, 101))])
        with pytest.raises(StartRefused, match="can't start new thread"):
            await SqliteLedger.open(path)
    assert await ledger.lease("orders", 1, floor=0, ceiling=MAX_ID) == Segment(101, 102)
    with monkeypatch.context() as limited:
        limited.setattr("trio._threads.start_thread_soon", refuse)
        await ledger.aclose()
    assert os.listdir(tmp_path) == ["ids.db"]
