"""The settings: what there are, what they may be, and where each value came from.

A setting is one attribute of `Settings` and nothing else. Its key in the file, its variable,
its flag, its checks and its row in a table of settings all follow from that attribute:

    segment_size = 20_000              in the TOML file of --config or IDALLOC_TCP_CONFIG
    IDALLOC_TCP_SEGMENT_SIZE=20_000    in the environment: overrides the file
    --segment-size 20_000              on the command line: overrides both

Reading is strict, and a value that a stronger source overrides is checked all the same: a
mistake should not lie in wait for the day on which the flag that hides it is dropped. What
overrides replaces the whole value: a list or a table is never merged.
"""

# ruff: noqa: RUF009 - `setting` makes attributes, as `attrs.field` does

import argparse
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, TypeVar, cast, final, get_args

import attrs
from typed_settings.dict_utils import merge_settings
from typed_settings.types import LoadedSettings, LoaderMeta, OptionInfo, OptionList

from idalloc_tcp.address import Address, parse_address
from idalloc_tcp.errors import SettingsError
from idalloc_tcp.kinds import (
    ID_MAX,
    SHOWN_CHARS_MAX,
    Kind,
    Unfit,
    address,
    addresses,
    choice,
    file,
    integer,
    integer_or_auto,
    last_ids,
    printable,
    seconds,
    store_url,
    switch,
    text,
    to_toml,
)

PREFIX: Final = "IDALLOC_TCP_"
CONFIG_VARIABLE: Final = f"{PREFIX}CONFIG"
FILE_BYTES_MAX: Final = 16 * 2**20
WORKERS_MAX: Final = 128

_RULE: Final = "rule"
_T = TypeVar("_T")

#: A flag as it was given: its text, the texts of a repeated one, or the truth of --x, --no-x.
Flag: TypeAlias = str | Sequence[str] | bool
LogLevel: TypeAlias = Literal["debug", "info", "warning", "error"]
Fallback: TypeAlias = Literal["off", "random"]
Lane: TypeAlias = Literal["sweep", "stream"]
Workers: TypeAlias = int | Literal["auto"]
LogFormat: TypeAlias = Literal["console", "json"]


@final
@attrs.frozen
class _Rule:
    kind: Kind[Any]
    group: str
    help: str
    at_least: tuple[str, ...]


def setting(
    default: _T, kind: Kind[_T], group: str, help: str, *, at_least: tuple[str, ...] = ()
) -> _T:
    """An attribute of `Settings`.

    Args:
        default: may be None for any kind: the setting is unset, which only the default says.
        kind: how it is read.
        group: the heading under which the help lists its flag. A group's settings stand together.
        help: one sentence, with the unit.
        at_least: settings than which this one may not be smaller.
    """
    rule = _Rule(kind, group, help, at_least)
    converter = attrs.Converter(_converted, takes_field=True)
    return attrs.field(default=default, converter=converter, metadata={_RULE: rule})


def _converted(value: object, field: "attrs.Attribute[Any]") -> object:
    if value is None and field.default is None:
        return None
    kind = cast(_Rule, field.metadata[_RULE]).kind
    try:
        return kind.read(value)
    except Unfit as error:
        raise SettingsError(f"{field.name}: expected {kind.expected}, found {error}") from None


_PLACES: Final = "addresses and files"
_STORES: Final = "database and Redis"
_IDS: Final = "IDs"
_TIMES: Final = "times"
_BOUNDS: Final = "bounds"
_RATES: Final = "rates"
_LOG: Final = "log and debugging"


