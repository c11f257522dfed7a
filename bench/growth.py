"""What a request costs, and what memory is held, as services and connections become many."""

import resource
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Final, TypeAlias, final

import attrs

from bench import peers
from bench.generator import Generator, Load, Sample, open_generator
from bench.peers import Peer
from bench.picture import WIDTH_INCHES, clean, place_legend
from bench.report import Opener, Options, Progress, Report
from bench.table import Cell, Spread, Table, Target, ratio

#: With many services: so many connections and requests in flight, each of the next service.
SERVICE_SHAPES: Final = ((64, 1), (64, 16))
#: With many connections: so many have a request under way, and the turn goes round all of them.
ACTIVE_CONNECTIONS: Final = 64
CONNECTIONS: Final = "connections"
#: What many connections cost the kernel alone.
ECHO_CONNECTIONS: Final = f"connections of the {peers.C_ECHO}"
#: Files that a server or a generator has open beside its connections, with room to spare.
OTHER_FILES: Final = 256
#: Nothing is given back before the last window is over, and while so many services begin, a request
#: may wait for longer than usual.
SERVER_FLAGS: Final = ("--idle-service-seconds", "3600", "--wait-seconds", "30")

_LIMIT_OF_COST: Final = 1.3
_LIMIT_PER_CONNECTION_KB: Final = 8.0
_LIMIT_PER_SERVICE_KB: Final = 12.0


@final
@attrs.frozen
class Plan:
    """What is measured, and for how long."""

    services: Sequence[int]
    connections: Sequence[int]
    rounds: int
    seconds: float


FULL: Final = Plan((1, 100, 10_000, 100_000), (1, 100, 1_000, 10_000), 5, 0.7)
QUICK: Final = Plan((1, 100, 1_000), (1, 100, 1_000), 1, 0.2)

#: By what there are many of, and how many there are.
Samples: TypeAlias = dict[tuple[str, int], list[Sample]]


def _services(count: int) -> list[str]:
    return [f"svc{number}" for number in range(count)]


def _service_axis(connections: int, in_flight: int) -> str:
    return f"services, {connections} x {in_flight}"


def _service_load(peer: Peer, count: int, shape: tuple[int, int], plan: Plan) -> Load:
    connections, in_flight = shape
    return attrs.evolve(
        peer.load(_services(count)),
        connections=connections,
        in_flight=in_flight,
        rotates=True,
        seconds=plan.seconds,
    )


def _connection_load(peer: Peer, count: int, plan: Plan) -> Load:
    return attrs.evolve(
        peer.load(),
        connections=count,
        active=min(count, ACTIVE_CONNECTIONS),
        # Everybody has had a turn.
        warm_requests=count,
        seconds=plan.seconds,
    )


def prime(generator: Generator, peer: Peer, count: int, plan: Plan) -> int:
    """Bring all services into use; the bytes that the server's memory grew by."""
    before = peer.rss_bytes()
    load = _service_load(peer, count, SERVICE_SHAPES[0], plan)
    # Its connections begin spread over all services, and none is much faster than the others.
    generator.run(attrs.evolve(load, warm_requests=round(1.1 * count), seconds=0.1))
    return peer.rss_bytes() - before


def hold_connections(peer: Peer, count: int) -> int:
    """Open connections that ask once, then are silent; the bytes that its memory grew by."""
    before = peer.rss_bytes()
    with ExitStack() as stack:
        for number in range(count):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", peer.port)))
            client.sendall(peer.request(peers.SERVICES[number % len(peers.SERVICES)]))
            while not client.recv(4096).endswith(b"\n"):
                pass
        return peer.rss_bytes() - before


