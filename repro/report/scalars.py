"""Tables of cells that compare dense with the method themselves, of plain numbers, and of failures."""

from __future__ import annotations

import json
from collections.abc import Sequence

from repro import evidence
from repro.evidence import Record
from repro.keys import canonical_json
from repro.report import tables
from repro.report.labels import Labels
from repro.report.tables import Column, Row, Section, Table
from repro.store import is_cut

#: Options that become columns; all others are constants of a table and stand in its title.
_COLUMN_OPTIONS = ("length", "protocol")
_EXPLANATION = (
    Column("attention share", "attention_share", tables.percent),
    Column("Amdahl", "amdahl_bound", tables.plain_times),
    Column("roofline", "roofline_bound", tables.plain_times),
    Column("selection", "selection_share", tables.percent),
)


def sections(records: Sequence[Record], labels: Labels, scored: set[str]) -> list[Section]:
    """Return the sections of measurements without per-item scores.

    Args:
        records: All records of one machine.
        labels: Names of the variants.
        scored: Measurements that have accuracy tables.
    """
    found: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        cell = record["cell"]
        if cell["measurement"]["name"] not in scored:
            found.setdefault((cell["measurement"]["name"], cell["subject"]), []).append(record)
    result = []
    for (measurement, subject), cells in found.items():
        paired = any(evidence.has_ratio(record) for record in cells)
        make = _ratio_tables if paired else _scalar_tables
        made = [table for table in make(measurement, cells, labels) if table.rows]
        if made:
            result.append(Section(f"{measurement} on {subject}", made))
    return result


def _split(cells: Sequence[Record]) -> dict[str, list[Record]]:
    """Return canonical constants -> cells, the constants being all options but the columns."""
    groups: dict[str, list[Record]] = {}
    for record in cells:
        options = evidence.options_of(record)
        rest = {k: v for k, v in options.items() if k not in _COLUMN_OPTIONS and v is not None}
        groups.setdefault(canonical_json(rest), []).append(record)
    return groups


def _titles(groups: dict[str, list[Record]]) -> dict[str, str]:
    """Return constants -> a title of the options that tell the groups apart."""
    parsed = {name: json.loads(name) for name in groups}
    keys = dict.fromkeys(key for options in parsed.values() for key in options)
    telling = [k for k in keys if len({canonical_json(o.get(k)) for o in parsed.values()}) > 1]
    return {
        name: ", ".join(
            f"{options[k]}" if isinstance(options[k], str) else f"{k} {options[k]}"
            for k in telling
            if k in options
        )
        for name, options in parsed.items()
    }


def _ratio_tables(measurement: str, cells: Sequence[Record], labels: Labels) -> list[Table]:
    groups = _split(cells)
    titles = _titles(groups)
    found: list[Table] = []
    for name, members in groups.items():
        rows = _sorted_rows([_ratio_row(record, labels) for record in members])
        constants = ", ".join(f"{k} {v}" for k, v in json.loads(name).items())
        timed = any("explanation" in record for record in members)
        intro = (
            "Dense over method with its 95 % interval: above 1 the method wins. Both alternate in "
            "one process; selection is inside the method's time. The bounds say what this density "
            "could give at best, here."
            if timed
            else "Dense over method: above 1 the method needs less."
        )
        title = f"{measurement}: {titles[name]}" if titles[name] else measurement
        intro += f" Setting: {constants}." if constants else ""
        columns = _ratio_columns(rows)
        found.append(Table(f"{measurement}_{len(found)}", title, intro, columns, rows))
    return found


def _ratio_row(record: Record, labels: Labels) -> Row:
    options = evidence.options_of(record)
    row: Row = {name: options.get(name) for name in _COLUMN_OPTIONS}
    row["method"] = labels.name(evidence.variant_of(record))
    row["order"] = labels.order[evidence.variant_of(record)]
    row["slug"] = record["cell"]["method"]["slug"]
    row["density"] = evidence.density_of(record)
    row["fallback"] = evidence.mean_fallback([record])
    row["status"] = _status(record)
    for name, metric in (record.get("metrics") or {}).items():
        if isinstance(metric, dict) and name != "density" and metric.get("value") is not None:
            row[name] = metric
    told = record.get("explanation") or {}
    row.update({column.key: told.get(column.key) for column in _EXPLANATION})
    return row


def _status(record: Record) -> str:
    message = " ".join(str(record.get("message") or "").split())
    message = message if len(message) <= 100 else message[:97] + "..."
    status = str(record.get("status"))
    return "" if status == "ok" else f"{status}: {message}" if message else status


def _sorted_rows(rows: list[Row]) -> list[Row]:
    """Sort by length, then method in plan order, then protocol; drop the sorting key."""
    rows.sort(key=lambda row: (row.get("length") or 0, row["order"], str(row.get("protocol"))))
    return [{key: value for key, value in row.items() if key != "order"} for row in rows]


