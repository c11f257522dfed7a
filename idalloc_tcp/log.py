"""The log: named events with fields, on standard error, for people or for programs.

Events go through the standard library's logging, as Trio's own do. Lines for programs are made
by structlog, which is imported only if they are asked for: it brings all of asyncio with it,
a tenth of the memory of an idle server.
"""

import logging
import sys
import time
from collections.abc import MutableMapping
from typing import Any, Final, final

_LOGGER: Final = logging.getLogger("idalloc_tcp")


def event(name: str, **fields: object) -> None:
    """Log that something happened that a person on call may want to know."""
    _LOGGER.info(name, extra={"fields": fields})


def warning(name: str, **fields: object) -> None:
    """Log that something is not as it should be."""
    _LOGGER.warning(name, extra={"fields": fields})


def failure(name: str, **fields: object) -> None:
    """Log the exception that is being handled: something that must not happen."""
    _LOGGER.error(name, exc_info=True, extra={"fields": fields})


def configure(level: str, form: str, **common: object) -> None:
    """Send events of `level` and above to standard error, as `console` or as `json` lines.

    Args:
        common: fields of every event.
    """

    def add_common(record: logging.LogRecord) -> bool:
        record.fields = {**getattr(record, "fields", {}), **common}
        return True

    handler = logging.StreamHandler(sys.stderr)
    if common:
        handler.addFilter(add_common)
    handler.setFormatter(_json_formatter() if form == "json" else _ConsoleFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


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
