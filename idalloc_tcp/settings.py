"""The settings: what there are, and what they may be.

A setting is one attribute of `Settings` and nothing else. Its key in the file, its variable,
its flag, its checks and its row in a table of settings all follow from that attribute.
"""

# ruff: noqa: RUF009 - `setting` makes attributes, as `attrs.field` does

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, TypeVar, cast, final, get_args

import attrs

from idalloc_tcp.address import Address, parse_address
from idalloc_tcp.errors import SettingsError
from idalloc_tcp.kinds import (
    ID_MAX,
    Kind,
    Unfit,
    address,
    addresses,
    choice,
    file,
    integer,
    integer_or_auto,
    last_ids,
    seconds,
    store_url,
    switch,
    text,
    to_toml,
)

WORKERS_MAX: Final = 128
_RULE: Final = "rule"
_T = TypeVar("_T")

LogLevel: TypeAlias = Literal["debug", "info", "warning", "error"]
Fallback: TypeAlias = Literal["off", "random"]
Lane: TypeAlias = Literal["sweep", "stream"]
Workers: TypeAlias = int | Literal["auto"]
LogFormat: TypeAlias = Literal["console", "json"]


@final
@attrs.frozen
class Rule:
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
    rule = Rule(kind, group, help, at_least)
    converter = attrs.Converter(_converted, takes_field=True)
    return attrs.field(default=default, converter=converter, metadata={_RULE: rule})


def _converted(value: object, field: "attrs.Attribute[Any]") -> object:
    if value is None and field.default is None:
        return None
    kind = cast(Rule, field.metadata[_RULE]).kind
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
        "How many ALLOCs a second are served, of all services together; a tenth of that may come "
        "at once; 0 is no limit.",
    )
    rate_limit_ids: int = setting(
        0,
        integer(0, 1_000_000_000_000),
        _RATES,
        "How many IDs a second are given away, of all services together; a larger request is "
        "served, and those after it wait; 0 is no limit.",
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
        for problem in contradictions(attrs.asdict(self, recurse=False), {}):
            raise SettingsError(problem)

    def shown(self, *names: str) -> dict[str, str]:
        """Those of these settings that are set, as people may see them: without passwords."""
        values = {name: getattr(self, name) for name in names}
        return {
            name: str(rules()[name].kind.shown(value))
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


def rules() -> dict[str, Rule]:
    return {field.name: field.metadata[_RULE] for field in attrs.fields(Settings)}


def contradictions(values: Mapping[str, Any], sources: Mapping[str, str]) -> Iterator[str]:
    def written(name: str) -> str:
        return f"{name} ({sources[name]})" if sources else name

    for name, rule in rules().items():
        for other in rule.at_least:
            if values[name] < values[other]:
                least = f"at least {to_toml(values[other])}, which is {written(other)}"
                yield f"{written(name)}: expected {least}, found {to_toml(values[name])}"