def _ratio_columns(rows: Sequence[Row]) -> list[Column]:
    fixed = {"length", "method", "slug", "protocol", "density", "fallback", "status", "ratio"}
    fixed |= {column.key for column in _EXPLANATION}
    metrics = dict.fromkeys(key for row in rows for key in row if key not in fixed)
    columns = [
        Column("length", "length", tables.integer),
        Column("method", "method", numeric=False),
        Column("protocol", "protocol", numeric=False),
        Column("dense / method", "ratio", tables.times),
        *(_metric_column(key, rows) for key in metrics),
        Column("density", "density", tables.percent),
        *_EXPLANATION,
        Column("dense fallback", "fallback", tables.percent),
        Column("status", "status", numeric=False),
    ]
    needed = {"method", "ratio"}
    return [c for c in columns if c.key in needed or any(r.get(c.key) for r in rows)]


def _metric_column(key: str, rows: Sequence[Row]) -> Column:
    """Return the column of a metric's point; its spread stands in the JSON alone."""
    unit = next((row[key].get("unit") for row in rows if row.get(key)), None) or ""
    if unit and key.endswith(f"_{unit}") and unit not in ("bytes", "x"):
        return Column(key.replace("_", " "), key, lambda metric: tables.number(metric["value"]))
    heading = key.removesuffix("_bytes").replace("_", " ")
    return Column(heading, key, lambda m: tables.with_unit({"value": m["value"], "unit": unit}))


def _scalar_tables(measurement: str, cells: Sequence[Record], labels: Labels) -> list[Table]:
    rows = []
    options = [evidence.options_of(record) for record in cells]
    keys = dict.fromkeys(key for o in options for key in o)
    telling = [k for k in keys if len({canonical_json(o.get(k)) for o in options}) > 1]
    for record, told in zip(cells, options, strict=True):
        row: Row = {key: told.get(key) for key in telling}
        row["method"] = labels.name(evidence.variant_of(record))
        row["density"] = evidence.density_of(record)
        row["status"] = _status(record)
        for name, metric in (record.get("metrics") or {}).items():
            if isinstance(metric, dict) and metric.get("value") is not None and name != "density":
                row[name] = metric
        if repeat := evidence.repeat_of(record):
            row["method"] += f", rerun {repeat}"
        rows.append(row)
    metrics = dict.fromkeys(
        key for row in rows for key, value in row.items() if isinstance(value, dict)
    )
    columns = [
        Column("method", "method", numeric=False),
        *(Column(key.replace("_", " "), key, numeric=False) for key in telling),
        *(Column(key.replace("_", " "), key, tables.with_unit) for key in metrics),
        Column("density", "density", tables.percent),
        Column("status", "status", numeric=False),
    ]
    shown = [c for c in columns if c.key == "method" or any(r.get(c.key) for r in rows)]
    intro = "One row a cell; brackets are 95 % intervals."
    return [Table(measurement, measurement, intro, shown, rows)]


# Cells that ended early

_EARLY = (
    Column("cell", "label", numeric=False),
    Column("items asked", "asked", numeric=False),
    Column("score lies in, %", "score", tables.between),
    Column("settled", "verdicts", numeric=False),
)


def ended_early(records: Sequence[Record]) -> Table:
    """Return the cells that a run with a budget did not ask to their end, and what they settled."""
    rows: list[Row] = []
    for record in filter(is_cut, records):
        part = record["settled"]
        known = sum(score for score in part["scores"] if score is not None)
        ends = known / part["of"], (known + part["of"] - part["asked"]) / part["of"]
        rows.append(
            {
                "label": record["cell"]["label"],
                "asked": f"{part['asked']} of {part['of']}",
                "score": [100 * end for end in ends],
                "verdicts": ", ".join(f"{name}: {said}" for name, said in part["verdicts"].items()),
            }
        )
    intro = (
        "A run with a budget stopped these when no outcome of their other items could change the "
        "verdict of a claim. They have no score of their own and are left out of means and plots; "
        "a run without `--budget` finishes them."
    )
    return Table("ended_early", "Cells that ended early", intro, _EARLY, rows)


# Cells without a result

_FAILURES = (
    Column("cells", "count", tables.integer),
    Column("status", "status", numeric=False),
    Column("which", "label", numeric=False),
    Column("message", "message", numeric=False),
)


def failures(records: Sequence[Record], labels: Labels) -> Table:
    """Return every kind of cell without a result, one row per cause and variant."""
    found: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        if evidence.is_ok(record):
            continue
        name = labels.name(evidence.variant_of(record))
        measurement = record["cell"]["measurement"]["name"]
        message = " ".join(str(record.get("message") or "").split())
        if record.get("status") == "not_run":
            name = ""
        key = (str(record.get("status")), measurement, name, message)
        found.setdefault(key, []).append(record)
    rows = []
    for (status, measurement, name, message), cells in found.items():
        label = str(cells[0]["cell"].get("label") or f"{name} {measurement}")
        if len(cells) > 1:
            label += " and others"
        rows.append({"count": len(cells), "status": status, "label": label, "message": message})
    intro = "Nothing is left blank: every cell that gave no result, and why."
    return Table("failures", "Cells without a result", intro, _FAILURES, rows)
