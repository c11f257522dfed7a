"""The load generator where there is no gcc: same arguments, same output as `generator.c`."""

import json
import select
import socket
import sys
import time
from array import array
from collections import deque
from pathlib import Path
from typing import Final, final

import attrs

from bench.generator import GRACE_SECONDS
from bench.processor import cpu_seconds

READ_BYTES: Final = 65_536
#: After so many new connections the last one gets a reply, so that no backlog overflows.
PACE: Final = 512
OUTSTANDING_MAX: Final = 1024
SLEEP_SECONDS_MAX: Final = 0.01


@final
@attrs.define(eq=False)
class Connection:
    """One connection, and when its unanswered requests were due."""

    socket: socket.socket
    #: The text that is sent next.
    turn: int
    due: deque[float] = attrs.field(factory=deque)
    unsent: bytes = b""
    inside_line: bool = False


@final
@attrs.define(eq=False)
class Client:
    """All connections, and what came over them."""

    _texts: list[bytes]
    _rotates: bool
    _expected: int
    connections: list[Connection] = attrs.field(init=False, factory=list)
    replies: int = attrs.field(init=False, default=0)
    unexpected: int = attrs.field(init=False, default=0)
    #: When the answered requests were due, and when the reply came.
    answered: list[tuple[float, float]] | None = attrs.field(init=False, default=None)
    _poller: select.epoll = attrs.field(init=False, factory=select.epoll)
    _by_fd: dict[int, Connection] = attrs.field(init=False, factory=dict)

    def connect(self, port: int, count: int) -> None:
        """Open all connections."""
        for number in range(count):
            client = socket.create_connection(("127.0.0.1", port))
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            texts = len(self._texts)
            turn = number * texts // count if self._rotates else number % texts
            connection = Connection(client, turn)
            if number % PACE == PACE - 1:
                client.sendall(self._texts[turn])
                while client.recv(1) != b"\n":
                    pass
            client.setblocking(False)
            self._poller.register(client, select.EPOLLIN)
            self._by_fd[client.fileno()] = connection
            self.connections.append(connection)

    def ask(self, connection: Connection, count: int, due: float) -> None:
        """Send so many requests, as one piece."""
        if self._rotates:
            texts, turn = self._texts, connection.turn
            request = b"".join(texts[(turn + i) % len(texts)] for i in range(count))
            connection.turn = (turn + count) % len(texts)
        else:
            request = self._texts[connection.turn] * count
        connection.due.extend([due] * count)
        if connection.unsent:
            connection.unsent += request
        elif (sent := connection.socket.send(request)) < len(request):
            connection.unsent = request[sent:]
            self._poller.modify(connection.socket, select.EPOLLIN | select.EPOLLOUT)

    def attend(self, seconds: float) -> list[tuple[Connection, int]]:
        """Wait so long at most: connections that got replies, and how many."""
        heard = []
        for fd, event in self._poller.poll(min(seconds, SLEEP_SECONDS_MAX)):
            connection = self._by_fd[fd]
            if event & select.EPOLLOUT:
                self._send_rest(connection)
            if event & ~select.EPOLLOUT:
                heard.append((connection, self._hear(connection)))
        return heard

    def _send_rest(self, connection: Connection) -> None:
        sent = connection.socket.send(connection.unsent)
        connection.unsent = connection.unsent[sent:]
        if not connection.unsent:
            self._poller.modify(connection.socket, select.EPOLLIN)

    def _hear(self, connection: Connection) -> int:
        data = connection.socket.recv(READ_BYTES)
        if not data:
            raise ConnectionError("the server closed a connection")
        begun = data.splitlines()[connection.inside_line :]
        strange = [line for line in begun if line[0] != self._expected]
        if strange and not self.unexpected:
            print(strange[0].decode(errors="replace"), file=sys.stderr)
        self.unexpected += len(strange)
        lines = data.count(b"\n")
        connection.inside_line = not data.endswith(b"\n")
        self.replies += lines
        now = time.monotonic()
        for _ in range(lines):
            due = connection.due.popleft()
            if self.answered is not None:
                self.answered.append((due, now))
        return lines


