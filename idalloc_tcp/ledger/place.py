"""Where a data file lies: all servers that open it must mean the same one, by the same name.

SQLite keeps servers apart, and keeps what they committed, in two more files beside the first,
which it finds by its name. So servers that reach one file by two names do not see each other,
and nothing of that shows in the file itself. It is looked for here, from outside.
"""

import os
import re
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeAlias

from idalloc_tcp.errors import StartRefused

#: What tells one file from another, whatever their names: device and inode.
Identity: TypeAlias = tuple[int, int]

#: A new file gets its content under another name: this one, in a directory that begins so.
DRAFT: Final = "ledger"
DRAFT_PREFIX: Final = ".idalloc-"

#: What is mounted where, in Linux; a line has its mount point as the fifth of its fields.
_MOUNTS: Final = Path("/proc/self/mountinfo")


def identity_of(path: Path) -> Identity:
    """Which file it is now.

    Raises:
        OSError: none that can be seen.
    """
    status = os.stat(path)
    return status.st_dev, status.st_ino


def companions(path: Path) -> tuple[Path, Path]:
    """The files that SQLite keeps beside it while it is open: the log, and who reads what."""
    real = os.path.realpath(path)
    return Path(f"{real}-wal"), Path(f"{real}-shm")


def check_file(path: Path) -> Identity:
    """The file's identity; what can be seen from outside must be right.

    Raises:
        StartRefused: it is not.
        OSError: it cannot be seen.
    """
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise StartRefused(f"{path} is a directory: name a file in it")
    if not stat.S_ISREG(status.st_mode):
        raise StartRefused(f"{path} is not a regular file: choose another path")
    if status.st_size == 0:
        raise StartRefused(
            f"{path} is empty: it may have been cut short: see Restoring in the README"
        )
    if _is_mounted(path):
        raise StartRefused(
            f"{path} is mounted by itself, so servers elsewhere do not see its log: "
            "mount its directory"
        )
    if status.st_nlink > 1 and _names_left(path) > 1:
        raise StartRefused(
            f"{path} has more than one name, and servers that use different ones do not see "
            "each other: remove the others, which are hard links"
        )
    return status.st_dev, status.st_ino


def _names_left(path: Path) -> int:
    """How many hard links it has, without that of its draft.

    Who made the file removes its draft right after; or dies before, and then it is done here.
    """
    directory = Path(os.path.realpath(path)).parent
    for draft in directory.glob(f"{DRAFT_PREFIX}*/{DRAFT}"):
        with suppress(OSError):  # It is gone already.
            if draft.samefile(path):
                draft.unlink()
                draft.parent.rmdir()
    return os.stat(path).st_nlink


def _is_mounted(path: Path) -> bool:
    """Is the file itself a mount point?"""
    try:
        lines = _MOUNTS.read_text(errors="surrogateescape").split("\n")
    except OSError:
        return False  # Not Linux: there files are not mounted.
    real = os.path.realpath(path)
    return any(_unescaped(line.split(" ")[4]) == real for line in lines if line)


def _unescaped(name: str) -> str:
    r"""A name from the list of mounts, where a space is `\040`."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), name)


def make_directory(directory: Path) -> None:
    """Make it, and what is missing above it, durably, for the owner alone."""
    if not directory.is_dir():
        make_directory(directory.parent)
        directory.mkdir(mode=0o700, exist_ok=True)
        fsync(directory.parent)


def fsync(path: Path) -> None:
    """See that a file's content, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
