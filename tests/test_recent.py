"""A number for each of the services used most recently."""

from hypothesis import given
from hypothesis import strategies as st

from idalloc_tcp.recent import Recent


def test_a_service_that_was_never_set_has_zero() -> None:
    """Asking is no setting."""
    recent = Recent()
    assert recent.get("a") == 0
    assert len(recent) == 0


def test_the_last_number_counts() -> None:
    """A number that is set again replaces the one before, also by a lower one."""
    recent = Recent()
    for number in (5, 9, 3):
        recent.set("a", number)
    assert (recent.get("a"), recent.get("b"), len(recent)) == (3, 0, 1)


def test_the_one_set_longest_ago_is_forgotten() -> None:
    """Setting keeps a service; reading does not."""
    recent = Recent(2)
    recent.set("a", 1)
    recent.set("b", 2)
    recent.set("a", 3)
    assert recent.get("b") == 2
    recent.set("c", 4)
    assert [recent.get(service) for service in "abc"] == [3, 0, 4]


@given(st.integers(1, 4), st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1))))
def test_it_never_holds_more_than_its_bound(bound: int, steps: list[tuple[str, int]]) -> None:
    """It holds the last number of each of the services set last, and no others."""
    recent = Recent(bound)
    for service, number in steps:
        recent.set(service, number)
    order = list(dict.fromkeys(service for service, _ in reversed(steps)))
    expected = {service: dict(steps)[service] for service in order[:bound]}
    assert {service: recent.get(service) for service in "abcdef" if recent.get(service)} == expected
    assert len(recent) == len(expected)
