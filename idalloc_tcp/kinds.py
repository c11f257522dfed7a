"""Kinds of values that a setting may have: how each is read, checked, written and shown."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Generic, Literal, TypeVar, cast, final

import attrs

from idalloc_tcp.address import parse_address
from idalloc_tcp.errors import BadName
from idalloc_tcp.names import fold_name

ID_MAX: Final = 2**63 - 1
YEAR_SECONDS: Final = 31_536_000.0
#: How much of a name or a value a message repeats.
SHOWN_CHARS_MAX: Final = 60
_ADDRESSES: Final = "HOST:PORT, [IPv6]:PORT or unix:PATH"

#: In a URL: up to the last @, for it may hold what should have been escaped in it.
_PASSWORD: Final = re.compile(r"(?<=://)([^:@/]*:).*(?=@)|([?&]password=)[^&]*")

_T = TypeVar("_T")
_T_co = TypeVar("_T_co", covariant=True)


class Unfit(Exception):
    """A value is not what its setting takes. The text says what was found."""


def _as_it_is(value: object) -> object:
    return value


@final
@attrs.frozen
class Kind(Generic[_T_co]):
    """One kind of values: what it is called, and how it is read.

    Args:
        expected: what messages and tables say of the values.
        metavar: what the help says of them; empty for a switch, whose flag takes no value.
        read: turns a TOML value into the setting's. Reading its own result changes nothing.
        from_text: turns the text of a variable or a flag into a TOML value, or raises ValueError.
        repeatable: the flag may be given several times; in one text, commas part the values.
        shown: the value as people may see it.
    """

    expected: str
    metavar: str
    read: Callable[[object], _T_co]
    from_text: Callable[[str], object] = str
    repeatable: bool = False
    shown: Callable[[Any], object] = _as_it_is

    def parse(self, text: str) -> _T_co:
        """The value that the text of a variable or a flag stands for."""
        try:
            value = self.from_text(text)
        except ValueError:
            raise Unfit(shown(text)) from None
        return self.read(value)


def integer(minimum: int, maximum: int) -> Kind[int]:
    """Whole numbers. Underscores may group the digits."""

    def read(value: object) -> int:
        if type(value) is not int or not minimum <= value <= maximum:
            raise Unfit(shown(value))
        return value

    return Kind(f"an integer from {minimum:_} to {maximum:_}", "N", read, int)


def integer_or_auto(minimum: int, maximum: int) -> Kind[int | Literal["auto"]]:
    """Whole numbers, or the word that leaves the number to the program."""
    number = integer(minimum, maximum)

    def read(value: object) -> int | Literal["auto"]:
        return "auto" if value == "auto" else number.read(value)

    def from_text(text: str) -> object:
        return text if text == "auto" else number.from_text(text)

    return Kind(f"{number.expected}, or auto", "N|auto", read, from_text)


def seconds(minimum: float, maximum: float = YEAR_SECONDS) -> Kind[float]:
    """Durations. A whole number will do."""

    def read(value: object) -> float:
        if type(value) not in (int, float) or not minimum <= cast(float, value) <= maximum:
            raise Unfit(shown(value))
        return float(cast(float, value))

    expected = f"a number of seconds from {minimum:_.15g} to {maximum:_.15g}"
    return Kind(expected, "SECONDS", read, float)


def switch() -> Kind[bool]:
    """Yes or no. The flag has two forms, --x and --no-x."""

    def read(value: object) -> bool:
        if type(value) is not bool:
            raise Unfit(shown(value))
        return value

    def from_text(text: str) -> object:
        return {"true": True, "false": False}.get(text.lower(), text)

    return Kind("true or false", "", read, from_text)


def choice(words: tuple[_T, ...]) -> Kind[_T]:
    """One of a few words."""

    def read(value: object) -> _T:
        if value not in words:
            raise Unfit(shown(value))
        return value

    return Kind(f"one of {', '.join(map(str, words))}", "|".join(map(str, words)), read)


def text(chars_max: int) -> Kind[str]:
    """Any printable text."""

    def read(value: object) -> str:
        if not isinstance(value, str) or len(value) > chars_max or not value.isprintable():
            raise Unfit(shown(value))
        return value

    return Kind(f"at most {chars_max} printable characters", "TEXT", read)


def store_url(*schemes: str) -> Kind[str]:
    """The URL of a store. Messages never repeat it, and only its password is hidden elsewhere."""
    forms = " or ".join(f"{scheme}://" for scheme in schemes)

    def read(value: object) -> str:
        from urllib.parse import urlsplit  # noqa: PLC0415 - the embedded server needs none

        try:
            parts = urlsplit(value) if isinstance(value, str) else None
        except ValueError:  # Its text may quote the password.
            parts = None
        if parts is None or parts.scheme not in schemes or not (parts.hostname or parts.path):
            raise Unfit("something else (not shown: it may hold a password)")
        return cast(str, value)

    def hide(url: str) -> str:
        return _PASSWORD.sub(lambda found: f"{found[1] or found[2]}***", url)

    return Kind(f"a URL that begins with {forms}", "URL", read, shown=hide)


def file() -> Kind[Path]:
    """The path of a file. A leading `~` is a home directory."""

    def read(value: object) -> Path:
        try:
            if not isinstance(value, str | Path) or not str(value) or b"\0" in str(value).encode():
                raise Unfit(shown(value))
            return Path(value).expanduser()
        except (UnicodeEncodeError, RuntimeError):
            raise Unfit(shown(value)) from None

    return Kind("the path of a file, in UTF-8", "FILE", read)


def address() -> Kind[str]:
    """Where to listen, as text."""

    def read(value: object) -> str:
        if not isinstance(value, str):
            raise Unfit(shown(value))
        try:
            return str(parse_address(value))
        except ValueError as error:
            raise Unfit(f"{shown(value)}: {error}") from None

    return Kind(f"an address ({_ADDRESSES})", "ADDRESS", read)


def addresses() -> Kind[tuple[str, ...]]:
    """Where to listen: one address or several, as text."""
    one = address()

    def read(value: object) -> tuple[str, ...]:
        if not isinstance(value, list | tuple) or not value:
            raise Unfit(shown(value))
        return tuple(map(read_one, value))

    def read_one(item: object) -> str:
        if not isinstance(item, str):
            raise Unfit(f"{shown(item)} among them")
        return one.read(item)

    expected = f"a list of addresses ({_ADDRESSES})"
    return Kind(expected, "ADDRESS", read, _items, repeatable=True)


def last_ids() -> Kind[Mapping[str, int]]:
    """The last ID of each service, by the service's folded name."""
    last_id = integer(1, ID_MAX)

    def read(value: object) -> Mapping[str, int]:
        if not isinstance(value, Mapping):
            raise Unfit(shown(value))
        found: dict[str, int] = {}
        for name, last in value.items():
            try:
                service = fold_name(name)
                found[service] = last_id.read(last)
            except (BadName, Unfit) as error:
                reason = f": {error}" if isinstance(error, BadName) else ""
                raise Unfit(f"{shown(name)} = {shown(last)}{reason}") from None
        if len(found) < len(value):
            raise Unfit("a service that is named twice")
        return found

    def from_text(text: str) -> object:
        pairs = [item.split("=") for item in _items(text)]
        found = {name.strip(): int(last) for name, last in pairs}
        if len(found) < len(pairs):
            raise Unfit("a service that is named twice")
        return found

    expected = f"service names, each with {last_id.expected}"
    return Kind(expected, "SERVICE=ID", read, from_text, repeatable=True)


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split(",")]


