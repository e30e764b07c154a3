"""From a manifest to records: the steps of ``repro run``, usable without the command line."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repro import budget as budgets
from repro import executors, manifest, status
from repro.errors import MissingResource
from repro.plan import Plan, make_plan, resolve_device
from repro.progress import Listener, Together, listener_for
from repro.store import RunStore, environment_key


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run did.

    Attributes:
        records: The records of the selected cells, in the plan's order.
        counts: Status -> cells; ``cached`` counts the reused ones.
        stopped: Whether a failure ended the run, as ``keep_going=False`` asks for.
    """

    name: str
    profile: str
    records: tuple[dict[str, Any], ...]
    counts: dict[str, int]
    stopped: bool = False

    @property
    def exit_code(self) -> int:
        """1 if a cell crashed, its machine failed or the run stopped, else 0."""
        failed = [record for record in self.records if record["status"] in ("crashed", "infra")]
        return 1 if failed or self.stopped else 0


def run(
    path: str | Path,
    *,
    profile: str = "embedded",
    runs: str | Path = "runs",
    executor: str = "auto",
    device: str = "auto",
    only: str | None = None,
    budget: str | None = None,
    fresh: bool = False,
    keep_going: bool = True,
    implied: bool = True,
    address: str | None = None,
    artifacts: str | None = None,
    quiet: bool = False,
    also: Listener | None = None,
) -> Outcome:
    """Run what a profile of a manifest asks for and is not done yet.

    Args:
        path: The manifest.
        runs: Folder of the run store.
        executor: ``auto``, ``inline`` or ``ray``.
        only: Keep the cells whose label holds this text or matches this shell pattern.
        budget: Time such as ``10m`` or ``2gpu-h``: every cell asks as many items as fit, the same
            ones from the first run on, and ends when no outcome of its other items could change a
            verdict; what does not fit all the same becomes ``not_run``.
        fresh: Compute again what is done already; the old files are set aside.
        keep_going: Run the other cells after one that failed; else they become ``not_run``.
        implied: Do not try the longer cells of what ran out of memory.
        address: A running Ray cluster.
        artifacts: Folder or URL where calibrations are shared; the run store by default.
        also: Is told of everything beside the display.

    Raises:
        BadInput: On a bad manifest or option.
        MissingResource: If nothing of what is asked for can run here; says what to fetch.
        MachineFault: If the store cannot be written.
        KeyboardInterrupt: On Ctrl-C; calling again goes on.
    """
    allowed = None if budget is None else budgets.parse(budget)
    checked = manifest.load(path, profile=profile)

    def make(items: int | None = None) -> Plan:
        cluster = address is not None
        return make_plan(checked, profile, device=device, cluster=cluster, items=items)

    plan = make()
    plan.select(only)
    name = executors.choose(plan, address=address) if executor == "auto" else executor
    module = executors.get(name)
    with RunStore(runs).lock():
        # The driver of a cluster may have no GPU itself.
        environment = environment_of("cpu" if plan.device == "cpu" else resolve_device("auto"))
        machine = environment_key(environment)
        if allowed is not None:
            plan = budgets.choose(
                make,
                allowed,
                store=RunStore(runs),
                machine=machine,
                # Some cells alone do not settle the subset of all.
                fresh=fresh and only is None,
                say=lambda text: print(text, file=sys.stderr),
            )
        selected = plan.select(only)
        estimate = sum(planned.estimate_seconds for planned in selected)
        with listener_for(len(selected), estimate, quiet=quiet) as listener:
            store = RunStore(runs, warn=listener.message)
            store.write_index(plan.to_json(), plan.manifest)
            path = status.path_of(store, plan.name, profile, plan.device)
            with status.Journal(path, total=len(selected), estimate_seconds=estimate) as journal:
                session = executors.Session(
                    plan=plan,
                    selected=selected,
                    store=store,
                    environment=environment,
                    listener=Together(listener, journal, *([also] if also else [])),
                    fresh=fresh,
                    allowance=None if allowed is None else budgets.Allowance(allowed),
                    known_pace=1.0 if allowed is None else budgets.pace_of(store, plan, machine),
                    keep_going=keep_going,
                    implied=implied,
                    address=address,
                    artifacts=artifacts,
                )
                module.execute(session)
            counts = dict(listener.counts)
    records = tuple(session.records[planned.key] for planned in selected)
    if allowed is None and all(record["status"] == "not_run" for record in records):
        needs = "\n".join(dict.fromkeys(record["message"] for record in records))
        raise MissingResource(f"nothing of profile {profile} can run here:\n{needs}")
    return Outcome(
        name=plan.name, profile=profile, records=records, counts=counts, stopped=session.stopped
    )


def environment_of(device: str) -> dict[str, Any]:
    """Return what records say of this machine; fixes the number of threads."""
    from repro import environment

    environment.set_threads()
    return environment.capture(device)
