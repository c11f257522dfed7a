"""Pauses between attempts: they grow, have a cap and jitter, and start over after a success."""

from idalloc_tcp.backoff import FIRST_SECONDS, LONGEST_SECONDS, Backoff


def test_pauses_double_up_to_the_cap() -> None:
    """Each pause lies between half and the whole of a time that doubles until it is capped."""
    for _ in range(200):
        backoff = Backoff()
        for attempt in range(12):
            longest = min(FIRST_SECONDS * 2**attempt, LONGEST_SECONDS)
            assert longest / 2 <= backoff.next_seconds() <= longest


def test_pauses_have_jitter() -> None:
    """Many who began to wait at the same moment do not come back at the same moment."""
    assert len({Backoff().next_seconds() for _ in range(20)}) > 10


def test_success_starts_over() -> None:
    """After a success the next failure is followed by a short pause again."""
    backoff = Backoff()
    for _ in range(10):
        backoff.next_seconds()
    backoff.reset()
    assert backoff.next_seconds() <= FIRST_SECONDS
    assert FIRST_SECONDS / 2 < backoff.next_seconds() <= 2 * FIRST_SECONDS
