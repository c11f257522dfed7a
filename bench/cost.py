"""CPU time of the server per request, beside Redis, MariaDB and bare echo servers.

One generator asks them all, turn by turn: first every peer once, then every peer again, so that
whatever else the machine does falls on all of them.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import product
from typing import Any, Final, TypeAlias, final

import attrs

from bench import peers
from bench.generator import Generator, Load, Sample, open_generator
from bench.peers import MariaDbPeer, Peer
from bench.picture import WIDTH_INCHES, grouped_bars
from bench.report import Opener, Options, Progress, Report
from bench.table import Cell, Spread, Table, Target, ratio


@final
@attrs.frozen
class Shape:
    """How many connections, how many requests in flight on each, and of which services."""

    connections: int
    in_flight: int
    is_mixed: bool = False

    def __str__(self) -> str:
        return f"{self.connections} x {self.in_flight}{' mixed' if self.is_mixed else ''}"


@final
@attrs.frozen
class Variant:
    """This server with flags, to be compared with itself without them."""

    name: str
    flags: Sequence[str]
    is_scraped: bool = False


@final
@attrs.frozen
class Plan:
    """What is measured, and for how long."""

    shapes: Sequence[Shape]
    rounds: int
    warm_seconds: float
    seconds: float


SHAPES: Final = tuple(Shape(*pair) for pair in product((1, 64, 512), (1, 16, 128)))
#: Each request in flight names another service than the one before it.
MIXED: Final = Shape(64, 16, is_mixed=True)
FULL: Final = Plan((*SHAPES, MIXED), rounds=5, warm_seconds=0.15, seconds=0.65)
QUICK: Final = Plan((Shape(64, 1), Shape(64, 16), MIXED), 1, warm_seconds=0.05, seconds=0.15)

STREAM_LANE: Final = "stream lane"
RATE_LIMITED: Final = "rate limits"
#: Rate limits, and admin pages that are asked for metrics every second. Deadlines and counters are
#: always on, and a trace costs who sends one.
GUARDED: Final = "everything on"
#: Limits that nobody reaches are looked at all the same.
_RATE_LIMITS: Final = (
    *("--rate-limit-qps", "1000000000", "--rate-limit-ids", "1000000000"),
    *("--service-rate-limit-qps", "1000000000", "--service-rate-limit-ids", "1000000000"),
)
#: An entry added here is measured in the `VARIANT_SHAPES`.
VARIANTS: Final = (
    Variant(STREAM_LANE, ("--lane", "stream")),
    Variant(RATE_LIMITED, _RATE_LIMITS),
    Variant(GUARDED, (*_RATE_LIMITS, "--admin", "127.0.0.1:0"), is_scraped=True),
)
VARIANT_SHAPES: Final = (Shape(64, 1), Shape(64, 16))

_LIMITS_TO_REDIS: Final = (
    (Shape(64, 1), 1.0),
    (Shape(512, 1), 1.0),
    (Shape(64, 16), 0.7),
    (Shape(64, 128), 0.55),
)
_LIMIT_TO_C_ECHO: Final = 1.6
_LIMIT_OF_GUARDING: Final = 1.1
#: What is compared: with it, and without.
_GUARDS: Final = (
    ("metrics, limits, deadlines and tracing", GUARDED, peers.OURS),
    ("rate limits alone", RATE_LIMITED, peers.OURS),
)

#: By the peer's name and the shape.
Samples: TypeAlias = dict[tuple[str, Shape], list[Sample]]


def load_of(peer: Peer, shape: Shape, plan: Plan) -> Load:
    """What the generator does to it."""
    return attrs.evolve(
        peer.load(),
        connections=shape.connections,
        in_flight=shape.in_flight,
        rotates=shape.is_mixed,
        warm_seconds=plan.warm_seconds,
        seconds=plan.seconds,
    )


def _is_measured(name: str, shape: Shape) -> bool:
    if name == peers.MARIADB:
        return shape.in_flight == 1
    if shape.is_mixed:
        return name in (peers.OURS, peers.REDIS, peers.REDIS_RESP)
    return shape in VARIANT_SHAPES or name not in {variant.name for variant in VARIANTS}


def measure(
    generator: Generator, all_peers: Sequence[Peer], mariadb: MariaDbPeer | None, plan: Plan
) -> Samples:
    """Every peer in every shape, so many times."""
    names = [peer.name for peer in all_peers] + ([peers.MARIADB] if mariadb else [])
    turns = [
        (shape, name)
        for shape in plan.shapes
        for _ in range(plan.rounds)
        for name in names
        if _is_measured(name, shape)
    ]
    by_name = {peer.name: peer for peer in all_peers}
    progress, samples = Progress(len(turns)), Samples()
    for shape, name in turns:
        progress.step(f"{name}, {shape}")
        if name in by_name:
            sample = generator.run(load_of(by_name[name], shape, plan))
        else:
            assert mariadb is not None
            sample = mariadb.run(shape.connections, plan.seconds)
        samples.setdefault((name, shape), []).append(sample)
    progress.end()
    return samples


def cost_of(samples: Samples, name: str, shape: Shape) -> Spread | None:
    """CPU µs per request; None where it was not measured."""
    of_these = samples.get((name, shape))
    return Spread.of(sample.cpu_us_per_request for sample in of_these) if of_these else None


def compare(samples: Samples, name: str, other: str, shape: Shape) -> float | None:
    """How many times what the other one costs, by the medians."""
    one, two = cost_of(samples, name, shape), cost_of(samples, other, shape)
    return ratio(one and one.median, two and two.median)


def tables(samples: Samples, shapes: Sequence[Shape]) -> list[Table]:
    """The costs, and the ratios that follow from them."""
    names = list(dict.fromkeys(name for name, _ in samples))
    costs: list[list[Cell]] = [
        [str(shape), *(cost_of(samples, name, shape) for name in names)] for shape in shapes
    ]
    others = [name for name in peers.REFERENCES if name in names]
    ratios: list[list[Cell]] = [
        [str(shape), *(compare(samples, peers.OURS, other, shape) for other in others)]
        for shape in shapes
    ]
    form = "connections x requests in flight"
    return [
        Table("CPU µs per request of the server: median [min..max]", [form, *names], costs),
        Table(f"{peers.OURS} / the other, of the medians", [form, *others], ratios),
    ]


def targets(samples: Samples) -> list[Target]:
    """Whether it is cheap enough."""
    return [
        *(
            Target(
                f"CPU per request / {peers.REDIS}, {shape}",
                limit,
                compare(samples, peers.OURS, peers.REDIS, shape),
            )
            for shape, limit in _LIMITS_TO_REDIS
        ),
        Target(
            f"CPU per request / {peers.C_ECHO}, {Shape(64, 1)}",
            _LIMIT_TO_C_ECHO,
            compare(samples, peers.OURS, peers.C_ECHO, Shape(64, 1)),
        ),
        *(
            Target(
                f"{guard} on / off, {shape}",
                _LIMIT_OF_GUARDING,
                compare(samples, guarded, bare, shape),
            )
            for guard, guarded, bare in _GUARDS
            for shape in VARIANT_SHAPES
        ),
    ]


def _as_json(samples: Samples) -> list[dict[str, Any]]:
    return [
        {
            "peer": name,
            "shape": str(shape),
            "cpu_us_per_request": sample.cpu_us_per_request,
            "requests": sample.requests,
            "seconds": sample.seconds,
            # Of the time: below 1, the generator was slower than the server.
            "busy": sample.cpu_seconds / sample.seconds,
        }
        for (name, shape), of_these in samples.items()
        for sample in of_these
    ]


def _draw(samples: Samples, shapes: Sequence[Shape], figure: Any) -> None:
    measured = {name for name, _ in samples}
    drawn = (peers.OURS, peers.REDIS_RESP, peers.TRIO_ECHO, peers.C_ECHO)
    series: Mapping[str, Sequence[float | None]] = {
        name: [compare(samples, name, peers.REDIS, shape) for shape in shapes]
        for name in drawn
        if name in measured
    }
    figure.set_size_inches(WIDTH_INCHES, 0.8 * len(shapes) + 1.5)
    axes = figure.add_subplot()
    grouped_bars(
        axes,
        [str(shape) for shape in shapes],
        series,
        title=f"CPU per request, as a multiple of {peers.REDIS} (less is better)",
        label="times Redis; rows are connections x requests in flight",
    )
    axes.axvline(1.0, color="0.4", linewidth=1, zorder=0)


def run(options: Options) -> Report:
    """Start everything, measure, end everything."""
    plan = QUICK if options.quick else FULL
    with ExitStack() as stack:
        opener = Opener(stack)
        generator = stack.enter_context(open_generator(options.generator))
        ours = opener.open(peers.open_ours(*options.server_flags))
        variants = [
            opener.open(
                peers.open_ours(
                    *options.server_flags, *one.flags, name=one.name, is_scraped=one.is_scraped
                )
            )
            for one in VARIANTS
        ]
        redis = opener.open(peers.open_redis())
        resp = redis and attrs.evolve(redis, name=peers.REDIS_RESP, request=peers.resp_request)
        echoes = [opener.open(peers.open_trio_echo()), opener.open(peers.open_c_echo())]
        mariadb = opener.open(peers.open_mariadb())
        all_peers = [peer for peer in (ours, *variants, redis, resp, *echoes) if peer]
        samples = measure(generator, all_peers, mariadb, plan)
    return Report(
        "cost",
        method={
            "generator": generator.name,
            "server_flags": options.server_flags,
            "variants": {one.name: one.flags for one in VARIANTS},
            "rounds": plan.rounds,
            "warm_seconds": plan.warm_seconds,
            "window_seconds": plan.seconds,
            "services": len(peers.SERVICES),
        },
        draw=lambda figure: _draw(samples, plan.shapes, figure),
        tables=tables(samples, plan.shapes),
        targets=targets(samples),
        samples=_as_json(samples),
        notes=[
            *opener.notes,
            f"generator: {generator.name}; {plan.rounds} windows of {plan.seconds:g} s each",
            f"{peers.REDIS} takes a line as we do; {peers.REDIS_RESP} is what its clients send",
            f"{peers.MARIADB} is asked by asyncmy: one request in flight, other window lengths",
        ],
    )
