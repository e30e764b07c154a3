"""What runs in a worker's own process under Ray: the code of every executor, and nothing else."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Any

from repro.errors import MachineFault
from repro.plan import PlannedCell
from repro.store import make_record, now


class CellActor:
    """Runs cells one after another.

    Args:
        runs: The driver's run store.
        token: Text of the driver's lock: an actor that reads the same there shares the store, any
            other one keeps its own and sends its files.
        artifacts: Where calibrations are shared, None for the store.
        name: Of its own store: a process that takes the place of a dead one finds what that left.
    """

    def __init__(self, runs: str, token: str, artifacts: str | None, name: str) -> None:
        from repro.store import RunStore
        from repro.worker import Worker

        try:
            self.shared = bool(token) and (Path(runs) / ".lock").read_text() == token
        except OSError:
            self.shared = False
        self._warnings: list[str] = []
        self._progress = (0, 0)
        self._key = ""
        root = runs if self.shared else Path(tempfile.gettempdir()) / f"repro-{name}"
        self.worker = Worker(RunStore(root, warn=self._warnings.append), artifacts=artifacts)
        self._items: Path | None = None

    def close(self) -> None:
        """Remove what it kept, if that was for itself alone."""
        if not self.shared:
            shutil.rmtree(self.worker.store.root, ignore_errors=True)

    def ready(self, device: str) -> dict[str, Any]:
        """Return which machine this is, whether its device computes and it shares the store."""
        import ray

        return {
            "environment": self.worker.environment(device),
            "healthy": self.worker.healthy(device),
            "shared": self.shared,
            "worker": f"{socket.gethostname()}:{os.getpid()}",
            "node": ray.get_runtime_context().get_node_id(),
            "warnings": [],
        }

    def run(self, planned_json: dict[str, Any], items: bytes | None) -> dict[str, Any]:
        """Run one cell; return its record, and its files if the store is not shared."""
        planned = PlannedCell.from_json(planned_json)
        folder = self.worker.folder(planned)
        self._progress, self._items, self._key = (0, 0), None, planned.key
        result: dict[str, Any] = {"record": None, "healthy": True}
        try:
            if items is not None and not folder.items_path.exists():
                folder.items_path.parent.mkdir(parents=True, exist_ok=True)
                folder.items_path.write_bytes(items)
            self._items = folder.items_path
            died = "" if self.shared else folder.take_fatal()
            if died:  # of the process before, where the driver cannot see it
                record = self._died(planned, died)
                folder.write_record(record)
            else:
                record = self.worker.run(planned, self._note)
            result["record"] = record
            if record["status"] in ("crashed", "oom"):
                result["healthy"] = self.worker.healthy(planned.cell["device"])
        except MachineFault as error:
            result["fault"] = str(error)
        result["warnings"] = list(self._warnings)
        self._warnings.clear()
        if not self.shared:
            result["items"] = self._items_from(0)
            result["log"] = folder.read_log()
            result["output"] = folder.read_output()
        return result

    def _died(self, planned: PlannedCell, stack: str) -> dict[str, Any]:
        environment = self.worker.environment(planned.cell["device"])
        body = {"environment": environment, "created": now(), "seconds": 0.0}
        return make_record(planned.key, planned.cell, "crashed", stack.splitlines()[0], **body)

    def progress(self, key: str, offset: int) -> tuple[int, int, bytes]:
        """Return (done, total) of the running cell, and its stored items from a byte on.

        The items only where the store is not shared: the driver keeps them, so that they outlive
        this machine. Nothing for another cell than ``key``: the items of two cells have the same
        keys, and must never mix.
        """
        if key != self._key:
            return 0, 0, b""
        return (*self._progress, b"" if self.shared else self._items_from(offset))

    def _items_from(self, offset: int) -> bytes:
        if self._items is None or not self._items.exists():
            return b""
        with self._items.open("rb") as stream:
            stream.seek(offset)
            data = stream.read()
        return data[: data.rfind(b"\n") + 1]  # a batch may be half written now

    def _note(self, done: int, total: int) -> None:
        self._progress = (done, total)
