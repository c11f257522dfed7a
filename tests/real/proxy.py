"""A TCP proxy that breaks connections on demand, for whatever TCP server stands behind it.

It runs in the Trio loop of whoever opened it. The methods that bring faults about are
synchronous and act at once; `heal` ends every fault. Bytes pass in chunks, each what one read
returned, so the replies to pipelined requests may well be a single chunk.
"""

import math
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, TypeAlias, final

import attrs
import trio

from tests.real.process import HOST, reserve_port

CHUNK_BYTES: Final = 16_384
#: How many chunks of one connection and direction may be delayed; then reading stops.
MAX_DELAYED_CHUNKS: Final = 64
#: Connections beyond these are cut as they arrive.
MAX_CONNECTIONS: Final = 512
CONNECT_TIMEOUT_SECONDS: Final = 2.0
_BACKLOG: Final = 128
#: SO_LINGER for a close that resets the connection and drops what has not been read.
_RESET: Final = struct.pack("ii", 1, 0)

#: When it was read (in Trio's time), and the bytes.
_Chunk: TypeAlias = tuple[float, bytes]


@final
@attrs.frozen
class ProxyStatistics:
    """What has passed a proxy so far, in connections and in bytes."""

    connections_accepted: int
    connections_open: int
    bytes_to_server: int
    bytes_to_client: int
    bytes_swallowed: int


@final
@attrs.define(eq=False)
class _Direction:
    """One of the two ways through the proxy, over all connections."""

    bytes_passed: int = 0
    _delay_seconds: float = attrs.field(init=False, default=0.0)
    _delay_changed: trio.Event = attrs.field(init=False, factory=trio.Event)

    def delay(self, seconds: float) -> None:
        """Let every chunk, also those under way, arrive so long after it was read."""
        self._delay_seconds = seconds
        self._delay_changed.set()
        self._delay_changed = trio.Event()

    async def arrival(self, read_at: float) -> None:
        """Wait until a chunk that was read then may arrive."""
        while trio.current_time() < (due := read_at + self._delay_seconds):
            with trio.move_on_at(due):
                await self._delay_changed.wait()


@final
@attrs.define(eq=False)
class _Link:
    """A client's connection and, once it is made, the one to the server."""

    client: trio.SocketStream
    server: trio.SocketStream | None = None
    #: It lost bytes, so whatever else it carried would be out of step.
    is_lossy: bool = False
    #: Everything that serves this link runs in here.
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)

    def cut(self) -> None:
        """Reset both connections at once; what is under way is lost."""
        for stream in self._open_streams():
            stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.close()

    def close(self) -> None:
        """Close both connections at once; what was sent still arrives."""
        for stream in self._open_streams():
            stream.socket.close()
        self.scope.cancel()

    def _open_streams(self) -> list[trio.SocketStream]:
        streams = (self.client, self.server)
        return [stream for stream in streams if stream and stream.socket.fileno() >= 0]


