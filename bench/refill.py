"""How long replies take while MariaDB and Redis are 0, 5 and 50 ms away.

Requests are served from memory, so a slow refill should not be noticed: pools fetch ahead, and the
faster IDs go the more they fetch at once. A pool that holds one second's demand instead of the
default's minute has to refill many times in a window.
"""

import functools
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final, TypeAlias, final

import attrs
import trio

from bench import peers
from bench.generator import Generator, Load, Sample, open_generator
from bench.latency import PERCENTS, latency_us
from bench.picture import WIDTH_INCHES, grouped_bars
from bench.report import Options, Progress, Report
from bench.table import Cell, Table, Target, ratio
from tests.processes import ServerProcess
from tests.real.mariadb_server import MariaDbServer
from tests.real.proxy import open_fault_proxy
from tests.real.redis_server import RedisServer
from tests.real.serving import LineClient

IDS_PER_SECOND: Final = 200_000
IDS_PER_REQUEST: Final = 100
CONNECTIONS: Final = 64
#: What the proxies add to a round trip.
DELAYS_MS: Final = (0, 5, 50)
#: The demand that a pool holds; None is the server's default, a minute.
POOL_SECONDS: Final = (None, 1)

_LIMIT: Final = 1.1
_WORST: Final = 100.0


@final
@attrs.frozen
class Plan:
    """What is measured, and for how long."""

    rounds: int
    warm_seconds: float
    seconds: float
    cold_seconds: float


FULL: Final = Plan(5, warm_seconds=1.5, seconds=2.5, cold_seconds=1.5)
QUICK: Final = Plan(1, warm_seconds=0.3, seconds=0.3, cold_seconds=0.3)


@final
@attrs.frozen
class Case:
    """One server: how far its stores are, and what its pools hold."""

    delay_ms: int
    pool_seconds: int | None

    def __str__(self) -> str:
        pool = "60 s" if self.pool_seconds is None else f"{self.pool_seconds} s"
        return f"{self.delay_ms} ms, pools of {pool}"

    @property
    def name(self) -> str:
        """Part of the names of its services: no two servers share one."""
        return f"{self.delay_ms}ms.{self.pool_seconds or 'default'}"

    @property
    def flags(self) -> list[str]:
        """What its server is started with."""
        return [] if self.pool_seconds is None else ["--pool-seconds", str(self.pool_seconds)]


CASES: Final = tuple(Case(delay, pool) for pool in POOL_SECONDS for delay in DELAYS_MS)

Samples: TypeAlias = dict[Case, list[Sample]]


@asynccontextmanager
async def _open_server(
    case: Case, mariadb: MariaDbServer, redis: RedisServer, flags: Sequence[str]
) -> AsyncIterator[ServerProcess]:
    """A server whose stores are that far away."""
    one_way = case.delay_ms / 2000
    async with (
        open_fault_proxy(mariadb.port) as to_mariadb,
        open_fault_proxy(redis.port) as to_redis,
    ):
        for proxy in (to_mariadb, to_redis):
            proxy.delay(to_server_seconds=one_way, to_client_seconds=one_way)
        stores = ["--mysql", f"mysql://root@127.0.0.1:{to_mariadb.port}/bench", "--create-table"]
        stores += ["--redis", f"redis://127.0.0.1:{to_redis.port}/0"]
        start = functools.partial(
            ServerProcess.start, *stores, *case.flags, *flags, data=Path("unused")
        )
        with await trio.to_thread.run_sync(start) as server:
            yield server


def _load(case: Case, server: ServerProcess, service: str) -> Load:
    peer = peers.as_peer(server)
    request = b"ALLOC %s.%s %d\n" % (service.encode(), case.name.encode(), IDS_PER_REQUEST)
    return attrs.evolve(
        peer.load(),
        requests=[request],
        connections=CONNECTIONS,
        rate=IDS_PER_SECOND / IDS_PER_REQUEST,
        keeps_latencies=True,
    )


def _segment_size(case: Case, server: ServerProcess) -> int:
    with LineClient.connect(server) as client:
        return int(client.stats(f"orders.{case.name}")["segment_size"])


@final
@attrs.frozen
class Found:
    """What all servers showed.

    Attributes:
        cold: from the very first request of a service on.
        steady: once it has been in demand for a while.
        segment_sizes: in the end, in IDs.
    """

    cold: Samples = attrs.field(factory=Samples)
    steady: Samples = attrs.field(factory=Samples)
    segment_sizes: dict[Case, int] = attrs.field(factory=dict)


