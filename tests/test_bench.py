"""The load commands: what they compute is right, and the first of them runs to its end."""

import json
import socket
import threading
import time
from array import array
from pathlib import Path

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import cost, peers
from bench.generator import GeneratorFailed, Load, Sample, open_generator
from bench.python_generator import Schedule
from bench.report import Options, Report
from bench.soak import Moment, count_duplicates, quarter_growth
from bench.table import Spread, Table, Target, percentile, ratio
from bench.workers import worker_counts


@given(st.lists(st.integers(0, 1000), min_size=1), st.floats(0.1, 100))
def test_a_percentile_is_the_least_value_that_enough_do_not_exceed(
    values: list[int], percent: float
) -> None:
    """At least so many percent lie at or below it, and fewer at or below any smaller value."""
    ordered = sorted(values)
    found = percentile(ordered, percent)
    needed = percent / 100 * len(ordered)
    assert sum(value <= found for value in ordered) >= needed
    assert sum(value < found for value in ordered) < needed


def test_an_open_loop_is_due_evenly_whatever_happens() -> None:
    """Request k is due k intervals after the start."""
    schedule = Schedule(100.0, 50.0)
    assert [schedule.due(number) for number in (0, 1, 50)] == [100.0, 100.02, 101.0]


def test_a_ratio_needs_both_sides() -> None:
    """What was not measured has no ratio, and neither has anything to zero."""
    assert ratio(3.0, 2.0) == 1.5
    assert [ratio(None, 1.0), ratio(1.0, None), ratio(1.0, 0.0)] == [None, None, None]


@pytest.mark.parametrize(
    ("measured", "verdict"), [(1.0, "met"), (1.01, "missed"), (None, "not measured")]
)
def test_a_target_is_met_up_to_its_limit(measured: float | None, verdict: str) -> None:
    """The limit itself is still good, and what was not measured is never met."""
    assert Target("cost", 1.0, measured).verdict == verdict


def test_a_table_lines_up() -> None:
    """Names are on the left, numbers on the right, and what is missing is a dash."""
    table = Table("costs", ["shape", "us"], [["1 x 1", Spread(1, 0.5, 12)], ["64 x 16", None]])
    assert str(table).splitlines() == [
        "costs",
        "--------------------------",
        "shape                   us",
        "--------------------------",
        "1 x 1    1.00 [0.50..12.0]",
        "64 x 16                  -",
        "--------------------------",
    ]


def test_costs_are_compared_by_their_medians() -> None:
    """One slow window of three does not count."""
    shape = cost.Shape(64, 1)
    samples = {
        (peers.OURS, shape): [Sample(1_000_000, 1.0, cpu) for cpu in (8.0, 9.0, 99.0)],
        (peers.REDIS, shape): [Sample(1_000_000, 1.0, cpu) for cpu in (6.0, 2.0, 4.0)],
    }
    assert cost.cost_of(samples, peers.OURS, shape) == Spread(9.0, 8.0, 99.0)
    assert cost.compare(samples, peers.OURS, peers.REDIS, shape) == 2.25
    named = {target.name: target.verdict for target in cost.targets(samples)}
    assert named[f"CPU per request / {peers.REDIS}, 64 x 1"] == "missed"
    assert named[f"CPU per request / {peers.C_ECHO}, 64 x 1"] == "not measured"


def test_redis_clients_send_the_lengths_of_the_parts() -> None:
    """The request is the array of three strings that RESP prescribes."""
    assert peers.resp_request("svc10") == b"*3\r\n$6\r\nINCRBY\r\n$5\r\nsvc10\r\n$1\r\n1\r\n"


def test_soaking_compares_the_last_quarter_with_the_second() -> None:
    """What the first quarter warms up is no growth, and too short a run says nothing."""
    moments = [
        Moment(at, rss, 10) for at, rss in enumerate([1.0, 50, 100, 100, 110, 110, 120, 120])
    ]
    assert quarter_growth(moments, lambda moment: moment.rss_mib) == 1.2
    assert quarter_growth(moments[:3], lambda moment: moment.rss_mib) is None


