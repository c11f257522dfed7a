"""A server inside the test's own process, and a peer that is as blunt as netcat."""

import os
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, Self, final

import attrs
import pytest
import trio

from idalloc_tcp.address import Address, TcpAddress, UnixAddress, parse_address
from idalloc_tcp.allocator import Allocator, AllocatorPolicy
from idalloc_tcp.listeners import open_listeners
from idalloc_tcp.metrics import Metrics
from idalloc_tcp.pool import MAX_ID
from idalloc_tcp.reservation import Reservation
from idalloc_tcp.server import Server, ServerLimits
from tests.fakes import FakeLedger

#: Which lane servers in tests use: a setting of theirs.
LANE_VARIABLE: Final = "IDALLOC_TCP_LANE"
#: Nothing in these tests takes so long, unless it hangs.
PATIENCE_SECONDS: Final = 10.0
#: A server listens on any of these.
ADDRESS_KINDS: Final = ("ipv4", "ipv6", "unix")
#: With this option set, closing a socket resets its connection.
RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)


def free_address(kind: str, directory: Path) -> str:
    """An address to listen on that nobody uses; skips the test if this machine has none."""
    if kind == "ipv6" and not _has_ipv6():
        pytest.skip("this machine has no ::1")
    return {
        "ipv4": "127.0.0.1:0",
        "ipv6": "[::1]:0",
        "unix": f"unix:{directory / 'ids.sock'}",
    }[kind]


def _has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@final
@attrs.define(eq=False)
class Peer:
    """The other end of a connection: says bytes, hears bytes, and never waits for ever."""

    stream: trio.abc.HalfCloseableStream
    patience_seconds: float = PATIENCE_SECONDS
    _heard: bytes = attrs.field(init=False, default=b"")

    @classmethod
    async def connect(cls, address: Address) -> Self:
        """Connect to a server."""
        match address:
            case TcpAddress(host, port):
                return cls(await trio.open_tcp_stream(host, port))
            case UnixAddress(path):
                return cls(await trio.open_unix_socket(path))

    async def say(self, data: bytes) -> None:
        """Send all of it."""
        with trio.fail_after(self.patience_seconds):
            await self.stream.send_all(data)

    async def hear(self) -> bytes:
        """The next line with its end, or what there was of it at the end of the stream."""
        with trio.fail_after(self.patience_seconds):
            while b"\n" not in self._heard:
                data = await self.stream.receive_some()
                if not data:
                    break
                self._heard += data
        line, end, self._heard = self._heard.partition(b"\n")
        return line + end

    async def hear_all(self) -> bytes:
        """Everything up to the end of the stream; raises if it was reset instead."""
        with trio.fail_after(self.patience_seconds):
            chunks = [self._heard, *[bytes(chunk) async for chunk in self.stream]]
        self._heard = b""
        return b"".join(chunks)

    async def ask(self, request: bytes) -> bytes:
        """Say it and hear one line."""
        await self.say(request)
        return await self.hear()

    async def end(self) -> None:
        """Say no more, but go on listening."""
        await self.stream.send_eof()

    def reset(self) -> None:
        """Break the connection, as a crash does."""
        assert isinstance(self.stream, trio.SocketStream)
        self.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        self.stream.socket.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await trio.aclose_forcefully(self.stream)


@final
@attrs.frozen
class Running:
    """A server that runs, and what it works on."""

    server: Server
    ledger: FakeLedger
    metrics: Metrics
    addresses: list[Address]
    _ended: trio.Event

    async def connect(self) -> Peer:
        """A new connection to its first address."""
        return await Peer.connect(self.addresses[0])

    async def stop(self) -> float:
        """Stop it, and wait until it has: the seconds that it took."""
        began_at = trio.current_time()
        self.server.stop()
        with trio.fail_after(PATIENCE_SECONDS):
            await self._ended.wait()
        return trio.current_time() - began_at


@asynccontextmanager
async def serving(
    *addresses: str,
    ledger: FakeLedger | None = None,
    limits: ServerLimits | None = None,
    policy: AllocatorPolicy | None = None,
) -> AsyncIterator[Running]:
    """A server on these addresses (a port of 127.0.0.1 if there are none) that stops at the end."""
    ledger, metrics = ledger or FakeLedger(), Metrics()
    reservation = Reservation(ledger, lambda _service: MAX_ID, metrics)
    allocator = Allocator(reservation, policy or AllocatorPolicy(), metrics)
    server = Server(
        allocator,
        attrs.evolve(limits or ServerLimits(), sweeps=os.environ.get(LANE_VARIABLE) != "stream"),
        metrics,
    )
    wanted = [parse_address(address) for address in addresses or ["127.0.0.1:0"]]
    listeners = await open_listeners(wanted)
    bound = [parse_address(listener.address) for listener in listeners]
    running = Running(server, ledger, metrics, bound, trio.Event())

    async def run(task_status: trio.TaskStatus[None]) -> None:
        await server.run(listeners, task_status=task_status)
        running._ended.set()

    async with trio.open_nursery() as nursery:
        await nursery.start(run)
        yield running
        await running.stop()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what another task is about to bring about, and rings no bell for."""
    with trio.fail_after(PATIENCE_SECONDS):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.002)