def possible_connections(counts: Sequence[int], notes: list[str]) -> list[int]:
    """Those counts for which a process may open enough files."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    possible = [count for count in counts if count + OTHER_FILES <= limit]
    if len(possible) < len(counts):
        notes.append(f"left out: more connections than the hard limit of {limit} open files allows")
    return possible


@final
@attrs.frozen
class Found:
    """Costs, and bytes of memory: by count, of all together."""

    samples: Samples = attrs.field(factory=Samples)
    service_bytes: dict[int, int] = attrs.field(factory=dict)
    connection_bytes: dict[int, int] = attrs.field(factory=dict)
    notes: list[str] = attrs.field(factory=list)


def measure(generator: Generator, flags: Sequence[str], plan: Plan) -> Found:
    """One server for each number of services and one for all connections, turn by turn."""
    found, progress = Found(), Progress(len(plan.services) + len(plan.connections))
    connections = possible_connections(plan.connections, found.notes)
    with ExitStack() as stack:
        opener = Opener(stack, found.notes)

        def open_server() -> Peer:
            return stack.enter_context(peers.open_ours(*SERVER_FLAGS, *flags))

        turns: list[tuple[tuple[str, int], Load]] = []
        for count in plan.services:
            progress.step(f"bringing {count:,} services into use")
            peer = open_server()
            found.service_bytes[count] = prime(generator, peer, count, plan)
            for shape in SERVICE_SHAPES:
                load = _service_load(peer, count, shape, plan)
                turns.append(((_service_axis(*shape), count), load))
        for count in connections:
            progress.step(f"holding {count:,} silent connections")
            found.connection_bytes[count] = hold_connections(open_server(), count)
        echo = opener.open(peers.open_c_echo())
        for axis, one in ((CONNECTIONS, open_server()), (ECHO_CONNECTIONS, echo)):
            if one is not None:
                loads = {count: _connection_load(one, count, plan) for count in connections}
                turns += [((axis, count), load) for count, load in loads.items()]
        progress = Progress(plan.rounds * len(turns))
        for _ in range(plan.rounds):
            for (what, count), load in turns:
                progress.step(f"{what}: {count:,}")
                found.samples.setdefault((what, count), []).append(generator.run(load))
        progress.end()
    return found


def _cost(found: Found, axis: str, count: int) -> Spread:
    return Spread.of(sample.cpu_us_per_request for sample in found.samples[axis, count])


def _counts(found: Found, axis: str) -> list[int]:
    return [count for what, count in found.samples if what == axis]


def _axes(found: Found) -> list[str]:
    return list(dict.fromkeys(what for what, _ in found.samples))


def _tables(found: Found) -> list[Table]:
    costs: list[list[Cell]] = [
        [axis, count, _cost(found, axis, count)]
        for axis in _axes(found)
        for count in _counts(found, axis)
    ]
    memory: list[list[Cell]] = [
        [what, count, grown / 2**20, grown / 1024 / count]
        for what, by_count in (
            ("silent connections", found.connection_bytes),
            ("active services", found.service_bytes),
        )
        for count, grown in by_count.items()
    ]
    return [
        Table(
            "CPU µs per request of the server: median [min..max]",
            ["many", "of them", "cost"],
            costs,
        ),
        Table("resident memory that they add", ["what", "of them", "MiB", "KiB each"], memory),
    ]


def _growth(found: Found, axis: str, few: int) -> tuple[float | None, int]:
    """How many times the cost with few of them is that with most; and how many those are."""
    counts = _counts(found, axis)
    most = max(counts)
    if few not in counts or few == most:
        return None, most
    return ratio(_cost(found, axis, most).median, _cost(found, axis, few).median), most


def _targets(found: Found) -> list[Target]:
    targets = []
    for axis in _axes(found):
        if axis == ECHO_CONNECTIONS:
            continue
        few = 100 if axis == CONNECTIONS else 1
        grown, most = _growth(found, axis, few)
        name = f"cost with {most:,} / with {few:,} {axis}"
        targets.append(Target(name, _LIMIT_OF_COST, grown))
    for what, limit, by_count in (
        ("silent connection", _LIMIT_PER_CONNECTION_KB, found.connection_bytes),
        ("active service", _LIMIT_PER_SERVICE_KB, found.service_bytes),
    ):
        most = max(by_count)
        name = f"KiB per {what}, of {most:,}"
        targets.append(Target(name, limit, by_count[most] / 1024 / most))
    return targets


def _draw(found: Found, figure: Any) -> None:
    figure.set_size_inches(WIDTH_INCHES, 5)
    axes = figure.add_subplot()
    for axis in _axes(found):
        counts = _counts(found, axis)
        costs = [_cost(found, axis, count).median for count in counts]
        axes.plot(counts, costs, marker="o", label=axis)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("how many")
    axes.set_ylabel("CPU µs per request")
    clean(axes, "Cost as services and connections become many (less is better)")
    place_legend(axes)


def _as_json(found: Found) -> dict[str, Any]:
    return {
        "cpu_us_per_request": [
            {"many": what, "of_them": count, "samples": [one.cpu_us_per_request for one in some]}
            for (what, count), some in found.samples.items()
        ],
        "service_bytes": found.service_bytes,
        "connection_bytes": found.connection_bytes,
    }


def run(options: Options) -> Report:
    """Start everything, measure, end everything."""
    plan = QUICK if options.quick else FULL
    with open_generator(options.generator) as generator:
        found = measure(generator, options.server_flags, plan)
    return Report(
        "growth",
        method={
            "generator": generator.name,
            "server_flags": [*SERVER_FLAGS, *options.server_flags],
            **attrs.asdict(plan),
        },
        draw=lambda figure: _draw(found, figure),
        tables=_tables(found),
        targets=_targets(found),
        samples=_as_json(found),
        notes=[
            *found.notes,
            "services: each request asks for the next of them; connections x in flight",
            f"connections: {ACTIVE_CONNECTIONS} at a time have one request under way, in turn",
        ],
    )
