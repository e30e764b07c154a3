"""The bench runner: kernel suites (``kernels/<name>/bench.py``) and the modules of this folder.

A module ``repro/bench/<name>.py`` offers ``HELP: str`` and ``run(*, quick, console) -> dict``.
Kernel benches need torch, triton and, for the table alone, Rich.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import itertools
import json
import os
import pkgutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from repro.errors import BadInput, Fault, MachineFault, near_matches

_NOT_BENCHES = {"suite"}


def kernel_names() -> list[str]:
    """Return the kernels that have a bench."""
    from repro import kernels

    return sorted(
        module.name
        for module in pkgutil.iter_modules(kernels.__path__)
        if module.ispkg and importlib.util.find_spec(f"repro.kernels.{module.name}.bench")
    )


def module_names() -> list[str]:
    """Return the benches of the suite itself."""
    return sorted(
        module.name
        for module in pkgutil.iter_modules(__path__)
        if module.name not in _NOT_BENCHES and not module.name.startswith("_")
    )


def names() -> list[str]:
    """Return everything that ``run`` accepts."""
    return sorted({*kernel_names(), *module_names()})


def run(
    chosen: Sequence[str] = (),
    *,
    device: str = "cpu",
    quick: bool = False,
    console: Any = None,
    record: str | Path | None = None,
) -> dict[str, Any]:
    """Run benches, print a line per case and a table for each, and return everything, JSON-able.

    Args:
        chosen: Names; none means every kernel, then the suite itself.
        device: ``cpu`` or ``cuda``; without a CUDA device its cases are listed as not run.
        quick: Fewer and smaller cases, shorter timing.
        console: Rich console to print to, or None.
        record: Folder that keeps the rows of each case once it is measured, see ``write_records``.

    Returns:
        ``environment``, ``quick``, ``rows`` (one per kernel case x implementation) and
        ``benches`` (name -> what the module returned).

    Raises:
        BadInput: If a name is unknown, or the device is neither cpu nor cuda.
    """
    _check(chosen, device)
    from repro import environment
    from repro.bench import _table

    environment.set_threads()
    here = environment.capture(device if _has(device) else "cpu")
    result: dict[str, Any] = {"environment": here, "quick": quick, "rows": [], "benches": {}}
    for name in chosen or [*kernel_names(), *module_names()]:
        if name not in kernel_names():
            module = importlib.import_module(f"repro.bench.{name}")
            result["benches"][name] = module.run(quick=quick, console=console)
            continue
        shown = []
        for rows in _run_kernel(name, device, quick, console):
            stamp = {
                "environment_id": here["environment_id"],
                "quick": quick,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            stamped = [row | stamp for row in rows]
            shown += stamped
            if record is not None:
                write_records({"environment": here, "rows": stamped}, record)
        _table.show(f"{name} on {device}", shown, console)
        result["rows"] += shown
    return result


def write_records(results: Mapping[str, Any], path: str | Path = "results/kernels") -> Path | None:
    """Merge the rows of a run into ``<path>/records/<environment_id>.jsonl``.

    A row replaces the one of the same kernel, case and implementation; rows that were not run
    are left out, so that a machine without a GPU never erases what one with a GPU measured.

    Returns:
        The file, or None if there was nothing to write.
    """
    measured = [row for row in results["rows"] if row["status"] != "not_run"]
    if not measured:
        return None
    here = results["environment"]
    target = Path(path) / "records" / f"{here['environment_id']}.jsonl"
    merged = {_identity(row): row for row in _read_rows(target)}
    merged |= {_identity(row): row | {"environment": here} for row in measured}
    text = "".join(
        json.dumps(merged[key], sort_keys=True, allow_nan=False) + "\n" for key in sorted(merged)
    )
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, target)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise MachineFault(f"bench: cannot write {target}: {error.strerror}") from error
    return target


def _identity(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["kernel"], row["case"], row["implementation"]


def _read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise BadInput(Fault(f"{path}:{number}", "a record", "one JSON object", line)) from None
    return rows


def _run_kernel(
    name: str, device: str, quick: bool, console: Any
) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of each case."""
    from repro.bench import _run

    suite = importlib.import_module(f"repro.kernels.{name}.bench").SUITE
    if not _has(device):
        yield _run.rows_without_device(suite, device, quick, "needs a CUDA device")
        return
    import torch

    total = len(list(suite.cases(device, quick)))
    rows = _run.run_suite(suite, torch.device(device), quick=quick)
    for number, (case, group) in enumerate(itertools.groupby(rows, lambda row: row["case"]), 1):
        yield list(group)
        if console is not None:
            console.print(f"{name}: {number} of {total} measured, {case}", highlight=False)


def _has(device: str) -> bool:
    if device == "cpu":
        return True
    import torch

    return torch.cuda.is_available()


def _check(chosen: Iterable[str], device: str) -> None:
    known = names()
    faults = [
        Fault("bench", "a name", "a known bench", name, near_matches(name, known))
        for name in chosen
        if name not in known
    ]
    if device not in ("cpu", "cuda"):
        faults.append(Fault("bench", "device", "cpu or cuda", device))
    if faults:
        raise BadInput(faults)
