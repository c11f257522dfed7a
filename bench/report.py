"""What every command is asked and what it hands back: tables, targets, JSON, a picture."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, TypeVar, final

import attrs

from bench.generator import GeneratorFailed, has_compiler
from bench.picture import save_picture
from bench.table import Spread, Table, Target, target_table
from tests.real.process import MissingServer, find_program

RESULTS: Final = Path(__file__).parent / "results"
_PACKAGES: Final = ("trio", "attrs", "asyncmy", "redis", "psutil", "matplotlib")
_PROGRAMS: Final = ("redis-server", "mariadbd", "gcc")

_T = TypeVar("_T")


@final
@attrs.frozen
class Options:
    """What the command line asks for.

    Attributes:
        quick: a smoke test: every part runs, and no number means anything.
        generator: one of `bench.generator.KINDS`.
        server_flags: further ones for this server.
        results: where the files go; unset, to `RESULTS`, but those of a smoke test nowhere.
        minutes: how long `soak` goes on.
    """

    quick: bool = False
    generator: str = "auto"
    server_flags: Sequence[str] = ()
    results: Path | None = None
    minutes: float = 4.0


@final
@attrs.define
class Report:
    """What a command found.

    Attributes:
        method: how it was measured, in names and values.
        samples: every single measurement.
        notes: what a reader of the tables has to know.
        draw: puts the picture on a matplotlib figure.
    """

    command: str
    method: Mapping[str, Any]
    draw: Callable[[Any], None]
    tables: Sequence[Table] = ()
    targets: Sequence[Target] = ()
    samples: Any = attrs.field(factory=dict)
    notes: Sequence[str] = ()

    def publish(self, options: Options) -> None:
        """Print it, and write `<command>.json` and `<command>.png`."""
        tables = [*self.tables, *([target_table(self.targets)] if self.targets else [])]
        print("\n\n".join(map(str, tables)))
        for note in self.notes:
            print(f"* {note}")
        folder = options.results or RESULTS
        if options.quick and options.results is None:
            print("* a smoke test: no number above means anything, and nothing was written")
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.command}.json"
        path.write_text(json.dumps(self.as_json(), indent=1, default=_plain) + "\n")
        print(f"written: {path}")
        print(save_picture(folder / f"{self.command}.png", self.draw))

    def as_json(self) -> dict[str, Any]:
        """All of it but the picture."""
        return {
            "command": self.command,
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "machine": machine(),
            "method": self.method,
            "tables": [attrs.asdict(table, recurse=False) for table in self.tables],
            "targets": [target.as_json() for target in self.targets],
            "notes": self.notes,
            "samples": self.samples,
        }


def _plain(value: object) -> Any:
    if isinstance(value, Spread):
        return attrs.asdict(value)
    raise TypeError(f"{value!r} has no place in JSON")


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {name: _package_version(name) for name in _PACKAGES},
        "programs": {name: _program_version(name) for name in _PROGRAMS},
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _program_version(name: str) -> str | None:
    try:
        path = find_program(name, debian_package=name)
    except MissingServer:
        return None
    done = subprocess.run([path, "--version"], capture_output=True, check=False, text=True)
    return done.stdout.partition("\n")[0]


@final
@attrs.define
class Progress:
    """One line on standard error that says how far it is."""

    total: int
    done: int = 0

    def step(self, what: str) -> None:
        """The next measurement begins."""
        self.done += 1
        end = "" if sys.stderr.isatty() else "\n"
        begin = "\r\x1b[K" if sys.stderr.isatty() else ""
        print(f"{begin}[{self.done}/{self.total}] {what}", end=end, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Nothing more comes."""
        if sys.stderr.isatty():
            print(file=sys.stderr)


@final
@attrs.frozen
class Opener:
    """Starts what a command needs; does without what is not installed, and says so."""

    stack: ExitStack
    notes: list[str] = attrs.field(factory=list)

    def open(self, server: AbstractContextManager[_T]) -> _T | None:
        """None where a program is missing."""
        try:
            return self.stack.enter_context(server)
        except MissingServer as missing:
            self.notes.append(f"left out: {missing}")
        except GeneratorFailed as failed:
            if has_compiler():
                raise
            self.notes.append(f"left out: the C echo, as {failed}")
        return None
