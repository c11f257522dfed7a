"""The embedded ledger: one SQLite file, shared by all servers of one machine.

`LedgerFile` is synchronous and holds everything that matters for uniqueness; `SqliteLedger`
runs it in a thread. The safety argument:

* A lease is one statement in one IMMEDIATE transaction, in WAL mode with `synchronous=FULL`.
  It is returned only after its COMMIT has succeeded, and so is on the disk before anybody can
  use it (rule 1, *lead*). Leases of several tasks share a transaction. A COMMIT that failed
  gave nothing to anybody; whatever became of it, the next lease is cut from the row as it is
  then.
* A ledger never starts again from 1 by accident. A new file is made complete under another
  name and then linked into place, so a file that is empty, cut short or not ours is damage or
  a mistake, and is refused. A write-ahead log without its file is refused too: the file is
  missing.
* A file that was moved, deleted or replaced while it is open, or its log was, gives no more
  leases: another server may have started on a new file in its place. Nor does one that servers
  can reach by two names (see `place`).
"""

import os
import sqlite3
import string
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, Self, TypeVar, final

import attrs
import trio

from idalloc_tcp.errors import Exhausted, StartRefused, Unavailable
from idalloc_tcp.ledger import Tail
from idalloc_tcp.ledger.group_commit import GroupCommit
from idalloc_tcp.ledger.place import (
    DRAFT,
    DRAFT_PREFIX,
    Identity,
    check_file,
    companions,
    fsync,
    identity_of,
    make_directory,
)
from idalloc_tcp.pool import Segment

_T = TypeVar("_T")

#: How long to wait for another process that is leasing from the same file.
BUSY_TIMEOUT_SECONDS: Final = 5.0

#: How long closing may wait for the lease that is under way.
CLOSE_TIMEOUT_SECONDS: Final = BUSY_TIMEOUT_SECONDS + 1.0

#: The first SQLite with STRICT tables; RETURNING came a little earlier.
OLDEST_SQLITE: Final = (3, 37, 0)

#: Marks a file as ours, in its header, where file(1) finds it too.
APPLICATION_ID: Final = 0x01DA110C

#: The version of the table, in the header's user_version.
FORMAT: Final = 1

#: Format 1 is exactly this text: another text is another format.
_TABLE: Final = """\
CREATE TABLE tbl_alloc_info (
    service_name TEXT PRIMARY KEY NOT NULL CHECK (service_name = lower(service_name)),
    last_alloc_value INTEGER NOT NULL DEFAULT 0 CHECK (last_alloc_value >= 0),
    data_version INTEGER NOT NULL DEFAULT 0 CHECK (data_version >= 0)
) STRICT"""

# The bound stands in the WHERE because SQLite turns a sum beyond 63 bits into a float.
_LEASE: Final = """\
INSERT INTO tbl_alloc_info (service_name, last_alloc_value, data_version)
VALUES (:service, :first_last, 1)
ON CONFLICT (service_name) DO UPDATE
SET last_alloc_value = max(last_alloc_value, :floor) + :size, data_version = data_version + 1
WHERE max(last_alloc_value, :floor) <= :ceiling - :size
RETURNING last_alloc_value"""

_READ: Final = """\
SELECT coalesce(max(last_alloc_value), 0) FROM tbl_alloc_info WHERE service_name = :service"""

_GIVE_BACK: Final = """\
UPDATE tbl_alloc_info
SET last_alloc_value = :before, data_version = data_version + 1
WHERE service_name = :service AND last_alloc_value = :last"""

#: What stands for itself in the path of a URI.
_PLAIN_BYTES: Final = frozenset(b"/._-" + string.ascii_letters.encode() + string.digits.encode())

