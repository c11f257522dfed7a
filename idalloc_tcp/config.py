"""Where each setting's value comes from, and how it is read and shown.

The settings themselves are in `settings`. Each has a key in the file, a variable and a flag:

    segment_size = 20_000              in the TOML file of --config or IDALLOC_TCP_CONFIG
    IDALLOC_TCP_SEGMENT_SIZE=20_000    in the environment: overrides the file
    --segment-size 20_000              on the command line: overrides both

Reading is strict, and a value that a stronger source overrides is checked all the same: a
mistake should not lie in wait for the day on which the flag that hides it is dropped. What
overrides replaces the whole value: a list or a table is never merged.
"""

import argparse
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Final, TypeAlias, final

import attrs
from typed_settings.dict_utils import merge_settings
from typed_settings.types import LoadedSettings, LoaderMeta, OptionInfo, OptionList

from idalloc_tcp.errors import SettingsError
from idalloc_tcp.kinds import (
    SHOWN_CHARS_MAX,
    Unfit,
    printable,
    to_toml,
)
from idalloc_tcp.settings import Settings, contradictions, rules

PREFIX: Final = "IDALLOC_TCP_"
CONFIG_VARIABLE: Final = f"{PREFIX}CONFIG"
FILE_BYTES_MAX: Final = 16 * 2**20

#: A flag as it was given: its text, the texts of a repeated one, or the truth of --x, --no-x.
Flag: TypeAlias = str | Sequence[str] | bool


def _options() -> OptionList:
    # typed-settings' own `deep_options` parses the source of the class for doc strings, which
    # takes a megabyte that the process keeps.
    return tuple(
        OptionInfo(
            parent_cls=Settings,
            path=field.name,
            cls=field.type or object,
            default=field.default,
            has_no_default=False,
            default_is_factory=False,
        )
        for field in attrs.fields(Settings)
    )


@final
@attrs.frozen
class Loaded:
    """The settings, and for each by its name where its value came from."""

    settings: Settings
    sources: Mapping[str, str]


def load(flags: Mapping[str, Flag], config_path: Path | None, environ: Mapping[str, str]) -> Loaded:
    """Read everything that was given: the file, then the environment, then the flags.

    Args:
        flags: what `given_flags` found, by the names of the settings.
        config_path: the file of --config; without one IDALLOC_TCP_CONFIG may name one.
        environ: the environment. Whatever begins with IDALLOC_TCP_ has to be a setting.

    Raises:
        SettingsError: in one line, what is wrong first and how much more is.
    """
    reader = _Reader()
    if config_path is not None:
        reader.read_file(config_path, "flag --config")
    elif CONFIG_VARIABLE in environ:
        reader.read_file(Path(environ[CONFIG_VARIABLE]), f"environment {CONFIG_VARIABLE}")
    reader.read_environment(environ)
    reader.read_flags(flags)
    return reader.result()


@final
@attrs.define
class _Reader:
    """What the sources gave so far, each overriding those before, and all that is wrong in it."""

    _given: list[LoadedSettings] = attrs.field(init=False, factory=list)
    _problems: list[str] = attrs.field(init=False, factory=list)

    def read_file(self, path: Path, named_by: str) -> None:
        try:
            content = _read_toml(path)
        except Unfit as error:
            self._problems.append(f"config ({named_by}): expected a TOML file, found {error}")
            return
        source = f"file {printable(str(path))}"
        for name, value in content.items():
            if name in rules():
                self._add(name, value, source, base=path.parent)
            else:
                self._problems.append(_unknown(name, source))

    def read_environment(self, environ: Mapping[str, str]) -> None:
        known = {f"{PREFIX}{name.upper()}": name for name in rules()}
        for variable in sorted(environ):
            if variable in known:
                self._add(known[variable], environ[variable], f"environment {variable}")
            elif variable.startswith(PREFIX) and variable != CONFIG_VARIABLE:
                self._problems.append(_unknown(variable, "environment", PREFIX))

    def read_flags(self, flags: Mapping[str, Flag]) -> None:
        for name, value in flags.items():
            text = value if isinstance(value, str | bool) else ",".join(value)
            self._add(name, text, f"flag {_flag(name, value is not False)}")

    def _add(self, name: str, value: object, source: str, *, base: Path | None = None) -> None:
        """Take one value, out of a file in the directory `base` or else from a text."""
        kind = rules()[name].kind
        try:
            if base is None and isinstance(value, str):
                value = kind.parse(value)
            else:
                value = kind.read(value)
        except Unfit as error:
            self._problems.append(f"{name} ({source}): expected {kind.expected}, found {error}")
            return
        base = base or Path()
        if isinstance(value, Path):
            # What `render` shows has to mean the same in a file elsewhere.
            value = (base / value).absolute()
        self._given.append(LoadedSettings({name: value}, LoaderMeta(source, base)))

    def result(self) -> Loaded:
        defaults = {field.name: field.default for field in attrs.fields(Settings)}
        layers = [LoadedSettings(defaults, LoaderMeta("default", Path())), *self._given]
        merged = merge_settings(_options(), layers)
        values = {name: loaded.value for name, loaded in merged.items()}
        sources = {name: loaded.loader_meta.name for name, loaded in merged.items()}
        problems = self._problems or list(contradictions(values, sources))
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise SettingsError(problems[0] + more)
        return Loaded(Settings(**values), sources)


