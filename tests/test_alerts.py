"""The alerts and the dashboard in `ops/`: right by promtool, and about metrics that there are."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from idalloc_tcp.errors import BY_CODE
from tests.real.process import MissingServer, find_program

OPS: Final = Path(__file__).parent.parent / "ops"
ALERTS: Final = OPS / "alerts.yml"
PROMTOOL_SECONDS: Final = 60

#: What a server exposes, each with its labels; `tests/real/test_exposed.py` asks one.
EXPOSED: Final[dict[str, set[str]]] = {
    "idalloc_ready": set(),
    "idalloc_build_info": {"version"},
    "idalloc_uptime_seconds": set(),
    "idalloc_draining": set(),
    "idalloc_services": set(),
    "idalloc_connections": set(),
    "idalloc_connections_total": set(),
    "idalloc_connections_refused_total": set(),
    "idalloc_requests_total": {"service"},
    "idalloc_ids_total": {"service"},
    "idalloc_waits_total": set(),
    "idalloc_random_total": set(),
    "idalloc_errors_total": {"code"},
    "idalloc_leases_total": set(),
    "idalloc_leased_ids_total": set(),
    "idalloc_lease_failures_total": set(),
    "idalloc_returned_ids_total": set(),
    "idalloc_cuts_total": set(),
    "idalloc_syncs_total": set(),
    "idalloc_sync_drops_total": set(),
    "idalloc_sync_queue_tasks": set(),
    "idalloc_seats_total": {"reason"},
    "idalloc_gap_ids_total": {"reason"},
    "idalloc_worker_restarts_total": set(),
    "idalloc_workers": set(),
    "idalloc_workers_silent": set(),
    "idalloc_store_up": {"store"},
    "idalloc_store_failures_total": {"store"},
    "idalloc_pool_ids": {"service"},
    "idalloc_pool_cover_seconds": {"service"},
    "idalloc_demand_ids_per_second": {"service"},
    "idalloc_segment_ids": {"service"},
    "idalloc_waiting_ids": {"service"},
    "idalloc_lease_headroom_ids": {"service"},
    "idalloc_ceiling_left_ids": {"service"},
    "idalloc_service_trouble": {"service", "code"},
    "idalloc_refill_seconds_bucket": {"source", "le"},
    "idalloc_refill_seconds_sum": {"source"},
    "idalloc_refill_seconds_count": {"source"},
    "idalloc_request_latency_seconds_bucket": {"le"},
    "idalloc_request_latency_seconds_sum": set(),
    "idalloc_request_latency_seconds_count": set(),
}
#: What Prometheus itself puts to them.
TARGET_LABELS: Final = {"job", "instance"}

_METRIC: Final = re.compile(r"\b(idalloc_[a-z_]+)(?:\{([^}]*)\})?")
_LABEL: Final = re.compile(r"(\w+)\s*[=!]")
_GROUPED: Final = re.compile(r"\b(?:by|on) \(([^)]*)\)")


def promtool(*arguments: str | Path) -> None:
    """Run it; what it says is what fails."""
    try:
        program = find_program("promtool", debian_package="prometheus")
    except MissingServer as missing:
        if os.environ.get("CI"):
            pytest.fail(str(missing))
        pytest.skip(str(missing))
    done = subprocess.run(
        [program, *arguments],
        capture_output=True,
        check=False,
        text=True,
        timeout=PROMTOOL_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def alerts() -> list[str]:
    """The text of each alert."""
    return ALERTS.read_text().split("- alert: ")[1:]


def alert_expressions() -> Iterator[str]:
    """What each alert asks for."""
    for alert in alerts():
        yield alert.partition("expr:")[2].partition(" for:")[0]


def panels() -> list[dict[str, Any]]:
    """The panels of the dashboard."""
    found: list[dict[str, Any]] = json.loads((OPS / "grafana.json").read_text())["panels"]
    return found


def dashboard_expressions() -> Iterator[str]:
    """What the dashboard asks for, as Prometheus would be asked."""
    for panel in panels():
        for target in panel["targets"]:
            yield target["expr"].replace("$__rate_interval", "5m").replace("$instance", ".*")


def test_the_rules_are_right() -> None:
    """By Prometheus' own check."""
    promtool("check", "rules", ALERTS)


def test_the_alerts_come_when_they_should() -> None:
    """A store that is down fires after its minute, a server that is well fires nothing."""
    promtool("test", "rules", OPS / "alerts_test.yml")


def test_every_alert_says_how_bad_it_is_and_what_to_do() -> None:
    """With a time that it must last, a severity, a summary and a description."""
    for alert in alerts():
        for part in ("expr:", "for:", "severity:", "summary:", "description:"):
            assert part in alert, f"{alert.splitlines()[0]} has no {part}"
        assert re.search(r"severity: (critical|warning)\n", alert)


def test_every_code_belongs_to_an_alert() -> None:
    """No kind of error goes unseen, and none is alerted on that there is not."""
    codes = "|".join(re.findall(r'code=~"([^"]*)"', ALERTS.read_text())).split("|")
    assert sorted(codes) == sorted(BY_CODE)


def test_every_alert_is_tried() -> None:
    """The tests of the rules name each of them."""
    tried = (OPS / "alerts_test.yml").read_text()
    for alert in alerts():
        assert alert.splitlines()[0] in tried


def test_the_dashboards_expressions_are_right(tmp_path: Path) -> None:
    """Prometheus can read each: as recording rules, which JSON is good enough for."""
    rules = [
        {"record": f"dashboard:{number}", "expr": expression}
        for number, expression in enumerate(dashboard_expressions())
    ]
    path = tmp_path / "rules.yml"
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    promtool("check", "rules", path)


def test_the_dashboards_panels_are_apart() -> None:
    """Each has its number, its place, and a description."""
    places = set()
    for panel in panels():
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in places, panel["title"]
                places.add((x, y))
        assert place["x"] + place["w"] <= 24
        assert panel["description"]
    assert len({panel["id"] for panel in panels()}) == len(panels())


@pytest.mark.parametrize("where", ["alerts", "dashboard"])
def test_every_metric_is_one_that_the_server_exposes(where: str) -> None:
    """By its name, and with no label that it does not have."""
    expressions = alert_expressions() if where == "alerts" else dashboard_expressions()
    used = set()
    for expression in expressions:
        known = set(TARGET_LABELS)
        for name, selectors in _METRIC.findall(expression):
            assert name in EXPOSED, f"{name}: {expression}"
            assert set(_LABEL.findall(selectors)) <= EXPOSED[name] | TARGET_LABELS, expression
            known |= EXPOSED[name]
            used.add(name)
        for group in _GROUPED.findall(expression):
            assert set(re.split(r",\s*", group)) <= known, expression
    assert len(used) > 10


def test_every_metric_that_an_alert_speaks_of_is_there() -> None:
    """Its text may also name a histogram as a whole."""
    families = {re.sub("_(bucket|sum|count)$", "", name) for name in EXPOSED} | set(EXPOSED)
    for alert in alerts():
        spoken_of = {name for name, _ in _METRIC.findall(alert)}
        assert spoken_of <= families, alert