@final
@attrs.frozen
class Settings:
    """What a server runs with: checked, and consistent in itself.

    Raises:
        SettingsError: a value is of the wrong type or out of range, or two contradict.
    """

    listen: tuple[str, ...] = setting(
        ("127.0.0.1:8642",),
        addresses(),
        _PLACES,
        "The addresses to listen on; port 0 is any free port.",
    )
    admin: str | None = setting(
        None,
        address(),
        _PLACES,
        "The address of the admin pages, by HTTP: health, metrics and a page to look at.",
    )
    data: Path | None = setting(
        None,
        file(),
        _PLACES,
        "The SQLite file; if unset, ids.sqlite3 in the user's state directory for idalloc-tcp.",
    )
    mysql: str | None = setting(
        None,
        store_url("mysql"),
        _STORES,
        "The database that holds the IDs instead of the SQLite file.",
    )
    redis: str | None = setting(
        None,
        store_url("redis", "rediss", "unix"),
        _STORES,
        "The Redis that cuts the database's leases into segments for all servers.",
    )
    create_table: bool = setting(
        False,
        switch(),
        _STORES,
        "Make the database's table at the start if it is missing, as init-db does.",
    )
    take_over: bool = setting(
        False,
        switch(),
        _STORES,
        "Make rows and hashes of the original idalloc ours; only once no such server runs.",
    )
    redis_key_prefix: str = setting(
        "idalloc:",
        text(200),
        _STORES,
        "What every key in Redis begins with.",
    )
    lease_segments: int = setting(
        100,
        integer(1, 1_000_000),
        _STORES,
        "How many segments the database leases to Redis at once.",
    )
    write_db_every_n_versions: int = setting(
        10,
        integer(1, 1_000_000),
        _STORES,
        "After how many segments of a service the lease ahead of Redis is looked after.",
    )
    recover_redis_every_n_versions: int = setting(
        100,
        integer(1, 1_000_000),
        _STORES,
        "After how many segments of a service its row and its hash are compared.",
    )
    sync_queue_size: int = setting(
        10_000,
        integer(1, 1_000_000),
        _STORES,
        "How many of these tasks may wait; further ones are dropped and counted.",
    )
    sync_workers: int = setting(
        10,
        integer(1, 1_000),
        _STORES,
        "How many of these tasks run at once.",
    )
    fallback: Fallback = setting(
        "off",
        choice(get_args(Fallback)),
        _STORES,
        "What a request gets when no store answers and the pool is empty: an error (off), "
        "or a range from the upper half under the reply word RANDOM (random).",
    )
    max_count: int = setting(
        1_000_000, integer(1, 10_000_000), _IDS, "The largest count of one ALLOC, in IDs."
    )
    segment_size: int = setting(
        10_000,
        integer(1, 10_000_000),
        _IDS,
        "The smallest segment that a pool asks for at once, in IDs.",
    )
    segment_size_max: int = setting(
        10_000_000,
        integer(1, 1_000_000_000),
        _IDS,
        "The largest segment that a pool asks for at once, in IDs.",
        at_least=("segment_size", "max_count"),
    )
    pool_seconds: float = setting(
        60.0,
        seconds(0, 86_400),
        _IDS,
        "The demand that a pool tries to hold, in seconds: the outage that nobody notices.",
    )
    ceiling: int = setting(
        ID_MAX,
        integer(1, ID_MAX),
        _IDS,
        "The last ID of every service that `ceilings` does not name.",
    )
    ceilings: Mapping[str, int] = setting(
        {}, last_ids(), _IDS, "The last IDs of single services, in place of `ceiling`."
    )
    wait_seconds: float = setting(
        2.0,
        seconds(0.001, 60),
        _TIMES,
        "How long a request may wait for IDs while the pool is empty, in seconds.",
    )
    idle_service_seconds: float = setting(
        300.0,
        seconds(1),
        _TIMES,
        "How long a service may go without a request before it gives its rest back, in seconds.",
    )
    idle_seconds: float = setting(
        3600.0,
        seconds(0.001),
        _TIMES,
        "How long a connection may go without a request before it is closed, in seconds.",
    )
    line_seconds: float = setting(
        60.0,
        seconds(0.001),
        _TIMES,
        "How long a client may take to finish a line that it began, in seconds.",
    )
    send_seconds: float = setting(
        30.0,
        seconds(0.001),
        _TIMES,
        "How long a client may take to accept its replies, in seconds.",
    )
    drain_seconds: float = setting(
        2.5,
        seconds(0),
        _TIMES,
        "How long busy connections may go on after a clean stop has begun, in seconds.",
    )
    lane: Lane = setting(
        "sweep",
        choice(get_args(Lane)),
        _BOUNDS,
        "Whether one task serves all connections that need not wait (sweep, the faster; only "
        "where there is epoll), or each connection's own (stream).",
    )
    workers: Workers = setting(
        1,
        integer_or_auto(1, WORKERS_MAX),
        _BOUNDS,
        "How many processes serve, on the same addresses; auto is one for each CPU.",
    )
    max_connections: int = setting(
        16_384, integer(1, 1_000_000), _BOUNDS, "How many connections may be open at once."
    )
    max_services: int = setting(
        100_000,
        integer(1, 10_000_000),
        _BOUNDS,
        "How many services one process may have in use at once.",
    )
    rate_limit_qps: int = setting(
        0,
        integer(0, 1_000_000_000),
        _RATES,
        "How many ALLOCs a second are served, of all services together; 0 is no limit.",
    )
    rate_limit_ids: int = setting(
        0,
        integer(0, 1_000_000_000_000),
        _RATES,
        "How many IDs a second are given away, of all services together; 0 is no limit.",
    )
    service_rate_limit_qps: int = setting(
        0,
        integer(0, 1_000_000_000),
        _RATES,
        "How many ALLOCs a second are served of each service; 0 is no limit.",
    )
    service_rate_limit_ids: int = setting(
        0,
        integer(0, 1_000_000_000_000),
        _RATES,
        "How many IDs a second are given away of each service; 0 is no limit.",
    )
    log_level: LogLevel = setting(
        "info", choice(get_args(LogLevel)), _LOG, "The least severity that is logged."
    )
    log_format: LogFormat = setting(
        "console",
        choice(get_args(LogFormat)),
        _LOG,
        "Whether a line of the log is for people (console) or for programs (json).",
    )
    debug: bool = setting(
        False,
        switch(),
        _LOG,
        "Let the admin pages also show what the processes are doing: profiles and tasks.",
    )

    def __attrs_post_init__(self) -> None:
        if self.redis is not None and self.mysql is None:
            raise SettingsError("redis: expected mysql beside it, which makes its IDs safe")
        for problem in _contradictions(attrs.asdict(self, recurse=False), {}):
            raise SettingsError(problem)

    def shown(self, *names: str) -> dict[str, str]:
        """Those of these settings that are set, as people may see them: without passwords."""
        values = {name: getattr(self, name) for name in names}
        return {
            name: str(_rules()[name].kind.shown(value))
            for name, value in values.items()
            if value is not None
        }

    def addresses(self) -> list[Address]:
        """Where to listen, parsed."""
        return [parse_address(text) for text in self.listen]

    def admin_addresses(self) -> list[Address]:
        """Where to answer HTTP, parsed; none if nowhere."""
        return [] if self.admin is None else [parse_address(self.admin)]

    @property
    def worker_count(self) -> int:
        """How many processes serve. `auto`: as many as there are CPUs that this one may use."""
        if self.workers == "auto":
            return min(len(os.sched_getaffinity(0)), WORKERS_MAX)
        return self.workers

    def data_path(self) -> Path:
        """The SQLite file. Its directory need not exist yet."""
        if self.data is not None:
            return self.data
        import platformdirs  # noqa: PLC0415 - most servers name their file

        return platformdirs.user_state_path("idalloc-tcp", appauthor=False) / "ids.sqlite3"


