"""The inline executor: every cell in this process, one after another."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType

from repro.executors import Session
from repro.worker import CellTimeout, Worker


def execute(session: Session) -> None:
    """Run the pending cells of a session.

    Raises:
        MachineFault: If the store cannot be written.
        KeyboardInterrupt: On Ctrl-C; everything finished is stored.
    """
    worker = Worker(session.store, artifacts=session.artifacts)
    here = f"{socket.gethostname()}:{os.getpid()}"
    lost = False
    for planned in session.pending():
        if session.settled_without_running(planned):
            continue
        if lost:
            session.settle(planned, "infra", "the device was lost in an earlier cell")
            continue
        session.listener.started(planned, here)
        limit = _time_limit(session.plan.timeout_seconds)
        handed = session.handed_out(planned, session.environment)
        record = worker.run(handed, session.listener.progress_of(planned), limit)
        session.finish(planned, record)
        if record["status"] in ("crashed", "timeout"):
            lost = not worker.healthy(planned.cell["device"])


AGAIN_SECONDS = 5.0  # long enough for what ends a cell to switch the timer off


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise CellTimeout in the block after so many seconds.

    This reaches Python code between two operators; an operator that never returns is only ended
    by an executor with processes of its own (``ray``). It comes again and again: what is raised in
    a destructor or a callback is lost.
    """
    usable = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")
    if not usable:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise CellTimeout(f"took longer than {seconds:g} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
