"""Worker threads whose torch operations are serial: many small tasks side by side, no barriers."""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Task = TypeVar("Task")
Result = TypeVar("Result")


def run(call: Callable[[Task], Result], tasks: Sequence[Task]) -> list[Result]:
    """Return what ``call`` returns for every task, in order; as many threads as torch uses.

    Runs without gradients and in the caller's inference mode. The first exception is raised here.
    """
    threads = torch.get_num_threads()
    inference = torch.is_inference_mode_enabled()

    def quietly(task: Task) -> Result:
        # Both modes belong to a thread.
        with torch.inference_mode(inference), torch.no_grad():
            return call(task)

    if threads == 1 or len(tasks) < 2:
        return [quietly(task) for task in tasks]
    return list(workers(threads).map(quietly, tasks))


_memory = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return memory that this thread keeps: what is allocated anew is faulted in page by page.

    What was in it is lost at the next call with this name.
    """
    size = math.prod(shape) * dtype.itemsize
    held = getattr(_memory, name, None)
    if held is None or held.numel() < size:
        with torch.inference_mode(False):
            held = torch.empty(size, dtype=torch.uint8)
        setattr(_memory, name, held)
    return held[:size].view(dtype).view(shape)


@functools.cache
def workers(count: int) -> ThreadPoolExecutor:
    """Return ``count`` threads whose torch operations are serial."""
    started = threading.Barrier(count + 1)
    pool = ThreadPoolExecutor(count, "serial_torch", initializer=_be_serial)
    # Each task waits for all others, so that every thread starts now.
    for _ in range(count):
        pool.submit(started.wait)
    started.wait()
    # The number is a thread's own but also the default of later threads: set that back.
    torch.set_num_threads(count)
    return pool


def _be_serial() -> None:
    torch.set_num_threads(1)
    # A thread takes over the default at its first look, which must not come after the set-back.
    torch.get_num_threads()


if hasattr(os, "register_at_fork"):  # threads do not survive a fork; Windows has none
    os.register_at_fork(after_in_child=workers.cache_clear)
