"""One worker of a Ray cluster, as the driver sees it: an actor, and the cell that it runs.

It keeps its actor through the deaths of its process, gets one cell at a time, and is ended when the
cell takes too long. On the driver's file system it writes to the same store, elsewhere it sends its
files.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from repro.errors import MachineFault
from repro.plan import PlannedCell
from repro.store import environment_key, write_atomically

if TYPE_CHECKING:
    from repro.executors._pool import Pool

BACK_OFF_SECONDS = 1.0  # before the second try; twice that before the third
PROGRESS_SECONDS = 1.0
CLOSE_SECONDS = 5.0


class Worker:
    """An actor, the call that the driver waits for, and the cell that it runs.

    ``node`` is the id of its node, None until the actor said where it is.
    """

    def __init__(self, pool: Pool, actor: Any, node: str | None) -> None:
        self.pool, self.actor, self.node = pool, actor, node
        self.ray, self.session = pool.ray, pool.session
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
        self.asked = 0.0
        self._report: Callable[[int, int], None] = lambda done, total: None
        self.question: Any = None  # about progress, not answered yet

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
            if self.session.must_wait(planned, self.environment):
                self.pool.queue.put_back(planned)
                return
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
        self._began = self.asked = time.monotonic()
        self.question = None  # what it answers is of the cell before
        items = None if self.shared else self._items(planned)
        handed = self.session.handed_out(planned, self.environment or {})
        self.call = self.actor.run.remote(handed.to_json(), items)

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
        if planned is None:
            self._arrived(result)
            return
        if not self.shared:
            self._keep(planned, result)
        if result.get("fault"):
            if self.shared:  # the driver's own store, and everybody's
                raise MachineFault(result["fault"])
            self._refuse(f"{self.name}: {result['fault']}", unfit=True)
            self._try_again(planned, result["fault"])
            return
        self.session.finish(planned, result["record"])
        self.pool.queue.release(planned)
        if not result["healthy"]:
            self._restart()

    def end_if_late(self) -> None:
        """End the running cell when its time is over."""
        limit = self.session.plan.timeout_seconds
        if self.call is None or self.current is None or time.monotonic() - self._began <= limit:
            return
        planned, self.current, self.call = self.current, None, None
        self._settle(planned, "timeout", f"took longer than {limit:g} s")
        self._restart()

    def wants_to_ask(self) -> bool:
        """Tell whether it is time to ask how far the running cell is."""
        waiting = self.current is not None and self.call is not None and self.question is None
        return waiting and time.monotonic() - self.asked > PROGRESS_SECONDS

    def ask(self) -> None:
        """Ask how far the running cell is, and for its items where the store is not shared."""
        if self.current is not None:
            self.asked = time.monotonic()
            offset = 0 if self.shared else len(self._items(self.current) or b"")
            self.question = self.actor.progress.remote(self.current.key, offset)

    def show_progress(self) -> None:
        """Take in the answer to ``ask``."""
        question, self.question = self.question, None
        with contextlib.suppress(self.ray.exceptions.RayError):
            done, total, items = self.ray.get(question)
            if self.current is None:
                return
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
        """Take the actor in, unless its device does not compute or is too small."""
        self.environment, self.shared, self.name, self.node = (
            ready[name] for name in ("environment", "shared", "worker", "node")
        )
        if not ready["healthy"]:
            self._refuse(f"{self.name}: its device does not compute", unfit=True)
        elif lack := self.session.plan.lack_of(self.environment):
            self._refuse(f"{self.name}: {lack}", unfit=True)
        else:
            self.pool.failed_starts = 0

    def _refuse(self, text: str, *, unfit: bool = False) -> None:
        """Do without this worker, and (``unfit``) without its node."""
        self.session.listener.message(text)
        if unfit and self.node is not None:
            self.pool.unfit.add(self.node)
        self.pool.failed_starts += 1
        self.stop()

    def _restart(self) -> None:
        self.ray.kill(self.actor, no_restart=False)
        self._gone()

    def _gone(self) -> None:
        self.environment = self.subject = self.question = None

    def _failed(self, planned: PlannedCell | None, error: Exception) -> None:
        """Find out what the end of the actor's process means for its cell."""
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        unavailable = isinstance(error, self.ray.exceptions.ActorUnavailableError)
        if planned is None:
            self._gone()
            if unavailable:
                self._not_before = time.monotonic() + BACK_OFF_SECONDS  # it is being started again
            elif self.node is not None and self.node not in self.pool.alive_now():
                self.session.listener.message(f"{self.name or 'a worker'}: its node is gone")
                self.stop()
            else:
                self._refuse(f"a worker could not be started: {reason}")
            return
        if unavailable:
            # It may run the cell still, out of reach; two must never be at one.
            self.ray.kill(self.actor, no_restart=False)
        folder = self.session.store.cell(planned.key, self.machine)
        record = self.session.finished(planned, self.machine) if self.shared else None
        if record is not None:  # it died on its way from the store to the driver
            self.session.finish(planned, record)
            self.pool.queue.release(planned)
        elif died := folder.take_fatal():
            self._settle(planned, "crashed", died.splitlines()[0])
        elif "low on memory" in str(error):
            self._settle(planned, "oom", "the machine ran low on memory")
        else:
            self._try_again(planned, reason)
        self._gone()

    def _settle(self, planned: PlannedCell, status: str, text: str) -> None:
        seconds = time.monotonic() - self._began
        self.session.settle(planned, status, text, environment=self.environment, seconds=seconds)
        self.pool.queue.release(planned)

    def _try_again(self, planned: PlannedCell, reason: str) -> None:
        self.session.spent(planned, time.monotonic() - self._began)
        self.pool.try_again(planned, reason, self.environment)

    def _known(self, planned: PlannedCell) -> bool:
        """Tell whether the actor's machine, where it is another one, has the record already."""
        if self.machine == self.session.machine:
            return False
        place = (planned.key, self.machine)
        if self.session.fresh and place not in self.pool.forgotten:
            self.pool.forgotten.add(place)
            self.session.store.cell(*place).forget()
            return False
        record = self.session.finished(planned, self.machine)
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
        folder = self.session.store.cell(planned.key, self.machine)
        write_atomically(folder.items_path, result["items"])
        if result["log"]:
            folder.write_log(result["log"])
        if result["output"]:
            folder.write_output(result["output"].encode())
        if result["record"] is not None:
            folder.write_record(result["record"])
