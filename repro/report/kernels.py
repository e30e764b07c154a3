"""``results/kernels/<kernel>.md`` from the rows of kernel benches, one file of rows per machine."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from repro import statistics
from repro.errors import BadInput, Fault
from repro.report import tables
from repro.report.page import render
from repro.report.tables import Column, Row, Table

_COLUMNS = (
    Column("case", "case", numeric=False),
    Column("implementation", "implementation", numeric=False),
    Column("over dense", "over_dense", tables.times),
    Column("ideal", "ideal", tables.plain_times),
    Column("of ideal", "fraction_of_ideal", tables.percent),
    Column("ms", "median_ms", tables.number),
    Column("TFLOP/s", "tflops", tables.number),
    Column("GB/s", "gbytes_per_s", tables.number),
    Column("of roofline", "roofline_fraction", tables.percent),
    Column("note", "note", numeric=False),
)
_SUMMARY = (
    Column("implementation", "implementation", numeric=False),
    Column("geometric mean over dense", "mean", tables.times),
    Column("lowest", "lowest", tables.plain_times),
    Column("highest", "highest", tables.plain_times),
    Column("cases", "cases", tables.integer),
)


def pages(folder: Path) -> dict[Path, bytes]:
    """Return path -> content of every kernel's page.

    Args:
        folder: ``results/kernels``; rows lie in ``records/*.jsonl`` below it.

    Raises:
        BadInput: If a line is not a row of a bench; names file and line.
    """
    kernels: dict[str, dict[str, list[Row]]] = {}
    facts: dict[str, Mapping[str, Any]] = {}
    for row in _rows(folder / "records"):
        machine = dict(row.get("environment") or {})
        name = str(machine.get("environment_id") or row.get("environment_id") or "unknown machine")
        facts[name] = machine
        kernels.setdefault(str(row["kernel"]), {}).setdefault(name, []).append(row)
    return {
        folder / f"{kernel}.md": _page(kernel, facts, machines)
        for kernel, machines in sorted(kernels.items())
    }


def _page(kernel: str, facts: Mapping[str, Any], machines: Mapping[str, list[Row]]) -> bytes:
    shown = [
        {
            "facts": facts[name],
            "name": facts[name].get("device_name") or name,
            "device": str(facts[name].get("device") or "machine").upper(),
            "summary": _summary(rows),
            "table": _table(kernel, rows),
        }
        for name, rows in sorted(machines.items())
    ]
    return render("kernel.md.jinja", kernel=kernel, machines=shown).encode()


def _rows(folder: Path) -> list[Row]:
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            try:
                row = json.loads(line)
                found.append({**row, **{name: row[name] for name in ("kernel", "case")}})
            except (ValueError, KeyError, TypeError) as error:
                got = f"{type(error).__name__} ({error})"
                fault = Fault(f"{path}:{number}", "the line", "a row of a bench", got)
                raise BadInput(fault) from None
    return found


def _table(kernel: str, rows: Sequence[Row]) -> Table:
    """Return all cases, in natural order, the dense baseline first in each."""
    ordered = sorted(
        rows,
        key=lambda row: (
            _natural(str(row["case"])),
            row.get("implementation") != row.get("baseline"),
            str(row.get("implementation")),
        ),
    )
    made = []
    for row in ordered:
        shown: Row = {column.key: row.get(column.key) for column in _COLUMNS}
        shown["over_dense"] = _speedup(row)
        status = str(row.get("status", "ok"))
        notes = ["" if status == "ok" else status, row.get("message"), row.get("bar")]
        if row.get("implementation") == row.get("baseline"):
            notes.insert(0, "dense baseline")
        if row.get("quick"):
            notes.append("quick run")
        shown["note"] = "; ".join(str(note) for note in notes if note)
        made.append(shown)
    used = [c for c in _COLUMNS if any(row.get(c.key) not in (None, "") for row in made)]
    intro = (
        "Median time of interleaved blocks; *over dense* is dense time over this implementation's "
        "with its 95 % interval, *of ideal* its share of what the skipped work could give."
    )
    return Table(kernel, "All cases", intro, used, made)


def _speedup(row: Row) -> dict[str, Any] | None:
    if row.get("speedup") is None:
        return None
    low, high = row.get("speedup_low"), row.get("speedup_high")
    return {"value": row["speedup"], "low": low, "high": high}


def _summary(rows: Sequence[Row]) -> Table:
    """Return the geometric mean of each implementation over its valid cases, with an interval."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row.get("status", "ok") == "ok" and row.get("speedup"):
            found.setdefault(str(row["implementation"]), []).append(float(row["speedup"]))
    made = [
        {
            "implementation": name,
            "mean": tables.interval(statistics.geometric_mean(values)),
            "lowest": min(values),
            "highest": max(values),
            "cases": len(values),
        }
        for name, values in sorted(found.items())
    ]
    intro = "Over all cases, with a 95 % interval over cases; the cases differ in density."
    return Table("summary", "Summary", intro, _SUMMARY, made)


def _natural(text: str) -> list[tuple[int, float, str]]:
    """Return a key that sorts ``8192`` before ``16384`` and text by letters."""
    parts = re.findall(r"\d+(?:\.\d+)?|\D+", text)
    return [(0, float(p), "") if p[0].isdigit() else (1, 0.0, p) for p in parts]
