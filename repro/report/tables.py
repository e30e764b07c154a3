"""Tables as data: rows of values for the JSON, one formatter per column for people."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from repro.statistics import Interval

Row = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """One column: its heading, the key in the rows, and how a value is shown."""

    heading: str
    key: str
    show: Callable[[Any], str] = str
    numeric: bool = True


@dataclass(frozen=True)
class Table:
    """A table with the one sentence that says how to read it; ``folded`` ones open on a click."""

    name: str
    title: str
    intro: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    folded: bool = False

    def cells(self) -> list[list[str]]:
        """Return the rows as text; a number that does not apply shows as a dash."""
        return [[_shown(column, row) for column in self.columns] for row in self.rows]

    def markdown(self) -> str:
        """Return the table in Markdown, numbers aligned to the right."""
        lines = [
            [column.heading for column in self.columns],
            ["--:" if column.numeric else "---" for column in self.columns],
            *[[escape(text) for text in row] for row in self.cells()],
        ]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def as_json(self) -> dict[str, Any]:
        """Return name, title and rows with all their values."""
        return {"name": self.name, "title": self.title, "rows": list(self.rows)}


@dataclass
class Section:
    """A heading with tables and plots (file name -> caption)."""

    title: str
    tables: list[Table] = field(default_factory=list)
    plots: dict[str, str] = field(default_factory=dict)


def _shown(column: Column, row: Mapping[str, Any]) -> str:
    value = row.get(column.key)
    if value is None or value == "":
        return "-" if column.numeric else ""
    return column.show(value)


def escape(text: str) -> str:
    """Return text that cannot break out of a Markdown table cell or open a tag."""
    text = " ".join(text.split())
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def interval(value: Interval | None) -> dict[str, Any] | None:
    """Return an interval as a JSON-able value."""
    if value is None:
        return None
    return {"value": value.value, "low": value.low, "high": value.high, "n": value.n}


# Formatters


def number(value: float) -> str:
    """Return three significant digits, thousands as such: 0.0123, 4.56, 789, 12345."""
    if not math.isfinite(value):
        return "n/a"
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}"


def between(value: Sequence[float]) -> str:
    """Return ``48.0 to 84.0``."""
    return f"{value[0]:.1f} to {value[1]:.1f}"


def integer(value: float) -> str:
    return f"{int(value):,}"


def percent(value: float) -> str:
    """Return a share in [0, 1] as percent."""
    return f"{100 * value:.1f} %"


def points(value: float) -> str:
    return f"{value:.1f}"


def score(value: Mapping[str, Any]) -> str:
    """Return ``93.0 [86.3, 96.6]``."""
    return _between(value, lambda x: f"{x:.1f}")


def difference(value: Mapping[str, Any]) -> str:
    """Return ``-1.2 [-3.0, +0.5]``."""
    return _between(value, signed)


def signed(value: float) -> str:
    text = f"{value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def times(value: Mapping[str, Any]) -> str:
    """Return ``1.84x [1.70, 1.99]``."""
    return _between(value, lambda x: f"{x:.2f}", "x")


def plain_times(value: float) -> str:
    return f"{value:.2f}x"


def p_value(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def flips(value: Mapping[str, Any]) -> str:
    """Return ``3 / 1``: items lost and gained."""
    return f"{value['lost']:g} / {value['gained']:g}"


def with_unit(value: Mapping[str, Any]) -> str:
    """Return a metric in a unit that reads well."""
    amount, unit = value.get("value"), str(value.get("unit") or "")
    if amount is None:
        return "n/a"
    if unit in ("bytes", "B"):
        return f"{amount / 2**20:,.1f} MiB"
    if unit == "x":
        return times(value)
    text = number(float(amount))
    if value.get("low") is not None and value.get("high") is not None:
        text += f" [{number(float(value['low']))}, {number(float(value['high']))}]"
    return f"{text} {unit}".rstrip()


def _between(value: Mapping[str, Any], show: Callable[[float], str], unit: str = "") -> str:
    text = f"{show(value['value'])}{unit}"
    low, high = value.get("low"), value.get("high")
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return text
    return f"{text} [{show(low)}, {show(high)}]"
