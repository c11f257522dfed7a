"""Many client processes on several servers with one data file: is any ID given out twice?

    python -m tests.hammer --servers 2 --clients 8 --ids 100000 --kills 3

Every client takes IDs in mixed counts, several requests in flight, and keeps every range that it
was given. With `--kills`, servers are killed (as by a crash) and started again under the load, and
clients connect again. Of servers with `--workers`, single workers are killed instead. In the end
all ranges are laid side by side. Exits with 1 if any two overlap.
"""

import argparse
import multiprocessing
import random
import socket
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Final, final

import attrs

from tests.processes import ServerProcess

IN_FLIGHT: Final = 8
SERVICES: Final = ("orders", "users")
#: No client goes on for longer.
CLIENT_SECONDS: Final = 60.0
#: Mostly small, sometimes larger than a segment.
COUNTS: Final = (1, 1, 1, 2, 3, 7, 10, 50, 100, 999)
LARGE_COUNT: Final = 15_000
LARGE_EVERY: Final = 400


@final
@attrs.define
class Taken:
    """What one client got: firsts and counts by service, and what went wrong."""

    ranges: "dict[str, array[int]]" = attrs.field(
        factory=lambda: {service: array("q") for service in SERVICES}
    )
    ids: int = 0
    requests: int = 0
    lost_connections: int = 0
    order_violations: int = 0


@final
@attrs.frozen
class Verdict:
    """What all clients together got. Gaps are expected: what a server held when it was ended."""

    ids: int
    requests: int
    duplicates: int
    order_violations: int
    lost_connections: int
    gap_ids: int
    seconds: float


def _requests(rng: random.Random) -> list[tuple[str, int]]:
    return [
        (
            rng.choice(SERVICES),
            LARGE_COUNT if rng.randrange(LARGE_EVERY) == 0 else rng.choice(COUNTS),
        )
        for _ in range(IN_FLIGHT)
    ]


def _converse(
    endpoint: tuple[str, int], enough: Callable[[], bool], rng: random.Random, taken: Taken
) -> None:
    """Take IDs on one connection until there are enough, or it breaks with OSError."""
    last = dict.fromkeys(SERVICES, 0)
    with socket.create_connection(endpoint, timeout=10) as client, client.makefile("rb") as replies:
        while not enough():
            requests = _requests(rng)
            client.sendall(b"".join(b"ALLOC %s %d\n" % (s.encode(), n) for s, n in requests))
            for service, count in requests:
                reply = replies.readline()
                if not reply.endswith(b"\n"):
                    raise ConnectionError("cut off")
                taken.requests += 1
                word, first, *_ = reply.split()
                if word != b"OK":
                    continue
                taken.ranges[service].extend((int(first), count))
                taken.ids += count
                taken.order_violations += int(first) <= last[service]
                last[service] = int(first) + count - 1


def _client(
    endpoint: tuple[str, int], wanted: int, seed: float, calm: Event, pipe: Connection
) -> None:
    taken, rng = Taken(), random.Random(seed)
    deadline = time.monotonic() + CLIENT_SECONDS

    def enough() -> bool:
        return (taken.ids >= wanted and calm.is_set()) or time.monotonic() > deadline

    while not enough():
        try:
            _converse(endpoint, enough, rng, taken)
        except OSError:
            taken.lost_connections += 1
            time.sleep(0.05)
    pipe.send(taken)
    pipe.close()


def overlaps(ranges: Iterator[tuple[int, int]]) -> tuple[int, int]:
    """How many IDs of (first, count) ranges occur more than once, and how many are missing."""
    duplicates = gaps = 0
    stop = 1
    for first, count in sorted(ranges):
        duplicates += max(0, min(stop, first + count) - first)
        gaps += max(0, first - stop)
        stop = max(stop, first + count)
    return duplicates, gaps


def _judge(all_taken: Sequence[Taken], seconds: float) -> Verdict:
    duplicates = gaps = 0
    for service in SERVICES:
        flat = [taken.ranges[service] for taken in all_taken]
        pairs = (pair for one in flat for pair in zip(one[::2], one[1::2], strict=True))
        more_duplicates, more_gaps = overlaps(pairs)
        duplicates += more_duplicates
        gaps += more_gaps
    return Verdict(
        ids=sum(taken.ids for taken in all_taken),
        requests=sum(taken.requests for taken in all_taken),
        duplicates=duplicates,
        order_violations=sum(taken.order_violations for taken in all_taken),
        lost_connections=sum(taken.lost_connections for taken in all_taken),
        gap_ids=gaps,
        seconds=seconds,
    )


def hammer(
    *, servers: int, clients: int, ids: int, kills: int, seed: int, workers: int = 1
) -> Verdict:
    """Run the load and compare all that was given out."""
    context = multiprocessing.get_context("spawn")
    calm = context.Event()  # No more crashes: whoever has enough may leave.
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "ids.sqlite3"
        flags = ("--workers", str(workers))
        running = [ServerProcess.start(*flags, data=data) for _ in range(servers)]
        began = time.monotonic()
        try:
            pipes = []
            for number in range(clients):
                ours, theirs = context.Pipe(duplex=False)
                endpoint = running[number % servers].endpoint
                arguments = (endpoint, ids, rng.random(), calm, theirs)
                context.Process(target=_client, args=arguments, daemon=True).start()
                theirs.close()
                pipes.append(ours)
            for _ in range(kills):
                time.sleep(rng.uniform(0.5, 1.0))
                index = rng.randrange(servers)
                if workers > 1:
                    rng.choice(running[index].workers).kill()
                else:
                    running[index] = _crash(running[index], data)
            calm.set()
            taken = [pipe.recv() for pipe in pipes]
        finally:
            for server in running:
                server.__exit__(None, None, None)
    return _judge(taken, time.monotonic() - began)


def _crash(server: ServerProcess, data: Path) -> ServerProcess:
    address = server.address
    server.kill()
    server.__exit__(None, None, None)
    return ServerProcess.start(data=data, listen=address)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--servers", type=int, default=2, help="on one data file")
    parser.add_argument("--workers", type=int, default=1, help="processes of each server")
    parser.add_argument("--clients", type=int, default=8, help="each a process")
    parser.add_argument(
        "--ids", type=int, default=100_000, help="each client takes at least so many"
    )
    parser.add_argument("--kills", type=int, default=0, help="kill -9 and restart so many times")
    parser.add_argument("--seed", type=int, default=1, help="of the counts and crashes")
    verdict = hammer(**vars(parser.parse_args()))
    for name, value in attrs.asdict(verdict).items():
        print(f"{name:17} {value:,.1f}" if name == "seconds" else f"{name:17} {value:,}")
    return 1 if verdict.duplicates or verdict.order_violations else 0


if __name__ == "__main__":
    sys.exit(main())
