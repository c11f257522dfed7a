"""Every exception of this package, each with its wire code.

The wire codes say what the caller should do (see protocol.md): fix the request, ask for
access, retry later, or call somebody. The client raises the same classes that the server
turned into codes, so an error reads alike on both ends.
"""

from typing import ClassVar, Final, Self


class IdallocError(Exception):
    """Base of all errors of this package. Its text is one line, fit for a reply."""

    code: ClassVar[str] = "internal"


class RequestError(IdallocError):
    """The request cannot be served as it stands: fix it."""


class BadSyntax(RequestError):
    """The line has the wrong form or the wrong arguments for its verb."""

    code = "syntax"


class UnknownVerb(RequestError):
    """The first word of the line is not a verb of this protocol."""

    code = "unknown"


class BadName(RequestError):
    """A service name has a wrong length or a character that names may not have."""

    code = "badname"


class BadCount(RequestError):
    """A count is not a plain decimal from 1 to the server's maximum."""

    code = "badcount"


class LineTooLong(RequestError):
    """A line is longer than the protocol's limit."""

    code = "toolong"


class Denied(IdallocError):
    """The caller may not do this: ask for access."""

    code = "denied"


class RetryLater(IdallocError):
    """The server is well, but not for this request right now: retry later."""


class Busy(RetryLater):
    """A bound of the server is reached, or IDs are still on their way."""

    code = "busy"


class RateLimited(RetryLater):
    """More was asked for than the configured rate gives. The text begins with how long to wait."""

    code = "limit"

    @classmethod
    def after(cls, wait_ms: int) -> Self:
        """The error whose caller should wait for so many milliseconds."""
        return cls(f"{wait_ms} ms until the rate allows another request")

    @property
    def wait_ms(self) -> int:
        """How many milliseconds to wait before asking again; 0 if the text does not say."""
        first = str(self).partition(" ")[0]
        return int(first) if first.isdecimal() and first.isascii() else 0


class Draining(RetryLater):
    """The server is stopping: reconnect, to another server if there is one."""

    code = "draining"


class ServerFault(IdallocError):
    """The server cannot serve this at all: call somebody."""


class Unavailable(ServerFault):
    """No store answered. Whether a store acted is not known: the range is lost."""

    code = "unavailable"


class NotOurs(Unavailable):
    """The original idalloc wrote this row: it may be behind, so nothing is leased from it."""


class Crowded(Unavailable):
    """Too many requests of ours are under way to a store: this one was not sent."""


class Exhausted(ServerFault):
    """The service's ceiling would be passed. Certain: nothing was taken.

    Args:
        left_ids: how many IDs were left below it, at most; so many may be asked for next.
    """

    code = "exhausted"

    def __init__(self, text: str, left_ids: int = 0) -> None:
        super().__init__(text)
        self.left_ids = left_ids


class Internal(ServerFault):
    """A fault in the server itself; its log has the details."""

    code = "internal"


class SettingsError(IdallocError):
    """A setting is unknown, of the wrong type or out of range. The process exits with 2."""


class StartRefused(IdallocError):
    """What the settings name cannot be used (a foreign data file, a taken port)."""


class ProtocolViolation(IdallocError):
    """The peer of a client sent something that is not a reply of this protocol."""


class ConnectionLost(IdallocError):
    """The connection ended before the reply: whether IDs were taken is not known."""


def _wire_classes(base: type[IdallocError]) -> list[type[IdallocError]]:
    subclasses = base.__subclasses__()
    return [base, *(found for sub in subclasses for found in _wire_classes(sub))]


#: Wire code -> the class that carries it; `internal` means `Internal`.
BY_CODE: Final[dict[str, type[IdallocError]]] = {
    cls.code: cls
    for cls in _wire_classes(IdallocError)
    if "code" in cls.__dict__ and cls is not IdallocError
}


def from_wire(code: str, text: str) -> IdallocError:
    """The exception for an `ERR code text` reply; a code of a newer server is `Internal`."""
    return BY_CODE.get(code, Internal)(text)
