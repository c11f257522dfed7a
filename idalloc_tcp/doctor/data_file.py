"""The embedded ledger's file, looked at without opening it as a server does.

Opening would make what is missing, and leave a log beside it. So the header is read as the bytes
that it is, and the content only while no log is there: as a file that does not change.
"""

import os
import sqlite3
import struct
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Final

import trio

from idalloc_tcp.doctor.finding import Outcome, Report, fail, ok, perform, warn
from idalloc_tcp.ledger.place import DRAFT, DRAFT_PREFIX, companions
from idalloc_tcp.ledger.sqlite import APPLICATION_ID, FORMAT, OLDEST_SQLITE

_MAGIC: Final = b"SQLite format 3\0"
_HEADER_BYTES: Final = 100
#: Where in the header user_version and, after one more field of four bytes, application_id stand.
_VERSIONS: Final = struct.Struct(">60x I 4x I")

#: What is mounted where, in Linux: the mount point is the fifth field, the kind that after a dash.
_MOUNTS: Final = Path("/proc/self/mountinfo")
#: Locks and shared memory do not reach from one machine to another: two servers would not see
#: each other.
_REMOTE: Final = frozenset(
    (
        *("nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ceph", "lustre", "gpfs", "beegfs"),
        *("glusterfs", "ocfs2", "gfs2", "fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.s3fs"),
    )
)
#: Gone with the machine's memory, or with the container.
_FLEETING: Final = frozenset(("tmpfs", "ramfs", "overlay"))


async def examine_data_file(path: Path, report: Report) -> None:
    """Could a server use the file at `path`, which is absolute?"""
    for subject, check in (("data file", _content), ("file system", _file_system)):
        await perform(subject, partial(_aside, partial(check, path)), report)


async def _aside(check: partial[Outcome]) -> Outcome:
    """In a thread: a network file system may hang, and then it is left behind."""
    try:
        return await trio.to_thread.run_sync(check, abandon_on_cancel=True)
    except OSError as error:
        return fail(f"{error.filename}: {error.strerror}")


def _content(path: Path) -> Outcome:
    for problem in _problems(path):
        return fail(problem)
    if not path.exists():
        return warn(
            f"{path} is not there: `serve` makes it, and every service begins at 1; if IDs were "
            "ever given out, this is the wrong path, user or disk"
        )
    if any(companion.exists() for companion in companions(path)):
        return ok(f"{path} is ours and writable; in use, or left by a crash: not read through")
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro&immutable=1", uri=True)) as db:
        try:
            [(damage,)] = db.execute("PRAGMA quick_check(1)").fetchall()
            [(services,)] = db.execute("SELECT count(*) FROM tbl_alloc_info").fetchall()
        except sqlite3.Error as error:
            damage, services = str(error), 0
    if damage != "ok":
        return fail(f"{path} is damaged ({damage}): see Restoring in the README")
    return ok(f"{path} is ours, sound and writable; {services} services")


def _problems(path: Path) -> Iterator[str]:
    """What keeps a server from using it, the first first."""
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        oldest = ".".join(map(str, OLDEST_SQLITE))
        yield f"SQLite {sqlite3.sqlite_version} is too old: install {oldest}"
    directory = _nearest(path.parent)
    if not os.access(directory, os.W_OK | os.X_OK):
        yield f"{directory} is not writable for this user: change its owner, or choose another path"
    if not os.path.lexists(path):
        logs = [log for log in (f"{path}-wal", f"{path}-journal") if os.path.lexists(log)]
        if logs:
            yield f"{path} is missing but {logs[0]} is there: restore {path}, see the README"
        return
    if not path.is_file():
        yield f"{path} is not a regular file: choose another path"
    if not os.access(path, os.R_OK | os.W_OK):
        yield f"{path} is not writable for this user: change its owner or mode"
    # Who died while making the file left a draft, which the next server removes.
    drafts = path.parent.glob(f"{DRAFT_PREFIX}*/{DRAFT}")
    if path.stat().st_nlink > 1 + sum(draft.samefile(path) for draft in drafts):
        yield f"{path} has more than one name: remove the others, which are hard links"
    yield from _header_problems(path)


def _header_problems(path: Path) -> Iterator[str]:
    with path.open("rb") as stream:
        header = stream.read(_HEADER_BYTES)
    if len(header) < _HEADER_BYTES or not header.startswith(_MAGIC):
        yield f"{path} is not an SQLite file, or cut short: restore it, or choose another path"
        return
    found_format, application_id = _VERSIONS.unpack_from(header)
    if application_id != APPLICATION_ID:
        yield f"{path} is an SQLite file of another program: choose another path"
    if found_format != FORMAT:
        yield (
            f"{path} has format {found_format}, but this program reads only {FORMAT}: install the "
            "version of the program that wrote it"
        )


def _file_system(path: Path) -> Outcome:
    kind, mount = _mounted(os.path.realpath(_nearest(path)))
    if mount == str(path):
        return fail(f"{path} is mounted by itself, so servers do not share its log: mount {mount}")
    if kind in _REMOTE:
        return fail(
            f"{mount} is {kind}, where servers on two machines do not see each other's locks: "
            "use a local disk, or MySQL for several machines"
        )
    if kind in _FLEETING:
        return warn(f"{mount} is {kind}: what it holds may be gone after a restart; use a disk")
    return ok(f"{mount} is {kind or 'of a kind that this system does not tell'}")


def _nearest(path: Path) -> Path:
    """The path, or what there is of it."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _mounted(real_path: str) -> tuple[str, str]:
    """The kind of the file system that holds it, and where that is mounted."""
    kind, mount = "", "/"
    try:
        lines = _MOUNTS.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return kind, mount  # Not Linux.
    for line in lines:
        fields, _, source = line.partition(" - ")
        point = fields.split(" ")[4].replace("\\040", " ")
        is_above = real_path == point or real_path.startswith(point.rstrip("/") + "/")
        # The last of the deepest is what is seen.
        if is_above and len(point) >= len(mount):
            kind, mount = source.split(" ")[0], point
    return kind, mount
