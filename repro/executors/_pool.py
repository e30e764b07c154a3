"""The workers of a Ray cluster: how many there are and where, and which cells are tried again."""

from __future__ import annotations

import os
import secrets
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repro.errors import MachineFault
from repro.executors import Session, chain_of
from repro.executors._actor import CellActor
from repro.executors._worker import BACK_OFF_SECONDS, Worker
from repro.plan import PlannedCell
from repro.scheduling import Queue

if TYPE_CHECKING:
    from collections.abc import Sequence

INFRA_TRIES = 3  # how often a cell is started whose machine fails
READY_TRIES = 5  # starts of a process before its machine counts as broken
POLL_SECONDS = 0.2
GROW_SECONDS = 5.0  # between two looks at what the cluster has
QUESTIONS = 4  # about progress, on their way at once: workers may be many, the driver is one
SILENT_SECONDS = 10.0  # until a question without an answer keeps no other from being asked
HEAD_SECONDS = 10.0  # without the cluster's head before the run ends; Ray itself waits for 60


@dataclass(frozen=True)
class Request:
    """What one worker holds as long as it lives.

    Attributes:
        cpus: CPUs of its node.
        gpus: GPUs of its node, or a share of one.
        whole_node: All CPUs of its node, whatever their number.
    """

    cpus: float = 1.0
    gpus: float = 0.0
    whole_node: bool = False

    def room(self, node: dict[str, Any]) -> int:
        """Return how many workers a node (an entry of ``ray.nodes()``) has room for."""
        has = node["Resources"]
        rooms = [
            int(has.get(name, 0.0) / wanted + 1e-9)
            for name, wanted in (("CPU", self.cpus), ("GPU", self.gpus))
            if wanted
        ]
        return min([*rooms, 1] if self.whole_node else rooms, default=1)

    def options(self, node: dict[str, Any] | None) -> dict[str, Any]:
        """Return what Ray is asked for, on a node or (None) anywhere."""
        if node is None:
            return {"num_cpus": self.cpus, "num_gpus": self.gpus}
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        cpus = node["Resources"]["CPU"] if self.whole_node else self.cpus
        place = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
        return {"num_cpus": cpus, "num_gpus": self.gpus, "scheduling_strategy": place}


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
        # (key, machine) of what ``fresh`` has set aside: a second try must not do so again.
        self.forgotten: set[tuple[str, str]] = set()
        self.workers: list[Worker] = []
        self.failed_starts = 0
        self.unfit: set[str] = set()  # nodes where no worker can be
        self.alive: set[str] = set()
        self._actor_class = actor_class or _actor_class(ray)
        self._name = secrets.token_hex(4)
        self._started = 0
        self._head = _Head(ray)
        self._grew = -GROW_SECONDS
        self._watched = 0.0

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
            # Its next cell goes out before another outcome is looked at: nobody waits for all.
            calls[call].collect()
            calls[call].advance()
        now = time.monotonic()
        if not done or now - self._watched > POLL_SECONDS:  # a free worker comes first
            self._watched = now
            self._watch()

    def _watch(self) -> None:
        """End what takes too long, and ask some of the running cells how far they are."""
        asked = {worker.question: worker for worker in self.workers if worker.question is not None}
        if asked:
            answered, _ = self.ray.wait(list(asked), num_returns=len(asked), timeout=0)
            for question in answered:
                asked[question].show_progress()
        for worker in self.workers:
            worker.end_if_late()
        silent = time.monotonic() - SILENT_SECONDS
        free = QUESTIONS - sum(
            worker.asked > silent for worker in asked.values() if worker.question
        )
        waiting = [worker for worker in self.workers if worker.wants_to_ask()]
        for worker in sorted(waiting, key=lambda worker: worker.asked)[: max(free, 0)]:
            worker.ask()

    def _grow(self) -> None:
        """Start workers where the cluster has room: nodes come and go."""
        if time.monotonic() - self._grew < GROW_SECONDS:
            return
        if not self._head.answers():  # what asks it anything would wait, and end the process
            return
        self._grew = time.monotonic()
        nodes = [node for node in self.ray.nodes() if node["Alive"]]
        self.alive = {node["NodeID"] for node in nodes}
        wanted = len(self.queue) + sum(1 for worker in self.workers if worker.current)
        # Where a worker that has not arrived yet will be is for Ray to say.
        unplaced = sum(1 for worker in self.workers if worker.node is None)
        for node in nodes:
            if node["NodeID"] in self.unfit:
                continue
            here = sum(1 for worker in self.workers if worker.node == node["NodeID"])
            for _ in range(here, self.request.room(node)):
                if unplaced:
                    unplaced -= 1
                elif len(self.workers) < wanted:
                    self._start(node)
        if wanted and not self.workers:
            # It waits for its resources as long as it takes; a cluster that grows sees it wait.
            self._start(None)

    def _start(self, node: dict[str, Any] | None) -> None:
        actor = self._actor_class.options(**self.request.options(node)).remote(
            str(self.session.store.root.absolute()),
            _token(self.session),
            self.session.artifacts,
            f"{self._name}-{self._started}",
        )
        self._started += 1
        self.workers.append(Worker(self, actor, None if node is None else node["NodeID"]))

    def _give_up(self) -> None:
        """Settle what is left: no worker of the cluster can be started."""
        waiting = [planned for _, planned in self.later]
        while (planned := self.queue.take(None)) is not None:
            waiting.append(planned)
        for planned in waiting:
            self.session.settle(planned, "infra", "no worker could be started")
        self.later = []

    def alive_now(self) -> set[str]:
        """Return the nodes that there are, if the head can tell."""
        if self._head.answers():
            self.alive = {node["NodeID"] for node in self.ray.nodes() if node["Alive"]}
        return self.alive

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
        self._silent_since: float | None = None

    def answers(self) -> bool:
        """Tell whether it takes connections.

        Raises:
            MachineFault: If it has not for ``HEAD_SECONDS``.
        """
        if not self._watched:
            return True
        host, _, port = self._address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2.0).close()
        except OSError:
            self._silent_since = self._silent_since or time.monotonic()
            if time.monotonic() - self._silent_since > HEAD_SECONDS:
                raise head_is_gone(self._address) from None
            return False
        self._silent_since = None
        return True


def head_is_gone(address: str) -> MachineFault:
    """Return the fault of a cluster whose head has ended."""
    return MachineFault(
        f"the head of the Ray cluster ({address}) does not answer; what is finished is kept. "
        "Start the cluster again, then run the same command"
    )


def _token(session: Session) -> str:
    """Return the text of the driver's lock: an actor that reads the same shares the store."""
    try:
        return (session.store.root / ".lock").read_text()
    except OSError:
        return ""


def _actor_class(ray: Any) -> Any:
    """Return the remote class of the workers, with the environment of this process."""
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
    cells = type("Cells", (CellActor,), members)
    return ray.remote(concurrency_groups={"watch": 1}, **options)(cells)
