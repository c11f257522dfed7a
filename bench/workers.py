"""Requests a second, and CPU time per request, with one worker process and with more."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Final, TypeAlias, final

import attrs

from bench import peers
from bench.generator import Generator, Sample, open_generator
from bench.peers import Peer
from bench.picture import WIDTH_INCHES, grouped_bars
from bench.report import Options, Progress, Report
from bench.table import Cell, Spread, Table
from tests.real.serving import run_command

SHAPES: Final = ((64, 1), (512, 1), (64, 16))
FLAG: Final = "--workers"


@final
@attrs.frozen
class Plan:
    """What is measured, and for how long."""

    rounds: int
    seconds: float


FULL: Final = Plan(5, 2.0)
QUICK: Final = Plan(1, 0.3)

#: By the number of workers, the connections and the requests in flight on each.
Samples: TypeAlias = dict[tuple[int, int, int], list[Sample]]


def worker_counts(cores: int) -> list[int]:
    """One, two, and on while there are as many cores."""
    return [1, 2, *(2**power for power in range(2, 8) if 2**power <= cores)]


def knows_workers() -> bool:
    """Can this server have more than one?"""
    return FLAG in run_command("serve", "--help").stdout


def measure(generator: Generator, servers: dict[int, Peer], plan: Plan) -> Samples:
    """Every number of workers in every shape, turn by turn."""
    turns = [(*shape, count) for _ in range(plan.rounds) for shape in SHAPES for count in servers]
    progress, samples = Progress(len(turns)), Samples()
    for connections, in_flight, count in turns:
        progress.step(f"{count} workers, {connections} x {in_flight}")
        load = attrs.evolve(
            servers[count].load(),
            connections=connections,
            in_flight=in_flight,
            seconds=plan.seconds,
        )
        samples.setdefault((count, connections, in_flight), []).append(generator.run(load))
    progress.end()
    return samples


def _table(samples: Samples) -> Table:
    rows: list[list[Cell]] = [
        [
            str(count),
            f"{connections} x {in_flight}",
            Spread.of(one.requests_per_second for one in of_these),
            Spread.of(one.cpu_us_per_request for one in of_these),
            Spread.of(one.cpu_seconds / one.seconds for one in of_these),
        ]
        for (count, connections, in_flight), of_these in samples.items()
    ]
    headings = ["workers", "connections x in flight", "requests/s", "CPU µs/request", "cores busy"]
    return Table("workers: median [min..max] of the rounds", headings, rows)


def _draw(samples: Samples, counts: Sequence[int], figure: Any) -> None:
    figure.set_size_inches(WIDTH_INCHES, 1.2 * len(SHAPES) + 1.5)
    grouped_bars(
        figure.add_subplot(),
        [f"{connections} x {in_flight}" for connections, in_flight in SHAPES],
        {
            f"{count} workers": [
                Spread.of(one.requests_per_second for one in samples[count, *shape]).median / 1000
                for shape in SHAPES
            ]
            for count in counts
        },
        title="Requests a second by the number of workers (more is better)",
        label="thousand requests a second; rows are connections x requests in flight",
    )


def _as_json(samples: Samples) -> list[dict[str, Any]]:
    return [
        {
            "workers": count,
            "connections": connections,
            "in_flight": in_flight,
            "requests_per_second": one.requests_per_second,
            "cpu_us_per_request": one.cpu_us_per_request,
        }
        for (count, connections, in_flight), of_these in samples.items()
        for one in of_these
    ]


def run(options: Options) -> Report:
    """Start everything, measure, end everything."""
    plan = QUICK if options.quick else FULL
    cores = len(os.sched_getaffinity(0))
    notes = [f"the generator needs a core of its own, and there are {cores} in all"]
    counts = worker_counts(cores)
    if not knows_workers():
        counts = [1]
        notes.append(f"this server has no {FLAG}: one process was measured")
    with ExitStack() as stack:
        generator = stack.enter_context(open_generator(options.generator))
        servers = {}
        for count in counts:
            flags = [FLAG, str(count)] if len(counts) > 1 else []
            servers[count] = stack.enter_context(peers.open_ours(*flags, *options.server_flags))
        samples = measure(generator, servers, plan)
    return Report(
        "workers",
        method={
            "generator": generator.name,
            "server_flags": options.server_flags,
            **attrs.asdict(plan),
        },
        draw=lambda figure: _draw(samples, counts, figure),
        tables=[_table(samples)],
        samples=_as_json(samples),
        notes=notes,
    )
