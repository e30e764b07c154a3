"""The worker: runs one cell in this process and types its outcome. Every executor runs this code.

ok           measured
oom          out of memory          timeout      longer than the cell may take
unsupported  known not to work      numerical    NaN or infinite where a number must stand
invalid      measured, not valid    crashed      any other error; its traceback is in log.txt
infra        the machine failed     implied      a shorter cell ran out of memory
not_run      budget, or something must be fetched first
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import math
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from repro import environment, measurements, registry, subjects
from repro.artifacts import ArtifactStore
from repro.errors import BadInput, MachineFault, MissingResource, ReproError
from repro.measurements import CellContext
from repro.method import Artifact, Method
from repro.output import captured
from repro.plan import PlannedCell
from repro.store import CellFolder, CellLocked, RunStore, Warn, environment_key, make_record, now

STATUSES = (
    "ok",
    "oom",
    "timeout",
    "unsupported",
    "numerical",
    "crashed",
    "infra",
    "implied",
    "not_run",
    "invalid",
)
# After these the model may be in an unknown state: the next cell loads it anew.
_RELOADS = frozenset({"crashed", "oom", "timeout", "numerical"})
TAIL_LINES = 20  # of the traceback, in the record of a failure
Progress = Callable[[int, int], None]


class CellTimeout(BaseException):
    """Raised inside a cell that took too long; no measurement can swallow it."""


class Settled(BaseException):
    """Raised inside a cell that may end early; no measurement can swallow it.

    ``body`` is that of its record.
    """

    def __init__(self, body: dict[str, Any]) -> None:
        super().__init__(body["message"])
        self.body = body


class Worker:
    """Runs cells one after another and keeps the subject of the last one loaded.

    ``artifacts`` is where calibrations are shared, a folder or URL; by default they lie in the store.
    """

    def __init__(
        self, store: RunStore, *, artifacts: str | None = None, warn: Warn | None = None
    ) -> None:
        self.store = store
        self.warn = warn or store.warn
        self.artifacts = ArtifactStore(artifacts or store.root / "artifacts", warn=self.warn)
        self._subject: subjects.Subject | None = None
        self._loaded: tuple[str, str, str] | None = None
        self._environment: dict[str, dict[str, Any]] = {}
        self._failed_artifacts: dict[str, Exception] = {}
        self._load_seconds = 0.0

    def environment(self, device: str) -> dict[str, Any]:
        """Return what records say of this machine; fixes the number of threads."""
        environment.set_threads()
        if device not in self._environment:
            self._environment[device] = environment.capture(device)
        return self._environment[device]

    def folder(self, planned: PlannedCell) -> CellFolder:
        """Return where a cell is kept on this machine."""
        machine = environment_key(self.environment(planned.cell["device"]))
        return self.store.cell(planned.key, machine)

    def run(
        self,
        planned: PlannedCell,
        progress: Progress,
        limit: AbstractContextManager[None] | None = None,
    ) -> dict[str, Any]:
        """Run one cell, store its record and return it; any failure is typed, not raised.

        Args:
            planned: The cell.
            progress: Is told (items done, items in all).
            limit: Raises ``CellTimeout`` in its block; no record is ever made inside.

        Raises:
            MachineFault: If the store cannot be written: no other cell could be kept either.
            KeyboardInterrupt: On Ctrl-C; finished items are stored.
        """
        folder = self.folder(planned)
        started = time.perf_counter()
        self._load_seconds = 0.0
        try:
            bounded = limit or contextlib.nullcontext()
            with folder.fatal_errors(), captured(folder.write_output), bounded:
                body = self._measure(planned, folder, progress)
        except (MachineFault, KeyboardInterrupt):
            raise
        except Settled as end:
            body = end.body
        except (Exception, CellTimeout, SystemExit) as error:  # noqa: BLE001 - becomes a record
            status, message = classify(error)
            stack = _printable(traceback.format_exc())
            if status == "crashed":
                folder.write_log(stack)
                message += f" (traceback: {folder.log_path})"
            body = {"status": status, "message": message}
            if status in _RELOADS:
                body["failure"] = {
                    "peak_memory_bytes": environment.peak_memory(planned.cell["device"]),
                    "log_tail": stack.splitlines()[-TAIL_LINES:],
                }
            # The traceback's frames hold the model and its activations.
            error.__traceback__ = None
        status, message = _outcome(planned, body)
        if status in _RELOADS:
            self.unload()
        record = make_record(
            planned.key,
            planned.cell,
            status,
            message,
            **{name: value for name, value in body.items() if name not in ("status", "message")},
            environment=self.environment(planned.cell["device"]),
            created=now(),
            load_seconds=round(self._load_seconds, 3),
            seconds=round(time.perf_counter() - started, 3),
        )
        folder.write_record(record)
        return record

    def unload(self) -> None:
        """Forget the subject and give its memory back."""
        self._subject = None
        self._loaded = None
        gc.collect()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            with contextlib.suppress(Exception):  # a lost device is found by ``healthy``
                torch.cuda.empty_cache()

    def healthy(self, device: str) -> bool:
        """Tell whether the device still computes; a sticky CUDA error fails every later call."""
        if device == "cpu":
            return True
        import torch

        try:
            return float((torch.ones(64, device=device) * 2).sum()) == 128.0
        except Exception:  # noqa: BLE001 - a lost device fails in many ways
            return False

    def _measure(
        self, planned: PlannedCell, folder: CellFolder, progress: Progress
    ) -> dict[str, Any]:
        cell = planned.cell
        subject = self._load(cell)
        method, config = self._method(cell)
        artifact = self._artifact(planned, method, config, subject, progress)
        measured = cell["measurement"]
        _seed_everything(cell["seed"])
        with folder.items(warn=self.warn) as items:
            context = CellContext(
                subject=subject,
                method=method,
                config=config,
                artifact=artifact,
                options=measured["options"],
                seed=cell["seed"],
                items=items,
                cache=self.store.root / "cache",
                progress=progress,
            )
            if planned.stake is not None:
                self._watch(planned, context)
            body = dict(measurements.get(measured["name"]).run(context))
        figures = [] if artifact is None else artifact.metadata.get("figures", [])
        return body | ({"figures": figures} if figures else {})

    def _watch(self, planned: PlannedCell, context: CellContext) -> None:
        """Have every stored batch looked at: it may be the last that matters."""
        from repro.early import Watch

        scoring = measurements.early_scoring(planned.cell["measurement"]["name"])
        if scoring is not None:
            context.items = Watch(planned, context.items, scoring(context))
            context.items.look()

    def _load(self, cell: Mapping[str, Any]) -> subjects.Subject:
        wanted = (cell["subject"], cell["device"], cell["dtype"])
        if self._subject is None or self._loaded != wanted:
            started = time.perf_counter()
            self.unload()
            subject = subjects.load(wanted[0], device=wanted[1], dtype=wanted[2])
            if subject.info.revision != cell["subject_revision"]:
                raise MissingResource(
                    f"{wanted[0]}: revision must be {cell['subject_revision']}, got "
                    f"{subject.info.revision}; it changed after the plan was made, run again"
                )
            self._subject, self._loaded = subject, wanted
            self._load_seconds = time.perf_counter() - started
        return self._subject

    def _method(self, cell: Mapping[str, Any]) -> tuple[Method | None, Any]:
        slug = cell["method"]["slug"]
        if slug == registry.DENSE:
            return None, None
        method = registry.get(slug)
        return method, method.config(**_frozen(cell["method"]["config"]))

    def _artifact(
        self,
        planned: PlannedCell,
        method: Method | None,
        config: Any,
        subject: subjects.Subject,
        progress: Progress,
    ) -> Artifact | None:
        wanted = planned.artifact
        if wanted is None or method is None:
            return None
        if wanted["id"] in self._failed_artifacts:  # the same stage fails the same way again
            raise self._failed_artifacts[wanted["id"]]

        def make() -> Artifact:
            if method.calibrate is None:
                raise NotImplementedError(f"{method.slug}: needs an artifact and has no calibrate")
            data: Any = []
            if wanted["data"]:
                from repro.calibration import calibration_prompts

                data = calibration_prompts(subject, **wanted["data"])
            own: dict[str, Any] = {}
            if "workdir" in inspect.signature(method.calibrate).parameters:
                own["workdir"] = self.store.root / "calibration" / wanted["id"]
            return method.calibrate(subject, config, data, progress=progress, **own)

        try:
            return self.artifacts.get_or_make(wanted["id"], make, identity=wanted["identity"])
        except MachineFault:
            raise
        except Exception as error:
            error.add_note("in the calibration stage")
            self._failed_artifacts[wanted["id"]] = error
            raise


def classify(error: BaseException) -> tuple[str, str]:
    """Return (status, one-line message) of a failure."""
    lines = _printable(str(error)).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    if isinstance(error, CellTimeout):
        return "timeout", text
    if _is_out_of_memory(error):
        return "oom", text
    if isinstance(error, MissingResource):
        return "not_run", " ".join(lines)
    if isinstance(error, CellLocked):
        return "infra", text
    if isinstance(error, NotImplementedError):
        return "unsupported", text
    if isinstance(error, FloatingPointError):
        return "numerical", text
    if isinstance(error, ReproError) and not isinstance(error, BadInput):
        return "crashed", text
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    return "crashed", f"{type(error).__name__}: {text}{notes}"


def _printable(text: str) -> str:
    """Return text that a file can hold: a lone surrogate in a path or a token cannot be encoded."""
    return text.encode(errors="backslashreplace").decode()


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    # torch.OutOfMemoryError is a RuntimeError; the CPU allocator raises a bare one.
    text = str(error)
    return (
        type(error).__name__ == "OutOfMemoryError"
        or "out of memory" in text.lower()
        or "DefaultCPUAllocator: can't allocate memory" in text
        or "not enough memory: you tried to allocate" in text
    )


def _outcome(planned: PlannedCell, body: Mapping[str, Any]) -> tuple[str, str]:
    """Return the status of a body: its own, or what its numbers and its fallbacks show."""
    status, message = body.get("status", "ok"), body.get("message", "")
    if status not in STATUSES:
        return "crashed", f"the measurement returned the unknown status {status!r}"
    if status != "ok":
        return status, message
    for name, metric in (body.get("metrics") or {}).items():
        value = metric.get("value") if isinstance(metric, Mapping) else metric
        if isinstance(value, float) and not math.isfinite(value):
            return "numerical", f"metric {name} is {value}"
    slug = planned.cell["method"]["slug"]
    share = (body.get("patch") or {}).get("fallback_share")
    if slug != registry.DENSE and share is not None:
        limit = registry.get(slug).fallback_limit
        if share > limit:
            return "invalid", (
                f"{share:.1%} of the attention calls fell back to dense; {slug} allows {limit:.1%}"
            )
    return status, message


def _frozen(value: Any) -> Any:
    """Return JSON values as a frozen dataclass holds them: lists as tuples."""
    if isinstance(value, list):
        return tuple(_frozen(entry) for entry in value)
    if isinstance(value, dict):
        return {name: _frozen(entry) for name, entry in value.items()}
    return value


def _seed_everything(seed: int) -> None:
    """Seed the global generators: a cell's outcome must not depend on the cells before it."""
    import random

    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    # torch.manual_seed also queues a call, with a formatted stack, for every absent accelerator.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)