@final
@attrs.define(eq=False)
class Window:
    """What is counted between its beginning and its end."""

    _client: Client
    _pids: list[int]
    _seconds: float
    began: float = float("inf")
    ends: float = float("inf")
    _replies: int = 0
    _cpu_seconds: float = 0.0

    def open(self, at: float) -> None:
        """Now, though it counts from `at`."""
        self._cpu_seconds = cpu_seconds(self._pids)
        self._replies = self._client.replies
        self.began, self.ends = at, at + self._seconds

    def close(self) -> dict[str, float]:
        """What the result says of it."""
        return {
            "cpu_seconds": cpu_seconds(self._pids) - self._cpu_seconds,
            "requests": self._client.replies - self._replies,
            "seconds": time.monotonic() - self.began,
        }


@final
@attrs.frozen
class Schedule:
    """When the requests of an open loop are due: evenly spaced, whatever the server does."""

    _start: float
    _rate: float

    def due(self, number: int) -> float:
        """When request `number`, from 0, is due."""
        return self._start + number / self._rate


def _run_closed(client: Client, window: Window, arguments: dict[str, str]) -> dict[str, float]:
    active, in_flight, burst = (int(arguments[name]) for name in ("active", "in_flight", "burst"))
    ready = time.monotonic() + float(arguments["warm_seconds"])
    warm_requests = int(arguments["warm_requests"])
    connections, cursor = client.connections, active - 1
    for connection in connections[:active]:
        for _ in range(0, in_flight, burst):
            client.ask(connection, burst, time.monotonic())
    while (now := time.monotonic()) < window.ends:
        for heard, lines in client.attend(window.ends - now):
            asking = heard
            if active < len(connections) and lines and not heard.due:
                while (asking := connections[cursor := (cursor + 1) % len(connections)]).due:
                    pass
            while len(asking.due) + burst <= in_flight:
                client.ask(asking, burst, time.monotonic())
                if active < len(connections):
                    break
        is_warm = now >= ready and client.replies >= warm_requests
        if is_warm and window.ends == float("inf"):
            window.open(time.monotonic())
    return window.close()


def _run_open(client: Client, window: Window, arguments: dict[str, str]) -> dict[str, float]:
    start, asked, connections = time.monotonic(), 0, client.connections
    schedule = Schedule(start, float(arguments["rate"]))
    opens = start + float(arguments["warm_seconds"])
    while (now := time.monotonic()) < window.ends:
        while (due := schedule.due(asked)) <= now:
            connection = connections[asked % len(connections)]
            if len(connection.due) == OUTSTANDING_MAX:
                break  # It waits, and its latency grows meanwhile.
            client.ask(connection, 1, due)
            asked += 1
        client.attend(max(0.0, due - now))
        if window.ends == float("inf") and now >= opens:
            window.open(opens)
    result = window.close()
    while any(one.due for one in connections) and time.monotonic() < window.ends + GRACE_SECONDS:
        client.attend(SLEEP_SECONDS_MAX)
    missed = sum(schedule.due(asked + i) < window.ends for i in range(OUTSTANDING_MAX))
    return result | {"unanswered": missed + sum(len(one.due) for one in connections)}


def main(arguments: dict[str, str]) -> None:
    """Make the load that the arguments describe, and print what was counted."""
    texts = Path(arguments["requests"]).read_bytes().split(b"\0")[:-1]
    client = Client(texts, arguments["rotates"] == "1", ord(arguments["expected"]))
    if arguments["latencies"]:
        client.answered = []
    client.connect(int(arguments["port"]), int(arguments["connections"]))
    pids = [int(pid) for pid in arguments["pids"].split(",") if pid]
    window = Window(client, pids, float(arguments["seconds"]))
    run = _run_open if float(arguments["rate"]) else _run_closed
    result: dict[str, float] = {"unanswered": 0} | run(client, window, arguments)
    if client.answered is not None:
        within = [pair for pair in client.answered if window.began <= pair[0] < window.ends]
        latencies = array("Q", (round((now - due) * 1e9) for due, now in within))
        Path(arguments["latencies"]).write_bytes(latencies.tobytes())
    print(json.dumps(result | {"unexpected": client.unexpected}))


if __name__ == "__main__":
    main(dict(argument.split("=", 1) for argument in sys.argv[1:]))
