"""Several processes seen as one: which values add up, and which do not."""

import json

import trio
import trio.testing

from idalloc_tcp.metrics import Metrics
from idalloc_tcp.snapshot import Rows, Snapshot, busiest, merge
from tests.serving import serving

ONE: Rows = {
    "version": "1",
    "uptime_seconds": 70,
    "draining": 0,
    "ledger_up": 1,
    "services": 2,
    "requests_total": 10,
    "errors_total": 3,
    "errors_total.busy": 1,
    "errors_total.unknown": 2,
    "gap_ids_total": 0,
}
OTHER: Rows = {
    **{**ONE, "uptime_seconds": 5, "draining": 1, "ledger_up": 0, "requests_total": 7},
    **{"errors_total": 1, "errors_total.badcount": 1},
}
del OTHER["errors_total.busy"], OTHER["errors_total.unknown"]


def of_orders(**rows: int | float | str) -> Snapshot:
    """A snapshot of one service alone."""
    return Snapshot({}, {"orders": {"service": "orders", **rows}})


def test_counts_add_up_and_states_do_not() -> None:
    """Of the whole server: what is counted adds up, what is a state has its own rule."""
    assert merge([Snapshot(ONE), Snapshot(OTHER)]).rows == {
        "version": "1",
        "uptime_seconds": 70,
        "draining": 1,
        "ledger_up": 0,
        "services": 2,
        "requests_total": 17,
        "errors_total": 4,
        "errors_total.badcount": 1,
        "errors_total.busy": 1,
        "errors_total.unknown": 2,
        "gap_ids_total": 0,
    }


def test_rows_stay_in_the_order_of_stats() -> None:
    """Whichever process has a label, it stands behind its total, and everything else as before."""
    ordered = [*list(ONE)[:7], "errors_total.badcount", *list(ONE)[7:]]
    for snapshots in ([ONE, OTHER], [OTHER, ONE]):
        assert list(merge([Snapshot(rows) for rows in snapshots]).rows) == ordered


def test_services_are_merged_by_their_names() -> None:
    """A service's remainders and rates add up; a process that does not use it changes nothing."""
    merged = merge(
        [
            of_orders(active=0),
            of_orders(active=1, remaining_ids=5, last_served=7, rate_ids_per_second=0.1),
            of_orders(active=1, remaining_ids=6, last_served=99, rate_ids_per_second=0.2),
            Snapshot({}, {"users": {"service": "users", "active": 0}}),
        ]
    )
    assert list(merged.services) == ["orders", "users"]
    assert (
        merged.about("orders")
        == {
            "service": "orders",
            "active": 1,
            "remaining_ids": 11,
            "last_served": 99,
            "rate_ids_per_second": 0.3,
        }.items()
    )


def test_the_worst_trouble_is_shown() -> None:
    """One process in trouble is not hidden by another that is well."""
    for troubles, worst in (
        (("none", "none"), "none"),
        (("none", "unavailable"), "unavailable"),
        (("exhausted", "unavailable"), "exhausted"),
    ):
        merged = merge([of_orders(trouble=trouble) for trouble in troubles])
        assert dict(merged.about("orders"))["trouble"] == worst


def test_merging_in_steps_is_merging_at_once() -> None:
    """What was merged can be merged on, and one alone stays what it is."""
    snapshots = [Snapshot(ONE), Snapshot(OTHER), Snapshot(dict(Metrics(ids_total=3).rows()))]
    assert merge([merge(snapshots[:2]), snapshots[2]]) == merge(snapshots)
    assert merge(snapshots[:1]) == snapshots[0]
    assert merge([]) == Snapshot()


def test_a_snapshot_survives_json() -> None:
    """What one process sends is what the other gets, in the same order."""
    sent = Snapshot(ONE, of_orders(active=1).services)
    got = Snapshot.from_json(json.loads(json.dumps(sent.to_json())))
    assert got == sent
    assert list(got.rows) == list(ONE)


def test_totals_are_what_never_shrinks() -> None:
    """Counts are kept with their labels; states, and single services, are not."""
    assert list(Snapshot(ONE, of_orders(active=1).services).totals().rows) == list(ONE)[5:]


def test_the_busiest_come_first() -> None:
    """A list of services is cut to those that served most."""
    services: dict[str, Rows] = {f"s{n}": {"served_ids": n} for n in range(5)}
    cut = busiest(Snapshot(ONE, {"idle": {"active": 0}, **services}), 2)
    assert list(cut.services) == ["s4", "s3"]
    assert cut.rows == ONE


async def test_a_server_says_what_stats_says() -> None:
    """A snapshot has the rows of STATS, of the server or of one service."""
    async with serving() as running, await running.connect() as peer:
        await peer.ask(b"ALLOC orders 3\n")
        await peer.ask(b"ALLOC users 5\n")
        await trio.testing.wait_all_tasks_blocked()
        server = running.server
        assert server.snapshot().rows == dict(server.rows())
        assert server.snapshot("orders") == Snapshot({}, {"orders": dict(server.rows("orders"))})
        everything = await server.gather_all(1)
        assert everything.rows["ids_total"] == 8
        assert list(everything.services) == ["users"]
