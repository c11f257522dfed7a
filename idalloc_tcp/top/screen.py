"""What a person sees of two samples: a rich renderable, no I/O."""

from collections.abc import Iterator
from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from idalloc_tcp.top.sample import Pace, Value, Values, cover_seconds

#: Below so many seconds of cover a service is marked: an outage of that length would be noticed.
SHORT_COVER_SECONDS: Final = 10.0
#: Lines that are not services: the heads, the totals and what is left free.
_OTHER_LINES: Final = 8

#: Numbers below this are written out; above, the largest of the scales is used.
PLAIN_BELOW: Final = 10_000
_SCALES: Final = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def screen(pace: Pace, title: str, trouble: str = "", height: int | None = None) -> RenderableType:
    """All of it; of the services the busiest that fit into so many lines.

    Args:
        title: what was asked.
        trouble: why there is nothing newer; "" if there is.
        height: the lines of the terminal; None for no bound.
    """
    parts: list[RenderableType] = [_headline(pace.now.rows, title), _totals(pace)]
    if trouble:
        parts.insert(0, Text(trouble, style="bold red"))
    if pace.now.services:
        shown = None if height is None else max(1, height - _OTHER_LINES)
        parts.append(_services(pace, shown))
    else:
        parts.append(Text("Name services, or --admin, to see them one by one.", style="dim"))
    return Group(*parts)


def _headline(rows: Values, title: str) -> Text:
    line = Text.assemble(("idalloc-tcp ", "bold"), str(rows.get("version", "")), f" at {title}")
    uptime = rows.get("uptime_seconds")
    if isinstance(uptime, int | float):
        line.append(f", up {duration(uptime)}")
    if rows.get("draining"):
        line.append(", stopping", style="bold yellow")
    for store, is_up in _stores(rows):
        style = "green" if is_up else "bold red"
        line.append(f"  {store} {'up' if is_up else 'DOWN'}", style=style)
    return line


def _stores(rows: Values) -> Iterator[tuple[str, bool]]:
    for name, value in rows.items():
        if name.endswith("_up"):
            yield name.removesuffix("_up"), bool(value)


def _totals(pace: Pace) -> Table:
    rows = pace.now.rows
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    cells = {
        "req/s": quantity(pace.of_server("requests_total")),
        "IDs/s": quantity(pace.of_server("ids_total")),
        "err/s": quantity(pace.of_server("errors_total")),
        "waits/s": quantity(pace.of_server("waits_total")),
        "leases/s": quantity(pace.of_server("leases_total")),
        "cuts/s": quantity(pace.of_server("cuts_total")),
        "conns": quantity(rows.get("connections_open")),
        "services": quantity(rows.get("services")),
        "gap IDs": quantity(rows.get("gap_ids_total")),
    }
    for head in cells:
        table.add_column(head, justify="right", no_wrap=True)
    table.add_row(*cells.values())
    return table


def _services(pace: Pace, shown: int | None) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", title_justify="left")
    table.add_column("service", no_wrap=True)
    for head in ("IDs/s", "cover", "in memory", "segment", "waiting", "last ID"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("trouble", no_wrap=True)
    paces = {name: pace.of_service(name) for name in pace.now.services}
    names = sorted(paces, key=lambda name: (-(paces[name] or 0.0), name))
    for name in names[:shown]:
        table.add_row(*_service(name, pace.now.services[name], paces[name]))
    if shown is not None and len(names) > shown:
        table.add_row(Text(f"… and {len(names) - shown} more", style="dim"))
    return table


def _service(name: str, values: Values, rate: float | None) -> Iterator[Text]:
    yield Text(name)
    yield Text(quantity(rate))
    cover = cover_seconds(values)
    is_short = cover is not None and cover < SHORT_COVER_SECONDS
    yield Text("" if cover is None else duration(cover), style="bold red" if is_short else "")
    for row in ("remaining_ids", "segment_size", "waiting_ids"):
        yield Text(quantity(values.get(row)))
    yield Text(str(values.get("last_served", "")))
    trouble = str(values.get("trouble", "idle"))
    is_well = trouble in ("none", "idle")
    yield Text("" if trouble == "none" else trouble, style="dim" if is_well else "bold red")


def quantity(value: Value) -> str:
    """A number in a few characters; "" if it is not known."""
    if value is None or isinstance(value, str):
        return ""
    if value < PLAIN_BELOW:
        return str(round(value)) if value >= 100 or value == int(value) else f"{value:.1f}"
    factor, prefix = next(scale for scale in _SCALES if value >= scale[0])
    return f"{value / factor:.{1 if value < factor * 100 else 0}f}{prefix}"


def duration(seconds: float) -> str:
    """A time in its largest units."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    if minutes < 100:
        return f"{minutes:.0f} min"
    hours = minutes / 60
    return f"{hours:.0f} h" if hours < 100 else f"{hours / 24:.0f} d"