def _rules() -> dict[str, _Rule]:
    return {field.name: field.metadata[_RULE] for field in attrs.fields(Settings)}


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


def _contradictions(values: Mapping[str, Any], sources: Mapping[str, str]) -> Iterator[str]:
    def written(name: str) -> str:
        return f"{name} ({sources[name]})" if sources else name

    for name, rule in _rules().items():
        for other in rule.at_least:
            if values[name] < values[other]:
                least = f"at least {to_toml(values[other])}, which is {written(other)}"
                yield f"{written(name)}: expected {least}, found {to_toml(values[name])}"


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
            if name in _rules():
                self._add(name, value, source, base=path.parent)
            else:
                self._problems.append(_unknown(name, source))

    def read_environment(self, environ: Mapping[str, str]) -> None:
        known = {f"{PREFIX}{name.upper()}": name for name in _rules()}
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
        kind = _rules()[name].kind
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
        problems = self._problems or list(_contradictions(values, sources))
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise SettingsError(problems[0] + more)
        return Loaded(Settings(**values), sources)


def _read_toml(path: Path) -> dict[str, Any]:
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
    for near in difflib.get_close_matches(name, _rules(), n=1):
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
    for heading, rules in groupby(_rules().items(), key=lambda item: item[1].group):
        group = parser.add_argument_group(heading)
        for name, rule in rules:
            options: dict[str, Any] = {"metavar": rule.kind.metavar}
            if rule.kind.repeatable:
                options["action"] = "append"
            elif not rule.kind.metavar:
                options = {"action": argparse.BooleanOptionalAction}
            text = f"{rule.help} Default: {_default(name)}.".replace("%", "%%")
            group.add_argument(_flag(name), help=text, default=argparse.SUPPRESS, **options)


def given_flags(arguments: argparse.Namespace) -> dict[str, Flag]:
    """The settings among the parsed arguments: only those that were given, as they were given."""
    return {name: value for name, value in vars(arguments).items() if name in _rules()}


def render(loaded: Loaded) -> str:
    """A TOML file that gives these settings again, with the source of each as a comment.

    But for passwords: those are hidden.
    """
    lines = []
    for name, value in attrs.asdict(loaded.settings, recurse=False).items():
        shown = None if value is None else to_toml(_rules()[name].kind.shown(value))
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
        for name, rule in _rules().items()
    ]


def _default(name: str) -> str:
    default = attrs.fields_dict(Settings)[name].default
    return "unset" if default is None else to_toml(default)
