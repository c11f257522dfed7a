"""Load on a server that answers each request with one line, made by a process of its own.

with open_generator("auto") as generator:
    sample = generator.run(Load(port=port, requests=[b"PING\n"], pids=[server.pid]))
"""

import json
import shutil
import subprocess
import sys
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self, final

import attrs

HERE: Final = Path(__file__).parent
KINDS: Final = ("auto", "c", "python")
#: Beyond its windows, a generator may take so long to connect, to warm up and to end.
PATIENCE_SECONDS: Final = 240.0
#: What a request counts that was not answered within this long after the end.
GRACE_SECONDS: Final = 5.0


class GeneratorFailed(Exception):
    """A generator could not be built, ended with an error, or saw replies that it should not."""


@final
@attrs.frozen(kw_only=True)
class Load:
    """What a generator does.

    Args:
        port: of 127.0.0.1.
        requests: their texts. Connection i always sends number i (modulo), unless it `rotates`:
            then each connection goes through all of them, the i-th begins at its i-th part.
        expected: what every good reply begins with, one character.
        pids: the processes whose CPU time is taken over the window.
        in_flight: how many requests each connection keeps under way.
        burst: how many it sends at once, as soon as so many fit; unset, all that are in flight.
        active: how many connections have requests under way; the turn goes round all of them.
        rate: requests a second that become due, over all connections; 0 asks as fast as answered.
        warm_requests: what has to be answered, beside `warm_seconds`, before the window opens.
    """

    port: int
    requests: Sequence[bytes] = attrs.field(repr=False)
    expected: str
    pids: Sequence[int] = ()
    connections: int = 1
    in_flight: int = 1
    burst: int | None = None
    active: int | None = None
    rotates: bool = False
    rate: float = 0.0
    warm_seconds: float = 0.2
    warm_requests: int = 0
    seconds: float = 0.8
    keeps_latencies: bool = False

    def arguments(self, requests: Path, latencies: Path) -> list[str]:
        """The command line after the program's name."""
        values: dict[str, Any] = attrs.asdict(self)
        values |= {
            "requests": requests,
            "pids": ",".join(map(str, self.pids)),
            "burst": self.burst or self.in_flight,
            "active": self.active or self.connections,
            "rotates": int(self.rotates),
            "latencies": latencies if self.keeps_latencies else "",
        }
        del values["keeps_latencies"]
        return [f"{name}={value}" for name, value in values.items()]


@final
@attrs.frozen
class Sample:
    """What was counted between the beginning and the end of a window.

    Attributes:
        cpu_seconds: user and system time of all `pids`.
        latencies_ns: sorted; of the requests that were due, or sent, in the window.
    """

    requests: int
    seconds: float
    cpu_seconds: float
    latencies_ns: "array[int]" = attrs.field(factory=lambda: array("Q"), repr=False)

    @property
    def cpu_us_per_request(self) -> float:
        """NaN where nothing was answered."""
        return self.cpu_seconds / self.requests * 1e6 if self.requests else float("nan")

    @property
    def requests_per_second(self) -> float:
        """Answered ones."""
        return self.requests / self.seconds


@final
@attrs.define(eq=False)
class Running:
    """A generator at work. After the `with` it is gone."""

    _process: subprocess.Popen[str]
    _folder: tempfile.TemporaryDirectory[str]
    _load: Load

    @property
    def pid(self) -> int:
        """Of the generator's process."""
        return self._process.pid

    def result(self) -> Sample:
        """Wait until it is through.

        Raises:
            GeneratorFailed: it ended with an error, or some replies were not as expected.
        """
        patience = PATIENCE_SECONDS + self._load.warm_seconds + self._load.seconds
        output, complaint = self._process.communicate(timeout=patience)
        if self._process.returncode:
            raise GeneratorFailed(complaint.strip())
        counted = json.loads(output)
        if counted["unexpected"]:
            how_many = f"{counted['unexpected']} replies do not begin with {self._load.expected!r}"
            raise GeneratorFailed(f"{how_many}, the first: {complaint.strip()}")
        return Sample(
            counted["requests"],
            counted["seconds"],
            counted["cpu_seconds"],
            self._latencies(counted["unanswered"]),
        )

    def _latencies(self, unanswered: int) -> "array[int]":
        latencies = array("Q")
        path = Path(self._folder.name, "latencies")
        if path.exists():
            latencies.frombytes(path.read_bytes())
            latencies.extend([round(GRACE_SECONDS * 1e9)] * unanswered)
        return array("Q", sorted(latencies))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._folder.cleanup()


@final
@attrs.frozen
class Generator:
    """How load is made: by the C program, or by the one in Python."""

    name: str
    _command: Sequence[str]

    def start(self, load: Load) -> Running:
        """Begin; to be used as a context manager."""
        folder = tempfile.TemporaryDirectory(prefix="idalloc-bench-")
        requests = Path(folder.name, "requests")
        requests.write_bytes(b"".join(request + b"\0" for request in load.requests))
        arguments = load.arguments(requests, Path(folder.name, "latencies"))
        process = subprocess.Popen(
            [*self._command, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        return Running(process, folder, load)

    def run(self, load: Load) -> Sample:
        """From the beginning to the end.

        Raises:
            GeneratorFailed: as `Running.result`.
        """
        with self.start(load) as running:
            return running.result()


def has_compiler() -> bool:
    """Is gcc there?"""
    return shutil.which("gcc") is not None


def compile_c(source: Path, folder: Path) -> Path:
    """The program that gcc makes of a file.

    Raises:
        GeneratorFailed: gcc refuses, or is not there.
    """
    program = folder / source.stem
    try:
        command = ["gcc", "-O2", "-o", str(program), str(source)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        raise GeneratorFailed("gcc is not installed: take --generator python") from None
    except subprocess.CalledProcessError as error:
        raise GeneratorFailed(f"gcc: {error.stderr.strip()}") from error
    return program


@contextmanager
def open_generator(kind: str) -> Iterator[Generator]:
    """A generator of one of the `KINDS`; `auto` is C where gcc is there.

    Raises:
        GeneratorFailed: it cannot be built.
    """
    if kind == "python" or (kind == "auto" and not has_compiler()):
        yield Generator("python", [sys.executable, "-m", "bench.python_generator"])
        return
    with tempfile.TemporaryDirectory(prefix="idalloc-bench-") as folder:
        yield Generator("C", [str(compile_c(HERE / "generator.c", Path(folder)))])
