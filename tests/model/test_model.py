"""The rules are enough, and none of them can go."""

from typing import Final

import pytest

from tests.model.rules import ALL, NAMES, THRIFT, Rules, without
from tests.model.schedule import SCENARIOS, play, random_schedule, shrink

#: Schedules per scenario here; `python -m tests.model` plays many more.
SCHEDULES: Final = 1_000
#: Schedules that may pass until a missing rule shows. The rarest of them needs a quarter of it.
BOUND: Final = 8_000
SEED: Final = 1

#: Without this rule, which scenario comes to which violation.
NEEDED: Final = {
    "lead": ("faults", "duplicate"),
    "fence": ("faults", "duplicate"),
    "fence_replid": ("faults", "duplicate"),
    "reseat": ("faults", "duplicate"),
    "seat_once": ("faults", "duplicate"),
    "raise_once": ("faults", "duplicate"),
    "give_back_once": ("faults", "duplicate"),
    "unknown_is_lost": ("faults", "duplicate"),
    "extend_compares_row": ("faults", "duplicate"),
    "raise_compares_end": ("faults", "duplicate"),
    "forward": ("faults", "order"),
    "give_back_compares": ("faults", "duplicate"),
    "floor": ("rollback", "duplicate"),
    "extend_heeds_floor": ("rollback", "duplicate"),
    "mark": ("carry_over", "duplicate"),
    "commit_beside": ("carry_over", "duplicate"),
    "version_beside": ("carry_over", "duplicate"),
    "close": ("carry_over", "duplicate"),
    "seat_carries_version": ("carry_over", "duplicate"),
}


def _first(scenario: str, rules: Rules, kind: str | None, schedules: int) -> int | None:
    """The number of the first schedule that ends in a violation (of this kind)."""
    for index in range(schedules):
        violation = play(SCENARIOS[scenario], rules, random_schedule(SEED, index))
        if violation and kind in (None, violation.kind):
            return index
    return None


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_all_rules_are_enough(scenario: str) -> None:
    """With all rules no schedule breaks an invariant."""
    assert _first(scenario, ALL, None, SCHEDULES) is None


@pytest.mark.parametrize("rule", NEEDED)
def test_no_rule_can_go(rule: str) -> None:
    """Without any one rule some schedule breaks an invariant."""
    scenario, kind = NEEDED[rule]
    assert _first(scenario, without(rule), kind, BOUND) is not None


@pytest.mark.parametrize("rule", THRIFT)
def test_a_rule_of_thrift_saves_leases_only(rule: str) -> None:
    """Without a rule that is said to save leases only, no invariant breaks."""
    assert all(_first(name, without(rule), None, SCHEDULES // 4) is None for name in SCENARIOS)


def test_every_rule_has_its_test() -> None:
    """Every switch is either shown to be needed or said to be thrift."""
    assert sorted([*NEEDED, *THRIFT]) == sorted(NAMES)


def test_a_schedule_shrinks_to_one_that_still_fails() -> None:
    """Shrinking keeps the violation, and leaves no step that could go."""
    scenario, rules = SCENARIOS["faults"], without("fence")
    index = _first("faults", rules, None, SCHEDULES)
    assert index is not None
    short = shrink(scenario, rules, random_schedule(SEED, index))
    assert play(scenario, rules, short)
    for step in range(len(short)):
        fewer = short[:step] + short[step + 1 :]
        assert not fewer or not play(scenario, rules, fewer)
