"""How long replies take at fixed rates, beside Redis, and for a polite client beside a flood.

The loop is open: request k is due at start + k / rate, and its latency counts from then, whether
or not a slow reply to an earlier one kept it from being sent. So no omission is coordinated.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Final, TypeAlias, final

import attrs

from bench import peers
from bench.generator import Generator, Load, Sample, open_generator
from bench.peers import Peer
from bench.picture import WIDTH_INCHES, grouped_bars
from bench.report import Opener, Options, Progress, Report
from bench.table import Cell, Spread, Table, Target, percentile, ratio

CONNECTIONS: Final = 64
PERCENTS: Final = (50.0, 99.0, 99.9)
FRACTIONS: Final = (0.1, 0.5, 0.8)
#: The flood: so many connections, each with so many requests under way and no pause.
FLOODING_CONNECTIONS: Final = 50
FLOOD_IN_FLIGHT: Final = 1024
FLOOD_BURST: Final = 128

_LIMIT_AT_HALF: Final = 1.2
_WORST: Final = 100.0


@final
@attrs.frozen
class Plan:
    """What is measured, and for how long."""

    rounds: int
    capacity_seconds: float
    seconds: float
    polite_rounds: int
    polite_seconds: float


FULL: Final = Plan(5, 0.8, 2.0, polite_rounds=5, polite_seconds=2.0)
QUICK: Final = Plan(1, 0.2, 0.3, polite_rounds=1, polite_seconds=0.5)


@final
@attrs.frozen
class Case:
    """A peer at a rate.

    Attributes:
        fraction: of the capacity of the peer named by `capacity_of`.
    """

    peer: str
    fraction: float
    capacity_of: str

    def __str__(self) -> str:
        whose = "its capacity" if self.peer == self.capacity_of else f"{self.capacity_of}'s"
        return f"{self.peer} at {self.fraction:.0%} of {whose}"


Samples: TypeAlias = dict[Case, list[Sample]]
#: By the peer's name, and whether the flood was there.
Polite: TypeAlias = dict[tuple[str, bool], list[Sample]]


def latency_us(samples: Sequence[Sample], percent: float) -> Spread:
    """One percentile of each sample."""
    return Spread.of(percentile(sample.latencies_ns, percent) / 1000 for sample in samples)


def _p99(samples: Samples, case: Case) -> float | None:
    return latency_us(samples[case], 99.0).median if case in samples else None


def cases(names: Sequence[str]) -> list[Case]:
    """Each at fractions of its own capacity, and the others also at the rates of ours."""
    found = []
    for fraction in FRACTIONS:
        found += [Case(name, fraction, name) for name in names if name != peers.C_ECHO]
        found += [Case(name, fraction, peers.OURS) for name in names if name != peers.OURS]
    return found


def measure_capacity(
    generator: Generator, all_peers: Sequence[Peer], plan: Plan
) -> dict[str, float]:
    """Requests a second by name, one in flight on each connection."""
    found: dict[str, list[float]] = {}
    for _ in range(plan.rounds):
        for peer in all_peers:
            load = attrs.evolve(peer.load(), connections=CONNECTIONS, seconds=plan.capacity_seconds)
            found.setdefault(peer.name, []).append(generator.run(load).requests_per_second)
    return {name: Spread.of(rates).median for name, rates in found.items()}


def measure_rates(
    generator: Generator, all_peers: Sequence[Peer], capacity: dict[str, float], plan: Plan
) -> Samples:
    """Every case, turn by turn."""
    by_name = {peer.name: peer for peer in all_peers}
    all_cases = cases(list(by_name))
    progress, samples = Progress(len(all_cases) * plan.rounds), Samples()
    for _ in range(plan.rounds):
        for case in all_cases:
            progress.step(str(case))
            load = attrs.evolve(
                by_name[case.peer].load(),
                connections=CONNECTIONS,
                rate=case.fraction * capacity[case.capacity_of],
                seconds=plan.seconds,
                keeps_latencies=True,
            )
            samples.setdefault(case, []).append(generator.run(load))
    progress.end()
    return samples


def measure_polite(generator: Generator, all_peers: Sequence[Peer], plan: Plan) -> Polite:
    """One client that asks one at a time: alone, then beside a flood."""
    progress, samples = Progress(2 * plan.polite_rounds * len(all_peers)), Polite()
    for _ in range(plan.polite_rounds):
        for peer in all_peers:
            polite = attrs.evolve(
                peer.load(), seconds=plan.polite_seconds, warm_seconds=0.1, keeps_latencies=True
            )
            progress.step(f"{peer.name}, a polite client alone")
            samples.setdefault((peer.name, False), []).append(generator.run(polite))
            progress.step(f"{peer.name}, a polite client beside a flood")
            with generator.start(_flood(peer, plan)) as flood:
                polite = attrs.evolve(polite, warm_seconds=0.5)
                samples.setdefault((peer.name, True), []).append(generator.run(polite))
                flood.result()
    progress.end()
    return samples


def _flood(peer: Peer, plan: Plan) -> Load:
    return attrs.evolve(
        peer.load(),
        connections=FLOODING_CONNECTIONS,
        in_flight=FLOOD_IN_FLIGHT,
        burst=FLOOD_BURST,
        seconds=plan.polite_seconds + 1.0,
    )


def _rate_table(samples: Samples) -> Table:
    rows: list[list[Cell]] = [
        [
            str(case),
            round(Spread.of(one.requests_per_second for one in of_these).median),
            *(latency_us(of_these, percent) for percent in PERCENTS),
        ]
        for case, of_these in samples.items()
    ]
    headings = ["peer and offered rate", "requests/s", *(f"p{percent:g}" for percent in PERCENTS)]
    return Table(
        f"latency in µs from when a request was due, {CONNECTIONS} connections: "
        "median [min..max] of the rounds",
        headings,
        rows,
    )


def _polite_table(samples: Polite) -> Table:
    rows: list[list[Cell]] = [
        [
            f"{name}, {'beside the flood' if has_flood else 'alone'}",
            *(latency_us(of_these, percent) for percent in (50.0, 99.0, _WORST)),
        ]
        for (name, has_flood), of_these in samples.items()
    ]
    return Table(
        f"a polite client's wait in us; flood: {FLOODING_CONNECTIONS} connections with "
        f"{FLOOD_IN_FLIGHT} in flight, without end",
        ["peer", "p50", "p99", "worst"],
        rows,
    )


def _targets(samples: Samples) -> list[Target]:
    half = _p99(samples, Case(peers.OURS, 0.5, peers.OURS))
    return [
        Target(
            f"p99 at half of capacity / {peers.REDIS}'s at half of its own",
            _LIMIT_AT_HALF,
            ratio(half, _p99(samples, Case(peers.REDIS, 0.5, peers.REDIS))),
        ),
        Target(
            f"p99 at half of capacity / {peers.REDIS}'s at the same rate",
            _LIMIT_AT_HALF,
            ratio(half, _p99(samples, Case(peers.REDIS, 0.5, peers.OURS))),
        ),
    ]


def _draw(samples: Samples, figure: Any) -> None:
    figure.set_size_inches(WIDTH_INCHES, 0.7 * len(samples) + 1.5)
    axes = figure.add_subplot()
    series = {
        f"p{percent:g}": [latency_us(of_these, percent).median for of_these in samples.values()]
        for percent in PERCENTS
    }
    axes.set_xscale("log")
    grouped_bars(
        axes,
        [str(case) for case in samples],
        series,
        title="Latency at fixed rates (less is better)",
        label="µs from when the request was due",
    )


def _as_json(capacity: dict[str, float], samples: Samples, polite: Polite) -> dict[str, Any]:
    def numbers(sample: Sample) -> dict[str, float]:
        return {
            "requests": sample.requests,
            "seconds": sample.seconds,
            **{
                f"p{percent:g}_us": percentile(sample.latencies_ns, percent) / 1000
                for percent in (*PERCENTS, _WORST)
            },
        }

    return {
        "capacity_requests_per_second": capacity,
        "rates": {str(case): list(map(numbers, some)) for case, some in samples.items()},
        "polite": {
            f"{name}{', flood' * has_flood}": list(map(numbers, some))
            for (name, has_flood), some in polite.items()
        },
    }


def run(options: Options) -> Report:
    """Start everything, measure, end everything."""
    plan = QUICK if options.quick else FULL
    with ExitStack() as stack:
        opener = Opener(stack)
        generator = stack.enter_context(open_generator(options.generator))
        ours = opener.open(peers.open_ours(*options.server_flags))
        opened = [ours, opener.open(peers.open_redis()), opener.open(peers.open_c_echo())]
        all_peers = [peer for peer in opened if peer]
        capacity = measure_capacity(generator, all_peers, plan)
        samples = measure_rates(generator, all_peers, capacity, plan)
        rivals = [peer for peer in all_peers if peer.name != peers.C_ECHO]
        polite = measure_polite(generator, rivals, plan)
    shown = ", ".join(f"{name} {rate:,.0f}/s" for name, rate in capacity.items())
    return Report(
        "latency",
        method={
            "generator": generator.name,
            "server_flags": options.server_flags,
            **attrs.asdict(plan),
        },
        draw=lambda figure: _draw(samples, figure),
        tables=[_rate_table(samples), _polite_table(polite)],
        targets=_targets(samples),
        samples=_as_json(capacity, samples, polite),
        notes=[
            *opener.notes,
            f"capacity, asked by {CONNECTIONS} connections with one request in flight: {shown}",
            f"generator: {generator.name}; the C echo shows what it and the kernel add",
        ],
    )
