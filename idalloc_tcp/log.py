"""The log: named events with fields, on standard error, for people or for programs.

Events go through the standard library's logging, as Trio's own do. Lines for programs are made
by structlog, which is imported only if they are asked for: it brings all of asyncio with it,
a tenth of the memory of an idle server.
"""

import logging
import sys
import time
from collections.abc import Mapping, MutableMapping
from typing import Any, Final, final

import attrs

INFO: Final = logging.INFO
WARNING: Final = logging.WARNING
ERROR: Final = logging.ERROR

_LOGGER: Final = logging.getLogger("idalloc_tcp")

#: How long the repeats of an event are counted before their sum is logged.
PERIOD_SECONDS: Final = 60


def event(name: str, /, **fields: object) -> None:
    """Log that something happened that a person on call may want to know."""
    _LOGGER.info(name, extra={"fields": fields})


def warning(name: str, /, **fields: object) -> None:
    """Log that something is not as it should be."""
    _LOGGER.warning(name, extra={"fields": fields})


def error(name: str, /, **fields: object) -> None:
    """Log that something cannot be done that somebody asked for."""
    _LOGGER.error(name, extra={"fields": fields})


def sparingly(level: int, name: str, at_once: int = 1, /, **fields: object) -> None:
    """Log something that may happen very often: see `Repeats`. Fields are numbers and texts.

    An error is the exception that is being handled: something that must not happen at all.

    Args:
        at_once: how many of a period are logged when they happen.
    """
    extra = {"fields": fields, "at_once": at_once}
    _LOGGER.log(level, name, exc_info=level >= ERROR, extra=extra)


def answer(name: str, /, **fields: object) -> None:
    """Log what somebody asked for just now, however severe an event has to be to be logged."""
    extra = {"fields": fields}
    _LOGGER.handle(_LOGGER.makeRecord(_LOGGER.name, INFO, "", 0, name, (), None, extra=extra))


def limiting(what: str, /, **fields: object) -> None:
    """Log that `what` there is of is at its limit, so that some who want it are refused."""
    sparingly(WARNING, f"limiting {what}", **fields)


@final
@attrs.define
class _Repeated:
    """What became of the events of a name, and what the last one said.

    Not its record, which may hold on to a traceback and all that is in it.
    """

    level: int = 0
    fields: Mapping[str, object] = attrs.field(factory=dict)
    logged: int = 0
    counted: int = 0


@final
@attrs.define(eq=False)
class Repeats:
    """Lets the first of several like events pass, and counts the others for a sum.

    Like events have the same name, and were logged `sparingly`. Pure: whoever calls `sum_up` once
    in `PERIOD_SECONDS` gives it its time.
    """

    _repeated: dict[str, _Repeated] = attrs.field(init=False, factory=dict)

    def filter(self, record: logging.LogRecord) -> bool:
        """Shall it be logged now? (What a handler of the standard library asks.)"""
        at_once: int = getattr(record, "at_once", 0)
        if not at_once:
            return True
        repeated = self._repeated.setdefault(record.msg, _Repeated())
        if repeated.logged < at_once:
            repeated.logged += 1
            return True
        repeated.level, repeated.fields = record.levelno, getattr(record, "fields", {})
        repeated.counted += 1
        return False

    def sum_up(self) -> None:
        """Log how often each event was repeated since the last time, with the last one's fields.

        What was not repeated is forgotten: the next of its name is a first one again.
        """
        for name, repeated in list(self._repeated.items()):
            if not repeated.counted:
                del self._repeated[name]
                continue
            sums = {"repeated": repeated.counted, "within_seconds": PERIOD_SECONDS}
            repeated.counted = 0
            _LOGGER.log(repeated.level, name, extra={"fields": {**repeated.fields, **sums}})


def configure(level: str, form: str, **common: object) -> Repeats:
    """Send events of `level` and above to standard error, as `console` or as `json` lines.

    Args:
        common: fields of every event.

    Returns:
        What to call for the sums of events that were repeated.
    """

    def add_common(record: logging.LogRecord) -> bool:
        record.fields = {**getattr(record, "fields", {}), **common}
        return True

    handler = logging.StreamHandler(sys.stderr)
    repeats = Repeats()
    handler.addFilter(repeats.filter)
    if common:
        handler.addFilter(add_common)
    handler.setFormatter(_json_formatter() if form == "json" else _ConsoleFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    return repeats


def set_level(level: str) -> None:
    """From now on log events of `level` and above."""
    logging.getLogger().setLevel(level.upper())


@final
class _ConsoleFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.000Z info serving listen=127.0.0.1:8642`, tracebacks below."""

    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - its name there
        fields: dict[str, object] = getattr(record, "fields", {})
        words = [self.formatTime(record), record.levelname.lower(), record.getMessage()]
        words += [f"{name}={_shown(value)}" for name, value in fields.items()]
        return " ".join(words)


def _shown(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _json_formatter() -> logging.Formatter:
    import structlog  # noqa: PLC0415

    # Local variables may hold passwords.
    tracebacks = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)

    def own_fields(_logger: object, _method: str, entry: MutableMapping[str, Any]) -> Any:
        entry.update(getattr(entry["_record"], "fields", {}))
        return entry

    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[
            structlog.stdlib.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            own_fields,
            structlog.processors.ExceptionRenderer(tracebacks),
        ],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.JSONRenderer(default=str),
        ],
    )
