"""The Ray executor: one actor per subject group, on this machine or on a running cluster.

The driver enforces the time limit of a cell by ending the actor's process, starts a dead actor
again and goes on. Only a fault of the machine is tried again; a cell's own error never is. An
actor on the driver's file system writes to the same store, any other one sends its files back.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repro.errors import BadInput, Fault, MachineFault, MissingResource
from repro.executors import Session, by_subject
from repro.plan import PlannedCell

if TYPE_CHECKING:
    from collections.abc import Callable

INFRA_TRIES = 2  # how often a cell is started whose machine fails
READY_TRIES = 5  # starts of a process before its machine counts as broken
POLL_SECONDS = 0.2
OBJECT_STORE_BYTES = 100 * 2**20  # records travel, tensors do not


def execute(session: Session) -> None:
    """Run the pending cells of a session.

    Raises:
        MissingResource: If Ray is not installed.
        BadInput: If the cluster at the address cannot be joined.
        MachineFault: If the store cannot be written.
        KeyboardInterrupt: On Ctrl-C; everything finished is stored.
    """
    try:
        import ray
    except ImportError:
        raise MissingResource(
            "executor ray: Ray is not installed; pip install 'repro[cluster]', or --executor inline"
        ) from None
    pending = session.pending()
    if not pending:
        return
    # Ray prints the death of a worker to standard output, where tables and JSON go; the session
    # tells it in one line.
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        _cluster(ray, session.address),
    ):
        actor_class = _actor_class(ray, session)
        groups = [_Group(ray, actor_class, session, cells) for cells in by_subject(pending)]
        try:
            _drive(ray, groups)
        finally:
            for group in groups:
                group.stop()


@contextlib.contextmanager
def _cluster(ray: Any, address: str | None) -> Iterator[None]:
    """Start a local cluster, or join one; stop only what was started here."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    from repro.environment import usable_cpus

    common: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    in_main_thread = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if address is None:
        ray.init(
            address="local",
            num_cpus=usable_cpus(),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _node_ip_address="127.0.0.1",
            **common,
        )
    else:
        try:
            ray.init(address=address, **common)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            rule = "a running Ray cluster, such as auto or ray://host:10001"
            raise BadInput(Fault("--address", "the address", rule, address, reason)) from error
    if in_main_thread:  # Ray puts its own handlers; a run ends by KeyboardInterrupt
        for number, handler in handlers.items():
            signal.signal(number, handler)
    try:
        yield
    finally:
        ray.shutdown()


def _drive(ray: Any, groups: list[_Group]) -> None:
    """Hand out cells and take in records until every group is done."""
    active = [group for group in groups if group.advance()]
    while active:
        waiting = [group.call for group in active]
        done, _ = ray.wait(waiting, num_returns=1, timeout=POLL_SECONDS)
        for group in list(active):
            if group.call in done:
                group.collect()
            else:
                group.watch()
            if group.call is None and not group.advance():
                active.remove(group)


class _Group:
    """The cells of one subject and the actor that runs them."""

    def __init__(
        self, ray: Any, actor_class: Any, session: Session, cells: list[PlannedCell]
    ) -> None:
        self.ray = ray
        self.session = session
        self.cells = list(cells)
        self.actor = actor_class.remote(str(session.store.root.absolute()), _token(session))
        self.call: Any = None  # the call that the driver waits for
        self.current: PlannedCell | None = None
        self.machine: str | None = None  # None until the actor said that it is there
        self.shared = True
        self.tries: dict[str, int] = {}
        self._began = 0.0
        self._report: Callable[[int, int], None] = lambda done, total: None
        self._progress_call: Any = None

    def advance(self) -> bool:
        """Make the next call to the actor; tell whether there was any left to make."""
        if self.call is not None:
            return True
        if not self.cells:
            self.stop()
            return False
        if self.machine is None:
            self.call = self.actor.ready.remote(self.cells[0].cell["device"])
            return True
        planned = self.cells.pop(0)
        if self._known(planned) or self.session.settled_without_running(planned):
            return self.advance()
        self.current = planned
        self.tries[planned.key] = self.tries.get(planned.key, 0) + 1
        self.session.listener.started(planned)
        self._report = self.session.listener.progress_of(planned)
        self._began = time.monotonic()
        items = None if self.shared else self._items(planned)
        self.call = self.actor.run.remote(planned.to_json(), items)
        return True

    def collect(self) -> None:
        """Take in the outcome of the call that ended."""
        call, self.call = self.call, None
        planned, self.current = self.current, None
        try:
            result = self.ray.get(call)
        except self.ray.exceptions.RayError as error:
            self._actor_failed(planned, error)
            return
        for text in result["warnings"]:
            self.session.listener.message(text)
        if result.get("fault"):
            raise MachineFault(result["fault"])
        if planned is None:
            self.machine, self.shared = result["machine"], result["shared"]
            return
        if not self.shared:
            self._keep(planned, result)
        self.session.finish(planned, result["record"])
        if not result["healthy"]:
            self._restart()

    def watch(self) -> None:
        """Show how far the running cell is, and end it when its time is over."""
        if self.current is None:
            return  # groups wait for one another's resources as long as it takes
        limit = self.session.plan.timeout_seconds
        if time.monotonic() - self._began > limit:
            planned, self.current, self.call = self.current, None, None
            self._restart()
            self.session.settle(planned, "timeout", f"took longer than {limit:g} s")
            return
        if self._progress_call is None:
            self._progress_call = self.actor.progress.remote()
        elif self.ray.wait([self._progress_call], timeout=0)[0]:
            with contextlib.suppress(self.ray.exceptions.RayError):
                done, total = self.ray.get(self._progress_call)
                if total:
                    self._report(done, total)
            self._progress_call = None

    def stop(self) -> None:
        """End the actor for good."""
        if self.actor is not None:
            with contextlib.suppress(Exception):
                self.ray.kill(self.actor, no_restart=True)
            self.actor = None

    def _restart(self) -> None:
        self.ray.kill(self.actor, no_restart=False)
        self.machine = None
        self._progress_call = None

    def _actor_failed(self, planned: PlannedCell | None, error: Exception) -> None:
        """Try the cell again if its process died, up to a limit; a dead machine ends the group."""
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        self.machine = None
        self._progress_call = None
        if planned is None:
            for cell in self.cells:
                self.session.settle(cell, "infra", f"no worker could be started: {reason}")
            self.cells = []
        elif "low on memory" in str(error):
            self.session.settle(planned, "oom", "the machine ran low on memory")
        elif self.tries[planned.key] < INFRA_TRIES:
            self.session.listener.message(f"{planned.label}: its worker died, trying again")
            self.cells.insert(0, planned)
        else:
            self.session.settle(planned, "infra", f"its worker died: {reason}")

    def _known(self, planned: PlannedCell) -> bool:
        """Tell whether the actor's machine, where it is another one, has the record already."""
        if self.machine in (None, self.session.machine):
            return False
        record = self.session.store.finished(planned.key, str(self.machine))
        if record is not None:
            self.session.reuse(planned, record)
        return record is not None

    def _items(self, planned: PlannedCell) -> bytes | None:
        path = self.session.store.cell(planned.key, str(self.machine)).items_path
        return path.read_bytes() if path.exists() else None

    def _keep(self, planned: PlannedCell, result: dict[str, Any]) -> None:
        """Store what an actor on another file system sent."""
        from repro.store import write_atomically

        folder = self.session.store.cell(planned.key, str(self.machine))
        write_atomically(folder.items_path, result["items"])
        if result["log"]:
            folder.write_log(result["log"])
        folder.write_record(result["record"])


