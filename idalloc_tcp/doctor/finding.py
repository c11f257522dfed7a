"""What a check finds: well, doubtful or broken, and what mends it."""

from collections.abc import Awaitable, Callable
from enum import Enum
from typing import Final, TypeAlias, final

import attrs
import trio

from idalloc_tcp.errors import Unavailable

#: No check takes longer. The drivers give up before, after 2.5 s.
CHECK_SECONDS: Final = 3.0
#: The width of the first two columns of a line.
_VERDICT_CHARS: Final = 4
_SUBJECT_CHARS: Final = 17


class Verdict(Enum):
    """How bad it is, as it is printed."""

    OK = "ok"
    WARN = "warn"
    FAIL = "FAIL"


@final
@attrs.frozen
class Finding:
    """The outcome of one check: a line for the person who runs the server."""

    verdict: Verdict
    subject: str
    text: str

    def __str__(self) -> str:
        verdict = self.verdict.value
        return f"{verdict:{_VERDICT_CHARS}}  {self.subject:{_SUBJECT_CHARS}}  {self.text}"


#: What a check answers: how it is and why.
Outcome: TypeAlias = tuple[Verdict, str]
#: It may raise Unavailable, which is a failure with that text.
Check: TypeAlias = Callable[[], Awaitable[Outcome]]
Report: TypeAlias = Callable[[Finding], None]


def ok(text: str) -> Outcome:
    """All is well."""
    return Verdict.OK, text


def warn(text: str) -> Outcome:
    """It serves, but not as well or as safely as it could. The text says what to do."""
    return Verdict.WARN, text


def fail(text: str) -> Outcome:
    """It does not serve. The text says what to do."""
    return Verdict.FAIL, text


async def perform(subject: str, check: Check, report: Report) -> bool:
    """Perform a check, in bounded time, and report what it found. Is all well?"""
    verdict, text = fail(f"no answer within {CHECK_SECONDS:g} s")
    with trio.move_on_after(CHECK_SECONDS):
        try:
            verdict, text = await check()
        except Unavailable as error:
            verdict, text = fail(str(error))
    report(Finding(verdict, subject, " ".join(text.split())))
    return verdict is Verdict.OK
