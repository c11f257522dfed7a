"""What a parent and a worker of its say to each other: lines of JSON, both ways.

First they talk in turns, with `send` and `receive`: what the worker needs, and whether it serves.
From then on `run` listens. Either side may ask the other for a snapshot, and each answers as it
can: a worker for itself, the parent for all of them. The parent may also ask a worker to look into
itself; what that says is not for this module to know.
"""

import json
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from itertools import count
from typing import Any, Final, Self, TypeAlias, final

import attrs
import trio

from idalloc_tcp.snapshot import Snapshot

#: The longest message. The settings, which may name many ceilings, are at most half of that.
MESSAGE_BYTES_MAX: Final = 32 * 2**20
RECEIVE_BYTES: Final = 65_536
#: Questions that may be open at once; further ones wait, within their time.
QUESTIONS_MAX: Final = 64

Message: TypeAlias = dict[str, Any]


@final
@attrs.frozen
class Query:
    """What a snapshot is wanted of.

    Attributes:
        service: this one alone; None: the server ...
        services_max: ... and so many of its busiest services.
        settings: not a question: new values of settings, to be in effect before the answer.
    """

    service: str | None = None
    services_max: int = 0
    settings: Mapping[str, Any] | None = None


Answer = Callable[[Query], Awaitable[Snapshot]]
#: Looks into the process.
Inspect = Callable[[Message], Awaitable[Message]]


async def no_inspection(_wanted: Message) -> Message:
    """There is nothing to see."""
    return {}


def _channel() -> tuple["trio.MemorySendChannel[Message]", "trio.MemoryReceiveChannel[Message]"]:
    return trio.open_memory_channel[Message](0)


@final
@attrs.define(eq=False)
class Link:
    """One side's end."""

    _stream: trio.abc.Stream
    _received: bytearray = attrs.field(init=False, factory=bytearray)
    #: Number of a question -> where its answer is awaited.
    _asked: dict[int, "trio.MemorySendChannel[Message]"] = attrs.field(init=False, factory=dict)
    _numbers: Iterator[int] = attrs.field(init=False, factory=count)
    _room: trio.CapacityLimiter = attrs.field(
        init=False, factory=lambda: trio.CapacityLimiter(QUESTIONS_MAX)
    )
    #: To the one task that sends: who asks may be cancelled, a message must not be cut short.
    _outbox: tuple["trio.MemorySendChannel[Message]", "trio.MemoryReceiveChannel[Message]"] = (
        attrs.field(init=False, factory=_channel)
    )

    async def send(self, message: Message) -> None:
        """Say something; what JSON does not know goes as its text.

        Nothing happens if the other side is gone: `receive` tells.
        """
        with suppress(trio.BrokenResourceError):
            await self._stream.send_all(json.dumps(message, default=str).encode() + b"\n")

    async def receive(self) -> Message | None:
        """What the other side says next; None: it is gone."""
        while b"\n" not in self._received:
            try:
                data = await self._stream.receive_some(RECEIVE_BYTES)
            except trio.BrokenResourceError:
                return None
            self._received += data
            if not data or len(self._received) > MESSAGE_BYTES_MAX:
                return None
        line, _, self._received = self._received.partition(b"\n")
        message: Message = json.loads(line)
        return message

    async def run(self, answer: Answer, inspect: Inspect = no_inspection) -> None:
        """Answer questions, and hear answers, until the other side is gone."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send_outbox)
            while (message := await self.receive()) is not None:
                match message:
                    case {"ask": number, "about": about}:
                        nursery.start_soon(self._reply, number, answer, Query(**about))
                    case {"ask": number, "inspect": wanted}:
                        nursery.start_soon(self._reply_inspection, number, inspect, wanted)
                    case {"answer": number} if number in self._asked:
                        self._asked[number].send_nowait(message)
            nursery.cancel_scope.cancel()

    async def ask(self, query: Query, within_seconds: float) -> Snapshot | None:
        """The other side's answer; None: there was none in time. `run` must be running."""
        message = await self._ask({"about": attrs.asdict(query)}, within_seconds)
        return None if message is None else Snapshot.from_json(message["snapshot"])

    async def inspect(self, wanted: Message, within_seconds: float) -> Message | None:
        """What the other side sees in itself; None: there was no answer in time."""
        message = await self._ask({"inspect": wanted}, within_seconds)
        found: Message | None = None if message is None else message["found"]
        return found

    async def _ask(self, question: Message, within_seconds: float) -> Message | None:
        number = next(self._numbers)
        awaiting, awaited = trio.open_memory_channel[Message](1)
        with trio.move_on_after(within_seconds):
            async with self._room:
                self._asked[number] = awaiting
                try:
                    await self._outbox[0].send({"ask": number, **question})
                    return await awaited.receive()
                finally:
                    del self._asked[number]
        return None

    async def aclose(self) -> None:
        """Say no more."""
        await self._stream.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _reply(self, number: int, answer: Answer, query: Query) -> None:
        snapshot = await answer(query)
        await self._outbox[0].send({"answer": number, "snapshot": snapshot.to_json()})

    async def _reply_inspection(self, number: int, inspect: Inspect, wanted: Message) -> None:
        await self._outbox[0].send({"answer": number, "found": await inspect(wanted)})

    async def _send_outbox(self) -> None:
        async for message in self._outbox[1]:
            await self.send(message)
