"""The size of segments: bounded, steady, and enough for the outage that nobody should notice."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idalloc_tcp.pool import Pool, Segment
from idalloc_tcp.sizing import GROWTH_MAX, Demand, SizePolicy

policies = st.builds(
    lambda smallest, more, pool_seconds: SizePolicy(smallest, smallest + more, pool_seconds),
    st.integers(1, 10_000),
    st.integers(0, 10_000_000),
    st.sampled_from([0.0, 0.5, 60.0, 86_400.0]),
)
#: How many IDs went, and how many seconds later that was noticed; clocks may stand still.
refills = st.tuples(st.integers(0, 10_000_000), st.sampled_from([0.0, 1e-9, 0.02, 1.0, 3600.0]))


@given(policies, st.lists(refills, max_size=20))
def test_size_is_bounded_whatever_happens(
    policy: SizePolicy, history: list[tuple[int, float]]
) -> None:
    """No history of demand takes the size out of its bounds or lets it grow too fast."""
    demand = Demand(policy, 0.0)
    assert demand.size == policy.smallest
    served_ids, now = 0, 0.0
    for ids, elapsed in history:
        previous = demand.size
        served_ids, now = served_ids + ids, now + elapsed
        demand.measure(served_ids, now)
        assert policy.smallest <= demand.size <= policy.largest
        assert demand.size <= previous * GROWTH_MAX
        assert 1 <= demand.low_water <= demand.size


def test_size_covers_the_demand() -> None:
    """At a steady rate the size comes to hold `pool_seconds` of it, and stays there."""
    demand = Demand(SizePolicy(smallest=100, largest=10**9, pool_seconds=30), 0.0)
    sizes = []
    for second in range(1, 8):
        demand.measure(served_ids=1_000 * second, now=float(second))
        sizes.append(demand.size)
    assert sizes == [400, 1_600, 6_400, 25_600, 30_000, 30_000, 30_000]
    assert demand.rate == 1_000
    assert demand.low_water == 30_000


def test_demand_beyond_the_largest_size() -> None:
    """A pool that cannot hold the demand is refilled at once, with the largest segments."""
    demand = Demand(SizePolicy(smallest=100, largest=1_000, pool_seconds=60), 0.0)
    for second in range(1, 4):
        demand.measure(served_ids=1_000_000 * second, now=float(second))
    assert demand.size == demand.low_water == 1_000


def test_burst_grows_one_step_only() -> None:
    """A single burst, however high, does not carry more than one step's growth away."""
    demand = Demand(SizePolicy(), 0.0)
    demand.measure(served_ids=10_000, now=0.0)
    assert demand.size == 10_000 * GROWTH_MAX


def test_rate_rises_at_once_and_falls_by_halves() -> None:
    """More demand is believed at once, less only by halves; the size follows."""
    demand = Demand(SizePolicy(smallest=10, largest=10**9, pool_seconds=10), 0.0)
    rates, sizes = [], []
    served_ids = 0
    for second, ids in enumerate([10, 800, 800, 800, 0, 0, 400], start=1):
        served_ids += ids
        demand.measure(served_ids, float(second))
        rates.append(demand.rate)
        sizes.append(demand.size)
    assert rates == [10, 800, 800, 800, 400, 200, 400]
    assert sizes == [40, 160, 640, 2_560, 4_000, 2_000, 4_000]


def test_quiet_service_comes_down_to_the_smallest_size() -> None:
    """What was once in demand and is no more costs no more than a new service."""
    demand = Demand(SizePolicy(), 0.0)
    for second in range(1, 10):
        demand.measure(served_ids=1_000_000 * second, now=float(second))
    assert demand.size > 1_000_000
    for second in range(10, 50):
        demand.measure(served_ids=9_000_000, now=float(second))
    assert demand.size == 10_000
    assert demand.low_water == 5_000


def test_low_water_of_a_slow_service() -> None:
    """A service that hardly needs anything is refilled at half of its small segment."""
    demand = Demand(SizePolicy(), 0.0)
    assert demand.low_water == 5_000
    assert Demand(SizePolicy(smallest=1), 0.0).low_water == 1


@pytest.mark.parametrize("ids_per_second", [100, 3_000, 123_400, 1_000_000])
def test_steady_demand_is_held_at_nearly_every_moment(ids_per_second: int) -> None:
    """After warm-up a pool could serve `pool_seconds` (here 10) at any moment without a refill."""
    tick_seconds, latency_ticks, ticks, warm_up_ticks = 0.01, 5, 30_000, 10_000
    policy = SizePolicy(largest=20_000_000, pool_seconds=10)
    demand, pool = Demand(policy, 0.0), Pool()
    next_id, arrival_tick, failed = 1, math.inf, 0
    lowest = math.inf
    for tick in range(ticks):
        if tick >= arrival_tick:
            pool.offer(Segment(next_id, next_id + demand.size))
            next_id, arrival_tick = next_id + demand.size, math.inf
            pool.low_water = demand.low_water
        if pool.take(round(ids_per_second * tick_seconds)) is None:
            failed += tick > warm_up_ticks
        if pool.wants_more and arrival_tick == math.inf:
            demand.measure(pool.served_ids, tick * tick_seconds)
            arrival_tick = tick + latency_ticks
        if tick > warm_up_ticks:
            lowest = min(lowest, pool.remaining)
    assert failed == 0
    assert lowest >= 0.99 * ids_per_second * policy.pool_seconds
