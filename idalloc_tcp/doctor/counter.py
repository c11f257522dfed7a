"""The counter's Redis: may scripts do there what the counter's scripts do?"""

import re
from collections.abc import Awaitable, Callable
from functools import partial
from importlib.resources import files
from typing import Any, Final, TypeVar, final

import attrs
from redis.asyncio import Redis
from redis.exceptions import NoPermissionError

from idalloc_tcp.bridge import run_unit
from idalloc_tcp.counter.redis import DRIVER_ERRORS, connect
from idalloc_tcp.doctor.finding import Outcome, Report, fail, ok, perform, warn
from idalloc_tcp.errors import SettingsError, Unavailable
from idalloc_tcp.settings import Settings

_T = TypeVar("_T")

#: What the probe's attempts answer where all is well: they were allowed, and refused as nonsense.
_NONSENSE: Final = ("not an integer", "wrong number of arguments")
#: Redis says in one of two ways that a user may not.
_DENIED: Final = ("NOPERM", "user executing the script")

#: How far the search for hashes goes: a Redis that holds other things, too, may be large.
SCAN_ROUNDS_MAX: Final = 20
SCAN_KEYS: Final = 1_000
NAMES_SHOWN_MAX: Final = 5


async def examine_counter(url: str, settings: Settings, report: Report) -> None:
    """Could a server use the Redis? Needs `bridge.asyncio_loop` around it.

    Raises:
        SettingsError: the URL does not say what it should.
    """
    try:
        counter = _Counter(connect(url), settings.redis_key_prefix)
    except ValueError as error:
        raise SettingsError(f"redis: {error}") from None
    try:
        if not await perform("Redis", counter.greet, report):
            return
        await perform("Redis role", counter.role, report)
        await perform("Redis scripts", counter.scripts, report)
        await perform("Redis memory", counter.memory, report)
        await perform("Redis hashes", partial(counter.hashes, settings.take_over), report)
    finally:
        await counter.aclose()


@final
@attrs.define(eq=False)
class _Counter:
    """A client. What the driver raises leaves it as Unavailable."""

    _client: Redis
    _key_prefix: str
    _info: dict[str, Any] = attrs.field(init=False, factory=dict)

    async def greet(self) -> Outcome:
        async def ask() -> dict[str, Any]:
            return {
                name: value
                for section in ("server", "replication", "memory")
                for name, value in (await self._client.info(section)).items()
            }

        try:
            self._info = await self._translated(ask)
        except Unavailable as error:
            if isinstance(error.__cause__, NoPermissionError):
                return fail(f"{error}: ACL SETUSER <name> +info +@scripting +@hash")
            return fail(f"{error}: check the address, the password and that the server runs")
        return ok(f"Redis {self._info.get('redis_version')} answers")

    async def role(self) -> Outcome:
        if self._info.get("role") != "master":
            master = f"{self._info.get('master_host')}:{self._info.get('master_port')}"
            return fail(f"it is a replica, not a master: name its master ({master})")
        return ok("it is a master")

    async def scripts(self) -> Outcome:
        """Try everything that the counter's scripts do, in ways that change nothing."""
        probe = (files("idalloc_tcp.doctor") / "probe.lua").read_text()

        async def attempt() -> list[str]:
            script = self._client.register_script(probe)
            answer: list[str] = await script([f"{self._key_prefix}alloc_info_doctor"], [])
            return answer

        try:
            answers = await self._translated(attempt)
        except Unavailable as error:
            if not isinstance(error.__cause__, NoPermissionError):
                raise
            answers = [f"NOPERM {error}"]
        refusals = [text for text in answers if text and not _has_any(text, _NONSENSE)]
        if not refusals:
            return ok("scripts may run, and use INFO and hashes")
        reason = refusals[0]
        if _has_any(reason, _DENIED):
            grant = f"ACL SETUSER <name> +info +@scripting +@hash ~{self._key_prefix}*"
            return fail(f"a script may not do what it must ({reason}): {grant}")
        return fail(f"a script cannot write: {reason}")

    async def memory(self) -> Outcome:
        policy = self._info.get("maxmemory_policy", "noeviction")
        if self._info.get("maxmemory", 0) and policy != "noeviction":
            return warn(
                f"maxmemory_policy is {policy}: a hash that is evicted harms no ID, but costs a "
                "lease; set it to noeviction"
            )
        return ok("it evicts nothing")

    async def hashes(self, take_over: bool) -> Outcome:
        async def search() -> tuple[list[str], int, bool]:
            return await _find_hashes(self._client, f"{self._key_prefix}alloc_info_")

        try:
            foreign, total, is_complete = await self._translated(search)
        except Unavailable as error:
            if isinstance(error.__cause__, NoPermissionError):
                return ok("this user may not SCAN, and need not: hashes were not looked for")
            raise
        looked = "" if is_complete else "; there are more keys than were looked through"
        if not foreign:
            return ok(f"{total} hashes, none of the original idalloc's{looked}")
        names = ", ".join(sorted(foreign)[:NAMES_SHOWN_MAX])
        more = ", …" if len(foreign) > NAMES_SHOWN_MAX else ""
        advice = (
            "take_over makes each ours at its next segment: be sure that no original runs"
            if take_over
            else "served beside the original until take_over = true"
        )
        return warn(f"{len(foreign)} of the original idalloc's ({names}{more}): {advice}{looked}")

    async def aclose(self) -> None:
        await self._translated(self._client.aclose)

    async def _translated(self, unit: Callable[[], Awaitable[_T]]) -> _T:
        async def translated() -> _T:
            try:
                return await unit()
            except DRIVER_ERRORS as error:
                raise Unavailable(str(error).rstrip(".") or type(error).__name__) from error

        return await run_unit(translated)


def _has_any(text: str, phrases: tuple[str, ...]) -> bool:
    return any(phrase in text for phrase in phrases)


async def _find_hashes(client: Redis, prefix: str) -> tuple[list[str], int, bool]:
    """The services of hashes without a fence of ours, how many hashes, and were those all?"""
    pattern = re.sub(r"([*?\[\]\\])", r"\\\1", prefix) + "*"
    cursor, keys = 0, set[Any]()
    for _ in range(SCAN_ROUNDS_MAX):
        cursor, found = await client.scan(cursor, match=pattern, count=SCAN_KEYS, _type="HASH")
        keys.update(found)
        if cursor == 0 or len(keys) >= SCAN_KEYS:
            break
    async with client.pipeline(transaction=False) as pipeline:
        for key in keys:
            pipeline.hget(key, "fence")
        fences = await pipeline.execute()
    foreign = [
        key.removeprefix(prefix) for key, fence in zip(keys, fences, strict=True) if not fence
    ]
    return foreign, len(keys), cursor == 0
