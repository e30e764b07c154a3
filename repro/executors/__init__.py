"""Executors: who runs the cells of a plan. One module each, found by scanning.

A module offers ``execute(session)``; it runs ``repro.worker.Worker`` for every pending cell and
hands each record to the session. What is the same for all of them is here: what is already done,
what a failure implies for longer cells, the time budget.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from repro.budget import Allowance
from repro.errors import BadInput, Fault, near_matches
from repro.keys import canonical_json
from repro.plan import Plan, PlannedCell
from repro.progress import Listener
from repro.store import FAILED, CellFolder, RunStore, environment_key, is_cut, make_record, now

if TYPE_CHECKING:
    from repro.early import Stakes


def names() -> list[str]:
    """Return the names of all executors."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def get(name: str) -> Any:
    """Return an executor's module by name.

    Raises:
        BadInput: If there is none of that name.
    """
    if name not in names():
        remedy = near_matches(name, ["auto", *names()])
        raise BadInput(Fault("--executor", "the executor", "a known name", name, remedy))
    return importlib.import_module(f"{__name__}.{name}")


def choose(plan: Plan, *, address: str | None) -> str:
    """Return the executor that ``auto`` stands for.

    Ray where it has something to schedule: several subject groups or a running cluster. For one
    group on one machine it would only add its start.
    """
    has_ray = importlib.util.find_spec("ray") is not None
    wants_ray = bool(address) or len(plan.groups()) > 1
    return "ray" if has_ray and wants_ray else "inline"


