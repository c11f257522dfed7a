"""Random schedules: what happens when, as a list of integers.

One integer is one step: it chooses the action and is its argument, too. An action that is not
possible does nothing. So any sublist of a schedule is a schedule, which is all that shrinking
needs.
"""

from collections.abc import Callable, Sequence
from random import Random
from typing import Final, final

import attrs

from tests.model.original import Original
from tests.model.rules import Rules
from tests.model.run import Run
from tests.model.world import Violation

Schedule = Sequence[int]
Action = Callable[[Run, int], None]

#: Steps in a schedule: enough for a few failovers with work in between.
STEPS: Final = 600

_WORK: Final[dict[Action, int]] = {
    Run.serve: 40,
    Run.reserve: 36,
    Run.extend: 10,
    Run.idle: 5,
    Run.settle: 20,
    Run.deliver: 50,
    Run.execute: 14,
    Run.give_up: 8,
    Run.lose: 3,
    Run.execute_late: 10,
    Run.crash: 2,
    Run.stop: 3,
    Run.reroute: 6,
    Run.attach: 1,
    Run.switch_ledger: 2,
}
_REDIS_FAULTS: Final[dict[Action, int]] = {
    Run.replicate: 10,
    Run.flush: 3,
    Run.restart: 2,
    Run.promote: 4,
    Run.demote: 4,
    Run.sync: 5,
}
#: With more flushes and fewer late executions than elsewhere, so that more of what a retired
#: original sent arrives after Redis has lost its data.
_ORIGINAL: Final[dict[Action, int]] = {
    Run.allocate: 30,
    Run.restart_original: 2,
    Run.retire_original: 4,
    Run.permit_take_over: 4,
    Run.flush: 8,
    Run.execute_late: 4,
}


@final
@attrs.frozen
class Scenario:
    """How a run begins, and what may happen in it: each action as often as its weight."""

    begin: Callable[[Rules, int], Run]
    weights: dict[Action, int]
    table: tuple[Action, ...] = attrs.field(init=False)

    @table.default
    def _table(self) -> tuple[Action, ...]:
        return tuple(action for action, weight in self.weights.items() for _ in range(weight))


def _begin_faults(rules: Rules, arg: int) -> Run:
    return Run(rules, workers=2 + arg % 2)


def _begin_rollback(rules: Rules, arg: int) -> Run:
    run = Run(rules, workers=1 + arg % 2)
    run.world.watches_lead = False
    return run


def _begin_carry_over(rules: Rules, arg: int) -> Run:
    """The original has served 9 IDs; its row is behind, as it nearly always is."""
    run = Run(rules, workers=2)
    world = run.world
    world.serve(1, 9)
    world.nodes[0].write((9, 0, 0, 3))
    world.nodes[1].sync()
    world.ledger.write_original(6, 2)
    world.ledger.is_ours = False
    run.originals = [Original(world, world.nodes[0]) for _ in range(1 + arg % 2)]
    for worker in run.workers:
        worker.takes_over = False
    return run


#: `faults`: everything that can befall Redis, the network and the workers; the ledger keeps its
#: commits. `rollback`: the ledger may lose commits that every worker remembers. `carry_over`:
#: originals beside ours on a healthy Redis, then ours alone with all faults.
SCENARIOS: Final = {
    "faults": Scenario(_begin_faults, {**_WORK, **_REDIS_FAULTS}),
    "rollback": Scenario(_begin_rollback, {**_WORK, **_REDIS_FAULTS, Run.roll_back: 10}),
    "carry_over": Scenario(_begin_carry_over, {**_WORK, **_REDIS_FAULTS, **_ORIGINAL}),
}


def random_schedule(seed: int, index: int) -> list[int]:
    """The schedule of this number in the series of this seed."""
    bits = Random(seed * 1_000_003 + index)
    return [bits.getrandbits(30) for _ in range(STEPS)]


def play(
    scenario: Scenario,
    rules: Rules,
    schedule: Schedule,
    watch: Callable[[str, Run], None] | None = None,
) -> Violation | None:
    """The first violation, if there is one; `watch` is told of every step."""
    table, size = scenario.table, len(scenario.table)
    run = scenario.begin(rules, schedule[0])
    world = run.world
    try:
        for step in schedule:
            action = table[step % size]
            if action in _REDIS_FAULTS and not run.redis_may_fail:
                continue
            action(run, step // size)
            if watch:
                watch(action.__name__, run)
            world.check_lead()
        for worker in run.workers:
            worker.drain()
        world.drain()
    except Violation as violation:
        return violation
    return None


def shrink(scenario: Scenario, rules: Rules, schedule: list[int]) -> list[int]:
    """A sublist that still ends in a violation, and that no step can be taken from."""
    chunk = len(schedule) // 2
    while chunk:
        start, before = 0, len(schedule)
        while start < len(schedule):
            fewer = schedule[:start] + schedule[start + chunk :]
            if fewer and play(scenario, rules, fewer):
                schedule = fewer
            else:
                start += chunk
        if chunk > 1 or len(schedule) == before:
            chunk //= 2
    return schedule
