"""Random ranges for when no store answers."""

import secrets
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idalloc_tcp import assembly
from idalloc_tcp.fallback import LOWEST, random_range
from idalloc_tcp.pool import MAX_ID
from idalloc_tcp.settings import Settings

COUNT_MAX = 10_000_000


@pytest.mark.parametrize("count", [1, 2, COUNT_MAX, 2**62])
def test_a_range_reaches_both_ends_and_no_further(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lowest first ID is 2^62, and the highest last one 2^63-1, whatever the count."""
    ends: list[Callable[[int], int]] = [lambda _below: 0, lambda below: below - 1]
    firsts = []
    for draw in ends:
        monkeypatch.setattr(secrets, "randbelow", draw)
        firsts.append(random_range(count))
    assert firsts == [2**62, 2**63 - count]


@given(st.integers(1, COUNT_MAX))
def test_every_range_lies_in_the_upper_half(count: int) -> None:
    """No ID below 2^62, none above what 63 bits hold."""
    first = random_range(count)
    assert first >= LOWEST
    assert first + count - 1 <= MAX_ID


def test_ranges_are_not_repeated() -> None:
    """They are random: of a thousand no two are the same."""
    assert len({random_range(1) for _ in range(1_000)}) == 1_000


def test_off_unless_it_is_wanted() -> None:
    """By default nothing stands in for IDs."""
    assert assembly._fallback(Settings())("orders", 1) is None


def test_no_random_id_above_a_ceiling() -> None:
    """Who set a ceiling relies on it, so such a service gets an error all the same."""
    fall_back = assembly._fallback(Settings(fallback="random", ceilings={"a": 2**53 - 1}))
    assert fall_back("a", 1) is None
    first = fall_back("b", COUNT_MAX)
    assert first is not None
    assert first >= LOWEST
    lowered = Settings(fallback="random", ceiling=MAX_ID - 1, ceilings={"b": MAX_ID})
    fall_back = assembly._fallback(lowered)
    assert fall_back("a", 1) is None
    assert fall_back("b", 1) is not None
