"""What the embedded ledger refuses to start on: every refusal says what is wrong, and where."""

import os
import re
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Final

import pytest

from idalloc_tcp.errors import StartRefused
from idalloc_tcp.ledger import sqlite as module
from idalloc_tcp.ledger.sqlite import LedgerFile, SqliteLedger
from tests.ledger.test_sqlite import make, refusal_of, run_child, run_sql

NOBODY: Final = 65534


def make_directory(path: Path) -> None:
    path.mkdir()


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_dangling_link(path: Path) -> None:
    path.symlink_to("nothing")


def make_text(path: Path) -> None:
    path.write_text("service,last\norders,100\n" * 100)


def make_foreign(path: Path) -> None:
    run_sql(path, "CREATE TABLE notes (text)", "INSERT INTO notes VALUES ('mine')")


def make_foreign_of_the_same_table(path: Path) -> None:
    run_sql(path, module._TABLE)


def make_newer(path: Path) -> None:
    make(path)
    run_sql(path, "PRAGMA user_version = 2")


def make_without_table(path: Path) -> None:
    make(path)
    run_sql(path, "DROP TABLE tbl_alloc_info")


def make_other_shape(path: Path) -> None:
    make(path)
    run_sql(path, "ALTER TABLE tbl_alloc_info ADD COLUMN note TEXT")


def make_corrupt(path: Path) -> None:
    make(path)
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * 4096)


def make_cut_short(path: Path) -> None:
    make(path)
    os.truncate(path, 4096)


def make_cut_in_the_header(path: Path) -> None:
    make(path)
    os.truncate(path, 50)


def make_float(path: Path) -> None:
    """As by hand in a program that does not know STRICT."""
    make(path)
    content = path.read_bytes().replace(b" STRICT", b"       ")
    path.write_bytes(content)


REFUSED: Final[dict[Callable[[Path], None], str]] = {
    make_directory: "is a directory: name a file in it",
    make_pipe: "is not a regular file",
    Path.touch: "is empty: it may have been cut short: see Restoring in the README",
    make_dangling_link: "cannot be used: No such file or directory",
    make_text: "is not an SQLite file: ",
    make_foreign: "is an SQLite file, but not of this program or damaged (application_id 0): ",
    make_foreign_of_the_same_table: "is an SQLite file, but not of this program or damaged ",
    make_newer: "has format 2, but this program reads only 1: ",
    make_without_table: "has a table tbl_alloc_info of another shape, or none: ",
    make_other_shape: "has a table tbl_alloc_info of another shape, or none: ",
    make_float: "has a table tbl_alloc_info of another shape, or none: ",
    make_corrupt: "is damaged: see Restoring in the README (",
    make_cut_short: "is damaged: see Restoring in the README (",
    make_cut_in_the_header: "is an SQLite file, but not of this program or damaged ",
}


