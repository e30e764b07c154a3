"""What fits into a budget: which share of the items a run asks, and when it stops taking cells.

The first items of every cell are asked, as many in each, so that tasks and methods stay comparable
pair by pair. How many is settled once for a run and kept beside it: choosing again after having
seen results would be choosing the results.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from repro.errors import BadInput, Fault
from repro.keys import canonical_json, digest
from repro.plan import Plan, PlannedCell
from repro.store import RunStore, is_cut, write_atomically

SUFFIX = ".subset"
#: Items a cell that a subset may have; fewer say nothing.
LADDER = (8, 10, 12, 16, 20, 25, 32, 40, 50, 64, 80, 100, 128, 160, 200, 256, 320, 400, 500)
#: Share of a budget that is planned for: estimates are rough.
PLANNED_SHARE = 0.9
#: Items of which dense and method disagree, for the power of a run that has no results yet.
ASSUMED_FLIPS = 0.1
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Budget:
    """Seconds to spend, of the clock or of all GPUs together."""

    seconds: float
    of_gpus: bool = False


def parse(text: str) -> Budget:
    """Return the budget of ``90``, ``90s``, ``10m``, ``2h`` or ``2gpu-h``.

    Raises:
        BadInput: If the text is no such duration, or not above 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(gpu-)?([a-z]*)", text.strip())
    if match is None or match.group(3) not in _UNITS or float(match.group(1)) <= 0:
        rule = "a duration above 0 such as 90s, 10m, 2h or 2gpu-h"
        raise BadInput(Fault("--budget", "the budget", rule, text))
    return Budget(float(match.group(1)) * _UNITS[match.group(3)], match.group(2) is not None)


@dataclass
class Allowance:
    """What is left of a budget while a run spends it; seconds of GPUs are of all GPUs together."""

    budget: Budget
    _began: float = field(default_factory=time.monotonic)
    _spent: float = 0.0
    _reserved: dict[str, float] = field(default_factory=dict)

    def left(self) -> float:
        """Return the seconds that one more cell may take."""
        if not self.budget.of_gpus:
            return self.budget.seconds - (time.monotonic() - self._began)
        return self.budget.seconds - self._spent - sum(self._reserved.values())

    def reserve(self, key: str, seconds: float) -> None:
        """Count a cell that starts by its estimate: other workers start beside it."""
        self._reserved[key] = seconds

    def spend(self, key: str, seconds: float) -> None:
        """Count a cell that ended, whatever came of it, by what it took."""
        self._reserved.pop(key, None)
        self._spent += seconds


@dataclass(frozen=True)
class Subset:
    """The items that a run with a budget asks.

    Attributes:
        items: At most so many in a cell, the first ones.
        of: How many the largest cell has in all.
        name: ``first-25-of-100-3f2a9c1d``; ends with a digest of which cells have which items.
        in_a_task: Smallest paired difference (share of 1) that one task shows with 80 % power.
        in_the_mean: The same of the mean over all tasks of one method.
    """

    items: int
    of: int
    name: str
    in_a_task: float
    in_the_mean: float

    def text(self) -> str:
        """Return a line for the user."""
        return (
            f"budget: the first {self.items} of {self.of} items a cell (subset {self.name}); "
            f"if dense and method disagree on one item in {1 / ASSUMED_FLIPS:.0f}, it shows a "
            f"difference of {100 * self.in_a_task:.1f} points in a task and of "
            f"{100 * self.in_the_mean:.1f} in the mean (80 % power)"
        )


def choose(
    make: Callable[[int | None], Plan],
    budget: Budget,
    *,
    store: RunStore,
    machine: str,
    fresh: bool = False,
    say: Callable[[str], None],
) -> Plan:
    """Return the plan of a run within a budget; its subset is settled if it is a new run.

    Args:
        make: Most items a cell (None: all) -> plan.
        budget: What may be spent.
        store: Where the run is kept.
        machine: Its folder in the store, for what is known of its pace.
        fresh: Settle the subset anew.
        say: Is told which subset it is.

    Raises:
        BadInput: If the budget is of GPUs and the run has none.
    """
    whole = make(None)
    if budget.of_gpus and whole.device != "cuda":
        rule = "of the clock where a run has no GPU, such as 10m"
        raise BadInput(Fault("--budget", "the budget", rule, f"GPU time on {whole.device}"))
    largest = max((planned.items for planned in whole.cells), default=0)
    if not largest:
        return whole
    path = store.root / whole.name / whole.profile / f"{whole.device}{SUFFIX}"
    items = None if fresh else _settled(path)
    new = items is None
    if items is None:
        usable = PLANNED_SHARE * budget.seconds / pace_of(store, whole, machine)
        items = fit(make, usable, largest=largest, of_gpus=budget.of_gpus)
    plan = make(items) if items < largest else whole
    subset = _subset(plan, min(items, largest), largest)
    if new:  # what was settled stays, also while a manifest asks for less
        write_atomically(path, json.dumps(asdict(subset)).encode() + b"\n")
    if items < largest:
        say(subset.text())
    return plan


def fit(
    make: Callable[[int | None], Plan], seconds: float, *, largest: int, of_gpus: bool = False
) -> int:
    """Return the most items a cell of which all cells fit into a time, by their estimates.

    Where not even the fewest fit it returns these: the run then does the cheapest comparisons.
    """
    steps = [items for items in LADDER if items < largest] + [largest]

    def cost(items: int) -> float:
        plan = make(items)
        return sum(
            cell.estimate_seconds * (plan.gpus_of(cell) if of_gpus else 1.0) for cell in plan.cells
        )

    # Costs grow with the items.
    return max((items for items in steps if cost(items) <= seconds), default=steps[0])


def pace_of(store: RunStore, plan: Plan, machine: str) -> float:
    """Return what this machine has taken so far over what was estimated, 1 if nothing is done."""
    taken = estimated = 0.0
    for planned in plan.cells:
        record = store.cell(planned.key, machine).read_record()
        whole = record is not None and record["status"] == "ok" and not is_cut(record)
        if record is not None and whole and planned.estimate_seconds > 0:
            taken += record.get("seconds", 0.0) - record.get("load_seconds", 0.0)
            estimated += planned.estimate_seconds
    return taken / estimated if taken > 0 and estimated > 0 else 1.0


def _settled(path: Path) -> int | None:
    try:
        return int(json.loads(path.read_bytes())["items"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _subset(plan: Plan, items: int, largest: int) -> Subset:
    counted = [planned for planned in plan.cells if planned.items]
    chosen = sorted(canonical_json([c.cell["subject"], c.cell["measurement"]]) for c in counted)
    name = f"first-{items}-of-{largest}-{digest(sorted(set(chosen)))[:8]}"
    tasks = max(_tasks_of_a_method(counted), default=1)
    return Subset(items, largest, name, _detectable(items), _detectable(items * tasks))


def _tasks_of_a_method(cells: Iterable[PlannedCell]) -> list[int]:
    tasks: dict[str, set[str]] = {}
    for planned in cells:
        variant = canonical_json([planned.cell["subject"], planned.cell["method"]])
        tasks.setdefault(variant, set()).add(canonical_json(planned.cell["measurement"]))
    return [len(found) for found in tasks.values()]


def _detectable(items: int) -> float:
    import numpy as np

    from repro.statistics import minimum_detectable_difference

    method = np.zeros(items)
    flipped = max(1, round(ASSUMED_FLIPS * items))
    method[:flipped] = np.resize([1.0, -1.0], flipped)
    return minimum_detectable_difference(np.zeros(items), method)
