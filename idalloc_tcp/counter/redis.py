"""The counter as a Redis hash, changed by scripts alone.

The hash is that of the original idalloc, with two fields of ours. Each script is atomic and reads
the live fence itself, so there is no moment between looking and cutting in which Redis could
become another one. No command is ever sent twice: the driver's retries are off, and a connection
on which anything went wrong is dropped.
"""

import re
from collections.abc import Awaitable
from contextlib import suppress
from importlib.resources import files
from typing import Any, Final, cast, final

import attrs
import trio
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.commands.core import AsyncScript
from redis.exceptions import NoPermissionError, RedisError

from idalloc_tcp.bridge import run_unit, turn
from idalloc_tcp.counter import Cut, Reason, Refusal, State
from idalloc_tcp.errors import Unavailable
from idalloc_tcp.ledger import Tail
from idalloc_tcp.pool import MAX_ID, Segment

#: Commands at once; further ones wait, for SLOT_SECONDS at most.
CONNECTIONS_MAX: Final = 8
SLOT_SECONDS: Final = 0.5
CONNECT_TIMEOUT_SECONDS: Final = 0.5
REPLY_TIMEOUT_SECONDS: Final = 1.0

#: What the driver, and asyncio below it, raise when the server or the network is not as it should
#: be: writing to a connection that was just lost is an AttributeError from Python 3.12 on.
DRIVER_ERRORS: Final = (RedisError, OSError, RuntimeError, ValueError, AttributeError)

_OPTIONS: Final[dict[str, Any]] = {
    "max_connections": CONNECTIONS_MAX,
    "timeout": SLOT_SECONDS,
    "socket_connect_timeout": CONNECT_TIMEOUT_SECONDS,
    "socket_timeout": REPLY_TIMEOUT_SECONDS,
    "retry": Retry(NoBackoff(), 0),
    # With protocol 3 the driver does not look for leftovers of an earlier reply.
    "protocol": 2,
    "decode_responses": True,
    # Whatever stands in a field: it is a state to look at, not an error.
    "encoding_errors": "replace",
}

_SCRIPTS: Final = ("take", "seat", "extend", "give_back", "inspect", "cut_beside", "take_over")
_NUMBER: Final = re.compile("0|[1-9][0-9]{0,18}")
#: The prefix of the original's keys, below the configurable one.
_KEY: Final = "alloc_info_"


def connect(url: str) -> Redis:
    """A client for redis://, rediss:// and unix:// URLs. Nothing is sent yet.

    Raises:
        ValueError: it is not such a URL; the text does not repeat it.
    """
    try:
        # Ours last: an option in the URL must not bring retries or another protocol back.
        pool = BlockingConnectionPool(**{**parse_url(url), **_OPTIONS})
        pool.connection_class(**pool.connection_kwargs)  # Else it refuses options only later.
    except (TypeError, ValueError):
        text = "it is not a redis://, rediss:// or unix:// URL, or has an unknown option"
        raise ValueError(text) from None
    return Redis.from_pool(pool)


@final
@attrs.define(eq=False)
class RedisCounter:
    """The counter in one Redis. Needs `bridge.asyncio_loop` around it.

    Args:
        client: as `connect` makes it.
        key_prefix: in front of every key; the original's is `idalloc:`.
    """

    _client: Redis
    _key_prefix: str
    _scripts: dict[str, AsyncScript] = attrs.field(init=False)
    _slots: trio.CapacityLimiter = attrs.field(
        init=False, factory=lambda: trio.CapacityLimiter(CONNECTIONS_MAX)
    )

    def __attrs_post_init__(self) -> None:
        here = files("idalloc_tcp.counter")
        common = (here / "common.lua").read_text()
        self._scripts = {
            name: self._client.register_script(common + (here / f"{name}.lua").read_text())
            for name in _SCRIPTS
        }

    async def take(self, service: str, size: int, *, floor: int) -> Cut | Refusal:
        """As `Counter.take`."""
        return _cut_or_refusal(await self._run("take", service, size, floor))

    async def seat(
        self, service: str, lease: Segment, size: int, refusal: Refusal, *, floor: int
    ) -> Cut | Refusal:
        """As `Counter.seat`."""
        assert refusal.reason is not None
        reason, seen_end = refusal.reason.value, refusal.state.lease_end
        arguments = (lease.start - 1, lease.last, size, floor, reason, seen_end)
        return _cut_or_refusal(await self._run("seat", service, *arguments))

    async def extend(self, service: str, old_end: int, new_end: int) -> bool:
        """As `Counter.extend`."""
        return bool(await self._run("extend", service, old_end, new_end))

    async def give_back(self, tail: Tail) -> bool:
        """As `Counter.give_back`."""
        segment = tail.segment
        return bool(await self._run("give_back", tail.service, segment.start - 1, segment.last))

    async def inspect(self, service: str) -> tuple[State, bool]:
        """As `Counter.inspect`."""
        is_live, fields = await self._run("inspect", service)
        return _state(fields), bool(is_live)

    async def cut_beside(self, service: str, size: int) -> Cut | Refusal:
        """As `Counter.cut_beside`."""
        return _cut_or_refusal(await self._run("cut_beside", service, size))

    async def take_over(self, service: str) -> Refusal:
        """As `Counter.take_over`."""
        answer = _cut_or_refusal(await self._run("take_over", service))
        assert isinstance(answer, Refusal)
        return answer

    async def aclose(self) -> None:
        """As `Counter.aclose`."""
        # Shielded, for `run_unit` has a deadline. It is over either way.
        with trio.CancelScope(shield=True), suppress(Unavailable, *DRIVER_ERRORS):
            await run_unit(self._client.aclose)

    async def _run(self, name: str, service: str, *arguments: int | str) -> Any:
        key = f"{self._key_prefix}{_KEY}{service}"
        # Not in the driver's queue: there it would look as if Redis did not answer.
        async with turn(self._slots, SLOT_SECONDS):
            return await run_unit(self._unit, name, key, arguments)

    async def _unit(self, name: str, key: str, arguments: tuple[int | str, ...]) -> Any:
        """On asyncio's side: one script."""
        try:
            # Numbers travel as text: a script's are doubles.
            return await cast(Awaitable[Any], self._scripts[name]([key], list(map(str, arguments))))
        except DRIVER_ERRORS as error:
            text = str(error) or type(error).__name__
            # Redis says this in one of two ways, and in neither which command it was.
            if isinstance(error, NoPermissionError) or "user executing the script" in text:
                text += "; the user needs +@hash, +@scripting and +info"
            raise Unavailable(f"Redis: {text}") from error


def _cut_or_refusal(reply: tuple[str, str, list[str]]) -> Cut | Refusal:
    verdict, before, fields = reply
    state = _state(fields)
    if verdict == "cut":
        return Cut(Segment(int(before) + 1, state.last_alloc_value + 1), state)
    return Refusal(None if verdict == "refused" else Reason(verdict), state)


def _state(fields: list[str]) -> State:
    last, version, lease_end, fence = fields
    return State(_number(last), _number(version), _number(lease_end), fence)


def _number(text: str) -> int:
    """What a field counts as: 0 if it is not there, or not a number as the scripts see one."""
    value = int(text) if _NUMBER.fullmatch(text) else 0
    return value if value <= MAX_ID else 0
