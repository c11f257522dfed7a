"""Play many schedules and sum up: `python -m tests.model --help`."""

import argparse
import sys
import time
from collections import Counter

from tests.model.rules import ALL, NAMES, Rules, without
from tests.model.run import Run
from tests.model.schedule import SCENARIOS, Scenario, play, random_schedule, shrink


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.model", description=__doc__)
    parser.add_argument("--schedules", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--without", choices=NAMES, metavar="RULE", help=", ".join(NAMES))
    parser.add_argument("--scenario", choices=[*SCENARIOS], action="append")
    return parser.parse_args()


def _print_step(action: str, run: Run) -> None:
    nodes = [
        f"{'master' if node.is_master else 'replica'} {node.live}: {node.hash}"
        for node in run.world.nodes
    ]
    pools = [(worker.held, f"floor {worker.floor}", *worker.busy) for worker in run.workers]
    row = run.world.ledger
    print(f"  {action:17} {nodes} row {row.value}, version {row.version} workers {pools}")


def _explain(scenario: Scenario, rules: Rules, schedule: list[int]) -> None:
    """Print the shortest way there that shrinking finds."""
    print(play(scenario, rules, shrink(scenario, rules, schedule), _print_step))


def main() -> int:
    """Exit status 1 if there was a violation; the first one is explained."""
    arguments = _arguments()
    rules = without(arguments.without) if arguments.without else ALL
    names = arguments.scenario or [*SCENARIOS]
    found: Counter[str] = Counter()
    began = time.perf_counter()
    every = max(1, arguments.schedules // 10)
    for index in range(arguments.schedules):
        name = names[index % len(names)]
        schedule = random_schedule(arguments.seed, index)
        violation = play(SCENARIOS[name], rules, schedule)
        if violation:
            if not found:
                print(f"schedule {index}, scenario {name}:")
                _explain(SCENARIOS[name], rules, schedule)
            found[violation.kind] += 1
        if not (index + 1) % every:
            print(f"{index + 1}/{arguments.schedules} {dict(found)}", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - began
    print(
        f"{arguments.schedules} schedules, seed {arguments.seed}, {'/'.join(names)},"
        f" without {arguments.without or 'nothing'}: violations {found.total()} {dict(found)},"
        f" {seconds:.1f} s"
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
