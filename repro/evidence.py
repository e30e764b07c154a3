"""Records as evidence: which cell a record is of, which records belong together, paired scores.

Everything here goes by the form of a record and never by the name of a method or measurement:
``items`` hold scores, a ``ratio`` metric is dense against method, ``config.control`` marks a
control, and a repeat of the dense cell is the noise floor.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from repro import statistics
from repro.keys import canonical_json
from repro.method import CONTROL_FIELDS
from repro.statistics import Array, Interval

Record = Mapping[str, Any]
DENSE = "dense"
#: Options that say how many items a cell has.
COUNT_OPTIONS = ("samples",)


@dataclass(frozen=True)
class Setting:
    """What dense and method cells share: subject, dtype, measurement, options, seed.

    How many items a cell has is no part of it: the first ones are the same, and items are paired
    by their keys, so that a control of many draws may run on fewer.
    """

    subject: str
    dtype: str
    measurement: str
    options: str
    seed: int


@dataclass(frozen=True)
class Variant:
    """A method with a configuration; ``config`` is canonical JSON without the control fields."""

    slug: str
    config: str
    control: str = "none"

    @property
    def is_dense(self) -> bool:
        return self.slug == DENSE

    def without_control(self) -> Variant:
        """Return the method itself, for a control."""
        return Variant(self.slug, self.config)


def options_of(record: Record) -> dict[str, Any]:
    """Return the measurement's options without the repeat."""
    options = dict(record["cell"]["measurement"]["options"])
    options.pop("repeat", None)
    return options


def repeat_of(record: Record) -> int:
    """Return which rerun of its cell a record is; 0 is the cell itself."""
    cell = record["cell"]
    return int(cell.get("repeat") or cell["measurement"]["options"].get("repeat") or 0)


def setting_of(record: Record) -> Setting:
    """Return what must be equal between a dense cell and the method cells compared with it."""
    cell = record["cell"]
    name = cell["measurement"]["name"]
    own = {key: value for key, value in options_of(record).items() if key not in COUNT_OPTIONS}
    options = canonical_json(own)
    return Setting(cell["subject"], cell.get("dtype", ""), name, options, int(cell.get("seed", 0)))


def variant_of(record: Record) -> Variant:
    """Return the method and configuration of a record, the control told apart."""
    method = record["cell"]["method"]
    config = {key: value for key, value in method["config"].items() if key not in CONTROL_FIELDS}
    control = str(method["config"].get("control") or "none")
    return Variant(method["slug"], canonical_json(config), control)


def draw_of(record: Record) -> int:
    """Return the draw of a random control."""
    return int(record["cell"]["method"]["config"].get("draw") or 0)


def environment_of(record: Record) -> str:
    """Return the short name of the machine, "" for a cell that did not run."""
    return str((record.get("environment") or {}).get("environment_id", ""))


def metric(record: Record, name: str) -> dict[str, Any] | None:
    """Return a metric that has a finite value; ``density`` may come from the patch."""
    found = (record.get("metrics") or {}).get(name)
    if isinstance(found, Mapping) and _finite(found.get("value")):
        return dict(found)
    if name == "density" and _finite((record.get("patch") or {}).get("density")):
        return {"value": record["patch"]["density"], "low": None, "high": None, "unit": ""}
    return None


def density_of(record: Record) -> float | None:
    """Return computed / computable blocks in [0, 1], None where nothing was counted."""
    found = metric(record, "density")
    return None if found is None else float(found["value"])


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def has_scores(record: Record) -> bool:
    """Tell whether a record carries per-item scores in [0, 1]."""
    scores = (record.get("items") or {}).get("scores") or []
    try:
        # Any NaN makes the sum NaN, and no comparison with NaN holds.
        return bool(scores) and min(scores) >= 0 and max(scores) <= 1 and sum(scores) >= 0
    except TypeError:
        return False


def has_ratio(record: Record) -> bool:
    """Tell whether a record compares dense with the method by itself."""
    return "ratio" in (record.get("metrics") or {})


def scores_of(record: Record) -> Array:
    """Return ``[n]`` scores of a record."""
    return np.asarray(record["items"]["scores"], dtype=np.float64)


def is_ok(record: Record) -> bool:
    """Tell whether a cell ended well."""
    return record.get("status") == "ok"


def paired_scores(first: Record, second: Record) -> tuple[Array, Array] | None:
    """Return the scores of the items that both records hold, in the first's order."""
    ours, theirs = first["items"], second["items"]
    if ours["keys"] == theirs["keys"]:
        return scores_of(first), scores_of(second)
    place = {key: index for index, key in enumerate(theirs["keys"])}
    shared = [(i, place[key]) for i, key in enumerate(ours["keys"]) if key in place]
    if not shared:
        return None
    left, right = (list(column) for column in zip(*shared, strict=True))
    return scores_of(first)[left], scores_of(second)[right]


def mean_score(records: Sequence[Record]) -> Interval:
    """Return the mean over cells (tasks) of their mean scores, each cell weighing the same."""
    return statistics.stratified_mean([scores_of(record) for record in records])