@dataclass
class Session:
    """One run of a plan: what is pending, and what became of each cell.

    Attributes:
        selected: The cells that this run is to do, in the plan's order.
        environment: What records say of this machine.
        allowance: What is left of the budget, None without one.
        known_pace: Measured over estimated seconds of what this machine did before.
        keep_going: Run the other cells after one that failed.
        implied: Do not try a longer cell of what ran out of memory.
    """

    plan: Plan
    selected: Sequence[PlannedCell]
    store: RunStore
    environment: dict[str, Any]
    listener: Listener
    fresh: bool = False
    allowance: Allowance | None = None
    known_pace: float = 1.0
    keep_going: bool = True
    implied: bool = True
    address: str | None = None
    artifacts: str | None = None
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    # (chain, machine) -> shortest length that ran out of memory
    _oom_lengths: dict[tuple[str, str], int] = field(default_factory=dict)
    _speed: list[tuple[float, float]] = field(default_factory=list)
    _machines: set[str] = field(default_factory=set)
    _stakes: dict[str, Stakes] = field(default_factory=dict)
    _first_failure: str = ""

    @property
    def machine(self) -> str:
        """The name of this machine's folder in the store."""
        return environment_key(self.environment)

    @property
    def stopped(self) -> bool:
        """Whether a failure has ended the run."""
        return bool(self._first_failure) and not self.keep_going

    def pending(self) -> list[PlannedCell]:
        """Report the cells that are done already and return the others, in running order."""
        waiting = []
        for planned in self.selected:
            if self.fresh:
                self.folder(planned).forget()
            record = self.finished(planned, self.machine)
            if record is not None:
                self._note(planned, record, cached=True)
            elif reason := self._missing(planned):
                self.settle(planned, "not_run", reason)
            elif died := self.folder(planned).take_fatal():
                # In this process it would end the run again, before the cells after it.
                self.settle(planned, "crashed", f"{died.splitlines()[0]}, in the last run")
            else:
                waiting.append(planned)
        return sorted(waiting, key=lambda planned: self._place[planned.key])

    @cached_property
    def _order(self) -> list[PlannedCell]:
        """The cells in running order, the same one whatever is done already."""
        cells = list(self.selected)
        return cells if self.allowance is None else _most_informative_first(cells)

    @cached_property
    def _place(self) -> dict[str, int]:
        return {planned.key: place for place, planned in enumerate(self._order)}

    def finished(self, planned: PlannedCell, machine: str) -> dict[str, Any] | None:
        """Return the record that makes a cell needless on a machine, or None.

        One that ended early is that under a budget alone.
        """
        record = self.store.finished(planned.key, machine)
        ended = record is not None and is_cut(record) and self.allowance is None
        return None if ended else record

    def handed_out(self, planned: PlannedCell, environment: dict[str, Any]) -> PlannedCell:
        """Return a cell as its worker gets it: under a budget with what may end it early."""
        stakes = self._stakes_on(environment)
        return (
            planned if stakes is None else replace(planned, stake=stakes.of(planned, self.records))
        )

    def must_wait(self, planned: PlannedCell, environment: dict[str, Any]) -> bool:
        """Tell whether a cell that runs elsewhere may decide when this one ends."""
        stakes = self._stakes_on(environment)
        return stakes is not None and stakes.awaits(planned, self.records)

    def _stakes_on(self, environment: dict[str, Any]) -> Stakes | None:
        machine = environment_key(environment)
        # What several machines have is judged apart, and each has a part of it.
        if self.allowance is None or not self._machines <= {machine}:
            return None
        if machine not in self._stakes:
            from repro.early import Stakes

            self._stakes[machine] = Stakes(self.plan, self._order, environment)
        return self._stakes[machine]

    def _missing(self, planned: PlannedCell) -> str | None:
        missing = self.plan.missing
        machine = None if self.address else missing.get("gpu") or missing.get("memory")
        return missing.get(planned.cell["subject"]) or machine

    def folder(self, planned: PlannedCell) -> CellFolder:
        return self.store.cell(planned.key, self.machine)

    def settled_without_running(
        self, planned: PlannedCell, *, environment: dict[str, Any] | None = None
    ) -> bool:
        """Settle a cell that need not or cannot run now; tell whether that was so.

        Args:
            planned: The cell.
            environment: The machine that would run it, if not this one.
        """
        if self.stopped:
            self.settle(planned, "not_run", f"stopped by --fail-fast after {self._first_failure}")
            return True
        length = planned.cell["measurement"]["options"].get("length")
        machine = environment_key(environment or self.environment)
        shortest = self._oom_lengths.get((chain_of(planned), machine)) if self.implied else None
        if shortest is not None and isinstance(length, int) and length > shortest:
            message = f"out of memory at length {shortest} already"
            self.settle(planned, "implied", message, environment=environment)
            return True
        if self.allowance is not None:
            left, needs = self.allowance.left(), self._cost(planned, self._estimate(planned))
            if left <= 0 or needs > left:
                message = f"budget spent: needs about {needs:.0f} s, {max(left, 0):.0f} s were left"
                self.settle(planned, "not_run", message)
                return True
            self.allowance.reserve(planned.key, needs)
        return False

    def finish(self, planned: PlannedCell, record: dict[str, Any]) -> None:
        """Take in the record of a cell that ran."""
        self.spent(planned, record.get("seconds", 0.0))
        if record["status"] == "ok" and planned.estimate_seconds > 0 and not is_cut(record):
            # A subject loads once for many cells: its time says nothing of the next cell's.
            seconds = record.get("seconds", 0.0) - record.get("load_seconds", 0.0)
            self._speed.append((seconds, planned.estimate_seconds))
        self._note(planned, record, cached=False)

    def reuse(self, planned: PlannedCell, record: dict[str, Any]) -> None:
        """Take in a record that another machine of the cluster has made before."""
        self._note(planned, record, cached=True)

    def settle(
        self,
        planned: PlannedCell,
        status: str,
        message: str,
        *,
        environment: dict[str, Any] | None = None,
        seconds: float = 0.0,
    ) -> dict[str, Any]:
        """Write and report the record of a cell that a worker did not run to its end.

        Args:
            planned: The cell.
            status: ``not_run`` is of no machine; all else counts among the results of one.
            message: Why.
            environment: The machine it failed on, if not this one.
            seconds: How long it ran.
        """
        self.spent(planned, seconds)
        body: dict[str, Any] = {"created": now(), "seconds": round(seconds, 3)}
        if status != "not_run":
            body["environment"] = environment or self.environment
        record = make_record(planned.key, planned.cell, status, message, **body)
        machine = environment_key(environment or self.environment)
        self.store.cell(planned.key, machine).write_record(record)
        self._note(planned, record, cached=False)
        return record

    def spent(self, planned: PlannedCell, seconds: float) -> None:
        """Charge the budget with what a cell took, also where nothing came of it."""
        if self.allowance is not None:
            self.allowance.spend(planned.key, self._cost(planned, seconds))

    def _estimate(self, planned: PlannedCell) -> float:
        return planned.estimate_seconds * self.pace()

    def _cost(self, planned: PlannedCell, seconds: float) -> float:
        """Return seconds as the budget counts them."""
        of_gpus = self.allowance is not None and self.allowance.budget.of_gpus
        return seconds * self.plan.gpus_of(planned) if of_gpus else seconds

    def pace(self) -> float:
        """Return measured over estimated seconds so far, the known one until something was."""
        measured = sum(seconds for seconds, _ in self._speed)
        estimated = sum(estimate for _, estimate in self._speed)
        return measured / estimated if estimated > 0 and measured > 0 else self.known_pace

    def _note(self, planned: PlannedCell, record: dict[str, Any], *, cached: bool) -> None:
        self.records[planned.key] = record
        if record.get("environment"):
            self._machines.add(environment_key(record["environment"]))
        # What an earlier run has settled would end every later one.
        if record["status"] in FAILED and not cached and not self._first_failure:
            self._first_failure = f"{planned.label}: {record['status']}"
        length = planned.cell["measurement"]["options"].get("length")
        if record["status"] == "oom" and isinstance(length, int):
            here = (chain_of(planned), environment_key(record["environment"]))
            self._oom_lengths[here] = min(length, self._oom_lengths.get(here, length))
        self.listener.finished(planned, record, cached=cached)


def chain_of(planned: PlannedCell) -> str:
    """Return what cells share that differ in length alone."""
    cell = planned.cell
    options = {
        name: value for name, value in cell["measurement"]["options"].items() if name != "length"
    }
    measured = [cell["measurement"]["name"], options]
    return canonical_json([cell["subject"], cell["method"], measured, cell.get("repeat", 0)])


def _most_informative_first(cells: list[PlannedCell]) -> list[PlannedCell]:
    """Return cells by cost, those that are compared with one another kept together."""
    together: dict[str, list[PlannedCell]] = {}
    for planned in cells:
        cell = planned.cell
        key = canonical_json([cell["subject"], cell["measurement"], cell["seed"]])
        together.setdefault(key, []).append(planned)

    def cost(group: list[PlannedCell]) -> float:
        return sum(planned.estimate_seconds for planned in group)

    return [planned for group in sorted(together.values(), key=cost) for planned in group]