def test_an_id_given_twice_is_found() -> None:
    """Ranges of one service that share IDs are counted; other services are their own."""
    assert count_duplicates({"a": array("q", (1, 3, 3, 2)), "b": array("q", (1, 3))}) == 1


def test_there_are_always_two_numbers_of_workers() -> None:
    """More of them only where they have cores."""
    assert [worker_counts(cores) for cores in (1, 2, 8)] == [[1, 2], [1, 2], [1, 2, 4, 8]]


def test_cost_runs_to_its_end(tmp_path: Path) -> None:
    """The generator in Python gets a reply to each request, and a report comes out of it."""
    plan = cost.Plan([cost.Shape(4, 1), cost.Shape(2, 4)], 1, warm_seconds=0.02, seconds=0.1)
    with (
        open_generator("python") as generator,
        peers.open_ours() as ours,
        peers.open_trio_echo() as echo,
    ):
        samples = cost.measure(generator, [ours, echo], None, plan)
    assert all(sample.requests and sample.cpu_seconds for [sample] in samples.values())
    report = Report("cost", {}, draw=lambda figure: None, tables=cost.tables(samples, plan.shapes))
    report.publish(Options(results=tmp_path))
    assert json.loads((tmp_path / "cost.json").read_text())["tables"][0]["rows"]


@pytest.mark.parametrize("kind", ["auto", "python"])
def test_an_open_loop_asks_at_its_rate_and_keeps_every_latency(kind: str) -> None:
    """Both generators send as many requests as are due, and know how long each took."""
    with open_generator(kind) as generator, peers.open_trio_echo() as echo:
        load = attrs.evolve(echo.load(), connections=3, rate=500.0, seconds=0.2)
        sample = generator.run(attrs.evolve(load, warm_seconds=0.05, keeps_latencies=True))
    assert 99 <= len(sample.latencies_ns) <= 101
    assert list(sample.latencies_ns) == sorted(sample.latencies_ns)


@pytest.mark.parametrize("kind", ["auto", "python"])
def test_a_refused_request_is_no_answered_one(kind: str) -> None:
    """Both generators fail on replies that they should not get, and quote the first."""
    with open_generator(kind) as generator, peers.open_ours() as ours:
        load = attrs.evolve(ours.load(), requests=[b"PING\n", b"NOTHING\n"], seconds=0.1)
        with pytest.raises(GeneratorFailed, match="do not begin with 'O', the first: ERR unknown"):
            generator.run(attrs.evolve(load, rotates=True, in_flight=4))


def _stall_once(listener: socket.socket, after: int, seconds: float) -> None:
    """Answer every line with `A`, but pause once, after so many of them."""
    connection, _ = listener.accept()
    with connection, connection.makefile("rb") as lines:
        for number, _ in enumerate(lines):
            if number == after:
                time.sleep(seconds)
            connection.sendall(b"A\n")


@pytest.mark.parametrize("kind", ["auto", "python"])
def test_a_stall_is_charged_to_every_request_that_was_due_in_it(kind: str) -> None:
    """A server that stops for 0.2 s delays all that was due meanwhile, not just one request."""
    with socket.create_server(("127.0.0.1", 0)) as listener, open_generator(kind) as generator:
        server = threading.Thread(target=_stall_once, args=(listener, 50, 0.2))
        server.start()
        load = Load(
            port=listener.getsockname()[1],
            requests=[b"PING\n"],
            expected="A",
            rate=500.0,
            warm_seconds=0.0,
            seconds=0.5,
            keeps_latencies=True,
        )
        latencies = generator.run(load).latencies_ns
        server.join()
    assert 249 <= len(latencies) <= 251
    # A hundred requests were due in the stall, spread evenly over it.
    assert sum(latency >= 50_000_000 for latency in latencies) >= 70
