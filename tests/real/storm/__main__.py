"""The command: see the package."""

import argparse
import multiprocessing
import random
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, Final, Self, final

import attrs
import trio

from tests.processes import ServerProcess
from tests.real.mariadb_server import MariaDbDatabase, MariaDbServer, QueryFailed
from tests.real.proxy import FaultProxy, open_fault_proxy
from tests.real.redis_server import RedisServer
from tests.real.storm.clients import SERVICES, Log, run_client
from tests.real.storm.faults import Weather
from tests.real.storm.verdict import Verdict, judge

SERVERS: Final = 2
CLIENTS: Final = 8
SAMPLE_SECONDS: Final = 0.25
WARM_UP_SECONDS: Final = 4.0
#: Two seconds' worth of IDs in a pool, so that refills are frequent, and faults meet them.
FLAGS: Final = ("--pool-seconds", "2", "--segment-size", "1000")


@final
@attrs.define(eq=False)
class Rows:
    """Watches that the ledger leads: no row may be below an ID that a client has."""

    database: MariaDbDatabase
    highest: list[Any]
    samples: int = 0
    behind: int = 0

    async def watch(self) -> None:
        """Sample until cancelled."""
        while True:
            # First what clients have, then the rows: they only rise.
            served = [max(one[index] for one in self.highest) for index in range(len(SERVICES))]
            try:
                rows = await trio.to_thread.run_sync(
                    self.database.query, "SELECT service_name, last_alloc_value FROM tbl_alloc_info"
                )
            except (QueryFailed, TimeoutError):
                rows = None  # It is down, as it should be from time to time.
            if rows is not None:
                last = {name: int(value) for name, value in rows}
                self.samples += 1
                self.behind += sum(
                    last.get(service, 0) < one
                    for service, one in zip(SERVICES, served, strict=True)
                )
            await trio.sleep(SAMPLE_SECONDS)


@final
@attrs.define(eq=False)
class Load:
    """The clients, each in a process of its own."""

    highest: list[Any]
    _over: Event
    _pipes: list[Connection]

    @classmethod
    def start(cls, endpoints: Sequence[tuple[str, int]], rng: random.Random) -> Self:
        """Let `CLIENTS` clients begin, spread over the servers."""
        context = multiprocessing.get_context("spawn")
        load = cls([], context.Event(), [])
        for number in range(CLIENTS):
            ours, theirs = context.Pipe(duplex=False)
            highest = context.Array("q", len(SERVICES), lock=False)
            endpoint = endpoints[number % len(endpoints)]
            arguments = (endpoint, rng.random(), highest, load._over, theirs)
            context.Process(target=run_client, args=arguments, daemon=True).start()
            theirs.close()
            load.highest.append(highest)
            load._pipes.append(ours)
        return load

    def end(self) -> list[Log]:
        """Stop, and what every client got."""
        self._over.set()
        return [pipe.recv() for pipe in self._pipes]


@asynccontextmanager
async def weather_station(stack: ExitStack) -> AsyncIterator[Weather]:
    """The stores, and the ways to them."""
    redis, replica = (stack.enter_context(RedisServer()) for _ in range(2))
    mariadb = stack.enter_context(MariaDbServer())
    database = mariadb.create_database("ids")
    async with AsyncExitStack() as proxies:

        async def proxy(port: int) -> FaultProxy:
            return await proxies.enter_async_context(open_fault_proxy(port))

        to_redis = [await proxy(redis.port) for _ in range(SERVERS)]
        to_mariadb = [await proxy(database.port) for _ in range(SERVERS)]
        to_master = await proxy(redis.port)
        weather = Weather(redis, replica, database, to_redis, to_mariadb, to_master)
        await weather.let_replicate()
        yield weather


async def start_server(weather: Weather, number: int, folder: Path) -> ServerProcess:
    """A server that reaches the stores through the proxies of its number."""
    mysql = f"mysql://root@127.0.0.1:{weather.to_mariadb[number].port}/ids"
    redis = f"redis://127.0.0.1:{weather.to_redis[number].port}/0"
    flags = (*FLAGS, "--mysql", mysql, "--redis", redis, "--create-table")
    start = partial(ServerProcess.start, *flags, data=folder / "unused")
    return await trio.to_thread.run_sync(start)


async def storm(seconds: float, seed: int, *, is_short: bool = False) -> Verdict:
    """Run one storm; a short one leaves most faults out, and needs no more than 20 seconds."""
    rng = random.Random(seed)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        async with weather_station(stack) as weather:
            servers = [await start_server(weather, n, folder) for n in range(SERVERS)]
            for server in servers:
                stack.enter_context(server)
            load = Load.start([server.endpoint for server in servers], rng)
            rows = Rows(weather.database, load.highest)
            async with trio.open_nursery() as watchers:
                watchers.start_soon(weather.take_snapshots)
                watchers.start_soon(rows.watch)
                await trio.sleep(WARM_UP_SECONDS)
                script = weather.short_script(rng) if is_short else weather.script(rng)
                await weather.go_through(script, seconds - WARM_UP_SECONDS)
                watchers.cancel_scope.cancel()
            logs = await trio.to_thread.run_sync(load.end)
    return judge(
        logs,
        weather.dark,
        happened=weather.happened,
        row_samples=rows.samples,
        rows_behind=rows.behind,
    )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=1, help="so many storms, one after the other")
    options = parser.parse_args()
    good = True
    for seed in range(options.seed, options.seed + options.seeds):
        verdict = trio.run(storm, options.seconds, seed)
        print(f"seed {seed}\n{verdict}", flush=True)
        good = good and verdict.is_good
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
