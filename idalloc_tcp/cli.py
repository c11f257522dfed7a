"""The command line."""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import trio

from idalloc_tcp import __version__, config
from idalloc_tcp.address import Address, parse_address
from idalloc_tcp.errors import IdallocError, SettingsError, StartRefused
from idalloc_tcp.names import fold_name
from idalloc_tcp.top.sample import parsed

#: Exit statuses: it failed, and the message says why; the command or a setting is wrong;
#: ended by a second signal before the stop was over.
FAILED: Final = 1
MISUSED: Final = 2
INTERRUPTED: Final = 130

DEFAULT_SERVER: Final = "127.0.0.1:8642"
INTERVAL_SECONDS_MIN: Final = 0.1
INTERVAL_SECONDS_MAX: Final = 3600.0

_DESCRIPTION: Final = """\
Unique, upward-trending 64-bit IDs over a protocol that you can type.

  idalloc-tcp serve                     run a server on 127.0.0.1:8642
  idalloc-tcp alloc orders 3            take three IDs of `orders` from it, or:
  printf 'ALLOC orders 3\\n' | nc -N 127.0.0.1 8642
"""
_SERVE: Final = """\
Run a server until SIGTERM or Ctrl-C, which stop it cleanly; a second one stops it at once.
SIGHUP reads the settings again, SIGUSR1 logs the status.

Every setting can also stand in the TOML file of --config, or in the environment, as IDALLOC_TCP_
and its name in capitals. A flag overrides the environment, and that the file."""
_CONFIG: Final = """\
Print every setting as it would be in effect, and where its value came from. The output is a valid
file for --config."""
_INIT_DB: Final = """\
Make the table tbl_alloc_info in the database of --mysql, if it is missing."""
_DOCTOR: Final = """\
Would `serve` with these settings serve, and safely? Looks at addresses, files and stores, changes
nothing and takes no ID. A line for each check says what to do; exit status 1 if one failed."""
_ALLOC: Final = """\
Take COUNT contiguous IDs of SERVICE and print `<first> <count>`: the IDs first, first+1, ...
are yours. Retrying after a failure is always safe; it costs at most a gap."""
_STATS: Final = "Print what a server says of itself, or of one service."
_TOP: Final = """\
Show rates, stores and services of a server until q or Ctrl-C. Of the server only the services that
are named are shown; its admin pages tell of all. Without a terminal: one table, after INTERVAL."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit status."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except IdallocError as error:
        return _complain(error)
    except BrokenPipeError:
        # The reader of our output left. Nothing more may be flushed into it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except BaseExceptionGroup as group:
        causes = _leaves(group)
        if any(isinstance(cause, KeyboardInterrupt) for cause in causes):
            return INTERRUPTED
        complaints = [cause for cause in causes if isinstance(cause, IdallocError)]
        if len(complaints) == len(causes):
            return _complain(complaints[0])  # Workers refuse for the same reason.
        raise
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    """The exceptions in a group and the groups within it."""
    leaves: list[BaseException] = []
    for error in group.exceptions:
        leaves += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return leaves


def _complain(error: IdallocError) -> int:
    code = "" if error.code == IdallocError.code else f"{error.code}: "
    print(f"idalloc-tcp: {code}{error}", file=sys.stderr)
    return MISUSED if isinstance(error, SettingsError) else FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="idalloc-tcp",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"idalloc-tcp {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    for name, run, summary, text in (
        ("serve", _serve, "run a server", _SERVE),
        ("config", _config, "show the settings", _CONFIG),
        ("init-db", _init_db, "make the table in a MySQL database", _INIT_DB),
        ("doctor", _doctor, "check settings and stores", _DOCTOR),
    ):
        command = commands.add_parser(
            name,
            help=summary,
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        config.add_flags(command)
        command.set_defaults(run=run)

    alloc = commands.add_parser("alloc", help="take IDs from a server", description=_ALLOC)
    alloc.add_argument("service", metavar="SERVICE")
    alloc.add_argument("count", metavar="COUNT", type=int, nargs="?", default=1, help="default: 1")
    alloc.set_defaults(run=_alloc)

    stats = commands.add_parser("stats", help="ask a server how it is", description=_STATS)
    stats.add_argument("service", metavar="SERVICE", nargs="?")
    stats.add_argument("--json", action="store_true", help="for programs")
    stats.set_defaults(run=_stats)

    top = commands.add_parser("top", help="watch a server", description=_TOP)
    top.add_argument("service", metavar="SERVICE", nargs="*")
    top.add_argument(
        *("--interval", "-i"),
        type=_interval,
        default=1.0,
        metavar="SECONDS",
        help="between looks; 0.1 to 3600 (default: 1)",
    )
    top.add_argument("--admin", metavar="URL", help="ask the admin pages, as in http://HOST:PORT")
    top.set_defaults(run=_top)

    for command in (alloc, stats, top):
        command.add_argument(
            "--server",
            type=_address,
            default=DEFAULT_SERVER,
            metavar="ADDRESS",
            help=f"HOST:PORT, [IPv6]:PORT or unix:PATH (default: {DEFAULT_SERVER})",
        )
    return parser


def _address(text: str) -> Address:
    try:
        return parse_address(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def _interval(text: str) -> float:
    with suppress(ValueError):
        if INTERVAL_SECONDS_MIN <= (seconds := float(text)) <= INTERVAL_SECONDS_MAX:
            return seconds
    raise argparse.ArgumentTypeError(f"{text!r}: not a number of seconds from 0.1 to 3600")


def _load(options: argparse.Namespace) -> config.Loaded:
    return config.load(config.given_flags(options), getattr(options, "config", None), os.environ)


def _config(options: argparse.Namespace) -> None:
    print(config.render(_load(options)), end="")


def _serve(options: argparse.Namespace) -> None:
    # Not at the top: the other commands are quick, and need none of the server.
    from idalloc_tcp import composition  # noqa: PLC0415

    composition.serve(lambda: _load(options).settings)


def _init_db(options: argparse.Namespace) -> None:
    from idalloc_tcp import composition  # noqa: PLC0415

    trio.run(composition.init_db, _load(options).settings)
    print("the table tbl_alloc_info is there")


def _doctor(options: argparse.Namespace) -> None:
    from idalloc_tcp import doctor  # noqa: PLC0415

    tally = doctor.Tally()
    trio.run(doctor.examine, _load(options), tally.report)
    if tally.has_failed:
        raise StartRefused(tally.summary())
    print(tally.summary())


def _alloc(options: argparse.Namespace) -> None:
    from idalloc_tcp.client import Client  # noqa: PLC0415 - a server needs none, here as below

    async def take() -> range:
        async with await Client.connect(options.server) as client:
            return await client.alloc(options.service, options.count)

    ids = trio.run(take)
    print(ids.start, len(ids))


def _stats(options: argparse.Namespace) -> None:
    from idalloc_tcp.client import Client  # noqa: PLC0415

    async def ask() -> dict[str, str]:
        async with await Client.connect(options.server) as client:
            return await client.stats(options.service)

    values = trio.run(ask)
    if options.json:
        import json  # noqa: PLC0415

        print(json.dumps({name: parsed(value) for name, value in values.items()}))
        return
    width = max(map(len, values), default=0)
    for name, value in values.items():
        print(f"{name:{width}}  {value}")


def _top(options: argparse.Namespace) -> None:
    # Not at the top: only this draws, and what draws is large.
    from idalloc_tcp.top import live  # noqa: PLC0415
    from idalloc_tcp.top.source import AdminSource, ServerSource  # noqa: PLC0415

    services = [fold_name(service) for service in options.service]
    source: AdminSource | ServerSource
    if options.admin is None:
        source, title = ServerSource(options.server, services), str(options.server)
    else:
        try:
            source, title = AdminSource.parse(options.admin, services), options.admin
        except ValueError as error:
            raise SettingsError(f"--admin: {error}") from None
    trio.run(live.run, source, title, options.interval)