@final
@attrs.define(eq=False)
class FaultProxy:
    """Forwards connections to a port of 127.0.0.1, as badly as it is told to.

    Args:
        nursery: where its tasks run.
        target_port: where new connections lead; may be changed at any time (those that exist
            stay where they are until `cut`). None: nowhere, new connections are cut.
    """

    _nursery: trio.Nursery
    target_port: int | None
    _reserved: socket.socket = attrs.field(init=False, factory=reserve_port)
    _listener: trio.SocketListener | None = attrs.field(init=False, default=None)
    _links: set[_Link] = attrs.field(init=False, factory=set)
    _to_server: _Direction = attrs.field(init=False, factory=_Direction)
    _to_client: _Direction = attrs.field(init=False, factory=_Direction)
    _is_blackhole: bool = attrs.field(init=False, default=False)
    _replies_to_swallow: float = attrs.field(init=False, default=0)
    _connections_accepted: int = attrs.field(init=False, default=0)
    _bytes_swallowed: int = attrs.field(init=False, default=0)

    @property
    def port(self) -> int:
        """Where it listens on 127.0.0.1; stays the same over `refuse` and `heal`."""
        port: int = self._reserved.getsockname()[1]
        return port

    def statistics(self) -> ProxyStatistics:
        """The counters as they are now."""
        return ProxyStatistics(
            connections_accepted=self._connections_accepted,
            connections_open=len(self._links),
            bytes_to_server=self._to_server.bytes_passed,
            bytes_to_client=self._to_client.bytes_passed,
            bytes_swallowed=self._bytes_swallowed,
        )

    def delay(self, *, to_server_seconds: float = 0.0, to_client_seconds: float = 0.0) -> None:
        """Let bytes arrive so long after they were sent, also those that are under way.

        `math.inf` holds them back until the next call, or until `heal`.
        """
        self._to_server.delay(to_server_seconds)
        self._to_client.delay(to_client_seconds)

    def cut(self) -> None:
        """Reset all connections; new ones are welcome."""
        for link in list(self._links):
            link.cut()

    def refuse(self) -> None:
        """Refuse new connections (ECONNREFUSED); those that exist live on."""
        if self._listener is not None:
            self._listener.socket.close()
            self._listener = None

    def blackhole(self) -> None:
        """Accept connections and bytes, and let none of them through in either direction."""
        self._is_blackhole = True

    def swallow_replies(self, chunks: int | None = None) -> None:
        """Let requests through to the server and lose the next `chunks` replies (None: all).

        The connections that lost a reply are cut after the last of them, or by `heal`. So the
        server has executed what its client never hears about.
        """
        assert chunks is None or chunks > 0
        self._replies_to_swallow = math.inf if chunks is None else chunks

    def heal(self) -> None:
        """End every fault. Connections that lost bytes are cut, the others live on."""
        self.delay()
        self._is_blackhole = False
        self._replies_to_swallow = 0
        self._cut_lossy()
        if self._listener is None:
            self._listen()

    def close(self) -> None:
        """Free the port. What still runs ends with the nursery."""
        self.refuse()
        self._reserved.close()

    def _cut_lossy(self) -> None:
        for link in [link for link in self._links if link.is_lossy]:
            link.cut()

    def _listen(self) -> None:
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((HOST, self.port))
        listening.listen(_BACKLOG)
        self._listener = trio.SocketListener(trio.socket.from_stdlib_socket(listening))
        self._nursery.start_soon(self._accept, self._listener)

    async def _accept(self, listener: trio.SocketListener) -> None:
        while True:
            try:
                link = _Link(await listener.accept())
            except trio.ClosedResourceError:
                return
            self._connections_accepted += 1
            if len(self._links) < MAX_CONNECTIONS:
                self._links.add(link)
                self._nursery.start_soon(self._serve, link)
            else:
                link.cut()

    async def _serve(self, link: _Link) -> None:
        try:
            with link.scope:
                if self._is_blackhole:
                    await self._drain(link)
                else:
                    await self._forward(link)
            link.close()
        except* (OSError, trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            pass  # One side has gone, or was cut: so goes the other.
        except* trio.BusyResourceError:
            # A driver under test, in the same process, closed a socket a moment before the bridge
            # told Trio, and its number came back as ours.
            pass
        finally:
            link.cut()
            self._links.discard(link)

    async def _drain(self, link: _Link) -> None:
        link.is_lossy = True  # No server will ever hear it, not even once all is well again.
        async for chunk in link.client:
            self._swallow(link, chunk)

    async def _forward(self, link: _Link) -> None:
        if self.target_port is None:
            link.cut()
            return
        with trio.fail_after(CONNECT_TIMEOUT_SECONDS):
            link.server = await trio.open_tcp_stream(HOST, self.target_port)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._pass, link, self._to_server, link.client, link.server)
            nursery.start_soon(self._pass, link, self._to_client, link.server, link.client)

    async def _pass(
        self, link: _Link, way: _Direction, source: trio.SocketStream, sink: trio.SocketStream
    ) -> None:
        send, receive = trio.open_memory_channel[_Chunk](MAX_DELAYED_CHUNKS)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read, source, send)
            async with receive:
                async for read_at, chunk in receive:
                    await way.arrival(read_at)
                    if self._loses(link, way):
                        self._swallow(link, chunk)
                    else:
                        await sink.send_all(chunk)
                        way.bytes_passed += len(chunk)
        await sink.send_eof()

    async def _read(self, source: trio.SocketStream, send: trio.MemorySendChannel[_Chunk]) -> None:
        async with send:
            while chunk := await source.receive_some(CHUNK_BYTES):
                await send.send((trio.current_time(), chunk))

    def _loses(self, link: _Link, way: _Direction) -> bool:
        if self._is_blackhole:
            return True
        return way is self._to_client and self._replies_to_swallow > 0

    def _swallow(self, link: _Link, chunk: bytes | bytearray) -> None:
        link.is_lossy = True
        self._bytes_swallowed += len(chunk)
        if self._replies_to_swallow > 0 and not self._is_blackhole:
            self._replies_to_swallow -= 1
            if self._replies_to_swallow == 0:
                self._cut_lossy()


@asynccontextmanager
async def open_fault_proxy(target_port: int | None = None) -> AsyncIterator[FaultProxy]:
    """A proxy that forwards to `target_port`, without any fault at first."""
    async with trio.open_nursery() as nursery:
        proxy = FaultProxy(nursery, target_port)
        try:
            proxy.heal()
            yield proxy
        finally:
            proxy.close()
            nursery.cancel_scope.cancel()
