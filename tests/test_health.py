"""Whether a store is worth asking."""

from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from idalloc_tcp.backoff import FIRST_SECONDS, LONGEST_SECONDS
from idalloc_tcp.errors import Crowded, Exhausted, NotOurs, Unavailable
from idalloc_tcp.health import PROBE_SECONDS, Health


def failing(error: Exception, seconds: float = 0) -> Callable[[], Awaitable[None]]:
    """A request that fails after so long."""

    async def request() -> None:
        await trio.sleep(seconds)
        raise error

    return request


async def answering() -> int:
    """A request that succeeds."""
    return 7


async def is_asked(health: Health) -> bool:
    """Does a request get through to a store that is down?"""
    probes = health.probes_total
    with pytest.raises(Unavailable):
        await health.ask(failing(Unavailable("no answer")))
    return health.probes_total > probes


async def test_a_store_that_answers_is_asked_every_time() -> None:
    """Nothing stands between a healthy store and those who ask."""
    health = Health("the store")
    assert [await health.ask(answering) for _ in range(9)] == [7] * 9
    assert (health.is_up, health.probes_total, health.failures_total) == (True, 0, 0)


@pytest.mark.parametrize("error", [Exhausted("none left"), NotOurs("the original's")])
async def test_a_refusal_is_an_answer(error: Exception, autojump_clock: MockClock) -> None:
    """Who refuses is up, also if he was down before."""
    health = Health("the store")
    assert not await is_asked(health)  # It is up, so that was no probe.
    await trio.sleep(FIRST_SECONDS)
    with pytest.raises(type(error)):
        await health.ask(failing(error))
    assert health.is_up
    assert health.failures_total == 1


async def test_one_probe_gets_through_in_each_pause(autojump_clock: MockClock) -> None:
    """For a pause after a probe that failed all others fail at once."""
    health = Health("the store")
    assert not await is_asked(health)
    assert not await is_asked(health)
    await trio.sleep(FIRST_SECONDS)
    assert await is_asked(health)
    assert not await is_asked(health)
    await trio.sleep(LONGEST_SECONDS)
    assert await is_asked(health)


@pytest.mark.parametrize("answers", [False, True])
async def test_who_comes_behind_a_probe_learns_what_it_finds(
    autojump_clock: MockClock, answers: bool
) -> None:
    """All who ask together after an outage are served, or refused, as the first of them is."""
    health = Health("the store")
    assert not await is_asked(health)
    await trio.sleep(LONGEST_SECONDS)
    served = 0

    async def request() -> None:
        await trio.sleep(PROBE_SECONDS / 2)
        if not answers:
            raise Unavailable("no answer")

    async def ask() -> None:
        nonlocal served
        try:
            await health.ask(request)
        except Unavailable:
            return
        served += 1

    async with trio.open_nursery() as nursery:
        for _ in range(9):
            nursery.start_soon(ask)
    assert served == (9 if answers else 0)
    assert health.probes_total == 1
    assert health.failures_total == (1 if answers else 2)


async def test_a_probe_that_hangs_keeps_nobody(autojump_clock: MockClock) -> None:
    """Others wait for a probe only as long as a store that is well would take."""
    health = Health("the store")
    for _ in range(9):  # Until the pauses are longer than the wait.
        await is_asked(health)
        await trio.sleep(LONGEST_SECONDS)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(health.ask, trio.sleep_forever)
        await wait_all_tasks_blocked()
        began_at = trio.current_time()
        assert not await is_asked(health)
        assert trio.current_time() == pytest.approx(began_at + PROBE_SECONDS)
        nursery.cancel_scope.cancel()
    began_at = trio.current_time()
    assert not await is_asked(health)
    assert trio.current_time() == began_at


async def test_a_store_that_hangs_is_left_alone_after_a_probe(autojump_clock: MockClock) -> None:
    """The pause begins when the probe has failed, however long that took."""
    health = Health("the store")
    for _ in range(9):
        await trio.sleep(LONGEST_SECONDS)
        with pytest.raises(Unavailable):
            await health.ask(failing(Unavailable("no answer"), seconds=5))
        assert not await is_asked(health)


async def test_a_cancelled_probe_is_followed_by_another(autojump_clock: MockClock) -> None:
    """A probe of which nothing is heard again does not end the probing."""
    health = Health("the store")
    assert not await is_asked(health)
    await trio.sleep(FIRST_SECONDS)
    with trio.move_on_after(1):
        await health.ask(trio.sleep_forever)
    await trio.sleep(LONGEST_SECONDS)
    assert await is_asked(health)


async def test_pauses_start_over_after_an_answer(autojump_clock: MockClock) -> None:
    """The next outage begins with a short pause again."""
    health = Health("the store")
    for _ in range(2):
        for _ in range(9):
            await is_asked(health)
            await trio.sleep(LONGEST_SECONDS)
        assert await health.ask(answering) == 7
    assert not await is_asked(health)
    await trio.sleep(FIRST_SECONDS)
    assert await is_asked(health)


async def test_requests_that_were_under_way_change_nothing(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Of many that are pending when a store goes or comes only one is news: one line each."""
    caplog.set_level("INFO")
    health = Health("the store")

    async def ask(request: Callable[[], Awaitable[object]]) -> None:
        with suppress(Unavailable):
            await health.ask(request)

    async def answer_late() -> None:
        await trio.sleep(0.02)

    async with trio.open_nursery() as nursery:
        for seconds in (0.01, 0.03, 5):
            nursery.start_soon(ask, failing(Unavailable("no answer"), seconds))
        nursery.start_soon(ask, answer_late)
        await trio.sleep(0.04)
        assert caplog.messages == ["the store is down"]
        await trio.sleep(LONGEST_SECONDS)
        await health.ask(answering)
    assert health.failures_total == 3
    assert caplog.messages == ["the store is down", "the store is back"]


async def test_a_crowd_of_our_own_is_no_outage(caplog: pytest.LogCaptureFixture) -> None:
    """A request that was not even sent says nothing of the store: others still ask it."""
    health = Health("the store")
    with pytest.raises(Unavailable):
        await health.ask(failing(Crowded("all connections are busy")))
    assert (health.is_up, health.failures_total) == (True, 0)
    assert caplog.messages == ["too many requests wait for the store"]
    assert await health.ask(answering) == 7
