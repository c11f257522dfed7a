"""The way into a Redis: URLs, accounts and permissions."""

from pathlib import Path

import pytest

from idalloc_tcp.bridge import asyncio_loop
from idalloc_tcp.counter.redis import REPLY_TIMEOUT_SECONDS, RedisCounter, connect
from idalloc_tcp.errors import Unavailable
from idalloc_tcp.pool import Segment
from tests.counter.conftest import open_counter
from tests.counter.test_redis import seat, take
from tests.real.redis_server import RedisServer


async def test_missing_permission_names_what_is_needed(shared_redis_server: RedisServer) -> None:
    """A user without INFO, as many ACLs have it, is told what to add; with it, all works."""
    command = shared_redis_server.command
    command("FLUSHALL")
    command("ACL", "SETUSER", "ids", "reset", "on", ">pass", "~idalloc:*", "+@hash", "+@scripting")
    async with open_counter(shared_redis_server.port, "ids:pass@") as counter:
        with pytest.raises(Unavailable, match=r"\+info") as caught:
            await seat(counter)
        assert "\n" not in str(caught.value)
        command("ACL", "SETUSER", "ids", "+info")
        assert await seat(counter) == Segment(101, 111)
        command("ACL", "SETUSER", "ids", "-@scripting")
        with pytest.raises(Unavailable, match=r"\+@scripting"):
            await take(counter)
    command("ACL", "DELUSER", "ids")


async def test_password_may_have_any_characters(shared_redis_server: RedisServer) -> None:
    """A password is written percent-encoded; a wrong one is an error that does not show it."""
    command = shared_redis_server.command
    command("FLUSHALL")
    command("ACL", "SETUSER", "ids", "reset", "on", ">p@ss:/wörd#", "~*", "+@all")
    account = "ids:p%40ss%3A%2Fw%C3%B6rd%23@"
    async with open_counter(shared_redis_server.port, account) as counter:
        assert await seat(counter) == Segment(101, 111)
    async with open_counter(shared_redis_server.port, "ids:secret@") as counter:
        with pytest.raises(Unavailable, match="invalid username-password") as caught:
            await take(counter)
        assert "secret" not in str(caught.value)
    command("ACL", "DELUSER", "ids")


async def test_unix_socket(tmp_path: Path) -> None:
    """A Redis can be reached through a socket in the file system."""
    path = tmp_path / "redis.sock"
    with RedisServer(("--unixsocket", str(path))):
        async with asyncio_loop():
            counter = RedisCounter(connect(f"unix://{path}?db=3"), "idalloc:")
            assert await seat(counter) == Segment(101, 111)
            await counter.aclose()


@pytest.mark.parametrize(
    "url",
    [
        *("", "localhost", "http://localhost", "mysql://localhost/x", "localhost:6379"),
        *("redis://localhost:port", "redis://user:sec/ret@localhost", "redis://localhost:99999"),
        *("redis://localhost?colour=red", "redis://localhost?max_connections=x"),
        *("redis://[::1", "redis://localhost?db=secret"),
    ],
)
def test_wrong_url_is_refused(url: str) -> None:
    """What is no such URL is refused in one line, which does not quote it."""
    with pytest.raises(
        ValueError, match=r"^it is not a redis://, rediss:// or unix:// URL"
    ) as info:
        connect(url)
    assert "sec" not in str(info.value)
    assert "\n" not in str(info.value)


def test_url_does_not_bring_retries_back() -> None:
    """What makes a request go out at most once cannot be undone by an option."""
    options = "protocol=3&retry_on_timeout=true&socket_timeout=60&decode_responses=no&timeout=60"
    pool = connect(f"redis://localhost?{options}").connection_pool
    connection = pool.connection_class(**pool.connection_kwargs)
    assert connection.retry.get_retries() == 0
    assert connection.protocol == 2
    assert connection.socket_timeout == REPLY_TIMEOUT_SECONDS
    assert connection.encoder.decode_responses
