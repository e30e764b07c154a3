"""Measurements: what is measured on a subject. One module or package each, found by scanning.

A measurement module is torch-free at import and offers ``MEASUREMENT``. Adding one edits no
existing file: the manifest schema is made from its options, the report from the form of its
records (``items`` -> accuracy table, ``ratio`` metrics -> latency table, else scalar table).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from repro.errors import BadInput, Fault, near_matches
from repro.method import Artifact, Method, Patch

if TYPE_CHECKING:
    from repro.subjects import Subject, SubjectInfo


def plain_metric(value: float, unit: str, *, n: int | None = None) -> dict[str, Any]:
    """Return a metric that has no interval."""
    return {"value": value, "low": None, "high": None, "n": n, "unit": unit}


class ItemStore(Protocol):
    """Per-cell store of finished items; a batch is the unit of storing and resuming."""

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the stored value of an item, or None."""

    def put(self, batch: Iterable[tuple[str, dict[str, Any]]]) -> None:
        """Append one finished batch of (item key, JSON-able value)."""


@dataclass
class CellContext:
    """Everything that a measurement may use to run one cell.

    ``method`` is None for the dense cell. ``options`` is one dict of ``Measurement.expand``.
    ``progress(done, total)`` feeds the live display. ``cache`` is a folder for what can be made again,
    shared by all cells; it may be deleted any time.
    """

    subject: Subject
    method: Method | None
    config: Any
    artifact: Artifact | None
    options: Mapping[str, Any]
    seed: int
    items: ItemStore
    cache: Path
    progress: Callable[[int, int], None]

    def patch(self) -> AbstractContextManager[Patch]:
        """Return the method's ``apply`` context, or an inert one for the dense cell."""
        if self.method is None:
            return nullcontext(Patch())
        return self.method.apply(self.subject, self.config, self.artifact)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The contract of a measurement.

    Attributes:
        name: Module name.
        options: Frozen dataclass (standard library types only) of the manifest's options; raises
            ValueError ``<field> must be <rule>, got <value>`` in ``__post_init__``.
        expand: Options -> one JSON-able dict per cell. A key ``length`` (tokens) orders cells for
            "implied" outcomes.
        item_count: Option that says how many items a cell asks, where it has such; the first items
            must not depend on it, so that a budget can ask fewer.
        positions: Cell options -> positions that a subject must have, checked before a run.
        run: Runs one cell and returns the record's body: ``metrics`` (name -> ``{"value", "low",
            "high", "n", "unit"}``, the absent ones None), and where they apply ``patch`` (the
            ``Patch.stats()``), ``items`` (columns of equal length: ``keys``, ``scores``, and any
            other per-item column such as ``depth``), ``raw`` (raw timings), ``explanation``.
        alone: True if nothing else may run on the device meanwhile, as for timings.
        paired: True if ``run`` itself measures dense against the method (no dense cell planned).
        needs_training: True if scores are meaningless on random weights.
        kinds: Subject kinds it applies to.
        libraries: Distributions whose versions take part in the cell key.
        estimate_seconds: (cell options, subject info) -> rough seconds on 2 CPU cores.
    """

    name: str
    options: type
    expand: Callable[[Any], list[dict[str, Any]]]
    run: Callable[[CellContext], dict[str, Any]]
    item_count: str = "samples"
    positions: Callable[[Mapping[str, Any]], int] = lambda options: options.get("length") or 0
    alone: bool = False
    paired: bool = False
    needs_training: bool = False
    kinds: tuple[str, ...] = ("llm",)
    libraries: tuple[str, ...] = ()
    estimate_seconds: Callable[[Mapping[str, Any], SubjectInfo], float] = lambda options, info: 10.0


@dataclass(frozen=True)
class Scoring:
    """How the items of a cell score before it has ended.

    Attributes:
        keys: Of all its items, in the order of the record.
        score: (key, stored value) -> the score that ``run`` gives the item, in [0, 1].
    """

    keys: Sequence[str]
    score: Callable[[str, Mapping[str, Any]], float]


def early_scoring(name: str) -> Callable[[CellContext], Scoring] | None:
    """Return how a measurement scores items one by one, None if its cells cannot end early.

    A package says that they can by a module ``early`` with a function ``scoring``: its items score
    in [0, 1] each, weigh the same, and are all that claims read of a record. No outcome depends on
    that module, so that it is no part of a cell's key.
    """
    get(name)
    places = getattr(importlib.import_module(f"{__name__}.{name}"), "__path__", ())
    if not any((Path(place) / "early.py").is_file() for place in places):
        return None
    return importlib.import_module(f"{__name__}.{name}.early").scoring


def names() -> list[str]:
    """Return the names of all measurements."""
    return sorted(
        module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")
    )


def get(name: str) -> Measurement:
    """Return a measurement by name.

    Raises:
        BadInput: If there is none of that name; lists near matches.
    """
    if name not in names():
        raise BadInput(
            Fault(
                "measurements", "a measurement", "a known name", name, near_matches(name, names())
            )
        )
    return importlib.import_module(f"{__name__}.{name}").MEASUREMENT
