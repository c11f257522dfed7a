"""Several processes as one server: what is merged, what a death costs, how they stop."""

import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Final, final

import attrs
import psutil
import pytest

from idalloc_tcp.workers import GATHER_SECONDS
from tests.hammer import overlaps
from tests.processes import ServerProcess

WORKERS: Final = ("--workers", "2")
#: So many connections that each worker has some of them.
CONNECTIONS: Final = 16
PATIENCE_SECONDS: Final = 10.0


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data file that does not exist yet."""
    return tmp_path / "ids.sqlite3"


@pytest.fixture
def server(data: Path) -> Iterator[ServerProcess]:
    """A server of two workers on a new data file."""
    with ServerProcess.start(*WORKERS, data=data) as running:
        yield running


@final
@attrs.define(eq=False)
class Client:
    """A connection that takes IDs, and keeps what it got."""

    _socket: socket.socket
    taken: list[tuple[int, int]] = attrs.field(factory=list)

    @property
    def port(self) -> int:
        """Its own end's."""
        port: int = self._socket.getsockname()[1]
        return port

    def alloc(self, count: int) -> int:
        """Take IDs: the first. ConnectionError: the server has gone."""
        word, *fields = self.ask(f"ALLOC orders {count}")[0].split()
        if word != "OK":
            raise ConnectionError(word)
        self.taken.append((int(fields[0]), count))
        return int(fields[0])

    def stats(self, about: str = "") -> dict[str, str]:
        """What STATS answers."""
        lines = self.ask(f"STATS {about}".rstrip())
        return dict(line.removeprefix("STAT ").split(" ", 1) for line in lines[:-1])

    def ask(self, request: str) -> list[str]:
        """The lines of the answer."""
        self._socket.sendall(f"{request}\n".encode())
        answer = b""
        end = b"END\n" if request.startswith("STATS") else b"\n"
        while not answer.endswith(end) and not (answer.startswith(b"ERR") and b"\n" in answer):
            data = self._socket.recv(65_536)
            if not data:
                raise ConnectionError("closed")
            answer += data
        return answer.decode().splitlines()


def connect(server: ServerProcess, stack: ExitStack, number: int = CONNECTIONS) -> list[Client]:
    """So many connections, open as long as the stack is."""
    sockets = [socket.create_connection(server.endpoint, PATIENCE_SECONDS) for _ in range(number)]
    clients = [Client(stack.enter_context(connected)) for connected in sockets]
    for client in clients:  # Accepted, for certain.
        assert client.ask("PING") == ["OK PONG"]
    return clients


def clients_of(worker: psutil.Process, clients: list[Client]) -> list[Client]:
    """Those of the connections that this worker serves."""
    ports = {one.raddr.port for one in worker.net_connections("tcp") if one.raddr}
    return [client for client in clients if client.port in ports]


def until(condition: Callable[[], bool]) -> None:
    """Wait for what other processes bring about."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def duplicates(clients: list[Client]) -> int:
    """How many IDs these clients got more than once."""
    return overlaps(taken for client in clients for taken in client.taken)[0]


def test_stats_are_those_of_all_workers(server: ServerProcess) -> None:
    """Whichever worker is asked, it speaks for all; each connection's IDs increase."""
    with ExitStack() as stack:
        clients = connect(server, stack)
        assert all(clients_of(worker, clients) for worker in server.workers)
        for client in clients:
            assert client.alloc(2) < client.alloc(3)
        for client in clients[:4]:
            rows = client.stats()
            assert rows["ids_total"] == str(5 * CONNECTIONS)
            assert rows["connections_open"] == rows["connections_total"] == str(CONNECTIONS)
            assert (rows["workers"], rows["workers_silent"]) == ("2", "0")
            rows = client.stats("orders")
            assert rows["served_ids"] == str(5 * CONNECTIONS)
            assert int(rows["last_served"]) == max(
                first + 2 for c in clients for first, _ in c.taken
            )
        assert duplicates(clients) == 0


def test_a_silent_worker_is_left_out_of_stats(server: ServerProcess) -> None:
    """A worker that hangs delays STATS a little, and is counted; its totals are not forgotten."""
    with ExitStack() as stack:
        clients = connect(server, stack)
        hung, well = server.workers
        asking = clients_of(well, clients)[0]
        for client in clients:
            client.alloc(1)
        assert asking.stats()["workers_silent"] == "0"
        hung.suspend()
        rows = asking.stats()
        assert rows["workers_silent"] == "1"
        assert rows["ids_total"] == str(CONNECTIONS)
        assert int(rows["connections_open"]) == len(clients_of(well, clients))
        assert asking.stats("orders")["workers_silent"] == "1"
        hung.resume()
        until(lambda: asking.stats()["workers_silent"] == "0")


def test_stats_that_cannot_be_gathered_are_refused(server: ServerProcess) -> None:
    """With a parent that hangs, STATS is answered with an error soon, and IDs flow on."""
    parent = psutil.Process(server.process.pid)
    with ExitStack() as stack:
        client = connect(server, stack, 1)[0]
        parent.suspend()
        began_at = time.monotonic()
        assert client.ask("STATS")[0].startswith("ERR busy ")
        assert time.monotonic() - began_at < 2 * GATHER_SECONDS
        client.alloc(1)
        parent.resume()
        until(lambda: client.stats()["ids_total"] == "1")


