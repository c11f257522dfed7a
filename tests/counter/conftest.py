"""Real Redis servers for the tests of counters."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Final

import pytest

from idalloc_tcp.bridge import asyncio_loop
from idalloc_tcp.counter.redis import RedisCounter, connect
from tests.real.conftest import _installed, fault_proxy, redis_server
from tests.real.process import HOST
from tests.real.redis_server import RedisServer

__all__ = ["fault_proxy", "redis_server", "shared_redis_server"]

#: The key of a service is this and its name.
KEY: Final = "idalloc:alloc_info_"


@pytest.fixture(scope="session")
def shared_redis_server() -> Iterator[RedisServer]:
    """A Redis that tests share: neither kill nor pause it, and expect any data in it."""
    with _installed(), RedisServer() as server:
        yield server


@asynccontextmanager
async def open_counter(port: int, account: str = "") -> AsyncIterator[RedisCounter]:
    """A counter in the Redis on that port, whatever it holds."""
    async with asyncio_loop():
        counter = RedisCounter(connect(f"redis://{account}{HOST}:{port}/0"), "idalloc:")
        try:
            yield counter
        finally:
            await counter.aclose()


def read_hash(server: RedisServer, service: str) -> dict[str, str]:
    """All fields of a service's hash."""
    reply = server.command("HGETALL", KEY + service)
    assert isinstance(reply, list)
    words = [str(word) for word in reply]
    return dict(zip(words[::2], words[1::2], strict=True))


def write_hash(server: RedisServer, service: str, **fields: str | int) -> None:
    """Put a hash of just these fields in the place of a service's."""
    server.command("DEL", KEY + service)
    words = [word for field in fields.items() for word in field]
    server.command("HSET", KEY + service, *words)
