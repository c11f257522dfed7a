"""Counters to test, each with what may happen to its data behind its back."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Final, Protocol, TypeAlias

import attrs
import pytest

from idalloc_tcp.counter import Counter
from tests.counter.conftest import open_counter, write_hash
from tests.fakes import FakeCounter
from tests.real.redis_server import RedisServer


class Rig(Protocol):
    """A counter, and what may happen to its data behind its back."""

    @property
    def counter(self) -> Counter:
        """The counter."""
        ...

    async def flush(self) -> None:
        """Lose everything."""

    async def fail_over(self) -> None:
        """Become another Redis with the same data."""

    async def write_original(self, service: str, last: int, version: int) -> None:
        """Put a hash of the original idalloc there."""


@attrs.frozen
class FakeRig:
    """The fake."""

    counter: FakeCounter

    async def flush(self) -> None:
        self.counter.flush()

    async def fail_over(self) -> None:
        self.counter.fail_over()

    async def write_original(self, service: str, last: int, version: int) -> None:
        self.counter.write_original(service, last, version)


@attrs.frozen
class RedisRig:
    """A real Redis; all that is done to it behind the counter's back takes well under 1 ms."""

    counter: Counter
    server: RedisServer

    async def flush(self) -> None:
        self.server.command("FLUSHALL")

    async def fail_over(self) -> None:
        # What every promotion does to the replication history, without another server.
        self.server.command("REPLICAOF", "127.0.0.1", 1)
        self.server.command("REPLICAOF", "NO", "ONE")

    async def write_original(self, service: str, last: int, version: int) -> None:
        write_hash(self.server, service, lastAllocValue=last, dataVersion=version)


Opener: TypeAlias = Callable[[pytest.FixtureRequest], AbstractAsyncContextManager[Rig]]


@asynccontextmanager
async def fake_rig(_: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    """The fake, empty."""
    yield FakeRig(FakeCounter())


@asynccontextmanager
async def redis_rig(request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    """A real Redis, empty."""
    server: RedisServer = request.getfixturevalue("shared_redis_server")
    server.command("FLUSHALL")
    async with open_counter(server.port) as counter:
        yield RedisRig(counter, server)


#: How to open an empty counter.
RIGS: Final[dict[str, Opener]] = {"fake": fake_rig, "redis": redis_rig}