@pytest.mark.parametrize("spoil", REFUSED)
def test_refuses_what_is_not_a_sound_ledger(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    """Anything at the path but a sound ledger is refused, and left exactly as it is."""
    path = tmp_path / "ids.db"
    spoil(path)
    before = path.read_bytes() if path.is_file() else None
    assert refusal_of(path).startswith(REFUSED[spoil])
    assert os.listdir(tmp_path) == ["ids.db"]
    assert before == (path.read_bytes() if path.is_file() else None)


@pytest.mark.parametrize("suffix", ["-wal", "-journal"])
def test_refuses_a_log_without_its_file(tmp_path: Path, suffix: str) -> None:
    """A log that is there alone means that the file is missing, not that it is new."""
    path = tmp_path / "ids.db"
    log = Path(f"{path}{suffix}")
    log.write_bytes(b"committed leases")
    expected = f"is missing but {log} is there: restore {path}, or delete {log} to start from 1"
    assert refusal_of(path) == expected
    assert os.listdir(tmp_path) == [log.name]


def test_refuses_a_file_for_a_directory(tmp_path: Path) -> None:
    """A path that leads through a file names the place that is wrong."""
    (tmp_path / "file").touch()
    assert refusal_of(tmp_path / "file" / "ids.db") == (
        f"cannot be used: File exists at {tmp_path / 'file'}"
    )


def test_refuses_a_locked_file(tmp_path: Path) -> None:
    """A file that another program keeps locked is waited for, then refused."""
    path = tmp_path / "ids.db"
    make(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert refusal_of(path).startswith("is locked: end the program that holds it")
        other.execute("ROLLBACK")
        LedgerFile.open(path).close()


def test_refuses_an_old_sqlite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library without STRICT tables is named, instead of a syntax error."""
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 34, 1))
    with pytest.raises(StartRefused, match=r"^SQLite .* is too old: install 3\.37\.0$"):
        LedgerFile.open(tmp_path / "ids.db")
    assert os.listdir(tmp_path) == []


def test_refuses_a_place_without_a_write_ahead_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where processes cannot share memory, as on a network disk, the ledger is not safe."""
    path = tmp_path / "ids.db"
    make(path)
    run_sql(path, "PRAGMA journal_mode = DELETE")

    def connect_without_shared_memory(path: Path, _: float) -> sqlite3.Connection:
        return sqlite3.connect(f"{path.as_uri()}?vfs=unix-dotfile", uri=True, isolation_level=None)

    monkeypatch.setattr(module, "_connect", connect_without_shared_memory)
    assert refusal_of(path) == "cannot have a write-ahead log: put it on a local disk"


def test_refuses_a_file_that_is_replaced_while_it_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was checked and what was opened must be the same file."""
    path, other = tmp_path / "ids.db", tmp_path / "other.db"
    make(path)
    make(other)
    connect = module._connect

    def connect_too_late(path: Path, busy_timeout_seconds: float) -> sqlite3.Connection:
        db = connect(path, busy_timeout_seconds)
        other.replace(path)
        return db

    monkeypatch.setattr(module, "_connect", connect_too_late)
    assert refusal_of(path).startswith("was moved, deleted or replaced while in use: ")


def test_refuses_a_file_with_two_names(tmp_path: Path) -> None:
    """Servers that open one file by different names would not see each other."""
    path, other = tmp_path / "ids.db", tmp_path / "other" / "ids.db"
    other.parent.mkdir()
    make(path)
    os.link(path, other)
    assert refusal_of(path).startswith("has more than one name, ")
    assert refusal_of(other).startswith("has more than one name, ")
    other.unlink()
    LedgerFile.open(path).close()


@pytest.mark.parametrize("name", ["ids.db", "a b\\040c.db"])
def test_refuses_a_file_that_is_mounted_by_itself(tmp_path: Path, name: str) -> None:
    """The log of a file that is mounted without its directory is not that of the others."""
    if not may_mount(tmp_path):
        pytest.skip("this user may not mount a file")
    path, mounted = tmp_path / "ids.db", tmp_path / "container" / name
    mounted.parent.mkdir()
    mounted.touch()
    make(path)
    bind = 'mount --bind "$0" "$1" && shift && exec "$@"'
    wrapper = ("unshare", "-m", "sh", "-c", bind, str(path), str(mounted))
    [text] = run_child(OPEN, mounted, wrapper=wrapper)
    assert text.startswith(f"{mounted} is mounted by itself, ")
    assert run_child(OPEN, path) == ["opened"]


OPEN: Final = """
import sys
from pathlib import Path
from idalloc_tcp.errors import StartRefused
from idalloc_tcp.ledger.sqlite import LedgerFile

try:
    LedgerFile.open(Path(sys.argv[1])).close()
except StartRefused as exc:
    print(exc)
else:
    print("opened")
"""

OPEN_AS_NOBODY: Final = f"""
import os, sys
from pathlib import Path
from tempfile import TemporaryDirectory
from idalloc_tcp.errors import StartRefused
from idalloc_tcp.ledger.sqlite import LedgerFile

with TemporaryDirectory() as scratch:  # imports all that it needs while it still may
    LedgerFile.open(Path(scratch, "ids.db")).close()
if os.getuid() == 0:
    os.setgroups([])
    os.setgid({NOBODY})
    os.setuid({NOBODY})
{OPEN}"""


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that every user may enter; those of pytest are for one user only."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        yield Path(directory)
        os.chmod(directory, 0o755)


@pytest.mark.parametrize(
    ("file_mode", "directory_mode", "expected"),
    [
        (0o666, 0o777, "opened"),
        (0o444, 0o777, "is read-only: check the permissions of it and its directory"),
        (0o000, 0o777, "cannot be opened: check the permissions of it and its directory"),
        (0o666, 0o555, "is read-only: check the permissions of it and its directory"),
        (0o444, 0o555, "is read-only: check the permissions of it and its directory"),
        (0o666, 0o000, "cannot be used: Permission denied"),
        (None, 0o777, "opened"),
        (None, 0o555, "cannot be used: Permission denied"),
    ],
)
def test_refuses_what_it_may_not_write(
    open_directory: Path, file_mode: int | None, directory_mode: int, expected: str
) -> None:
    """A file or directory that this user may not write is refused at once, not at a lease."""
    path = open_directory / "ids.db"
    if file_mode is not None:
        make(path)
        path.chmod(file_mode)
    open_directory.chmod(directory_mode)
    [text] = run_child(OPEN_AS_NOBODY, path)
    assert text.removeprefix(f"{path} ").startswith(expected)


RUN_OUT_OF_ROOM: Final = """
import resource, sys
from contextlib import suppress
from pathlib import Path
from idalloc_tcp.errors import StartRefused, Unavailable
from idalloc_tcp.ledger.sqlite import LeaseRequest, LedgerFile

kind, directory = sys.argv[1], Path(sys.argv[2])
path, filler = directory / "ids.db", directory / "filler"
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)

def take_all_room():
    if kind == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, most))
    else:
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

