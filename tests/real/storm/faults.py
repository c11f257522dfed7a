"""The weather: what happens to Redis, to MariaDB, and on the way to them."""

import random
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Final, final

import attrs
import trio

from tests.real.mariadb_server import MariaDbDatabase
from tests.real.process import wait_until
from tests.real.proxy import FaultProxy
from tests.real.redis_server import RedisServer
from tests.real.resp import RedisError
from tests.real.storm.clients import SERVICES

KEY_PREFIX: Final = "idalloc:alloc_info_"
#: How far a replica lags before it is promoted.
LAG_SECONDS: Final = 0.5
SNAPSHOT_AGE_SECONDS: Final = 10.0
#: Pools refill, and so find out that a counter is not theirs any more, in less than this.
SEATED_SECONDS: Final = 8.0
#: After both stores were down, they are asked again within a second, and pools within another.
RECOVERY_SECONDS: Final = 2.5

#: One fault: it happens, lasts and is over.
Fault = Callable[[], Awaitable[None]]
_block = trio.to_thread.run_sync


@final
@attrs.define(eq=False)
class Weather:
    """The stores and the ways to them, and what was done to them."""

    redis: RedisServer
    replica: RedisServer
    database: MariaDbDatabase
    #: From each of the two servers.
    to_redis: list[FaultProxy]
    to_mariadb: list[FaultProxy]
    #: Between the replica and its master, so that it can be made to lag.
    to_master: FaultProxy
    #: When errors are allowed: both stores were down.
    dark: list[tuple[float, float]] = attrs.field(factory=list)
    #: When each fault began, and its name.
    happened: list[tuple[float, str]] = attrs.field(factory=list)
    _snapshots: list[tuple[float, bytes]] = attrs.field(factory=list)

    def script(self, rng: random.Random) -> list[Fault]:
        """Every fault, in an order of the seed's; what needs an older snapshot comes late."""
        early: list[Fault] = [
            self.flush,
            self.delete_one,
            self.lose_everything,
            self.pause_redis,
            self.swallow_redis_replies,
            self.swallow_mariadb_replies,
            self.stop_mariadb,
        ]
        late: list[Fault] = [
            self.return_older,
            self.split_and_fail_back,
            self.pause_mariadb,
            self.darkness,
        ]
        rng.shuffle(early)
        rng.shuffle(late)
        return early + late

    def short_script(self, rng: random.Random) -> list[Fault]:
        """What is over within a few seconds, and the darkness."""
        script: list[Fault] = [
            self.flush,
            self.lose_everything,
            self.swallow_redis_replies,
            self.split_and_fail_back,
            self.darkness,
        ]
        rng.shuffle(script)
        return script

    async def go_through(self, script: list[Fault], seconds: float) -> None:
        """All faults of the script, with pauses that fill the time."""
        began = time.monotonic()
        for number, fault in enumerate(script):
            elapsed = time.monotonic() - began
            print(f"{elapsed:5.1f} s  {fault.__name__.replace('_', ' ')}", flush=True)
            fault_began = time.monotonic()
            await fault()
            self.happened.append((fault_began, fault.__name__))
            left = seconds - (time.monotonic() - began)
            await trio.sleep(max(0.5, min(2.0, left / (2 * (len(script) - number)))))
        await trio.sleep(max(0.0, seconds - (time.monotonic() - began)))

    async def take_snapshots(self) -> None:
        """Keep what Redis holds, every second, for `return_older`."""
        while True:
            with suppress(OSError, RedisError):  # It is down or busy: that is what a storm is.
                self._snapshots.append((time.monotonic(), await _block(self.redis.snapshot)))
            await trio.sleep(1)

    async def flush(self) -> None:
        """FLUSHALL."""
        await _block(self.redis.command, "FLUSHALL")

    async def delete_one(self) -> None:
        """DEL of one hash."""
        await _block(self.redis.command, "DEL", f"{KEY_PREFIX}orders")

    async def lose_everything(self) -> None:
        """kill -9, and back with nothing."""
        await _block(self.redis.restart_empty)
        await self.let_replicate()

    async def return_older(self) -> None:
        """kill -9, and back with what it held ten seconds ago."""
        limit = time.monotonic() - SNAPSHOT_AGE_SECONDS
        older = [snapshot for at, snapshot in self._snapshots if at < limit]
        await _block(self.redis.restart_from, older[-1])
        await self.let_replicate()

    async def pause_redis(self) -> None:
        """SIGSTOP for five seconds: connections stay open and nothing answers."""
        self.redis.pause()
        await trio.sleep(5)
        self.redis.resume()

    async def swallow_redis_replies(self) -> None:
        """Commands are executed, and their replies never arrive."""
        await self._swallow(self.to_redis)

    async def swallow_mariadb_replies(self) -> None:
        """Statements are executed, and their replies never arrive."""
        await self._swallow(self.to_mariadb)

    async def stop_mariadb(self) -> None:
        """kill -9, and ten seconds later back."""
        await self._until_seated()
        await _block(self.database.server.kill)
        await trio.sleep(10)
        await _block(self.database.server.start)

    async def pause_mariadb(self) -> None:
        """SIGSTOP for five seconds."""
        await self._until_seated()
        self.database.server.pause()
        await trio.sleep(5)
        self.database.server.resume()

    async def _until_seated(self) -> None:
        """Wait until Redis can cut for every service: without that, this would be darkness.

        Or until no pool wanted more for a while: then they hold enough.
        """
        what = "a counter for every service"
        wait = partial(wait_until, self._is_seated, timeout_seconds=SEATED_SECONDS, what=what)
        with suppress(TimeoutError):
            await _block(wait)

    def _is_seated(self) -> bool:
        info = self.redis.info()
        live = f"{info['run_id']}:{info['master_replid']}"
        fences = [self.redis.command("HGET", f"{KEY_PREFIX}{name}", "fence") for name in SERVICES]
        return all(fence == live for fence in fences)

    async def darkness(self) -> None:
        """Both down for five seconds."""
        with self._darkness():
            await _block(self.database.server.kill)
            await _block(self.redis.kill)
            await trio.sleep(5)
            await _block(self.database.server.start)
            await _block(self.redis.start)
            await self.let_replicate()

    async def split_and_fail_back(self) -> None:
        """A lagging replica is promoted while one server still reaches the old master.

        Then the old master is demoted, gets the new one's data, and is promoted again.
        """
        old, new = self.redis, self.replica
        await _block(old.wait_for_sync, new)
        self.to_master.delay(to_client_seconds=LAG_SECONDS)
        await trio.sleep(2 * LAG_SECONDS)
        await _block(new.promote)
        self._route(1, new)
        await trio.sleep(1.5)
        self._route(0, new)
        self.to_master.heal()
        await _block(old.replicate_from, new.port)
        await _block(new.wait_for_sync, old)
        await trio.sleep(1)
        await _block(old.promote)
        self._route(0, old)
        await trio.sleep(1)
        self._route(1, old)
        await self.let_replicate()

    def _route(self, server: int, redis: RedisServer) -> None:
        self.to_redis[server].target_port = redis.port
        self.to_redis[server].cut()

    async def let_replicate(self) -> None:
        self.to_master.target_port = self.redis.port
        await _block(self.replica.replicate_from, self.to_master.port)

    async def _swallow(self, proxies: list[FaultProxy]) -> None:
        for proxy in proxies:
            proxy.swallow_replies()
        await trio.sleep(1)
        for proxy in proxies:
            proxy.heal()

    @contextmanager
    def _darkness(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.dark.append((began, time.monotonic() + RECOVERY_SECONDS))
