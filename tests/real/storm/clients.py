"""The load: client processes that take IDs, measure, and keep all they were given."""

import random
import socket
import time
from array import array
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from typing import Any, Final, final

import attrs

SERVICES: Final = ("orders", "users", "events")
COUNTS: Final = (1, 1, 1, 2, 3, 10, 100)
LARGE_COUNT: Final = 20_000
LARGE_EVERY: Final = 200
#: The mean pause between a client's requests.
THINK_SECONDS: Final = 0.002
SOCKET_SECONDS: Final = 10.0
#: Requests that took longer are kept one by one.
NOTABLE_SECONDS: Final = 0.05


@final
@attrs.frozen
class Failure:
    """A reply that was not OK: when it came (monotonic), its code, and how long it took."""

    at: float
    code: str
    seconds: float


@final
@attrs.define
class Log:
    """What one client got."""

    #: By service: first, count, first, count, …
    ranges: "list[array[int]]" = attrs.field(factory=lambda: [array("q") for _ in SERVICES])
    requests: int = 0
    ids: int = 0
    order_violations: int = 0
    #: (when, how long) of the requests that took longest.
    slowest: list[tuple[float, float]] = attrs.field(factory=list)
    failures: list[Failure] = attrs.field(factory=list)

    def note(self, index: int, ids: range | bytes, began: float, highest: Any) -> None:
        """Keep the reply to a request for IDs of service `index`: the IDs, or the error's code."""
        ended = time.monotonic()
        seconds = ended - began
        self.requests += 1
        if seconds > NOTABLE_SECONDS:
            self.slowest.append((ended, seconds))
        if isinstance(ids, bytes):
            self.failures.append(Failure(ended, ids.decode(), seconds))
            return
        self.ids += len(ids)
        self.order_violations += ids.start <= highest[index]
        self.ranges[index].extend((ids.start, len(ids)))
        highest[index] = ids[-1]


def run_client(
    endpoint: tuple[str, int],
    seed: float,
    highest: Any,
    over: Event,
    pipe: Connection,
) -> None:
    """Take IDs until it is over, then send the `Log`. `highest` shows the last ID by service."""
    log, rng = Log(), random.Random(seed)
    with (
        socket.create_connection(endpoint, SOCKET_SECONDS) as client,
        client.makefile("rb") as lines,
    ):
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while not over.is_set():
            index = rng.randrange(len(SERVICES))
            count = LARGE_COUNT if rng.randrange(LARGE_EVERY) == 0 else rng.choice(COUNTS)
            began = time.monotonic()
            client.sendall(b"ALLOC %s %d\n" % (SERVICES[index].encode(), count))
            words = lines.readline().split()
            ids = range(int(words[1]), int(words[1]) + count) if words[0] == b"OK" else words[1]
            log.note(index, ids, began, highest)
            time.sleep(rng.expovariate(1 / THINK_SECONDS))
    pipe.send(log)
    pipe.close()
