"""What the suite itself costs: cells that do nothing, 64 workers, and reading a large store again."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HELP = "cost of a no-op cell, throughput of 64 simulated workers under Ray, reading 100,000 items"
CELL_BAR_MS = 10.0
MEMORY_BAR_BYTES = 500 * 10**6
READ_BAR_SECONDS = 2.0
THROUGHPUT_BAR = 0.95
WORKERS = 64
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
        cell), ``peak_memory_bytes`` of this process after them, ``items``, ``read_seconds``, the
        same under ``cpu`` as processor time (what another load on the machine does not change),
        ``workers``, ``ray_ms`` (per cell that takes no time) and ``throughput`` (of cells of one
        second, as a share of the ideal; both None without Ray), and ``bars``: name -> kept or not.
    """
    import torch  # noqa: F401 - its import is no cost of a cell

    from repro.environment import peak_memory

    cells = 200 if quick else 10_000
    items = 10_000 if quick else 100_000
    with tempfile.TemporaryDirectory() as folder, _plugins(Path(folder) / "plugins"):
        first, reused, planned = _cell_costs(Path(folder), cells)
        memory = peak_memory("cpu")
        ray_seconds, throughput = _ray_costs(Path(folder), 2 if quick else 20, cells)
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
    found |= {"peak_memory_bytes": memory, "workers": WORKERS, "throughput": throughput}
    found["ray_ms"] = None if ray_seconds is None else 1e3 * ray_seconds / cells
    found["bars"] = {
        f"a no-op cell costs at most {CELL_BAR_MS:g} ms": wall["first_ms"] <= CELL_BAR_MS,
        f"the driver takes at most {MEMORY_BAR_BYTES / 1e6:g} MB": memory <= MEMORY_BAR_BYTES,
        f"reading takes at most {READ_BAR_SECONDS:g} s": wall["read_seconds"] <= READ_BAR_SECONDS,
    }
    if throughput is not None:
        found["bars"] |= {
            f"under Ray it costs at most {CELL_BAR_MS:g} ms": found["ray_ms"] <= CELL_BAR_MS,
            f"{WORKERS} workers reach {THROUGHPUT_BAR:.0%} of the ideal throughput": throughput
            >= THROUGHPUT_BAR,
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


def _ray_costs(folder: Path, rounds: int, cells: int) -> tuple[float | None, float | None]:
    """Return seconds of the driver for no-op cells, and the share of the ideal throughput.

    The driver, its calls through Ray and its store are the real ones; the workers are simulated:
    one process plays them all, and a cell is a pause.
    """
    try:
        import ray
    except ImportError:
        return None, None
    from repro.executors import ray as executor

    with executor.cluster(ray, None, cpus=WORKERS + 1):
        remote: Any = ray.remote(_Simulation)
        simulation = remote.options(num_cpus=1, max_concurrency=2 * WORKERS).remote()
        ray.get(simulation.ready.remote())

        def seconds(number: int, pause: float) -> float:
            session = _session(folder / f"pause-{pause:g}", number)
            made = SimpleNamespace(remote=lambda *_: _Simulated(simulation, pause))
            actors = SimpleNamespace(options=lambda **_: made)
            request = executor.Request()
            pool = executor.Pool(ray, session, request, session.pending(), actor_class=actors)
            started = time.perf_counter()
            pool.drain()
            assert len(session.records) == number
            return time.perf_counter() - started

        idle = seconds(cells, 0.0)
        return idle, rounds / seconds(rounds * WORKERS, 1.0)


class _Simulation:
    """The process that plays all workers."""

    async def ready(self) -> dict[str, Any]:
        import ray

        return {
            "environment": {"environment_id": "simulated"},
            "healthy": True,
            "shared": True,
            "worker": "simulated",
            "node": ray.get_runtime_context().get_node_id(),
            "warnings": [],
        }

    async def run(self, planned: dict[str, Any], pause: float) -> dict[str, Any]:
        from repro.store import make_record, now

        await asyncio.sleep(pause)
        record = make_record(planned["key"], planned["cell"], "ok", created=now(), seconds=pause)
        return {"record": record, "healthy": True, "warnings": []}

    async def progress(self, key: str, offset: int) -> tuple[int, int, bytes]:
        del key, offset
        return 0, 1, b""


class _Simulated:
    """One worker, as the pool sees an actor."""

    def __init__(self, simulation: Any, pause: float) -> None:
        self.progress = simulation.progress
        self.ready = SimpleNamespace(remote=lambda device: simulation.ready.remote())
        self.run = SimpleNamespace(remote=lambda cell, items: simulation.run.remote(cell, pause))


def _session(folder: Path, cells: int) -> Any:
    """Return a session of so many cells that differ in their task."""
    from repro import executors
    from repro.plan import Plan, PlannedCell
    from repro.progress import Quiet
    from repro.store import RunStore

    planned = []
    for index in range(cells):
        measured = {"name": "bench_noop", "options": {"task": f"t{index}"}}
        cell: dict[str, Any] = {"subject": "bench_noop:one", "measurement": measured, "seed": 0}
        cell |= {"method": {"slug": "dense", "config": {}}, "device": "cpu"}
        cell["label"] = f"cell {index}"
        planned.append(PlannedCell(key=f"{index:064x}", cell=cell, estimate_seconds=1.0))
    plan = Plan(name="noop", profile="noop", device="cpu", manifest={}, cells=tuple(planned))
    environment = {"environment_id": "simulated"}
    return executors.Session(plan, planned, RunStore(folder), environment, Quiet())


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
        "cost of the suite", "by the clock", "processor", title="runner", title_justify="left"
    )
    rows = {
        f"no-op cell, first run of {found['cells']:,} (inline)": ("first_ms", "{:.2f} ms"),
        "no-op cell, reused": ("reused_ms", "{:.2f} ms"),
        "checking and planning, a cell": ("plan_ms", "{:.2f} ms"),
        f"opening a cell of {found['items']:,} items": ("read_seconds", "{:.2f} s"),
    }
    for text, (name, form) in rows.items():
        table.add_row(text, form.format(found[name]), form.format(found["cpu"][name]))
    table.add_row("peak memory of the driver", f"{found['peak_memory_bytes'] / 1e6:.0f} MB", "")
    if found["throughput"] is None:
        table.add_row("under Ray", "not run: needs Ray", "")
    else:
        workers = f"{found['workers']} simulated workers under Ray"
        table.add_row(f"no-op cell, {workers}", f"{found['ray_ms']:.2f} ms", "")
        table.add_row(f"cells of 1 s, {workers}", f"{found['throughput']:.1%} of ideal", "")
    console.print(table)
    for bar, kept in found["bars"].items():
        console.print(f"{'kept' if kept else 'BROKEN'}: {bar}")
