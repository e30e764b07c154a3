"""What the suite itself costs: cells that do nothing, and reading a large store again."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HELP = "cost of a no-op cell through `repro run`, planned, run and reused; reading 100,000 items"
CELL_BAR_MS = 10.0
READ_BAR_SECONDS = 2.0
Cost = tuple[float, float]  # seconds by the clock, seconds of the processor

_MEASUREMENT = """
from dataclasses import dataclass
from repro.measurements import Measurement

@dataclass(frozen=True, kw_only=True)
class Options:
    cells: int = 1

MEASUREMENT = Measurement(
    name="bench_noop", options=Options, run=lambda context: {"metrics": {}},
    expand=lambda options: [{"task": f"t{i}"} for i in range(options.cells)],
)
"""
_SUBJECT = """
import torch
from repro.subjects import Subject, SubjectInfo

def describe(rest):
    return SubjectInfo(name=f"bench_noop:{rest}", kind="llm", revision="1", max_length=1)

def load(rest, *, device, dtype):
    return Subject(info=describe(rest), model=None, tokenizer=None, device=torch.device(device),
                   dtype=getattr(torch, dtype))
"""


def run(*, quick: bool, console: Any) -> dict[str, Any]:
    """Measure and print the costs.

    Returns:
        ``cells``, ``first_ms`` and ``reused_ms`` (per cell, inline, all included), ``plan_ms`` (per
        cell), ``items``, ``read_seconds``, the same under ``cpu`` as processor time (what another
        load on the machine does not change), and ``bars``: name -> whether it is kept.
    """
    import torch  # noqa: F401 - its import is no cost of a cell

    cells = 200 if quick else 1000
    items = 10_000 if quick else 100_000
    with tempfile.TemporaryDirectory() as folder, _plugins(Path(folder) / "plugins"):
        first, reused, planned = _cell_costs(Path(folder), cells)
        read = _read_cost(Path(folder), items)
    wall, cpu = (
        {
            "first_ms": 1e3 * first[clock] / cells,
            "reused_ms": 1e3 * reused[clock] / cells,
            "plan_ms": 1e3 * planned[clock] / cells,
            "read_seconds": read[clock],
        }
        for clock in (0, 1)
    )
    found: dict[str, Any] = {"cells": cells, "items": items, **wall, "cpu": cpu}
    found["bars"] = {
        f"a no-op cell costs at most {CELL_BAR_MS:g} ms": wall["first_ms"] <= CELL_BAR_MS,
        f"reading takes at most {READ_BAR_SECONDS:g} s": wall["read_seconds"] <= READ_BAR_SECONDS,
    }
    if console is not None:
        _print(found, console)
    return found


def _cell_costs(folder: Path, cells: int) -> tuple[Cost, Cost, Cost]:
    """Return the cost of the first run, of one that reuses it, and of the plan alone."""
    from repro import manifest, runner
    from repro.plan import make_plan

    path = folder / "noop.yaml"
    # Dense and nothing else: every cell is one task.
    path.write_text(
        "profiles:\n  noop:\n    subjects: [bench_noop:one]\n"
        f"    measurements: [{{bench_noop: {{cells: {cells}}}}}]\n"
    )

    def go() -> None:
        outcome = runner.run(
            path,
            profile="noop",
            runs=folder / "runs",
            executor="inline",
            device="cpu",
            quiet=True,
        )
        assert len(outcome.records) == cells

    # The state of the machine is asked once a process; its first call is no cost of a cell.
    runner.environment_of("cpu")
    planned = _cost(lambda: make_plan(manifest.load(path), "noop", device="cpu"))
    return _cost(go), _cost(go), planned


def _read_cost(folder: Path, number: int) -> Cost:
    """Return the cost of opening a store of so many items, as long as RULER's."""
    from repro.store import ItemFile

    path = folder / "many" / "items.jsonl"
    value = {"text": " 7312890 and 4412087", "new_tokens": 14, "seconds": 0.123, "depth": 0.5}
    with ItemFile(path) as items:
        items.put((f"niah_multikey_1-4096-{index:064x}", value) for index in range(number))

    def read() -> None:
        with ItemFile(path) as items:
            assert len(items) == number

    return _cost(read)


def _cost(function: Callable[[], Any]) -> Cost:
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


@contextlib.contextmanager
def _plugins(folder: Path) -> Iterator[None]:
    """Make the no-op subject and measurement known inside the block."""
    from repro import measurements, subjects

    for name, text in (("measurements", _MEASUREMENT), ("subjects", _SUBJECT)):
        (folder / name).mkdir(parents=True)
        (folder / name / "bench_noop.py").write_text(text)
    packages = (measurements, subjects)
    before = [package.__path__ for package in packages]
    for package in packages:
        name = package.__name__.rpartition(".")[2]
        package.__path__ = [*package.__path__, str(folder / name)]
    try:
        yield
    finally:
        for package, path in zip(packages, before, strict=True):
            package.__path__ = path
            sys.modules.pop(f"{package.__name__}.bench_noop", None)


def _print(found: dict[str, Any], console: Any) -> None:
    from rich.table import Table

    table = Table(
        "cost of the suite", "by the clock", "processor", title="runner_cost", title_justify="left"
    )
    rows = {
        f"no-op cell, first run of {found['cells']} (inline)": ("first_ms", "{:.2f} ms"),
        "no-op cell, reused": ("reused_ms", "{:.2f} ms"),
        "checking and planning, a cell": ("plan_ms", "{:.2f} ms"),
        f"opening a cell of {found['items']:,} items": ("read_seconds", "{:.2f} s"),
    }
    for text, (name, form) in rows.items():
        table.add_row(text, form.format(found[name]), form.format(found["cpu"][name]))
    console.print(table)
    for bar, kept in found["bars"].items():
        console.print(f"{'kept' if kept else 'BROKEN'}: {bar}")
