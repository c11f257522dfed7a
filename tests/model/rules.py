"""The rules of the lease hierarchy, each with a switch.

A rule that cannot be switched off cannot be shown to matter. So every clause that the safety
argument leans on is a field here, on by default; without it the same random schedules that
find nothing otherwise must find a violation.
"""

from typing import Final, final

import attrs


@final
@attrs.frozen(kw_only=True)
class Rules:
    """Which rules hold in a run. The number is that of the rule it is a clause of.

    Attributes:
        lead: the counter cuts only below its lease's end (1).
        fence: the counter is not cut from unless its fence is the live one (2).
        fence_replid: the fence holds `master_replid` beside `run_id` (2).
        reseat: recovery seats a fresh lease, instead of restoring the row's value (3).
        seat_carries_version: a seat leaves no lower version in the hash than the row has (3).
        seat_recheck: a seat is refused if its reason is gone (3).
        seat_once: a seat whose outcome is unknown is not sent again (4).
        raise_once: nor is the raise of a counter's lease end (4).
        give_back_once: nor is a give-back (4).
        unknown_is_lost: a range is not served after an unknown outcome (4).
        extend_compares_row: the ledger extends a lease only if its row ends there (5).
        raise_compares_end: the counter takes the extension only if its lease ends there (5).
        raise_compares_fence: and only under the live fence (5).
        floor: a lease lies above every lease end that the worker has seen (6).
        extend_heeds_floor: a lease end below that floor is not extended (6).
        forward: a segment below what was served is dropped (7).
        give_back_compares_fence: and the counter takes it only under the live fence (8).
        give_back_compares: a tail goes back only if nothing above it was taken (8).
        mark: no lease from a row that the original wrote and nobody has taken over.
        commit_beside: beside the original, a cut is committed to the row before it is served.
        version_beside: that commit carries the version of its own cut, no higher one.
        close: taking over closes the hash to the original before anything is leased.
    """

    lead: bool = True
    fence: bool = True
    fence_replid: bool = True
    reseat: bool = True
    seat_carries_version: bool = True
    seat_recheck: bool = True
    seat_once: bool = True
    raise_once: bool = True
    give_back_once: bool = True
    unknown_is_lost: bool = True
    extend_compares_row: bool = True
    raise_compares_end: bool = True
    raise_compares_fence: bool = True
    floor: bool = True
    extend_heeds_floor: bool = True
    forward: bool = True
    give_back_compares: bool = True
    give_back_compares_fence: bool = True
    mark: bool = True
    commit_beside: bool = True
    version_beside: bool = True
    close: bool = True


ALL: Final = Rules()
#: Rules whose absence breaks nothing here. Every seat, raise and give-back is sent once and
#: carries a range of its own, and `take` cuts under the live fence only, so one that comes too
#: late can bury a lease but never revive one. They stand because a buried lease is a gap, and
#: because a script that checks for itself can be read by itself.
THRIFT: Final = ("seat_recheck", "raise_compares_fence", "give_back_compares_fence")
NAMES: Final = tuple(field.name for field in attrs.fields(Rules))


def without(name: str) -> Rules:
    """All rules but one."""
    return Rules(**{name: False})
