"""HTTP by hypercorn, within bounds that leave the ID server alone.

Hypercorn itself knows no bound on connections, on their number a second, or on how long a reader
may take. So this accepts: each of a few tasks sees to one connection at a time, with one request on
it, and they take turns in accepting, with a pause in between.
"""

import logging
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final, final

import attrs
import h11
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ASGIFramework, ConnectionState

from idalloc_tcp import log
from idalloc_tcp.listeners import Listener, close_listeners

VERSIONS: Final = ("1.0", "1.1")
CONNECTIONS_MAX: Final = 16
#: Fifty connections a second, at most.
ACCEPT_PAUSE_SECONDS: Final = 0.02
#: A request that is longer is not heard to its end.
REQUEST_BYTES_MAX: Final = 16_384
REASON_CHARS_MAX: Final = 200
#: How long a client may take to ask ...
ASK_SECONDS: Final = 1.0
#: ... an answer to be made, of which some are profiles of a minute ...
ANSWER_SECONDS: Final = 90.0
#: ... a client to read each part of it ...
SEND_SECONDS: Final = 5.0
#: ... and hypercorn to be done with a connection that is over.
END_SECONDS: Final = 0.5


async def serve(
    listeners: Sequence[Listener],
    app: ASGIFramework,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer HTTP until cancelled. Closes the listeners."""
    config = Config()
    config.errorlog = logging.getLogger(__name__)
    config.h11_max_incomplete_size = REQUEST_BYTES_MAX
    config.keep_alive_timeout = ASK_SECONDS
    config.include_server_header = False
    config.max_app_queue_size = REQUEST_BYTES_MAX  # Nobody reads a body, and nobody waits for that.
    try:
        async with trio.open_nursery() as nursery:
            for listener in listeners:
                desks = _Desks(listener, app, config)
                nursery.start_soon(desks.close_at_end)
                for _ in range(CONNECTIONS_MAX):
                    nursery.start_soon(desks.serve_one_by_one)
            task_status.started()
    finally:
        close_listeners(listeners)


@final
@attrs.define(eq=False)
class _Desks:
    """Where the clients of one listener are seen to."""

    _listener: Listener
    _app: ASGIFramework
    _config: Config
    _turn: trio.Lock = attrs.field(init=False, factory=trio.Lock)
    _clients: set[trio.socket.SocketType] = attrs.field(init=False, factory=set)

    async def serve_one_by_one(self) -> None:
        while True:
            clients: list[socket.socket] = []
            async with self._turn:
                await trio.sleep(ACCEPT_PAUSE_SECONDS)
                await trio.lowlevel.wait_readable(self._listener.socket)
                self._listener.accept_waiting(clients.append, most=1)
            for client in clients:
                await self._serve(trio.socket.from_stdlib_socket(client))

    async def close_at_end(self) -> None:
        """When cancelled, hang up on everybody: what hypercorn shields must not hold up a stop."""
        try:
            await trio.sleep_forever()
        finally:
            for client in self._clients:
                client.close()

    async def _serve(self, client: trio.socket.SocketType) -> None:
        context, state = WorkerContext(max_requests=None), ConnectionState({})
        self._clients.add(client)
        try:
            with trio.move_on_after(ASK_SECONDS) as patience:
                once = _Once(self._app, patience)
                stream: Any = BoundedStream(
                    trio.SocketStream(client), once.hear_no_more, patience.cancel
                )
                app: Any = ASGIWrapper(once)
                # One of hypercorn's inner parts, but the one that takes a stream of ours.
                await TCPServer(app, self._config, context, state, stream)
        except Exception as error:  # The client spoke in a way that hypercorn did not expect.
            reason = repr(error)[:REASON_CHARS_MAX]
            log.sparingly(log.WARNING, "an admin connection failed", reason=reason)
        finally:
            self._clients.discard(client)
            client.close()


@final
@attrs.define(eq=False)
class _Once:
    """An application for one request by HTTP/1; whatever else comes ends the connection.

    Of hypercorn's other protocols one waits for clients that have left, without a bound.

    Args:
        patience: around all of the connection.
    """

    _app: Any
    _patience: trio.CancelScope
    _was_asked: bool = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self._was_asked or scope["type"] != "http" or scope["http_version"] not in VERSIONS:
            self._patience.cancel()
            return

        async def send_part(message: Any) -> None:
            with suppress(h11.LocalProtocolError):  # The client has left, or talks nonsense.
                await send(message)

        self._was_asked = True
        self._patience.deadline = trio.current_time() + ANSWER_SECONDS
        await self._app(scope, receive, send_part)
        self._patience.deadline = trio.current_time() + END_SECONDS

    def hear_no_more(self) -> None:
        """The client says nothing else; what it has just said may be on its way to us."""
        if not self._was_asked:
            self._patience.deadline = trio.current_time() + END_SECONDS


@final
@attrs.define(eq=False)
class BoundedStream:
    """A connection on which neither side can take for ever, or say too much.

    Hypercorn shields what it sends from being cancelled. Here that has a deadline.

    Args:
        on_end: is told when there is nothing more to receive ...
        on_close: ... and when it is all over, which hypercorn's own timers do not notice.
    """

    _stream: trio.abc.HalfCloseableStream
    _on_end: Callable[[], None]
    _on_close: Callable[[], None]
    _received_bytes: int = 0

    @property
    def socket(self) -> Any:
        """Where hypercorn looks for the names of both ends."""
        assert isinstance(self._stream, trio.SocketStream)
        return self._stream.socket

    async def receive_some(self, max_bytes: int) -> bytes:
        """As a stream does; its end, once the client has said too much."""
        data = bytes(await self._stream.receive_some(max_bytes))
        self._received_bytes += len(data)
        if data and self._received_bytes <= REQUEST_BYTES_MAX:
            return data
        self._on_end()
        return b""

    async def send_all(self, data: bytes) -> None:
        """As a stream does."""
        with trio.move_on_after(SEND_SECONDS) as patience:
            try:
                await self._stream.send_all(data)
            except trio.BusyResourceError:  # Another of hypercorn's tasks is hanging up.
                raise trio.ClosedResourceError("the connection ends") from None
        if patience.cancelled_caught:
            raise trio.BrokenResourceError("it reads too slowly")

    async def send_eof(self) -> None:
        """As a stream does."""
        await self._stream.send_eof()

    async def aclose(self) -> None:
        """As a stream does."""
        await self._stream.aclose()
        self._on_close()
