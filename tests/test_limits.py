"""Rates: what is admitted in the long run, at once, and what is told to who comes too fast."""

from contextlib import suppress
from typing import Final, final

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from idalloc_tcp import limits
from idalloc_tcp.errors import RateLimited, from_wire
from idalloc_tcp.express import Express
from idalloc_tcp.limits import BURST_SECONDS, NOTE_SECONDS, RateLimiter, RateLimits
from idalloc_tcp.metrics import Metrics
from idalloc_tcp.protocol import RequestParser
from tests.lane import Lane, Supplies

LINE: Final = b"ALLOC orders 3\n"


@final
@attrs.define
class Clock:
    """Time that a test moves."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def limiter(clock: Clock, **rates: int) -> RateLimiter:
    """With these limits, on this clock."""
    return RateLimiter(RateLimits(**rates), clock)


@given(
    rate=st.integers(1, 10_000),
    offers=st.lists(st.tuples(st.floats(0, 0.3), st.integers(1, 300)), min_size=1, max_size=60),
)
def test_in_the_long_run_the_rate_is_kept(rate: int, offers: list[tuple[float, int]]) -> None:
    """However requests come, no more are served than the rate and one burst give, or one at all."""
    clock, served = Clock(), 0
    limited = limiter(clock, requests=rate)
    for pause, times in offers:
        clock.now += pause
        served += limited.admit("orders", times, 1)
    assert served <= max(1, rate * BURST_SECONDS) + rate * clock.now + 1e-6 * rate + 1


def test_what_is_offered_above_the_rate_is_served_at_the_rate() -> None:
    """Five times too much for ten seconds: the rate is used to the full."""
    clock, served = Clock(), 0
    limited = limiter(clock, requests=1_000)
    for _ in range(50_000):
        clock.now += 0.0002
        served += limited.admit("orders", 1, 1)
    assert served == pytest.approx(10_000, rel=0.02)


def test_a_large_count_is_possible_at_a_low_rate() -> None:
    """It is served at once, and paid for by those who come after."""
    clock = Clock()
    limited = limiter(clock, ids=100)
    assert limited.admit("orders", 1, 1_000) == 1
    clock.now = 9.8
    assert limited.admit("orders", 1, 1) == 0
    assert limited.wait_ms("orders") == 100
    clock.now = 9.91
    assert limited.admit("orders", 1, 1) == 1


def test_of_several_requests_as_many_are_served_as_can_be_paid_for() -> None:
    """A chunk is not refused as a whole, nor served as a whole."""
    clock = Clock()
    limited = limiter(clock, requests=1_000, ids=1_500)
    assert limited.admit("orders", 200, 3) == 50
    assert limited.admit("orders", 200, 3) == 0


def test_each_service_has_its_own_rate_beside_the_servers() -> None:
    """One that is too fast is refused alone, until the server's own limit is reached."""
    clock = Clock()
    limited = limiter(clock, requests=250, service_requests=100)
    assert [limited.admit(name, 20, 1) for name in ("a", "a", "b", "c", "d")] == [10, 0, 10, 5, 0]
    assert limited.wait_ms("a") >= 1


@pytest.mark.parametrize(
    ("requests", "ids", "admitted"),
    [
        ({"a": 5, "b": 5}, {"a": 5, "b": 5}, True),
        ({"a": 20, "b": 20}, {"a": 20, "b": 20}, False),
        ({"a": 11}, {"a": 11}, False),
        ({"a": 1, "b": 1}, {"a": 1, "b": 60}, False),
    ],
    ids=["all", "too many for the server", "too many for one", "too many ids"],
)
def test_a_mixed_chunk_is_admitted_together_or_line_by_line(
    requests: dict[str, int], ids: dict[str, int], admitted: bool
) -> None:
    """What cannot be paid for together is not paid for at all."""
    limited = limiter(Clock(), requests=300, ids=500, service_requests=100)
    assert limited.admit_all(requests, ids) == admitted
    assert limited.admit("a", 100, 1) == (5 if admitted else 10)


def test_refusals_are_told_to_the_log_once_a_second(caplog: pytest.LogCaptureFixture) -> None:
    """However many requests are refused, refusing them stays cheap."""
    clock = Clock()
    take = limiter(clock, requests=10).limited(lambda _service, count: count)
    for _ in range(3):
        for _ in range(100):
            with suppress(RateLimited):
                take("orders", 1)
        clock.now += NOTE_SECONDS
    assert caplog.messages == ["limiting requests"] * 3


def test_few_services_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many names come, the buckets stay within their bound."""
    monkeypatch.setattr(limits, "SERVICES_MAX", 3)
    clock = Clock()
    limited = limiter(clock, service_requests=1)
    for number in range(10):
        clock.now += 1.0
        assert limited.admit(f"s{number}", 1, 1) == 1
    assert len(limited._services) == 3


def test_a_debt_is_not_forgotten_for_newcomers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flood of names does not give a service its rate anew; they share one among themselves."""
    monkeypatch.setattr(limits, "SERVICES_MAX", 3)
    clock = Clock()
    limited = limiter(clock, service_ids=1_000)
    for victim in ("a", "b", "c"):
        assert limited.admit(victim, 1, 1_000_000) == 1
    assert [limited.admit(f"s{number}", 1, 60) for number in range(4)] == [1, 1, 0, 0]
    clock.now += 1.0
    assert limited.admit("a", 1, 1) == 0
    assert limited.wait_ms("a") > 990_000


def test_who_is_too_fast_is_told_how_long_to_wait() -> None:
    """The error's text begins with it, and a client can read it there."""
    clock = Clock()
    take = limiter(clock, requests=10).limited(lambda _service, count: count)
    assert take("orders", 7) == 7
    with pytest.raises(RateLimited) as refused:
        take("orders", 7)
    assert refused.value.wait_ms >= 1
    told = from_wire("limit", str(refused.value))
    assert isinstance(told, RateLimited)
    assert told.wait_ms == refused.value.wait_ms
    assert RateLimited("over the rate").wait_ms == 0


@pytest.mark.parametrize(("times", "served"), [(1, 1), (5, 2), (40, 2)])
def test_the_short_way_refuses_what_is_too_fast(times: int, served: int) -> None:
    """One line, one reply: those that are served come first, and the counters tell them apart."""
    metrics, lane = Metrics(), Lane()
    parser = RequestParser(1_000)
    parser.parse(LINE.strip())
    limited = limiter(Clock(), requests=20)
    express = Express(parser.known, Supplies(lane), metrics, limited)
    replies = express.answer([LINE * times])[0].splitlines()
    assert replies[:served] == [b"OK 1 3", b"OK 4 3"][:served]
    refusal = b"ERR limit 1 ms until the rate allows another request"
    assert replies[served:] == [refusal] * (times - served)
    assert lane.taken == {"orders": 3 * served}
    assert metrics.requests_total == times
    assert metrics.ids_total == 3 * served
    assert metrics.errors_total["limit"] == times - served