#: What SQLite's primary result codes mean to the person who runs the server.
_PROBLEMS: Final = {
    sqlite3.SQLITE_BUSY: "is locked: end the program that holds it",
    sqlite3.SQLITE_READONLY: "is read-only: check the permissions of it and its directory",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened: check the permissions of it and its directory",
    sqlite3.SQLITE_FULL: "cannot grow: make room on the disk",
    sqlite3.SQLITE_IOERR: "cannot be read or written: check the disk, its room and its limits",
    sqlite3.SQLITE_CORRUPT: "is damaged: see Restoring in the README",
    sqlite3.SQLITE_NOTADB: "is not an SQLite file: choose another path, or restore it",
}


@final
@attrs.frozen
class LeaseRequest:
    """What `Ledger.lease` was asked for."""

    service: str
    size: int
    floor: int
    ceiling: int


@final
@attrs.define(eq=False)
class LedgerFile:
    """The ledger's file, opened and checked. Synchronous; for one thread at a time."""

    path: Path
    _db: sqlite3.Connection
    #: Which files it is made of, from when they were first seen.
    _identities: dict[Path, Identity]

    @classmethod
    def open(cls, path: Path, *, busy_timeout_seconds: float = BUSY_TIMEOUT_SECONDS) -> Self:
        """Open the ledger at `path`; make it, and its directory, if there is none.

        Raises:
            StartRefused: the file or its place cannot be used as they are.
        """
        if sqlite3.sqlite_version_info < OLDEST_SQLITE:
            oldest = ".".join(map(str, OLDEST_SQLITE))
            raise StartRefused(f"SQLite {sqlite3.sqlite_version} is too old: install {oldest}")
        path = Path(os.path.abspath(path))
        with _refusing(path):
            _make_if_missing(path)
            identity = check_file(path)
            db = _connect(path, busy_timeout_seconds)
            try:
                _check_content(db, path)
                _make_durable(db, path)
                file = cls(path, db, {path: identity})
                file._prove_writable()
                file._remember_companions()
            except BaseException:
                db.close()
                raise
            return file

    def lease_all(self, requests: Sequence[LeaseRequest]) -> list[Segment | Exhausted]:
        """As `Ledger.lease`, each in its turn; one that is exhausted leaves the others alone.

        Raises:
            Unavailable: whether any was leased is not known; they are all lost.
        """
        with self._transaction():
            return [self._lease(request) for request in requests]

    def give_back(self, tails: Sequence[Tail]) -> list[bool]:
        """As `Ledger.give_back`."""
        with self._transaction():
            return [self._give_back(tail) for tail in tails]

    def close(self) -> None:
        """Close it; never raises. The last to close leaves a single file, without a log."""
        with suppress(sqlite3.Error):
            self._db.close()

    def _lease(self, request: LeaseRequest) -> Segment | Exhausted:
        size, ceiling = request.size, request.ceiling
        first_last = request.floor + size
        if first_last <= ceiling:
            values = attrs.asdict(request) | {"first_last": first_last}
            rows = self._db.execute(_LEASE, values).fetchall()
            if rows:
                last = rows[0][0]
                return Segment(last - size + 1, last + 1)
        [(last,)] = self._db.execute(_READ, {"service": request.service}).fetchall()
        text = f"{request.service}: a lease of {size} would pass its ceiling {ceiling}"
        return Exhausted(text, max(0, ceiling - max(last, request.floor)))

    def _give_back(self, tail: Tail) -> bool:
        request = {
            "service": tail.service,
            "last": tail.segment.last,
            "before": tail.segment.start - 1,
        }
        return self._db.execute(_GIVE_BACK, request).rowcount == 1

    def _prove_writable(self) -> None:
        """Write to the disk what is there already: what keeps leases from it shows now."""
        with self._transaction():
            self._db.execute(f"PRAGMA user_version = {FORMAT}")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing, alone, and on the disk when it is left.

        A `return` inside it comes to the caller only once the COMMIT has succeeded.
        """
        try:
            # Immediate, so that the lock is waited for first: what is checked next still holds
            # when the first write is made.
            self._db.execute("BEGIN IMMEDIATE")
            self._check_in_place()
            yield
            self._db.execute("COMMIT")
        except sqlite3.Error as exc:
            raise Unavailable(_describe(self.path, exc)) from exc
        finally:
            with suppress(sqlite3.Error):
                self._db.rollback()  # does nothing after a COMMIT

    def _remember_companions(self) -> None:
        """They stay as long as the file is open; whoever closes it last removes them."""
        for companion in companions(self.path):
            self._identities[companion] = identity_of(companion)

    def _check_in_place(self) -> None:
        for path, identity in self._identities.items():
            try:
                in_place = identity_of(path) == identity
            except OSError:
                in_place = False
            if not in_place:
                raise Unavailable(
                    f"{path} was moved, deleted or replaced while in use: stop every server that "
                    "uses it, put the right file in its place, then start them again"
                )


@final
@attrs.define(eq=False)
class SqliteLedger:
    """The `Ledger` in one SQLite file: a `LedgerFile` that is run in a thread.

    A call that has reached the thread is seen through even if it is cancelled meanwhile, so
    its outcome is always known. That is bounded by the busy timeout and the disk.
    """

    _file: LedgerFile
    _one_at_a_time: trio.CapacityLimiter
    _leases: GroupCommit[LeaseRequest, Segment | Exhausted] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._leases = GroupCommit(self._lease_all)

    @classmethod
    async def open(cls, path: Path, *, busy_timeout_seconds: float = BUSY_TIMEOUT_SECONDS) -> Self:
        """As `LedgerFile.open`.

        Raises:
            StartRefused: the file or its place cannot be used as they are.
        """
        limiter = trio.CapacityLimiter(1)
        open_file = partial(LedgerFile.open, path, busy_timeout_seconds=busy_timeout_seconds)
        try:
            return cls(await _in_thread(open_file, limiter), limiter)
        except Unavailable as exc:
            raise StartRefused(str(exc)) from exc

    async def lease(self, service: str, size: int, *, floor: int, ceiling: int) -> Segment:
        """As `Ledger.lease`."""
        answer = await self._leases.ask(LeaseRequest(service, size, floor, ceiling))
        if isinstance(answer, Exhausted):
            raise answer
        return answer

    async def _lease_all(self, requests: Sequence[LeaseRequest]) -> list[Segment | Exhausted]:
        return await _in_thread(partial(self._file.lease_all, requests), self._one_at_a_time)

    async def give_back(self, tails: Sequence[Tail]) -> list[bool]:
        """As `Ledger.give_back`."""
        return await _in_thread(partial(self._file.give_back, tails), self._one_at_a_time)

    async def aclose(self) -> None:
        """As `Ledger.aclose`: closes even if the caller is being cancelled."""
        with trio.move_on_after(CLOSE_TIMEOUT_SECONDS, shield=True):
            try:
                await _in_thread(self._file.close, self._one_at_a_time)
            except Unavailable:
                self._file.close()  # It was our turn, so no thread uses the file.


async def _in_thread(call: Callable[[], _T], limiter: trio.CapacityLimiter) -> _T:
    """Run it when its turn has come.

    Raises:
        Unavailable: the machine has no thread to spare; it was not run.
    """
    try:
        return await trio.to_thread.run_sync(call, limiter=limiter)
    except RuntimeError as exc:  # Only of the start: nothing that runs here raises one.
        raise Unavailable(f"the data file cannot be used: {exc}") from exc


def _uri_of(path: Path) -> str:
    """The file, if it exists: `mode=rw` never makes one.

    Not by `Path.as_uri`, which brings all that can be done with URLs into memory.
    """
    quoted = (chr(byte) if byte in _PLAIN_BYTES else f"%{byte:02x}" for byte in os.fsencode(path))
    return f"file:{''.join(quoted)}?mode=rw"


def _connect(path: Path, busy_timeout_seconds: float) -> sqlite3.Connection:
    """Open a file that exists: `mode=rw` never makes one."""
    return sqlite3.connect(
        _uri_of(path),
        uri=True,
        timeout=busy_timeout_seconds,
        isolation_level=None,
        check_same_thread=False,
    )


def _make_if_missing(path: Path) -> None:
    """Put a complete, durable ledger at `path` if there is none."""
    # The logs are looked for first: no process removes the file, so if it is missing now it
    # was missing then, and they are not those of a file that another process has just made.
    logs = [log for log in (f"{path}-wal", f"{path}-journal") if os.path.lexists(log)]
    if not os.path.lexists(path):
        if logs:
            raise StartRefused(
                f"{path} is missing but {logs[0]} is there: restore {path}, "
                f"or delete {logs[0]} to start from 1"
            )
        make_directory(path.parent)
        _make(path)
    fsync(path.parent)


def _make(path: Path) -> None:
    with TemporaryDirectory(
        prefix=DRAFT_PREFIX, dir=path.parent, ignore_cleanup_errors=True
    ) as scratch:
        draft = Path(scratch, DRAFT)
        draft.touch(mode=0o600)
        with closing(_connect(draft, BUSY_TIMEOUT_SECONDS)) as db:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {FORMAT}")
            db.execute(_TABLE)
        fsync(draft)
        with suppress(FileExistsError):  # another process was first: its file is used
            os.link(draft, path)


def _check_content(db: sqlite3.Connection, path: Path) -> None:
    """Only reads: a file that is not ours is left as it is."""
    application_id = _pragma(db, "application_id")
    if application_id != APPLICATION_ID:
        raise StartRefused(
            f"{path} is an SQLite file, but not of this program or damaged "
            f"(application_id {application_id}): choose another path, or restore it from a backup"
        )
    found_format = _pragma(db, "user_version")
    if found_format != FORMAT:
        raise StartRefused(
            f"{path} has format {found_format}, but this program reads only {FORMAT}: "
            "install the version of the program that wrote it"
        )
    damage = _pragma(db, "quick_check(1)")
    if damage != "ok":
        raise StartRefused(_one_line(f"{path} is damaged: see Restoring in the README ({damage})"))
    tables = db.execute("SELECT sql FROM sqlite_schema WHERE name = 'tbl_alloc_info'").fetchall()
    if tables != [(_TABLE,)]:
        raise StartRefused(
            f"{path} has a table tbl_alloc_info of another shape, or none: "
            "restore it from a backup, or choose another path"
        )


def _make_durable(db: sqlite3.Connection, path: Path) -> None:
    if _pragma(db, "journal_mode = WAL") != "wal":
        raise StartRefused(f"{path} cannot have a write-ahead log: put it on a local disk")
    db.execute("PRAGMA synchronous = FULL")


def _pragma(db: sqlite3.Connection, pragma: str) -> object:
    """The first value that it answers."""
    rows = db.execute(f"PRAGMA {pragma}").fetchall()
    return rows[0][0]


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Whatever keeps the file from being used is a refusal to start."""
    try:
        yield
    except (sqlite3.Error, OSError) as exc:
        raise StartRefused(_describe(path, exc)) from exc
    except Unavailable as exc:
        raise StartRefused(str(exc)) from exc


def _describe(path: Path, exc: sqlite3.Error | OSError) -> str:
    """One line: which file, what is wrong, what to do, and the words of the system."""
    if isinstance(exc, OSError):
        where = f" at {exc.filename}" if exc.filename not in (None, str(path)) else ""
        return _one_line(f"{path} cannot be used: {exc.strerror}{where}")
    primary_code = getattr(exc, "sqlite_errorcode", sqlite3.SQLITE_OK) & 0xFF
    problem = _PROBLEMS.get(primary_code, "cannot be used")
    return _one_line(f"{path} {problem} ({exc})")


def _one_line(text: str) -> str:
    return " ".join(text.split())