def mean_density(records: Iterable[Record]) -> float | None:
    """Return the mean density of the records that state one."""
    values = [value for record in records if (value := density_of(record)) is not None]
    return float(np.mean(values)) if values else None


def mean_fallback(records: Iterable[Record]) -> float | None:
    """Return the mean share of attention calls that ran dense though they should not have."""
    return mean_observed(records, "fallback_share")


def mean_observed(records: Iterable[Record], name: str) -> float | None:
    """Return the mean of what patches have observed under a name, None if none has."""
    found = [(record.get("patch") or {}).get(name) for record in records]
    values = [float(value) for value in found if value is not None and _finite(value)]
    return float(np.mean(values)) if values else None


class Evidence:
    """The records of one profile on one machine, indexed by setting and variant."""

    def __init__(self, records: Iterable[Record]):
        self.records = list(records)
        self._dense: dict[Setting, dict[int, Record]] = defaultdict(dict)
        self._controls: dict[tuple[Setting, Variant], list[Record]] = defaultdict(list)
        self._by_name: dict[tuple[str, str], list[Record]] = defaultdict(list)
        for record in self.records:
            variant, setting = variant_of(record), setting_of(record)
            if not repeat_of(record):
                self._by_name[variant.slug, setting.measurement].append(record)
            if variant.is_dense:
                known = self._dense[setting].get(repeat_of(record))
                if known is None or _size(record) > _size(known):
                    self._dense[setting][repeat_of(record)] = record
            elif variant.control != "none":
                self._controls[setting, variant].append(record)

    def of(self, slug: str, measurement: str) -> list[Record]:
        """Return all cells of a method, controls too, in one measurement; no reruns."""
        return self._by_name.get((slug, measurement), [])

    @cached_property
    def methods(self) -> list[Record]:
        """Records of methods themselves: no dense cell, no control, no repeat."""
        return [
            record
            for record in self.records
            if not variant_of(record).is_dense
            and variant_of(record).control == "none"
            and repeat_of(record) == 0
        ]

    @property
    def dense(self) -> list[Record]:
        """The dense cells, first runs only."""
        return [cells[0] for cells in self._dense.values() if 0 in cells]

    def dense_of(self, record: Record, repeat: int = 0) -> Record | None:
        """Return the dense cell of the same setting, or one of its reruns."""
        return self._dense.get(setting_of(record), {}).get(repeat)

    def controls_of(self, record: Record, control: str) -> list[Record]:
        """Return the controls of a method's cell that ran, by draw."""
        variant = variant_of(record)
        key = setting_of(record), Variant(variant.slug, variant.config, control)
        found = [r for r in self._controls.get(key, []) if is_ok(r) and has_scores(r)]
        return sorted(found, key=draw_of)

    def reruns(self) -> list[tuple[Record, Record]]:
        """Return (dense cell, its rerun) for every rerun with scores."""
        return [
            (cells[0], again)
            for cells in self._dense.values()
            for repeat, again in sorted(cells.items())
            if repeat and 0 in cells and _scored(cells[0]) and _scored(again)
        ]

    def pairs(self, records: Iterable[Record]) -> list[tuple[Array, Array]]:
        """Return (dense scores, method scores) of every record whose dense cell ran."""
        found = []
        for record in records:
            dense = self.dense_of(record)
            if dense is not None and _scored(dense) and _scored(record):
                pair = paired_scores(dense, record)
                if pair is not None:
                    found.append(pair)
        return found

    def minus_control(self, records: Iterable[Record], control: str) -> Array | None:
        """Return ``[draws, items]`` differences method minus control, over all given cells.

        A control may have seen fewer items than the method: the shared ones count. Only draws
        that every cell has in full are kept; None if a cell has no control at all.
        """

        def difference(record: Record, other: Record) -> Array | None:
            pair = paired_scores(record, other)
            return None if pair is None else pair[0] - pair[1]

        return self._over_draws(records, control, difference)

    def control_scores(self, records: Iterable[Record], control: str) -> Array | None:
        """Return ``[draws, items]`` scores of a control, over all given cells of its method.

        Only draws that every cell has in full are kept; None if a cell has no control at all.
        """
        return self._over_draws(records, control, lambda record, other: scores_of(other))

    def _over_draws(
        self,
        records: Iterable[Record],
        control: str,
        values: Callable[[Record, Record], Array | None],
    ) -> Array | None:
        cells = []
        for record in records:
            by_draw: dict[int, Array] = {}
            for other in self.controls_of(record, control):
                found = values(record, other)
                if found is not None:
                    by_draw[draw_of(other)] = found
            if not by_draw:
                return None
            most = max(delta.size for delta in by_draw.values())
            cells.append({draw: d for draw, d in by_draw.items() if d.size == most})
        draws = sorted(set.intersection(*map(set, cells))) if cells else []
        if not draws:
            return None
        return np.stack([np.concatenate([cell[draw] for cell in cells]) for draw in draws])


def _size(record: Record) -> int:
    return len((record.get("items") or {}).get("keys") or [])


def _scored(record: Record) -> bool:
    return is_ok(record) and has_scores(record)
