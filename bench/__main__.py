"""The command line: `python -m bench COMMAND`."""

import argparse
import resource
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from bench import cost, growth, latency, refill, soak, workers
from bench.generator import KINDS, GeneratorFailed
from bench.report import Options, Report
from tests.real.process import MissingServer, StartFailed

COMMANDS: Final[Mapping[str, Callable[[Options], Report]]] = {
    "cost": cost.run,
    "latency": latency.run,
    "refill": refill.run,
    "growth": growth.run,
    "workers": workers.run,
    "soak": soak.run,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=(sys.modules["bench"].__doc__ or "").split("\n\n")[1]
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, run in COMMANDS.items():
        text = (sys.modules[run.__module__].__doc__ or "").splitlines()[0]
        one = subparsers.add_parser(name, help=text, description=text)
        one.add_argument("--quick", action="store_true", help="a smoke test, for no numbers")
        one.add_argument("--generator", choices=KINDS, default="auto", help="what makes the load")
        one.add_argument(
            "--server-flags",
            type=shlex.split,
            default=[],
            metavar="FLAGS",
            help="for this server, in one argument: --server-flags='--log-level error'",
        )
        one.add_argument("--results", type=Path, help="where the files go: bench/results")
        if name == "soak":
            one.add_argument("--minutes", type=float, default=4.0, help="how long")
    return parser


def main() -> int:
    """Run one command; 1 if it could not be run to its end."""
    arguments = vars(_parser().parse_args())
    # Servers and generators inherit it.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    run = COMMANDS[arguments.pop("command")]
    options = Options(**arguments)
    try:
        run(options).publish(options)
    except (GeneratorFailed, MissingServer, StartFailed) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