def _read_toml(path: Path) -> dict[str, Any]:
    import tomllib  # noqa: PLC0415 - many servers have no file

    try:
        with path.open("rb") as stream:
            content = stream.read(FILE_BYTES_MAX + 1)
        if len(content) > FILE_BYTES_MAX:
            raise ValueError(f"it holds more than {FILE_BYTES_MAX:_} bytes")
        return tomllib.loads(content.decode())
    except OSError as error:
        reason = error.strerror or str(error)
    except (ValueError, RecursionError) as error:
        reason = str(error)
    raise Unfit(printable(f"{path}: {reason}"))


def _unknown(spelling: str, source: str, prefix: str = "") -> str:
    import difflib  # noqa: PLC0415 - only a mistake needs it

    spelling = spelling[:SHOWN_CHARS_MAX]
    name = spelling.removeprefix(prefix).lower().replace("-", "_")
    advice = "`idalloc-tcp config` lists them all"
    for near in difflib.get_close_matches(name, rules(), n=1):
        advice = f"did you mean {prefix + near.upper() if prefix else near}?"
    return f"{printable(spelling)} ({source}): unknown setting; {advice}"


def _flag(name: str, positive: bool = True) -> str:
    return f"--{'' if positive else 'no-'}{name.replace('_', '-')}"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Give `parser` --config and a flag for every setting, under the headings of their groups."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        default=argparse.SUPPRESS,
        help=f"A TOML file with settings. {CONFIG_VARIABLE} may name it as well.",
    )
    for heading, members in groupby(rules().items(), key=lambda item: item[1].group):
        group = parser.add_argument_group(heading)
        for name, rule in members:
            options: dict[str, Any] = {"metavar": rule.kind.metavar}
            if rule.kind.repeatable:
                options["action"] = "append"
            elif not rule.kind.metavar:
                options = {"action": argparse.BooleanOptionalAction}
            text = f"{rule.help} Default: {_default(name)}.".replace("%", "%%")
            group.add_argument(_flag(name), help=text, default=argparse.SUPPRESS, **options)


def given_flags(arguments: argparse.Namespace) -> dict[str, Flag]:
    """The settings among the parsed arguments: only those that were given, as they were given."""
    return {name: value for name, value in vars(arguments).items() if name in rules()}


def render(loaded: Loaded) -> str:
    """A TOML file that gives these settings again, with the source of each as a comment.

    But for passwords: those are hidden.
    """
    lines = []
    for name, value in attrs.asdict(loaded.settings, recurse=False).items():
        shown = None if value is None else to_toml(rules()[name].kind.shown(value))
        if name == "data" and value is None:
            line = f"# data = {to_toml(loaded.settings.data_path())}"
        else:
            line = f"# {name} is unset" if shown is None else f"{name} = {shown}"
        lines.append(f"{line}  # {loaded.sources[name]}\n")
    return "".join(lines)


@final
@attrs.frozen
class Description:
    """A setting as a row of a table, all of it text."""

    name: str
    type: str
    default: str
    help: str


def describe() -> list[Description]:
    """Every setting, in the order in which `Settings` has them."""
    return [
        Description(name, rule.kind.expected, _default(name), rule.help)
        for name, rule in rules().items()
    ]


def _default(name: str) -> str:
    default = attrs.fields_dict(Settings)[name].default
    return "unset" if default is None else to_toml(default)
