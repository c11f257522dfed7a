"""Every fault of the proxy is what it says it is, and healing ends it."""

import contextlib
import errno
import math
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Final, final

import attrs
import pytest
import trio

from tests.real import proxy as proxy_module
from tests.real.process import HOST, wait_until
from tests.real.proxy import CHUNK_BYTES, MAX_DELAYED_CHUNKS, FaultProxy, open_fault_proxy
from tests.real.redis_server import RedisServer
from tests.real.resp import call

#: Long enough for bytes that are let through to arrive, short enough to wait for nothing.
QUIET_SECONDS: Final = 0.1
#: For whatever must happen; a machine with much else to do may take its time.
TIMEOUT_SECONDS: Final = 5.0
DELAY_SECONDS: Final = 0.3


@final
@attrs.define(eq=False)
class Echo:
    """A server that sends back what it receives, after a name of its own."""

    name: bytes
    port: int
    received: bytes = b""
    received_at: float = 0.0

    async def serve(self, stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            async with stream:
                async for chunk in stream:
                    self.received += chunk
                    self.received_at = trio.current_time()
                    await stream.send_all(self.name + chunk)


@contextlib.asynccontextmanager
async def open_echo(name: bytes) -> AsyncIterator[Echo]:
    listeners = await trio.open_tcp_listeners(0, host=HOST)
    echo = Echo(name, listeners[0].socket.getsockname()[1])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(trio.serve_listeners, echo.serve, listeners))
        yield echo
        nursery.cancel_scope.cancel()


@pytest.fixture
async def echo(fault_proxy: FaultProxy) -> AsyncIterator[Echo]:
    """An echo server behind the proxy."""
    async with open_echo(b"a:") as server:
        fault_proxy.target_port = server.port
        yield server


@pytest.fixture
async def client(fault_proxy: FaultProxy, echo: Echo) -> AsyncIterator[trio.SocketStream]:
    """A connection through the proxy that has already carried bytes both ways."""
    async with await connect(fault_proxy) as stream:
        assert await ask(stream, b"hello") == b"a:hello"
        yield stream


async def connect(proxy: FaultProxy) -> trio.SocketStream:
    return await trio.open_tcp_stream(HOST, proxy.port)


async def ask(stream: trio.SocketStream, request: bytes) -> bytes:
    with trio.fail_after(TIMEOUT_SECONDS):
        await stream.send_all(request)
        return bytes(await stream.receive_some())


async def assert_quiet(stream: trio.SocketStream) -> None:
    with trio.move_on_after(QUIET_SECONDS):
        pytest.fail(f"it received {await stream.receive_some()!r}")


async def assert_cut(stream: trio.SocketStream) -> None:
    with trio.fail_after(TIMEOUT_SECONDS):
        with pytest.raises(trio.BrokenResourceError) as caught:
            await stream.receive_some()
        assert isinstance(caught.value.__cause__, OSError)
        assert caught.value.__cause__.errno == errno.ECONNRESET


async def assert_turned_away(proxy: FaultProxy) -> None:
    """A new connection is reset, be it before its maker has noticed that it is made."""
    with trio.fail_after(TIMEOUT_SECONDS), pytest.raises((OSError, trio.BrokenResourceError)):
        async with await connect(proxy) as stream:
            await stream.receive_some()


async def eventually(holds: Callable[[], bool], what: str) -> None:
    await trio.to_thread.run_sync(
        partial(wait_until, holds, timeout_seconds=TIMEOUT_SECONDS, what=what)
    )


async def test_without_a_fault_it_only_forwards(fault_proxy: FaultProxy, echo: Echo) -> None:
    """Bytes pass both ways unchanged, a half-close passes too, and all of it is counted."""
    async with await connect(fault_proxy) as stream:
        payload = bytes(range(256)) * 4
        await stream.send_all(payload)
        await stream.send_eof()
        with trio.fail_after(TIMEOUT_SECONDS):
            reply = b"".join([bytes(chunk) async for chunk in stream])
    assert echo.received == payload
    assert reply.replace(b"a:", b"") == payload
    await eventually(lambda: fault_proxy.statistics().connections_open == 0, "0 are open")
    counted = fault_proxy.statistics()
    assert (counted.connections_accepted, counted.bytes_swallowed) == (1, 0)
    assert (counted.bytes_to_server, counted.bytes_to_client) == (len(payload), len(reply))


