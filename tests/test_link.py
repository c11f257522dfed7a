"""The link between a parent and its worker: questions, answers, and silence."""

import trio
import trio.testing

from idalloc_tcp.link import MESSAGE_BYTES_MAX, QUESTIONS_MAX, Link, Query
from idalloc_tcp.snapshot import Snapshot

WITHIN_SECONDS = 0.5


def ends() -> tuple[Link, Link]:
    """Both ends of a link."""
    one, other = trio.testing.memory_stream_pair()
    return Link(one), Link(other)


async def describe(query: Query) -> Snapshot:
    """An answer that shows its question."""
    return Snapshot({"about": query.service or "all", "services_max": query.services_max})


async def never(_query: Query) -> Snapshot:
    """No answer."""
    await trio.sleep_forever()
    raise AssertionError


async def test_both_sides_may_ask() -> None:
    """Each side's questions get that side's own answers, many at a time."""
    ours, theirs = ends()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ours.run, never)
        nursery.start_soon(theirs.run, describe)

        async def ask(number: int) -> None:
            answer = await ours.ask(Query("orders", number), WITHIN_SECONDS)
            assert answer == Snapshot({"about": "orders", "services_max": number})

        async with trio.open_nursery() as asking:
            for number in range(3 * QUESTIONS_MAX):
                asking.start_soon(ask, number)
        nursery.cancel_scope.cancel()


async def test_silence_is_no_answer(autojump_clock: trio.abc.Clock) -> None:
    """Who does not answer in time gave none, and an answer that comes later harms nobody."""
    ours, theirs = ends()

    async def answer_late(query: Query) -> Snapshot:
        await trio.sleep(2 * WITHIN_SECONDS)
        return await describe(query)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ours.run, never)
        nursery.start_soon(theirs.run, answer_late)
        began_at = trio.current_time()
        assert await ours.ask(Query(), WITHIN_SECONDS) is None
        assert trio.current_time() - began_at == WITHIN_SECONDS
        assert await ours.ask(Query("a"), 4 * WITHIN_SECONDS) == await describe(Query("a"))
        nursery.cancel_scope.cancel()


async def test_the_end_of_one_side_ends_the_other(autojump_clock: trio.abc.Clock) -> None:
    """When a process is gone the other one hears it at once, and may go on asking in vain."""
    ours, theirs = ends()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ours.run, never)
        await theirs.aclose()
    await ours.send({"ready": {}})
    assert await ours.receive() is None
    assert await ours.ask(Query(), WITHIN_SECONDS) is None


async def test_a_message_has_a_bound() -> None:
    """A line that never ends is not collected for ever."""
    one, other = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.send_all, b"x" * (MESSAGE_BYTES_MAX + 1))
        assert await Link(other).receive() is None