async def measure(generator: Generator, flags: Sequence[str], plan: Plan) -> Found:
    """All servers at once, each asked in its turn."""
    found, progress = Found(), Progress(2 * plan.rounds * len(CASES))
    async with AsyncExitStack() as stack:
        mariadb = stack.enter_context(MariaDbServer())
        redis = stack.enter_context(RedisServer())
        mariadb.create_database("bench")
        servers = {
            case: await stack.enter_async_context(_open_server(case, mariadb, redis, flags))
            for case in CASES
        }
        for number in range(plan.rounds):
            for case, server in servers.items():
                cold = attrs.evolve(
                    _load(case, server, f"cold{number}"),
                    warm_seconds=0.0,
                    seconds=plan.cold_seconds,
                )
                steady = attrs.evolve(
                    _load(case, server, "orders"),
                    warm_seconds=plan.warm_seconds,
                    seconds=plan.seconds,
                )
                for what, load, samples in (
                    ("from the first request on", cold, found.cold),
                    ("after a while", steady, found.steady),
                ):
                    progress.step(f"{case}, {what}")
                    sample = await trio.to_thread.run_sync(generator.run, load)
                    samples.setdefault(case, []).append(sample)
        for case, server in servers.items():
            find = functools.partial(_segment_size, case, server)
            found.segment_sizes[case] = await trio.to_thread.run_sync(find)
    progress.end()
    return found


def _table(title: str, samples: Samples) -> Table:
    rows: list[list[Cell]] = [
        [str(case), *(latency_us(of_these, percent) for percent in (*PERCENTS, _WORST))]
        for case, of_these in samples.items()
    ]
    headings = ["stores away by", *(f"p{percent:g}" for percent in PERCENTS), "worst"]
    return Table(title, headings, rows)


def _tables(found: Found) -> list[Table]:
    rate = f"{IDS_PER_SECOND:,} IDs/s in requests of {IDS_PER_REQUEST}"
    sizes: list[list[Cell]] = [[str(case), size] for case, size in found.segment_sizes.items()]
    return [
        _table(f"latency in µs at {rate}, after a while: median [min..max]", found.steady),
        _table("the same, from the very first request of a service on", found.cold),
        Table("size of the segments in the end, in IDs", ["stores away by", "IDs"], sizes),
    ]


def _targets(samples: Samples) -> list[Target]:
    p99 = {case: latency_us(of_these, 99.0).median for case, of_these in samples.items()}
    near, far = DELAYS_MS[0], DELAYS_MS[-1]
    return [
        Target(
            f"p99 with stores {far} ms away / {near} ms, pools of {pool or 60} s",
            _LIMIT,
            ratio(p99[Case(far, pool)], p99[Case(near, pool)]),
        )
        for pool in POOL_SECONDS
    ]


def _draw(samples: Samples, figure: Any) -> None:
    figure.set_size_inches(WIDTH_INCHES, 0.8 * len(samples) + 1.5)
    grouped_bars(
        figure.add_subplot(),
        [str(case) for case in samples],
        {
            f"p{percent:g}": [latency_us(some, percent).median for some in samples.values()]
            for percent in PERCENTS
        },
        title=f"Latency at {IDS_PER_SECOND:,} IDs a second, by the distance of the stores",
        label="µs from when the request was due",
    )


def _as_json(samples: Samples) -> dict[str, list[dict[str, float]]]:
    return {
        str(case): [
            {f"p{percent:g}_us": latency_us([one], percent).median for percent in (*PERCENTS, 100)}
            for one in of_these
        ]
        for case, of_these in samples.items()
    }


def run(options: Options) -> Report:
    """Start everything, measure, end everything."""
    plan = QUICK if options.quick else FULL
    with ExitStack() as stack:
        generator = stack.enter_context(open_generator(options.generator))
        found = trio.run(measure, generator, options.server_flags, plan)
    return Report(
        "refill",
        method={
            "generator": generator.name,
            "server_flags": options.server_flags,
            "ids_per_second": IDS_PER_SECOND,
            "ids_per_request": IDS_PER_REQUEST,
            **attrs.asdict(plan),
        },
        draw=lambda figure: _draw(found.steady, figure),
        tables=_tables(found),
        targets=_targets(found.steady),
        samples={"steady": _as_json(found.steady), "cold": _as_json(found.cold)},
        notes=[
            "a proxy adds the delay to each round trip, half of it each way, to both stores",
            f"all IDs are of one service, over {CONNECTIONS} connections",
            "pools of 60 s hardly refill within a window, those of 1 s once a second",
        ],
    )
