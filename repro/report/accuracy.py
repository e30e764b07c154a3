"""Accuracy tables from records with per-item scores: score, paired difference, flips, controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from repro import evidence, statistics
from repro.evidence import Evidence, Record, Variant
from repro.report import tables
from repro.report.labels import Labels
from repro.report.tables import Column, Row, Section, Table
from repro.statistics import Interval
from repro.store import is_cut

#: Controls that every table has room for; what else a method has follows.
CONTROLS = ("random", "oracle")


@dataclass(frozen=True)
class Group:
    """The accuracy cells of one measurement on one subject, and how its tasks are called."""

    subject: str
    measurement: str
    records: list[Record]

    def lengths(self) -> list[Any]:
        return sorted({_length(r) for r in self.records}, key=lambda x: (x is None, x or 0))

    def at(self, length: Any, variant: Variant) -> list[Record]:
        """Return the first runs of a variant at one length, in plan order."""
        return [
            record
            for record in self.records
            if _length(record) == length
            and evidence.variant_of(record) == variant
            and not evidence.repeat_of(record)
        ]

    def lengths_of(self, variant: Variant) -> list[Any]:
        return [length for length in self.lengths() if self.at(length, variant)]


def _length(record: Record) -> Any:
    return record["cell"]["measurement"]["options"].get("length")


def _is_good(record: Record) -> bool:
    return evidence.is_ok(record) and evidence.has_scores(record)


def _good(cells: Sequence[Record]) -> list[Record]:
    return [record for record in cells if _is_good(record)]


def task_of(record: Record) -> str:
    """Return the name of a cell's task, the measurement's name if it has none."""
    measurement = record["cell"]["measurement"]
    return str(measurement["options"].get("task") or measurement["name"])


def groups(records: Sequence[Record]) -> list[Group]:
    """Return the groups whose measurement gave per-item scores; cells without any go along."""
    scored = {
        (r["cell"]["subject"], r["cell"]["measurement"]["name"])
        for r in records
        if evidence.is_ok(r) and (evidence.has_scores(r) or is_cut(r))
    }
    found: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        name = record["cell"]["subject"], record["cell"]["measurement"]["name"]
        if name in scored:
            found.setdefault(name, []).append(record)
    return [Group(subject, name, cells) for (subject, name), cells in found.items()]


def sections(records: Evidence, labels: Labels) -> list[Section]:
    """Return one section per measurement and subject."""
    return [
        Section(
            f"{group.measurement} on {group.subject}",
            [t for t in _tables(group, records, labels) if t.rows],
        )
        for group in groups(records.records)
    ]


def _tables(group: Group, records: Evidence, labels: Labels) -> list[Table]:
    found = [_summary(group, records, labels), _selection(group, records, labels)]
    found.append(_noise_floor(group, records))
    for variant in labels.methods():
        for length in reversed(group.lengths_of(variant)):
            found.append(_by_task(group, records, labels, variant, length))
    return found


# Means over tasks

_SUMMARY = (
    Column("length", "length", tables.integer),
    Column("method", "method", numeric=False),
    Column("density", "density", tables.percent),
    Column("KV read", "kv_read", tables.percent),
    Column("KV held, MB", "kv_megabytes", tables.points),
    Column("score, %", "score", tables.score),
    Column("minus dense, points", "difference", tables.difference),
    Column("lost / gained", "flips", tables.flips),
    Column("p", "p", tables.p_value),
    Column("sees", "sees", tables.points),
    Column("dense fallback", "fallback", tables.percent),
    Column("tasks x items", "tasks", numeric=False),
)


def _summary(group: Group, records: Evidence, labels: Labels) -> Table:
    rows = [
        row
        for length in group.lengths()
        for variant in labels.order
        if (row := summary_row(group, records, labels, variant, length))
    ]
    if not any(row.get("density") for row in rows if row["slug"] != evidence.DENSE):
        rows = [{**row, "density": None} for row in rows]  # of prefill methods alone
    intro = (
        "Mean over tasks with its 95 % interval; differences are paired item by item with dense. "
        "Lost and gained count items whose score fell or rose; *sees* is the smallest difference "
        "in points that this many items could have shown. Controls keep as much as the method "
        "does; rows with fewer items are compared on those alone."
    )
    if any(row.get("kv_megabytes") for row in rows):
        intro += (
            " *KV read* is what decode steps read of the tokens so far, *KV held* the bytes of all "
            "tensors of the cache after an item, the most of any."
        )
    columns = _columns(_SUMMARY, rows)
    return Table(f"{group.measurement}_summary", "Mean over tasks", intro, columns, rows)


def summary_row(
    group: Group, records: Evidence, labels: Labels, variant: Variant, length: Any
) -> Row | None:
    """Return one line of the summary, None if the variant has no cell at that length."""
    cells = group.at(length, variant)
    if not cells:
        return None
    good = _good(cells)
    row: Row = {"length": length, "method": labels.name(variant), "tasks": _tasks(cells, good)}
    row.update(slug=variant.slug, control=variant.control)
    if not good:
        return row
    row["density"] = 1.0 if variant.is_dense else evidence.mean_density(good)
    row["fallback"] = evidence.mean_fallback(good)
    row["kv_read"] = evidence.mean_observed(good, "decode_density")
    held = evidence.mean_observed(good, "kv_bytes")
    row["kv_megabytes"] = None if held is None else held / 1e6
    if variant.control == "random":
        return {**row, **_drawn(good, records)}
    row["score"] = tables.interval(evidence.mean_score(good).scaled(100))
    if not variant.is_dense:
        row.update(_compared(records.pairs(good)))
    return row


def _tasks(cells: Sequence[Record], good: Sequence[Record]) -> str:
    """Return ``13 x 100`` (items), or ``12 of 13 x 100: oom``, with the draws of a control."""
    names = {task_of(record) for record in cells}
    whole = names - {task_of(record) for record in cells if not _is_good(record)}
    sizes = sorted({len(record["items"]["keys"]) for record in good})
    items = (
        f" x {'-'.join(str(size) for size in (sizes[0], sizes[-1])[: len(sizes)])}" if sizes else ""
    )
    text = f"{len(names)}{items}"
    if len(whole) < len(names):
        text = f"{len(whole)} of {text}: {_lacks(cells)}"
    draws = {evidence.draw_of(record) for record in good}
    return f"{text}, {len(draws)} draws" if len(draws) > 1 else text


def _lacks(cells: Sequence[Record]) -> str:
    """Return why some cells have no score."""
    said = {"settled early" if is_cut(r) else str(r["status"]) for r in cells if not _is_good(r)}
    return ", ".join(sorted(said))


def _compared(pairs: Sequence[tuple[Any, Any]]) -> Row:
    """Return difference, flips, p and the smallest visible difference of paired cells."""
    if not pairs:
        return {}
    result = statistics.stratified_difference(pairs)
    dense, method = (np.concatenate(column) for column in zip(*pairs, strict=True))
    counted = statistics.flips(dense, method)
    return {
        "difference": tables.interval(result.scaled(100)),
        "flips": {"lost": counted.lost, "gained": counted.gained, "n": counted.n},
        "p": result.p,
        "sees": 100 * statistics.minimum_detectable_difference(dense, method),
    }


def _drawn(good: Sequence[Record], records: Evidence) -> Row:
    """Return score and difference of a random control, pooled over draws and items."""
    by_draw: dict[int, dict[str, Record]] = {}
    for record in good:
        name = f"{evidence.setting_of(record)}"
        by_draw.setdefault(evidence.draw_of(record), {})[name] = record
    shared = set.intersection(*(set(cells) for cells in by_draw.values()))
    names = [name for name in next(iter(by_draw.values())) if name in shared]
    if not names:
        return {}
    scores = [
        np.concatenate([evidence.scores_of(cells[name]) for name in names])
        for cells in by_draw.values()
    ]
    row: Row = {}
    if len({values.size for values in scores}) == 1:
        pooled = statistics.crossed_interval(np.stack(scores), bounds=(0, 1))
        row["score"] = tables.interval(pooled.scaled(100))
    pairs = [records.pairs([cells[name] for name in names]) for cells in by_draw.values()]
    deltas = [np.concatenate([m - d for d, m in draw]) for draw in pairs if len(draw) == len(names)]
    if len(deltas) == len(by_draw) and len({d.size for d in deltas}) == 1:
        stacked = np.stack(deltas)
        row["difference"] = tables.interval(statistics.crossed_interval(stacked).scaled(100))
        lost, gained = (stacked < 0).sum(1).mean(), (stacked > 0).sum(1).mean()
        row["flips"] = {
            "lost": round(float(lost), 1),
            "gained": round(float(gained), 1),
            "n": stacked.shape[1],
        }
    return row


# Is it the selection?

_SELECTION = (
    Column("length", "length", tables.integer),
    Column("method", "method", numeric=False),
    Column("density", "density", tables.percent),
)


def _controls(records: Sequence[Record]) -> tuple[str, ...]:
    """Return the controls of some records, the common ones first, there or not."""
    found = {evidence.variant_of(record).control for record in records}
    return (*CONTROLS, *sorted(found - {"none", *CONTROLS}))


def _selection(group: Group, records: Evidence, labels: Labels) -> Table:
    rows = []
    controls = _controls(group.records)
    for length in group.lengths():
        for variant in labels.methods():
            cells = group.at(length, variant)
            good = _good(cells)
            row: Row = {"length": length, "method": labels.name(variant)}
            row["density"] = evidence.mean_density(good)
            for control in controls:
                with_control = [r for r in good if records.controls_of(r, control)]
                deltas = records.minus_control(with_control, control)
                if deltas is not None:
                    pooled = statistics.crossed_interval(deltas)
                    row[f"minus_{control}"] = tables.interval(pooled.scaled(100))
            if any(f"minus_{control}" in row for control in controls):
                rows.append(row)
    intro = (
        "The method against its controls on the same items: as much chosen at random (interval "
        "over draws and items), by the exact attention mass (oracle), or as the control is named."
    )
    columns = [
        Column(f"minus {control}, points", f"minus_{control}", tables.difference)
        for control in controls
    ]
    title = "Is it the choice?"
    name = f"{group.measurement}_selection"
    columns = _columns((*_SELECTION, *columns), rows)
    return Table(name, title, intro, columns, rows)


# Noise floor

_NOISE = (
    Column("length", "length", tables.integer),
    Column("items", "n", tables.integer),
    Column("rerun minus dense, points", "difference", tables.difference),
    Column("lost / gained", "flips", tables.flips),
)


def _noise_floor(group: Group, records: Evidence) -> Table:
    names = {id(record) for record in group.records}
    by_length: dict[Any, list[tuple[Any, Any]]] = {}
    for first, again in records.reruns():
        pair = evidence.paired_scores(first, again)
        if id(first) in names and pair is not None:
            by_length.setdefault(_length(first), []).append(pair)
    rows = []
    for length in sorted(by_length, key=lambda x: (x is None, x or 0)):
        row: Row = {"length": length, **_compared(by_length[length])}
        row["n"] = row["flips"]["n"]
        rows.append(row)
    intro = (
        "Dense against a second run of itself: what differs here is noise of the machine, and a "
        "method's difference below it says nothing."
    )
    return Table(f"{group.measurement}_noise_floor", "Noise floor", intro, _NOISE, rows)


# Task by task

_BY_TASK = (
    Column("task", "task", numeric=False),
    Column("dense, %", "dense", tables.score),
    Column("method, %", "score", tables.score),
    Column("minus dense, points", "difference", tables.difference),
    Column("lost / gained", "flips", tables.flips),
    Column("p", "p", tables.p_value),
    Column("p, Holm", "p_holm", tables.p_value),
    Column("sees", "sees", tables.points),
    Column("density", "density", tables.percent),
    Column("status", "status", numeric=False),
)


def _by_task(
    group: Group, records: Evidence, labels: Labels, variant: Variant, length: Any
) -> Table:
    tasks: dict[str, list[Record]] = {}
    for record in group.at(length, variant):
        tasks.setdefault(task_of(record), []).append(record)
    rows = [_task_row(task, cells, records) for task, cells in tasks.items()]
    tested = [row for row in rows if row.get("p") is not None]
    for row, p in zip(tested, statistics.holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = p
    intro = (
        "p is exact McNemar where scores are 0 or 1 and a paired bootstrap elsewhere; Holm corrects "
        f"it over the {len(tested)} tasks."
    )
    where = f" at {length:,} tokens" if isinstance(length, int) else ""
    title = f"By task: {labels.name(variant)}{where}"
    name = f"{group.measurement}_by_task"
    shown = [c for c in _controls(records.records) if any(row.get(c) for row in rows)]
    controls = [Column(f"{control}, %", control, tables.score) for control in shown]
    *most, status = _BY_TASK
    columns = _columns((*most, *controls, status), rows)
    return Table(name, title, intro, columns, rows, folded=True)


def _columns(columns: Sequence[Column], rows: Sequence[Row]) -> list[Column]:
    """Leave out optional columns that no row fills."""
    optional = {"density", "status", "fallback", "kv_read", "kv_megabytes"}
    return [
        column
        for column in columns
        if not (column.key in optional or column.key.startswith("minus_"))
        or any(row.get(column.key) for row in rows)
    ]


def _task_row(task: str, cells: Sequence[Record], records: Evidence) -> Row:
    good = _good(cells)
    row: Row = {"task": task}
    dense = [d for r in cells if (d := records.dense_of(r)) and _is_good(d)]
    if dense:
        row["dense"] = tables.interval(evidence.mean_score(dense).scaled(100))
    if len(good) < len(cells):
        row["status"] = _lacks(cells)
    if not good:
        return row
    row["score"] = tables.interval(evidence.mean_score(good).scaled(100))
    row["density"] = evidence.mean_density(good)
    row["items"] = sum(len(r["items"]["keys"]) for r in good)
    pairs = records.pairs(good)
    row.update(_compared(pairs))
    if pairs and all(statistics.is_binary(np.concatenate(pair)) for pair in pairs):
        row["p"] = statistics.mcnemar_exact(row["flips"]["lost"], row["flips"]["gained"])
    for control in _controls(records.records):
        row[control] = tables.interval(_control_score(good, records, control))
    return row


def _control_score(cells: Sequence[Record], records: Evidence, control: str) -> Interval | None:
    scores = records.control_scores(cells, control)
    if scores is None:
        return None
    if len(scores) == 1:
        return statistics.mean_interval(scores[0]).scaled(100)
    return statistics.crossed_interval(scores, bounds=(0, 1)).scaled(100)