async def test_a_slow_reader_gets_all_that_was_sent(fault_proxy: FaultProxy) -> None:
    """When both ends have closed, what a client has not read yet still arrives."""
    sent = bytes(128 * 1024)  # Fits into the default buffers of both sockets, not into one.

    async def speak(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.send_all(sent)
            await stream.receive_some()

    listeners = await trio.open_tcp_listeners(0, host=HOST)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, speak, listeners)
        fault_proxy.target_port = listeners[0].socket.getsockname()[1]
        async with await connect(fault_proxy) as stream:
            await stream.send_eof()
            await eventually(
                lambda: fault_proxy.statistics().bytes_to_client == len(sent), "all is sent"
            )
            await eventually(lambda: fault_proxy.statistics().connections_open == 0, "it ended")
            with trio.fail_after(TIMEOUT_SECONDS):
                assert b"".join([bytes(chunk) async for chunk in stream]) == sent
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("direction", ["to_server_seconds", "to_client_seconds"])
async def test_each_direction_can_be_delayed(
    fault_proxy: FaultProxy, client: trio.SocketStream, echo: Echo, direction: str
) -> None:
    """A delay holds back its own direction, at least for so long, and not the other."""
    fault_proxy.delay(**{direction: DELAY_SECONDS})
    began_at = trio.current_time()
    assert await ask(client, b"x") == b"a:x"
    there_seconds = echo.received_at - began_at
    back_seconds = trio.current_time() - echo.received_at
    delays_requests = direction == "to_server_seconds"
    assert (there_seconds >= DELAY_SECONDS) is delays_requests
    assert (back_seconds >= DELAY_SECONDS) is not delays_requests


async def test_what_is_held_back_arrives_in_order_when_healed(
    fault_proxy: FaultProxy, client: trio.SocketStream, echo: Echo
) -> None:
    """Bytes held back for ever arrive after all, each once and in order, when it is healed."""
    fault_proxy.delay(to_server_seconds=math.inf)
    for chunk in (b"1", b"2", b"3"):
        await client.send_all(chunk)
        await assert_quiet(client)
    fault_proxy.heal()
    with trio.fail_after(TIMEOUT_SECONDS):
        while echo.received != b"hello123":
            await client.receive_some()


