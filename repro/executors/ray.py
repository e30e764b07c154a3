"""The Ray executor: one actor per device, on this machine or on a running cluster.

The driver hands out cells, enforces the time limit of a cell by ending the actor's process, starts
a dead actor again and goes on. Only a fault of the machine is tried again; a cell's own error never
is. An actor on the driver's file system writes to the same store, any other one sends its files.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repro import measurements
from repro.errors import BadInput, Fault, MachineFault, MissingResource
from repro.executors import Session, chain_of
from repro.executors._actor import CellActor
from repro.plan import PlannedCell
from repro.scheduling import Queue
from repro.store import environment_key

if TYPE_CHECKING:
    from collections.abc import Sequence

INFRA_TRIES = 3  # how often a cell is started whose machine fails
BACK_OFF_SECONDS = 1.0  # before the second try; twice that before the third
READY_TRIES = 5  # starts of a process before its machine counts as broken
POLL_SECONDS = 0.2
GROW_SECONDS = 5.0  # between two looks at what the cluster has
PROGRESS_SECONDS = 1.0
CLOSE_SECONDS = 5.0
HEAD_SECONDS = 10.0  # without the cluster's head before the run ends; Ray itself waits for 60
OBJECT_STORE_BYTES = 100 * 2**20  # records travel, tensors do not


@dataclass(frozen=True)
class Request:
    """What one worker holds as long as it lives."""

    cpus: float
    gpus: float

    def fits(self, node: dict[str, Any]) -> int:
        """Return how many workers a node (an entry of ``ray.nodes()``) has room for."""
        if not node["Alive"]:
            return 0
        has = node["Resources"]
        rooms = [
            int(has.get(name, 0.0) / wanted + 1e-9)
            for name, wanted in (("CPU", self.cpus), ("GPU", self.gpus))
            if wanted
        ]
        return min(rooms, default=1)


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
        cluster(ray, session.address),
    ):
        for request, cells in _phases(ray, session, pending):
            Pool(ray, session, request, cells).drain()


@contextlib.contextmanager
def cluster(ray: Any, address: str | None, *, cpus: int | None = None) -> Iterator[None]:
    """Start a local cluster, or join one; stop only what was started here.

    Args:
        ray: The package.
        address: Of a running cluster, None for a local one.
        cpus: What a local one offers; by default what this process may use.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    from repro.environment import usable_cpus

    common: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    in_main_thread = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if address is None:
        ray.init(
            address="local",
            num_cpus=cpus or usable_cpus(),
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


def _phases(
    ray: Any, session: Session, cells: Sequence[PlannedCell]
) -> list[tuple[Request, list[PlannedCell]]]:
    """Return what runs together: where several workers share a GPU, timings have it to themselves.

    A worker on the CPU takes a whole node, since two at once would spoil each other's timings and
    the number of threads is part of a record.
    """
    if session.plan.device == "cpu":
        counts = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
        return [(Request(min((c for c in counts if c >= 1), default=1.0), 0.0), list(cells))]
    gpus = float(session.plan.resources.get("gpus") or 1)
    if gpus >= 1:
        return [(Request(1.0, gpus), list(cells))]
    alone = [cell for cell in cells if _needs_device_alone(cell)]
    packed = [cell for cell in cells if not _needs_device_alone(cell)]
    phases = [(Request(1.0, gpus), packed), (Request(1.0, 1.0), alone)]
    return [(request, group) for request, group in phases if group]


def _needs_device_alone(planned: PlannedCell) -> bool:
    return measurements.get(planned.cell["measurement"]["name"]).alone


class Pool:
    """The workers of one phase and the cells they share.

    Args:
        ray: The package, connected.
        session: The run.
        request: What each worker holds.
        cells: In running order.
        actor_class: Remote class of the workers, ``CellActor`` by default.
    """

    def __init__(
        self,
        ray: Any,
        session: Session,
        request: Request,
        cells: Sequence[PlannedCell],
        *,
        actor_class: Any = None,
    ) -> None:
        self.ray = ray
        self.session = session
        self.request = request
        # With a budget, the session's order is the point.
        self.queue = Queue(cells, chain_of=chain_of, longest_first=session.allowance is None)
        self.later: list[tuple[float, PlannedCell]] = []  # cells to be tried again, and when
        self.tries: dict[str, int] = {}
        self.workers: list[_Worker] = []
        self.failed_starts = 0
        self._actor_class = actor_class or _actor_class(ray, session, request)
        self._head = _Head(ray)
        self._grew = -GROW_SECONDS

    def drain(self) -> None:
        """Hand out cells and take in records until none is left."""
        try:
            while self._has_work():
                self._take_up_again()
                if self.failed_starts >= READY_TRIES and not self.workers:
                    self._give_up()
                    return
                self._grow()
                for worker in self.workers:
                    worker.advance()
                self.workers = [worker for worker in self.workers if not worker.ended]
                self._wait()
        finally:
            for worker in self.workers:
                worker.stop()

    def _has_work(self) -> bool:
        return bool(len(self.queue) or self.later or any(w.current for w in self.workers))

    def _wait(self) -> None:
        calls = {worker.call: worker for worker in self.workers if worker.call is not None}
        if not calls:
            time.sleep(POLL_SECONDS)
            return
        done, _ = self.ray.wait(list(calls), num_returns=len(calls), timeout=0)
        if not done:
            done, _ = self.ray.wait(list(calls), num_returns=1, timeout=POLL_SECONDS)
        for call in done:
            calls[call].collect()
        for worker in self.workers:
            worker.watch()

    def _grow(self) -> None:
        """Start workers where the cluster has room: nodes come and go."""
        if time.monotonic() - self._grew < GROW_SECONDS:
            return
        if not self._head.answers():  # what asks it anything would wait, and end the process
            return
        self._grew = time.monotonic()
        room = sum(self.request.fits(node) for node in self.ray.nodes())
        # One at least, also where nothing fits now: it waits for its resources as long as it takes.
        wanted = min(max(room, 1), len(self.queue) + sum(1 for w in self.workers if w.current))
        while len(self.workers) < wanted:
            self.workers.append(_Worker(self, self._actor_class))

    def _give_up(self) -> None:
        """Settle what is left: no worker of the cluster can be started."""
        waiting = [planned for _, planned in self.later]
        while (planned := self.queue.take(None)) is not None:
            waiting.append(planned)
        for planned in waiting:
            self.session.settle(planned, "infra", "no worker could be started")
        self.later = []

    def _take_up_again(self) -> None:
        now = time.monotonic()
        due = [planned for when, planned in self.later if when <= now]
        self.later = [entry for entry in self.later if entry[0] > now]
        for planned in due:
            self.queue.put_back(planned)

    def try_again(
        self, planned: PlannedCell, reason: str, environment: dict[str, Any] | None
    ) -> None:
        """Run a cell again later whose machine failed, or give it up."""
        tries = self.tries[planned.key]
        if tries < INFRA_TRIES:
            pause = BACK_OFF_SECONDS * 2 ** (tries - 1)
            self.later.append((time.monotonic() + pause, planned))
            text = f"{planned.label}: its worker died ({reason}), trying again"
            self.session.listener.message(text)
        else:
            text = f"its worker died {tries} times: {reason}"
            self.session.settle(planned, "infra", text, environment=environment)
            self.queue.release(planned)


class _Head:
    """The process of the cluster that all others depend on, watched so that its end is told."""

    def __init__(self, ray: Any) -> None:
        self._address = ray.get_runtime_context().gcs_address
        # A client of another network reaches the client server alone, and Ray tells its end.
        self._watched = not ray.util.client.ray.is_connected()
        self._heard = time.monotonic()

    def answers(self) -> bool:
        """Tell whether it takes connections.

        Raises:
            MachineFault: If it has not for ``HEAD_SECONDS``.
        """
        if not self._watched:
            return True
        host, _, port = self._address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=2.0).close()
        except OSError:
            if time.monotonic() - self._heard > HEAD_SECONDS:
                raise MachineFault(
                    f"the head of the Ray cluster ({self._address}) does not answer; what is "
                    "finished is kept. Start the cluster again, then run the same command"
                ) from None
            return False
        self._heard = time.monotonic()
        return True


