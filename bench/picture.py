"""Pictures of results, where matplotlib is installed."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from bench.table import plain_number

WIDTH_INCHES: Final = 9.0
DPI: Final = 120
#: How much of a group's height its bars fill.
_FILLED: Final = 0.8


def save_picture(path: Path, draw: Callable[[Any], None]) -> str:
    """Write the picture; what to tell about it."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - an extra
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra
    except ImportError:
        return "no picture: matplotlib is not installed (pip install matplotlib)"
    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    figure.savefig(path, dpi=DPI)
    return f"written: {path}"


def clean(axes: Any, title: str) -> None:
    """No more ink than needed."""
    axes.set_title(title, loc="left", fontsize=11, pad=22)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)


def place_legend(axes: Any) -> None:
    """Beside the title, where it hides nothing."""
    corner = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0.0}
    axes.legend(**corner, frameon=False, fontsize=8, ncols=5)


def grouped_bars(
    axes: Any,
    groups: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    *,
    title: str,
    label: str,
) -> None:
    """Horizontal bars, the first group at the top; each series has one value for each group."""
    thickness = _FILLED / len(series)
    for number, (name, values) in enumerate(series.items()):
        places = [index + (number + 0.5) * thickness - _FILLED / 2 for index in range(len(groups))]
        bars = axes.barh(places, [value or 0 for value in values], thickness * 0.92, label=name)
        texts = ["" if value is None else plain_number(value) for value in values]
        axes.bar_label(bars, texts, padding=3, fontsize=7, color="0.3")
    axes.set_yticks(range(len(groups)), groups)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.margins(x=0.1)  # The numbers at the ends of the bars need room.
    axes.set_xlabel(label)
    clean(axes, title)
    place_legend(axes)