async def test_what_is_held_back_is_bounded(
    fault_proxy: FaultProxy, client: trio.SocketStream
) -> None:
    """A delayed sender that never stops is stopped by the proxy, not buffered without end."""
    fault_proxy.delay(to_server_seconds=math.inf)
    kernel_bytes = 16 * 1024 * 1024
    for _ in range(kernel_bytes // CHUNK_BYTES + MAX_DELAYED_CHUNKS):
        with trio.move_on_after(QUIET_SECONDS) as patience:
            await client.send_all(bytes(CHUNK_BYTES))
        if patience.cancelled_caught:
            break
    else:
        pytest.fail("it took all that was sent")


async def test_cut_resets_all_connections_and_takes_new_ones(
    fault_proxy: FaultProxy, client: trio.SocketStream
) -> None:
    """Connections that exist are reset at once, and the next one works."""
    async with await connect(fault_proxy) as second:
        await ask(second, b"x")
        fault_proxy.cut()
        await assert_cut(client)
        await assert_cut(second)
    async with await connect(fault_proxy) as third:
        assert await ask(third, b"y") == b"a:y"


async def test_refuse_turns_new_connections_away_only(
    fault_proxy: FaultProxy, client: trio.SocketStream
) -> None:
    """New connections are refused, existing ones live on, and the port stays the same."""
    port = fault_proxy.port
    fault_proxy.refuse()
    with pytest.raises(OSError, match="connect"):
        await connect(fault_proxy)
    assert await ask(client, b"x") == b"a:x"
    fault_proxy.heal()
    assert fault_proxy.port == port
    async with await connect(fault_proxy) as second:
        assert await ask(second, b"y") == b"a:y"
    assert await ask(client, b"z") == b"a:z"


async def test_a_blackhole_accepts_everything_and_answers_nothing(
    fault_proxy: FaultProxy, client: trio.SocketStream, echo: Echo
) -> None:
    """Neither old nor new connections get through; healed, they are cut and the next one works."""
    fault_proxy.blackhole()
    async with await connect(fault_proxy) as second, await connect(fault_proxy) as silent:
        for stream in (client, second):
            await stream.send_all(b"lost")
            await assert_quiet(stream)
        await eventually(lambda: fault_proxy.statistics().connections_open == 3, "3 are open")
        fault_proxy.heal()
        for stream in (client, second, silent):
            await assert_cut(stream)
    async with await connect(fault_proxy) as third:
        assert await ask(third, b"x") == b"a:x"
    assert b"lost" not in echo.received
    assert fault_proxy.statistics().bytes_swallowed == 2 * len(b"lost")


async def test_a_blackhole_does_not_harm_connections_that_were_idle(
    fault_proxy: FaultProxy, client: trio.SocketStream
) -> None:
    """A connection that carried nothing meanwhile works on when it is healed."""
    fault_proxy.blackhole()
    await assert_quiet(client)
    fault_proxy.heal()
    assert await ask(client, b"x") == b"a:x"


async def test_a_swallowed_reply_was_executed(
    fault_proxy: FaultProxy, client: trio.SocketStream, echo: Echo
) -> None:
    """The server gets the request, the client no reply but a reset; then all is well again."""
    fault_proxy.swallow_replies(1)
    await client.send_all(b"take")
    await assert_cut(client)
    assert echo.received == b"hellotake"
    async with await connect(fault_proxy) as second:
        assert await ask(second, b"x") == b"a:x"


async def test_replies_are_swallowed_over_all_connections(
    fault_proxy: FaultProxy, client: trio.SocketStream
) -> None:
    """The number of replies to lose is shared; all who lost one are cut with the last of them."""
    fault_proxy.swallow_replies(2)
    async with await connect(fault_proxy) as second, await connect(fault_proxy) as third:
        await client.send_all(b"x")
        await assert_quiet(client)
        await second.send_all(b"y")
        await assert_cut(client)
        await assert_cut(second)
        assert await ask(third, b"z") == b"a:z"


async def test_replies_are_swallowed_until_healed(
    fault_proxy: FaultProxy, client: trio.SocketStream, echo: Echo
) -> None:
    """Without a number all replies are lost; healing cuts those who lost one, and no other."""
    async with await connect(fault_proxy) as idle:
        await ask(idle, b"i")
        fault_proxy.swallow_replies()
        for _ in range(3):
            await client.send_all(b"x")
            await assert_quiet(client)
        fault_proxy.heal()
        await assert_cut(client)
        assert await ask(idle, b"y") == b"a:y"
    assert echo.received == b"helloixxxy"


async def test_a_new_target_takes_new_connections_only(
    fault_proxy: FaultProxy, client: trio.SocketStream
) -> None:
    """Clients stay with the old server until they are cut; then they reach the new one."""
    async with open_echo(b"b:") as other:
        fault_proxy.target_port = other.port
        assert await ask(client, b"x") == b"a:x"
        fault_proxy.cut()
        await assert_cut(client)
        async with await connect(fault_proxy) as second:
            assert await ask(second, b"y") == b"b:y"


@pytest.mark.parametrize("has_target", [False, True])
async def test_without_a_server_connections_are_cut(
    fault_proxy: FaultProxy, redis_server: RedisServer, has_target: bool
) -> None:
    """With no target, or a target that is down, a connection is cut and the proxy lives on."""
    redis_server.kill()
    fault_proxy.target_port = redis_server.port if has_target else None
    await assert_turned_away(fault_proxy)
    redis_server.start()
    fault_proxy.target_port = redis_server.port
    async with await connect(fault_proxy) as stream:
        assert await ask(stream, b"PING\r\n") == b"+PONG\r\n"


async def test_connections_are_bounded(
    fault_proxy: FaultProxy, client: trio.SocketStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection beyond the limit is cut, and the others are not harmed."""
    monkeypatch.setattr(proxy_module, "MAX_CONNECTIONS", 1)
    await assert_turned_away(fault_proxy)
    assert await ask(client, b"x") == b"a:x"


async def test_closing_ends_everything(echo: Echo) -> None:
    """After its context all connections are cut, whatever they wait for, and the port is free."""
    async with open_fault_proxy(echo.port) as proxy:
        port = proxy.port
        stream = await connect(proxy)
        await ask(stream, b"x")
        proxy.delay(to_server_seconds=math.inf, to_client_seconds=math.inf)
        await stream.send_all(b"y")
    await assert_cut(stream)
    await stream.aclose()
    with trio.socket.socket() as freed:
        await freed.bind((HOST, port))


async def test_a_swallowed_redis_command_took_effect(
    fault_proxy: FaultProxy, redis_server: RedisServer
) -> None:
    """On a real server: the client learns nothing but that the connection broke; it counted."""
    fault_proxy.target_port = redis_server.port
    fault_proxy.swallow_replies(1)
    incr = partial(call, fault_proxy.port, "INCR", "id", timeout_seconds=TIMEOUT_SECONDS)
    with pytest.raises(ConnectionResetError):
        await trio.to_thread.run_sync(incr)
    assert await trio.to_thread.run_sync(incr) == 2
