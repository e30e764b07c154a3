"""Figures that a calibration leaves in its artifact; the report draws them from the records.

An artifact's ``metadata["figures"]`` is a list of what ``heatmap`` and ``curve`` return.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def heatmap(
    title: str,
    values: Sequence[Sequence[float]],
    *,
    row: str,
    column: str,
    label: str,
    limits: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """Return a matrix to be drawn as colours, its numbers written in it while they are few.

    Args:
        title: One line.
        values: Rows of equal length.
        row: What a row is, e.g. ``layer``.
        column: What a column is.
        label: What a value is, with its unit.
        limits: Ends of the colour scale, the values' own by default.
    """
    lengths = {len(line) for line in values}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"heatmap: rows must be equally long, none empty, got {sorted(lengths)}")
    made = {"kind": "heatmap", "title": title, "row": row, "column": column, "label": label}
    return made | {"values": [list(line) for line in values], "limits": limits and list(limits)}


def curve(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x: str,
    y: str,
    joined: Sequence[str] = (),
) -> dict[str, Any]:
    """Return sets of points.

    Args:
        title: One line.
        series: Name -> points (x, y).
        x: What the first number is, with its unit.
        y: What the second is.
        joined: Series whose points a line joins.
    """
    if unknown := sorted(set(joined) - set(series)):
        raise ValueError(f"curve: joined must name series, got {', '.join(unknown)}")
    points = {name: [list(point) for point in found] for name, found in series.items()}
    made = {"kind": "curve", "title": title, "x": x, "y": y, "joined": list(joined)}
    return made | {"series": points}