def make_room():
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    filler.unlink(missing_ok=True)

def attempt(action):
    try:
        return action()
    except (StartRefused, Unavailable) as exc:
        print(type(exc).__name__, exc)

def lease():
    [segment] = ledger.lease_all([LeaseRequest("orders", 100, 0, 2**63 - 1)])
    print(segment.start)

take_all_room()
attempt(lambda: LedgerFile.open(path))
make_room()
assert not path.exists()
ledger = LedgerFile.open(path)
attempt(lease)
take_all_room()
attempt(lease)
attempt(lease)
make_room()
attempt(lease)
ledger.close()
take_all_room()
attempt(lambda: LedgerFile.open(path))
make_room()
ledger = LedgerFile.open(path)
attempt(lease)
ledger.close()
"""

ON_A_SMALL_DISK: Final = 'mount -t tmpfs -o size=256k tmpfs "$0" && exec "$@"'


def may_mount(directory: Path) -> bool:
    """Whether this user may mount a file system that no other process sees."""
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", str(directory)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("kind", ["disk", "limit"])
def test_full_disk_loses_nothing(tmp_path: Path, kind: str) -> None:
    """Without room it neither starts nor leases; with room again it goes on where it was."""
    wrapper: tuple[str, ...] = ()
    if kind == "disk":
        if not may_mount(tmp_path):
            pytest.skip("this user may not mount a small disk")
        wrapper = ("unshare", "-m", "sh", "-c", ON_A_SMALL_DISK, str(tmp_path))
    lines = run_child(RUN_OUT_OF_ROOM, kind, tmp_path, wrapper=wrapper)
    path = re.escape(str(tmp_path / "ids.db"))
    problem = rf"{path} cannot (grow|be read or written): .* room .*"
    expected = [
        rf"StartRefused {problem}",
        "1",
        rf"Unavailable {problem}",
        rf"Unavailable {problem}",
        "101",
        rf"StartRefused {problem}",
        "201",
    ]
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line)


async def test_refusal_comes_through_the_thread(tmp_path: Path) -> None:
    """Opening in the thread refuses as opening does."""
    (tmp_path / "ids.db").touch()
    with pytest.raises(StartRefused, match="is empty"):
        await SqliteLedger.open(tmp_path / "ids.db")
