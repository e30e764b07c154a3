"""Shows bench rows: a Rich table at a terminal, aligned plain text elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

COLUMNS = (
    "case",
    "implementation",
    "ms",
    "p20-p80",
    "speed-up",
    "95 % interval",
    "ideal",
    "of ideal",
    "rate",
    "of roofline",
    "note",
)


def cells(row: Mapping[str, Any]) -> list[str]:
    """Return one bench row as text, one string per column."""
    return [
        row["case"],
        row["implementation"],
        _number(row.get("median_ms")),
        _span(row, "p20_ms", "p80_ms"),
        _number(row.get("speedup"), "x"),
        _span(row, "speedup_low", "speedup_high"),
        _number(row.get("ideal"), "x"),
        _number(row.get("fraction_of_ideal")),
        _rate(row),
        _number(row.get("roofline_fraction")),
        _note(row),
    ]


def summary(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return one line per implementation: geometric mean of its speed-ups over the valid cases."""
    speedups: dict[str, list[float]] = {}
    for row in rows:
        if row["status"] == "ok" and row.get("speedup"):
            speedups.setdefault(row["implementation"], []).append(row["speedup"])
    return [
        f"{name}: geometric mean {math.exp(sum(map(math.log, found)) / len(found)):.2f}x "
        f"over {len(found)} cases"
        for name, found in speedups.items()
    ]


def show(title: str, rows: Sequence[Mapping[str, Any]], console: Any) -> None:
    """Print the rows of one kernel. ``console`` is a Rich console, or None to print nothing."""
    if console is None:
        return
    text = [cells(row) for row in rows]
    if getattr(console, "is_terminal", False):
        from rich.table import Table

        table = Table(title=title)
        for column in COLUMNS:
            table.add_column(column, no_wrap=column not in ("case", "note"))
        for line in text:
            table.add_row(*line)
        console.print(table)
    else:
        console.print(plain(title, text), markup=False, highlight=False, soft_wrap=True)
    for sentence in summary(rows):
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)


def plain(title: str, text: Sequence[Sequence[str]]) -> str:
    """Return an aligned table without any control character."""
    lines: list[Sequence[str]] = [COLUMNS, *text]
    widths = [max(len(line[index]) for line in lines) for index in range(len(COLUMNS))]
    rendered = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    return "\n".join([title, *rendered])


def _number(value: float | None, unit: str = "") -> str:
    if value is None:
        return "-"
    digits = 0 if value >= 1000 else 1 if value >= 100 else 2 if value >= 1 else 3
    return f"{value:.{digits}f}{unit}"


def _span(row: Mapping[str, Any], low: str, high: str) -> str:
    if row.get(low) is None:
        return "-"
    return f"{_number(row[low])}-{_number(row[high])}"


def _rate(row: Mapping[str, Any]) -> str:
    if row.get("bound") == "memory" and row.get("gbytes_per_s"):
        return f"{_number(row['gbytes_per_s'])} GB/s"
    if row.get("tflops"):
        return f"{_number(row['tflops'])} TFLOP/s"
    return "-"


def _note(row: Mapping[str, Any]) -> str:
    if row["status"] != "ok":
        return f"{row['status'].replace('_', ' ')}: {row['message']}"
    return row.get("bar") or ("baseline" if row["implementation"] == row["baseline"] else "")
