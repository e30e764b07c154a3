"""Plots as small PNG files whose bytes depend on the records alone."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from repro import evidence
from repro.evidence import Evidence, Record, Variant
from repro.keys import canonical_json
from repro.report import accuracy
from repro.report.labels import Labels

_DEPTH_BINS = 10
_MAX_PANELS = 4
_WRITTEN_VALUES = 160  # a matrix of more is colours alone
#: Title of the section of what calibrations left.
CALIBRATION = "Calibration"
#: Colours that stay apart for colour-blind readers (Okabe and Ito).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


@dataclass(frozen=True)
class Plot:
    """One picture: file stem, the section that it belongs to, caption, PNG bytes."""

    stem: str
    section: str
    caption: str
    image: bytes


def draw(records: Evidence, labels: Labels, device: str) -> list[Plot]:
    """Return what the records allow to draw.

    Args:
        records: The records of one profile on one machine.
        labels: Names of the variants.
        device: How the machine is called in titles.
    """
    found = []
    for group in accuracy.groups(records.records):
        section = f"{group.measurement} on {group.subject}"
        if image := _depth_map(group, labels):
            caption = "Score by position of the needle and length of the prompt"
            found.append(Plot(_stem(f"{section}-depth"), section, caption, image))
        if image := _score_by_density(group, records, labels):
            caption = "Score against density, with the controls at the same density"
            found.append(Plot(_stem(f"{section}-density"), section, caption, image))
    for (section, name), members in _ratio_groups(records.records).items():
        if image := _ratio_by_length(members, labels, f"{device}; {name}"):
            caption = f"Dense over method by length: {name}"
            found.append(Plot(_stem(f"{section}-{name}"), section, caption, image))
    return found + _calibrations(records.records, labels)


def _stem(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text.lower()).strip("-")


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    # The object interface: no global state of pyplot, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _png(figure: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


# Needle depth by length


def _depth_map(group: accuracy.Group, labels: Labels) -> bytes | None:
    """Draw mean score by depth and length: dense, then the methods."""
    lengths = group.lengths()
    shown = [v for v in labels.order if v.control == "none"][:_MAX_PANELS]
    maps = {v: _depth_scores(group, v, lengths) for v in shown}
    maps = {v: values for v, values in maps.items() if np.isfinite(values).any()}
    if not maps:
        return None
    figure, axes = _figure(2.2 + 2.1 * len(maps), 3.4, len(maps))
    picture = None
    for axis, (variant, values) in zip(axes, maps.items(), strict=True):
        picture = axis.imshow(values, vmin=0, vmax=100, cmap="viridis", aspect="auto")
        axis.set_title(labels.name(variant), fontsize=9)
        axis.set_xticks(range(len(lengths)), [str(x) for x in lengths], fontsize=8, rotation=45)
        axis.set_yticks([])
        axis.set_xlabel("length, tokens", fontsize=8)
    ticks = range(0, _DEPTH_BINS, 2)
    axes[0].set_yticks(ticks, [f"{100 * t // _DEPTH_BINS} %" for t in ticks], fontsize=8)
    axes[0].set_ylabel("depth of the needle", fontsize=8)
    figure.colorbar(picture, ax=list(axes), label="score, %", shrink=0.9)
    return _png(figure)


def _depth_scores(group: accuracy.Group, variant: Variant, lengths: Sequence[Any]) -> np.ndarray:
    """Return ``[depth bin, length]`` mean scores in percent, NaN where no item lies."""
    total = np.zeros((_DEPTH_BINS, len(lengths)))
    count = np.zeros_like(total)
    for column, length in enumerate(lengths):
        for record in group.at(length, variant):
            if not (evidence.is_ok(record) and evidence.has_scores(record)):
                continue
            depths = record["items"].get("depth") or []
            for depth, score in zip(depths, record["items"]["scores"], strict=False):
                if depth is not None:
                    row = min(_DEPTH_BINS - 1, max(0, int(depth / 100 * _DEPTH_BINS)))
                    total[row, column] += score
                    count[row, column] += 1
    return np.divide(100 * total, count, out=np.full_like(total, np.nan), where=count > 0)


# Score against density


def _score_by_density(group: accuracy.Group, records: Evidence, labels: Labels) -> bytes | None:
    """Draw mean score against density at the longest length that a method has."""
    lengths = [x for v in labels.methods() for x in group.lengths_of(v) if x is not None]
    if not lengths:
        return None
    length = max(lengths)
    points = []
    for variant in labels.order:
        row = accuracy.summary_row(group, records, labels, variant, length) or {}
        if row.get("score") and row.get("density") is not None:
            points.append((variant, row["density"], row["score"]))
    if len(points) < 2 or all(v.is_dense for v, _, _ in points):
        return None
    figure, (axis,) = _figure(5.6, 3.6)
    marks = {"none": "o", "random": "x", "oracle": "^"}
    bases = list(dict.fromkeys(v.without_control() for v, _, _ in points))
    for variant, density, score in points:
        colour = _COLOURS[bases.index(variant.without_control()) % len(_COLOURS)]
        axis.errorbar(
            100 * density,
            score["value"],
            yerr=[[score["value"] - score["low"]], [score["high"] - score["value"]]],
            fmt=marks.get(variant.control, "s"),
            color="black" if variant.is_dense else colour,
            capsize=3,
            label=labels.name(variant),
        )
    axis.set_xlabel("density, % of causal blocks computed", fontsize=8)
    axis.set_ylabel("score, % (mean over tasks)", fontsize=8)
    axis.set_title(f"{group.measurement} on {group.subject}, {length:,} tokens", fontsize=9)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    return _png(figure)


# Ratio by length


def _ratio_groups(records: Sequence[Record]) -> dict[tuple[str, str], list[Record]]:
    """Return (section, name) -> the records of one curve."""
    found: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if evidence.is_ok(record) and evidence.metric(record, "ratio"):
            options = evidence.options_of(record)
            measurement = record["cell"]["measurement"]["name"]
            words = [str(options[k]) for k in ("phase", "inputs", "protocol") if options.get(k)]
            section = f"{measurement} on {record['cell']['subject']}"
            found.setdefault((section, " ".join(words) or measurement), []).append(record)
    return found


def _ratio_by_length(cells: Sequence[Record], labels: Labels, device: str) -> bytes | None:
    """Draw dense over method with intervals, and what the density would allow at best."""
    found_lengths = {evidence.options_of(r).get("length") for r in cells}
    lengths = sorted(int(x) for x in found_lengths if x is not None)
    if len(lengths) < 2:
        return None
    figure, (axis,) = _figure(5.6, 3.6)
    variants = [v for v in labels.order if any(evidence.variant_of(r) == v for r in cells)]
    for index, variant in enumerate(variants):
        rows = sorted(
            (r for r in cells if evidence.variant_of(r) == variant),
            key=lambda r: evidence.options_of(r)["length"],
        )
        colour = _COLOURS[index % len(_COLOURS)]
        x = [evidence.options_of(r)["length"] for r in rows]
        found = [evidence.metric(r, "ratio") or {} for r in rows]
        y = np.array([m["value"] for m in found], dtype=float)
        ends = [[_end(m, e) for m in found] for e in ("low", "high")]
        spread = np.maximum(np.array([y - ends[0], ends[1] - y], dtype=float), 0)
        axis.errorbar(
            x, y, yerr=spread, fmt="o-", color=colour, capsize=3, label=labels.name(variant)
        )
        bounds = [_bound(r) for r in rows]
        if all(bound is not None for bound in bounds):
            axis.plot(
                x, bounds, "--", color=colour, alpha=0.6, label=f"{labels.name(variant)}, bound"
            )
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [f"{x:,}" for x in lengths])
    axis.minorticks_off()
    axis.tick_params(labelsize=8)
    axis.set_xlabel("length, tokens", fontsize=8)
    axis.set_ylabel("dense time / method time", fontsize=8)
    axis.set_title(device, fontsize=9)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    return _png(figure)


# What calibrations left


def calibrated(records: Sequence[Record]) -> bool:
    """Tell whether a calibration left something to draw."""
    return any(f["kind"] in _DRAWN for record in records for f in record.get("figures") or ())


def _calibrations(records: Sequence[Record], labels: Labels) -> list[Plot]:
    """Draw every figure once, in the section ``CALIBRATION``."""
    found: dict[str, Plot] = {}  # by content: a control shares its method's
    for record in records:
        name = labels.name(evidence.variant_of(record))
        for figure in record.get("figures") or ():
            content = canonical_json(figure)
            if figure["kind"] in _DRAWN and content not in found:
                caption = f"{name}: {figure['title']}"
                image = _DRAWN[figure["kind"]](figure)
                found[content] = Plot(_stem(caption), CALIBRATION, caption, image)
    return list(found.values())


def _heatmap(figure: Mapping[str, Any]) -> bytes:
    values = np.array(figure["values"], dtype=float)
    rows, columns = values.shape
    picture, (axis,) = _figure(min(9.0, 2.5 + 0.45 * columns), min(9.0, 1.4 + 0.35 * rows))
    low, high = figure.get("limits") or (None, None)
    shown = axis.imshow(values, cmap="viridis", aspect="auto", vmin=low, vmax=high)
    if values.size <= _WRITTEN_VALUES:
        middle = (shown.norm.vmin + shown.norm.vmax) / 2
        for (row, column), value in np.ndenumerate(values):
            colour = "white" if value < middle else "black"
            axis.text(column, row, f"{value:.2g}", ha="center", va="center", fontsize=7, c=colour)
    axis.set_xlabel(figure["column"], fontsize=8)
    axis.set_ylabel(figure["row"], fontsize=8)
    axis.set_xticks(range(0, columns, 1 + columns // 17))
    axis.set_yticks(range(0, rows, 1 + rows // 17))
    axis.tick_params(labelsize=8)
    axis.set_title(figure["title"], fontsize=9)
    picture.colorbar(shown, ax=axis, label=figure["label"])
    return _png(picture)


def _curve(figure: Mapping[str, Any]) -> bytes:
    picture, (axis,) = _figure(5.6, 3.6)
    for index, (name, points) in enumerate(figure["series"].items()):
        x, y = zip(*sorted(points), strict=True) if points else ((), ())
        style = "o-" if name in figure["joined"] else "o"
        alpha = 1.0 if name in figure["joined"] else 0.5
        colour = _COLOURS[index % len(_COLOURS)]
        axis.plot(x, y, style, color=colour, alpha=alpha, markersize=4, label=name)
    axis.set_xlabel(figure["x"], fontsize=8)
    axis.set_ylabel(figure["y"], fontsize=8)
    axis.tick_params(labelsize=8)
    axis.set_title(figure["title"], fontsize=9)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    return _png(picture)


_DRAWN = {"heatmap": _heatmap, "curve": _curve}


def _end(metric: dict[str, Any], name: str) -> float:
    value = metric.get(name)
    return metric["value"] if value is None else value


def _bound(record: Record) -> float | None:
    """Return the tightest bound that the record states."""
    told = record.get("explanation") or {}
    bounds = [told[name] for name in ("amdahl_bound", "roofline_bound") if told.get(name)]
    return min(bounds) if bounds else None