class _Worker:
    """An actor, the call that the driver waits for, and the cell that it runs."""

    def __init__(self, pool: Pool, actor_class: Any) -> None:
        self.pool = pool
        self.ray, self.session = pool.ray, pool.session
        runs = str(self.session.store.root.absolute())
        self.actor = actor_class.remote(runs, _token(self.session), self.session.artifacts)
        self.call: Any = None
        self.current: PlannedCell | None = None
        self.subject: str | None = None
        # What records say of its machine; None until the actor said that it is there.
        self.environment: dict[str, Any] | None = None
        self.shared = True
        self.name = ""
        self.ended = False
        self._not_before = 0.0
        self._began = 0.0
        self._asked = 0.0
        self._report: Callable[[int, int], None] = lambda done, total: None
        self._progress_call: Any = None

    @property
    def machine(self) -> str:
        """The name of its machine's folder in the store."""
        return environment_key(self.environment or self.session.environment)

    def advance(self) -> None:
        """Make the next call to the actor, if it is idle."""
        if self.call is not None or self.ended or time.monotonic() < self._not_before:
            return
        if self.environment is None:
            self.call = self.actor.ready.remote(self.session.plan.device)
            return
        while (planned := self.pool.queue.take(self.subject)) is not None:
            if self._known(planned) or self.session.settled_without_running(
                planned, environment=self.environment
            ):
                self.pool.queue.release(planned)
                continue
            self._start(planned)
            return
        if not self.pool.later:
            self.stop()

    def _start(self, planned: PlannedCell) -> None:
        self.current, self.subject = planned, planned.cell["subject"]
        self.pool.tries[planned.key] = self.pool.tries.get(planned.key, 0) + 1
        self.session.listener.started(planned, self.name)
        self._report = self.session.listener.progress_of(planned)
        self._began = self._asked = time.monotonic()
        self._progress_call = None  # what it answers is of the cell before
        items = None if self.shared else self._items(planned)
        self.call = self.actor.run.remote(planned.to_json(), items)

    def collect(self) -> None:
        """Take in the outcome of the call that ended."""
        call, self.call = self.call, None
        planned, self.current = self.current, None
        try:
            result = self.ray.get(call)
        except self.ray.exceptions.RayError as error:
            self._failed(planned, error)
            return
        for text in result["warnings"]:
            self.session.listener.message(text)
        if result.get("fault"):
            raise MachineFault(result["fault"])
        if planned is None:
            self._arrived(result)
            return
        if not self.shared:
            self._keep(planned, result)
        self.session.finish(planned, result["record"])
        self.pool.queue.release(planned)
        if not result["healthy"]:
            self._restart()

    def watch(self) -> None:
        """Show how far the running cell is, and end it when its time is over."""
        if self.current is None or self.call is None:
            return
        now, limit = time.monotonic(), self.session.plan.timeout_seconds
        if now - self._began > limit:
            planned, self.current, self.call = self.current, None, None
            text = f"took longer than {limit:g} s"
            self.session.settle(planned, "timeout", text, environment=self.environment)
            self._restart()
            self.pool.queue.release(planned)
        elif self._progress_call is None:
            if now - self._asked > PROGRESS_SECONDS:
                self._asked = now
                offset = 0 if self.shared else len(self._items(self.current) or b"")
                self._progress_call = self.actor.progress.remote(self.current.key, offset)
        elif self.ray.wait([self._progress_call], timeout=0)[0]:
            call, self._progress_call = self._progress_call, None
            with contextlib.suppress(self.ray.exceptions.RayError):
                done, total, items = self.ray.get(call)
                if total:
                    self._report(done, total)
                if items:
                    self._append(self.current, items)

    def stop(self) -> None:
        """End the actor for good."""
        if not self.ended:
            self.ended = True
            with contextlib.suppress(Exception):
                if not self.shared:
                    self.ray.wait([self.actor.close.remote()], timeout=CLOSE_SECONDS)
                self.ray.kill(self.actor, no_restart=True)

    def _arrived(self, ready: dict[str, Any]) -> None:
        """Take the actor in, unless its device does not compute."""
        self.environment, self.shared, self.name = (
            ready[name] for name in ("environment", "shared", "worker")
        )
        if not ready["healthy"]:
            self._refuse(f"{self.name}: its device does not compute")

    def _refuse(self, text: str) -> None:
        self.session.listener.message(text)
        self.pool.failed_starts += 1
        self.stop()

    def _restart(self) -> None:
        self.ray.kill(self.actor, no_restart=False)
        self._gone()

    def _gone(self) -> None:
        self.environment = self.subject = self._progress_call = None

    def _failed(self, planned: PlannedCell | None, error: Exception) -> None:
        """Try the cell again if its process died, up to a limit."""
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        environment = self.environment
        self._gone()
        if planned is None and isinstance(error, self.ray.exceptions.ActorUnavailableError):
            self._not_before = time.monotonic() + BACK_OFF_SECONDS  # it is being started again
        elif planned is None:
            self._refuse(f"a worker could not be started: {reason}")
        elif died := self.session.folder(planned).take_fatal():
            self.session.settle(planned, "crashed", died.splitlines()[0], environment=environment)
            self.pool.queue.release(planned)
        elif "low on memory" in str(error):
            text = "the machine ran low on memory"
            self.session.settle(planned, "oom", text, environment=environment)
            self.pool.queue.release(planned)
        else:
            self.pool.try_again(planned, reason, environment)

    def _known(self, planned: PlannedCell) -> bool:
        """Tell whether the actor's machine, where it is another one, has the record already."""
        if self.machine == self.session.machine:
            return False
        if self.session.fresh and not self.pool.tries.get(planned.key):
            self.session.store.cell(planned.key, self.machine).forget()
            return False
        record = self.session.store.finished(planned.key, self.machine)
        if record is not None:
            self.session.reuse(planned, record)
        return record is not None

    def _items(self, planned: PlannedCell) -> bytes | None:
        path = self.session.store.cell(planned.key, self.machine).items_path
        return path.read_bytes() if path.exists() else None

    def _append(self, planned: PlannedCell, items: bytes) -> None:
        """Keep finished items of a cell that still runs on another file system."""
        folder = self.session.store.cell(planned.key, self.machine)
        folder.append_items(items)

    def _keep(self, planned: PlannedCell, result: dict[str, Any]) -> None:
        """Store what an actor on another file system sent."""
        from repro.store import write_atomically

        folder = self.session.store.cell(planned.key, self.machine)
        write_atomically(folder.items_path, result["items"])
        if result["log"]:
            folder.write_log(result["log"])
        if result["output"]:
            folder.write_output(result["output"].encode())
        folder.write_record(result["record"])


def _token(session: Session) -> str:
    """Return the text of the driver's lock: an actor that reads the same shares the store."""
    try:
        return (session.store.root / ".lock").read_text()
    except OSError:
        return ""


def _actor_class(ray: Any, session: Session, request: Request) -> Any:
    """Return the remote class with the resources of a worker and the environment of this process."""
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
    options = {
        "num_cpus": request.cpus,
        "num_gpus": request.gpus,
        "max_restarts": -1,
        "max_task_retries": 0,
        "runtime_env": {"env_vars": variables},
    }
    members = {
        "progress": ray.method(concurrency_group="watch")(CellActor.progress),
        "close": ray.method(concurrency_group="watch")(CellActor.close),
        # Waits through a restart; running a cell again is the driver's decision alone.
        "ready": ray.method(max_task_retries=READY_TRIES)(CellActor.ready),
    }
    remote = ray.remote(concurrency_groups={"watch": 1})(type("Cells", (CellActor,), members))
    return remote.options(**options)