def test_a_dead_worker_takes_no_other_connection_with_it(server: ServerProcess) -> None:
    """Killed under load, it is back soon; the rest goes on, no ID comes twice, counts stay."""
    enough = Event()

    def load(client: Client) -> None:
        with suppress(ConnectionError):
            while not enough.is_set():
                client.alloc(1)
                time.sleep(0.001)

    with ExitStack() as stack:
        clients = connect(server, stack)
        doomed, other = server.workers
        lost, kept = clients_of(doomed, clients), clients_of(other, clients)
        threads = [Thread(target=load, args=(client,)) for client in clients]
        for thread in threads:
            thread.start()
        asking = connect(server, stack, 1)[0]
        while clients_of(doomed, [asking]):
            asking = connect(server, stack, 1)[0]
        before = int(asking.stats()["ids_total"])
        doomed.kill()
        until(lambda: asking.stats()["worker_restarts_total"] == "1")
        until(lambda: any("info a worker serves again" in line for line in server.lines))
        until(lambda: asking.stats()["workers_silent"] == "0")
        assert int(asking.stats()["ids_total"]) >= before
        ended = rf"a worker ended worker=\d pid={doomed.pid} status=-9"
        assert any(re.search(ended, line) for line in server.lines)
        enough.set()
        for thread in threads:
            thread.join()
        late = connect(server, stack)
        successor = next(worker for worker in server.workers if worker.pid != other.pid)
        assert clients_of(successor, late)
        for client in (*kept, *late):
            client.alloc(1)
        for client in lost:
            with pytest.raises(ConnectionError):
                client.alloc(1)
        assert duplicates([*clients, *late]) == 0


def test_clients_that_a_dead_worker_had_not_accepted_wait_for_its_successor(
    server: ServerProcess,
) -> None:
    """What lies in a worker's queue when it dies is not refused."""
    with ExitStack() as stack:
        for worker in server.workers:
            worker.suspend()
        sockets = [
            stack.enter_context(socket.create_connection(server.endpoint, PATIENCE_SECONDS))
            for _ in range(CONNECTIONS)
        ]
        for worker in server.workers:
            worker.kill()
        clients = [Client(connected) for connected in sockets]
        for client in clients:
            client.alloc(1)
        assert duplicates(clients) == 0


def test_a_worker_that_cannot_be_replaced_yet_is_replaced_later(server: ServerProcess) -> None:
    """A parent that is out of files serves on with who is left, and tries until it succeeds."""
    parent = psutil.Process(server.process.pid)
    doomed, other = server.workers
    with ExitStack() as stack:
        asking = clients_of(other, connect(server, stack))[0]
        soft, hard = parent.rlimit(psutil.RLIMIT_NOFILE)
        parent.rlimit(psutil.RLIMIT_NOFILE, (parent.num_fds() - 2, hard))
        doomed.kill()
        until(lambda: int(asking.stats()["worker_restarts_total"]) > 2)
        parent.rlimit(psutil.RLIMIT_NOFILE, (soft, hard))
        until(lambda: len(server.workers) == 2)
    # Once, however often it is tried.
    [line] = [line for line in server.lines if "a worker cannot start" in line]
    assert re.search(r" warning .* worker=\d reason=cannot start worker \d: Too many open", line)
    assert server.terminate() == 0


def test_a_stop_under_load_repeats_nothing(data: Path) -> None:
    """SIGTERM: status 0, workers too; the next start, of one process or several, goes on above."""
    clients: list[Client] = []
    for flags in (WORKERS, (), WORKERS):
        with ExitStack() as stack, ServerProcess.start(*flags, data=data) as server:
            running = connect(server, stack)
            clients += running

            def load(client: Client) -> None:
                with suppress(ConnectionError):
                    while True:
                        client.alloc(7)

            threads = [Thread(target=load, args=(client,)) for client in running]
            for thread in threads:
                thread.start()
            time.sleep(0.3)
            assert server.terminate() == 0
            for thread in threads:
                thread.join()
            assert not any("a worker ended" in line for line in server.lines)
    taken = [taken for client in clients for taken in client.taken]
    found, gaps = overlaps(iter(taken))
    print(f"{sum(count for _, count in taken)} IDs taken, {gaps} in gaps")
    assert found == 0


def test_what_one_worker_alone_took_is_given_back(data: Path) -> None:
    """A stop leaves no gap where only one of the workers served."""
    for first in (1, 4):
        with ExitStack() as stack, ServerProcess.start(*WORKERS, data=data) as server:
            assert connect(server, stack, 1)[0].alloc(3) == first
            assert server.terminate() == 0


def test_workers_end_with_their_parent(server: ServerProcess) -> None:
    """A parent that is killed leaves nothing behind for long, and its port is free again."""
    with ExitStack() as stack:
        connect(server, stack)
        workers = server.workers
        server.kill()
        gone, alive = psutil.wait_procs(workers, timeout=PATIENCE_SECONDS)
    assert (len(gone), alive) == (2, [])
    with socket.create_server(server.endpoint):
        pass


def test_a_stop_does_not_wait_for_the_start(data: Path) -> None:
    """SIGTERM while workers are being made anew: status 0, and nothing is left."""
    with ServerProcess.start(*WORKERS, data=data) as server:
        for worker in server.workers:
            worker.kill()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(PATIENCE_SECONDS) == 0
