"""Numbers for people: percentiles, spreads, tables, and whether targets are met."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Self, TypeAlias, final

import attrs

Cell: TypeAlias = "str | int | float | Spread | None"


@final
@attrs.frozen
class Spread:
    """Several measurements of one thing."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Self:
        """Of one or more."""
        ordered = sorted(values)
        return cls(statistics.median(ordered), ordered[0], ordered[-1])

    def __str__(self) -> str:
        if self.low == self.high:
            return plain_number(self.median)
        return f"{plain_number(self.median)} [{plain_number(self.low)}..{plain_number(self.high)}]"


def percentile(ordered: Sequence[int], percent: float) -> int:
    """The smallest value that at least so many percent of all do not exceed (nearest rank).

    Args:
        ordered: ascending, not empty.
    """
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """None where either was not measured."""
    return None if numerator is None or not denominator else numerator / denominator


def plain_number(value: float) -> str:
    """Three digits or so, and no exponent."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _text(cell: Cell) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, int):
        return f"{cell:,}"
    return plain_number(cell) if isinstance(cell, float) else str(cell)


@final
@attrs.frozen
class Table:
    """Rows under headings; the first column is on the left, numbers are on the right."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def __str__(self) -> str:
        texts = [list(self.headings), *([_text(cell) for cell in row] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
        lines = [
            "  ".join(
                text.rjust(width) if index else text.ljust(width)
                for index, (text, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in texts
        ]
        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        return "\n".join([self.title, rule, lines[0], rule, *lines[1:], rule])


@final
@attrs.frozen
class Target:
    """What a measurement should not exceed."""

    name: str
    limit: float
    measured: float | None

    @property
    def verdict(self) -> str:
        """In a word or two."""
        if self.measured is None:
            return "not measured"
        return "met" if self.measured <= self.limit else "missed"

    def as_json(self) -> Mapping[str, str | float | None]:
        """For the results file."""
        return {**attrs.asdict(self), "verdict": self.verdict}


def target_table(targets: Sequence[Target]) -> Table:
    """All targets, whether met or missed."""
    rows = [
        [target.name, target.measured, f"<= {plain_number(target.limit)}", target.verdict]
        for target in targets
    ]
    return Table("targets", ["target", "measured", "limit", "verdict"], rows)