def _token(session: Session) -> str:
    """Return the text of the driver's lock: an actor that reads the same shares the store."""
    try:
        return (session.store.root / ".lock").read_text()
    except OSError:
        return ""


def _actor_class(ray: Any, session: Session) -> Any:
    """Return the remote class with the resources of a group and the environment of this process."""
    import repro
    from repro.environment import usable_cpus

    here = str(Path(repro.__file__).parents[1])
    paths = [*filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), here]
    variables = {
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        # Ray would set the number of threads to the actor's CPUs; inline takes what is usable.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(usable_cpus())),
    }
    for name in ("REPRO_THREADS", "TRITON_INTERPRET", "HF_HOME", "HF_HUB_OFFLINE"):
        if name in os.environ:
            variables[name] = os.environ[name]
    gpus = max(int(session.plan.resources.get("gpus", 0)), session.plan.device == "cuda")
    options = {
        # Two groups at once on the same cores would spoil each other's timings.
        "num_cpus": 1 if gpus else usable_cpus(),
        "num_gpus": gpus,
        "max_restarts": -1,
        "max_task_retries": 0,
        "runtime_env": {"env_vars": variables},
    }
    members = {
        "progress": ray.method(concurrency_group="watch")(CellActor.progress),
        # Waits through a restart; running a cell again is the driver's decision alone.
        "ready": ray.method(max_task_retries=READY_TRIES)(CellActor.ready),
    }
    remote = ray.remote(concurrency_groups={"watch": 1})(type("Cells", (CellActor,), members))
    return remote.options(**options)


class CellActor:
    """Runs cells in a process of its own; the only code that is Ray's is around it."""

    def __init__(self, runs: str, token: str) -> None:
        from repro.store import RunStore
        from repro.worker import Worker

        try:
            self.shared = bool(token) and (Path(runs) / ".lock").read_text() == token
        except OSError:
            self.shared = False
        self._warnings: list[str] = []
        self._progress = (0, 0)
        root = runs if self.shared else tempfile.mkdtemp(prefix="repro-")
        self.worker = Worker(RunStore(root, warn=self._warnings.append))

    def ready(self, device: str) -> dict[str, Any]:
        """Return which machine this is and whether it shares the driver's store."""
        from repro.store import environment_key

        machine = environment_key(self.worker.environment(device))
        return {
            "machine": machine,
            "shared": self.shared,
            "host": socket.gethostname(),
            "warnings": [],
        }

    def run(self, planned_json: dict[str, Any], items: bytes | None) -> dict[str, Any]:
        """Run one cell; return its record, and its files if the store is not shared."""
        planned = PlannedCell.from_json(planned_json)
        self._progress = (0, 0)
        folder = self.worker.folder(planned)
        result: dict[str, Any] = {"record": None, "healthy": True}
        try:
            if items is not None and not folder.items_path.exists():
                folder.items_path.parent.mkdir(parents=True, exist_ok=True)
                folder.items_path.write_bytes(items)
            record = self.worker.run(planned, self._note)
            result["record"] = record
            if record["status"] in ("crashed", "oom"):
                result["healthy"] = self.worker.healthy(planned.cell["device"])
        except MachineFault as error:
            result["fault"] = str(error)
        result["warnings"] = list(self._warnings)
        self._warnings.clear()
        if not self.shared:
            has_items, has_log = folder.items_path.exists(), folder.log_path.exists()
            result["items"] = folder.items_path.read_bytes() if has_items else b""
            result["log"] = folder.log_path.read_text() if has_log else ""
        return result

    def progress(self) -> tuple[int, int]:
        """Return (done, total) of the running cell."""
        return self._progress

    def _note(self, done: int, total: int) -> None:
        self._progress = (done, total)
