"""Worker threads whose torch operations are serial: many small tasks side by side, no barriers."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Task = TypeVar("Task")


def run(call: Callable[[Task], None], tasks: Sequence[Task]) -> None:
    """Call ``call`` on every task, on as many threads as torch uses; large tasks belong first.

    Runs without gradients and in the caller's inference mode. The first exception is raised here.
    """
    threads = torch.get_num_threads()
    inference = torch.is_inference_mode_enabled()

    def quietly(task: Task) -> None:
        # Both modes belong to a thread.
        with torch.inference_mode(inference), torch.no_grad():
            call(task)

    if threads == 1 or len(tasks) < 2:
        for task in tasks:
            quietly(task)
        return
    for _ in workers(threads).map(quietly, tasks):
        pass


@functools.cache
def workers(count: int) -> ThreadPoolExecutor:
    """Return ``count`` threads whose torch operations are serial."""
    started = threading.Barrier(count + 1)
    pool = ThreadPoolExecutor(
        count, "serial_torch", initializer=torch.set_num_threads, initargs=(1,)
    )
    # Each task waits for all others, so that every thread starts now.
    for _ in range(count):
        pool.submit(started.wait)
    started.wait()
    # The number is a thread's own but also the default of later threads: set that back.
    torch.set_num_threads(count)
    return pool


if hasattr(os, "register_at_fork"):  # threads do not survive a fork; Windows has none
    os.register_at_fork(after_in_child=workers.cache_clear)