def printable(text: str) -> str:
    """The text in one line that changes nothing on a terminal."""
    return "".join(char if char.isprintable() else f"\\U{ord(char):08x}" for char in text)


def to_toml(value: object) -> str:
    """The value as TOML, in one line."""
    match value:
        case bool():
            return str(value).lower()
        case int():
            return f"{value:_}"
        case str() | Path():
            escaped = str(value).replace("\\", "\\\\").replace('"', '\\"')
            return f'"{printable(escaped)}"'
        case tuple():
            return f"[{', '.join(map(to_toml, value))}]"
        case Mapping():
            pairs = [f"{to_toml(name)} = {to_toml(item)}" for name, item in value.items()]
            return f"{{{', '.join(pairs)}}}"
        case _:
            return repr(value)


def shown(value: object) -> str:
    """A value for a message: as it is written if that is short, or else what it is."""
    match value:
        case int() if value.bit_length() > 3 * SHOWN_CHARS_MAX:
            return f"an integer of {value.bit_length()} bits"
        case str() if len(value) > SHOWN_CHARS_MAX:
            return to_toml(value[:SHOWN_CHARS_MAX] + "…")
        case int() | float() | str() | Path():
            return to_toml(value)
        case dict():
            return "a table"
        case list():
            return "an array"
        case _:
            return f"a {type(value).__name__}"
