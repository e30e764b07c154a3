"""What a run tells of itself while it runs: kept by the driver, read by ``repro status``.

    runs/<name>/<profile>/<device>.live     JSON, written anew every few seconds

The records are the truth; this file only adds what no record holds: what runs now, and where.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from repro.errors import BadInput, Fault, MachineFault, near_matches
from repro.plan import matches
from repro.progress import Pace
from repro.store import FAILED, RunStore, write_atomically

if TYPE_CHECKING:
    from repro.plan import PlannedCell

SUFFIX = ".live"
BEAT_SECONDS = 2.0
# A driver that was silent for so long is dead; storing may block for a while on a slow disk.
SILENT_SECONDS = 20.0


class Journal:
    """A listener that keeps the state of the run in a file, with a sign of life."""

    def __init__(self, path: Path, *, total: int, estimate_seconds: float) -> None:
        self.path = path
        self._guard = threading.Lock()
        self._stop = threading.Event()
        self._total = total
        self._counts: Counter[str] = Counter()
        self._running: dict[str, dict[str, Any]] = {}
        self._workers: dict[str, dict[str, Any]] = {}
        self._pace = Pace(estimate_seconds)
        self._thread = threading.Thread(target=self._beat, name="journal", daemon=True)

    def __enter__(self) -> Self:
        self._write("running")
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._stop.set()
        self._thread.join()
        self._write("finished" if kind is None else "stopped")

    def started(self, planned: PlannedCell, worker: str) -> None:
        with self._guard:
            self._running[planned.key] = {
                "key": planned.key,
                "label": planned.label,
                "worker": worker,
                "since": time.time(),
                "done": 0,
                "total": 0,
            }

    def progress_of(self, planned: PlannedCell) -> Callable[[int, int], None]:
        def note(done: int, total: int) -> None:
            with self._guard:
                if planned.key in self._running:
                    self._running[planned.key].update(done=done, total=total)

        return note

    def finished(self, planned: PlannedCell, record: dict[str, Any], *, cached: bool) -> None:
        with self._guard:
            self._counts["cached" if cached else record["status"]] += 1
            self._pace.finished(planned, cached=cached)
            running = self._running.pop(planned.key, None)
            if running is not None:
                none: dict[str, Any] = {"cells": 0, "items": 0, "seconds": 0.0}
                worker = self._workers.setdefault(running["worker"], none)
                worker["cells"] += 1
                asked = (record.get("settled") or {}).get("asked")
                worker["items"] += asked or len((record.get("items") or {}).get("keys") or ())
                worker["seconds"] = round(worker["seconds"] + (record.get("seconds") or 0.0), 3)

    def message(self, text: str) -> None:
        pass

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            self._write("running")

    def _write(self, state: str) -> None:
        with self._guard:
            body = {
                "state": state,
                "updated": time.time(),
                "total": self._total,
                "counts": dict(self._counts),
                "left_seconds": self._pace.left(),
                "running": list(self._running.values()),
                "workers": self._workers,
            }
            text = json.dumps(body, ensure_ascii=False)
        # A full disk ends the run where it stores records; this file is not worth it.
        with contextlib.suppress(MachineFault):
            write_atomically(self.path, text.encode() + b"\n")


def path_of(store: RunStore, name: str, profile: str, device: str) -> Path:
    """Return where the journal of a run lies."""
    return store.root / name / profile / f"{device}{SUFFIX}"


def find(store: RunStore, run: str) -> tuple[str, str]:
    """Return (name, profile) of ``<name>`` or ``<name>/<profile>``.

    Raises:
        BadInput: If there is none, or several profiles of that name.
    """
    known = store.runs()
    name, _, profile = run.partition("/")
    matching = [pair for pair in known if pair[0] == name and profile in ("", pair[1])]
    if len(matching) == 1:
        return matching[0]
    told = ["/".join(pair) for pair in (matching or known)]
    remedy = near_matches(run, told) if not matching else f"one of {', '.join(told)}"
    rule = f"one run of {store.root}, as <name>/<profile>"
    raise BadInput(Fault("status", "the run", rule, run, remedy))


def examine(store: RunStore, name: str, profile: str) -> dict[str, Any]:
    """Return the state of a run: counts by outcome, and what its driver said last.

    Returns:
        ``name``, ``profile``, ``state`` (``running``, ``finished``, ``stopped``), ``silent_seconds``
        (since the driver's last sign of life, None if it never ran), ``total`` (cells), ``counts``
        (outcome -> cells), ``failed`` (label -> message), ``running``, ``workers``, ``left_seconds``.
    """
    records = store.records(name, profile)
    counts = Counter(record["status"] for record in records)
    failed = {
        record["cell"]["label"]: f"{record['status']}: {record['message']}"
        for record in records
        if record["status"] in FAILED
    }
    found: dict[str, Any] = {
        "name": name,
        "profile": profile,
        "state": "finished" if not counts["not_run"] else "stopped",
        "silent_seconds": None,
        "total": len(records),
        "counts": dict(sorted(counts.items())),
        "failed": failed,
        "running": [],
        "workers": {},
        "left_seconds": None,
    }
    live = _latest(store.root / name / profile)
    if live is None:
        return found
    silent = max(time.time() - live["updated"], 0.0)
    found["silent_seconds"] = round(silent, 1)
    found["workers"] = live["workers"]
    if live["state"] == "running" and silent < SILENT_SECONDS:
        found.update(state="running", running=live["running"], left_seconds=live["left_seconds"])
    elif live["state"] != "finished":
        found["state"] = "stopped"
    return found


def logs(store: RunStore, name: str, profile: str, cell: str) -> list[dict[str, Any]]:
    """Return what is known of the cells that match, in the plan's order.

    Args:
        cell: The beginning of a key, or text or a shell pattern of a label.

    Returns:
        Per record ``key``, ``status``, ``message``, ``label``, ``log`` (the traceback) and
        ``output`` (what it printed), empty if none; no record for a cell that has not run.

    Raises:
        BadInput: If no cell matches.
    """
    cells = [entry for index in store.indexes(name, profile) for entry in index["cells"]]
    labels = {entry["key"]: entry["cell"]["label"] for entry in cells}
    chosen = [k for k, label in labels.items() if k.startswith(cell) or matches(label, cell)]
    found = []
    for key in chosen:
        for folder in store.folders(key):
            record = folder.read_record(warn=store.warn)
            if record is not None:
                told = {name: record[name] for name in ("key", "status", "message")}
                texts = {"log": folder.read_log(), "output": folder.read_output()}
                found.append({**told, "label": labels[key], **texts})
    if not chosen:
        remedy = near_matches(cell, labels.values())
        rule = f"part of a label or of a key of {name}/{profile}"
        raise BadInput(Fault("logs", "the cell", rule, cell, remedy))
    return found


def _latest(folder: Path) -> dict[str, Any] | None:
    """Return the journal with the latest sign of life; one that cannot be read counts as none."""
    found = []
    for path in folder.glob(f"*{SUFFIX}"):
        with contextlib.suppress(ValueError, OSError):
            found.append(json.loads(path.read_bytes()))
    return max(found, key=lambda live: live["updated"], default=None)
