"""What this device reaches: matmul rate and copy bandwidth, measured once per process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from repro.timing import timer_for


@dataclass(frozen=True)
class Roofline:
    """Measured peaks: ``tflops`` of a square matmul, ``gbytes_per_s`` of a copy (read + write)."""

    tflops: float
    gbytes_per_s: float

    def seconds(self, flops: float, bytes_moved: float) -> float:
        """Return the least time that the work can take."""
        return max(flops / (self.tflops * 1e12), bytes_moved / (self.gbytes_per_s * 1e9))

    def bound_by(self, flops: float, bytes_moved: float) -> str:
        """Return ``compute`` or ``memory``, whichever takes longer."""
        compute = flops / self.tflops > bytes_moved / self.gbytes_per_s * 1e3
        return "compute" if compute else "memory"


@functools.cache
def measured(device: str = "cpu", dtype: str = "bfloat16") -> Roofline:
    """Measure the roofline of a device: the best of several runs, since a peak is asked for.

    Args:
        device: ``cpu`` or ``cuda[:n]``.
        dtype: Of the matmul, a floating type of torch.
    """
    target = torch.device(device)
    timer = timer_for(target)
    size, copy_bytes, rounds = (1024, 1 << 27, 12)
    if target.type == "cuda":
        size, copy_bytes, rounds = (8192, 1 << 30, 20)
    kind = getattr(torch, dtype)
    left, right = (torch.randn(size, size, device=target, dtype=kind) for _ in range(2))
    result = torch.empty_like(left)
    source = torch.zeros(copy_bytes, dtype=torch.int8, device=target)
    sink = torch.empty_like(source)

    def best(call: Callable[[Any], Any]) -> float:
        timer.run(call, [0, 0])
        times: list[float] = []
        # On a shared machine the peak shows only in the gaps that others leave.
        while len(times) < rounds or sum(times) < 0.5:
            times.append(timer.run(call, [0])[0])
        return min(times)

    seconds = best(lambda _: torch.mm(left, right, out=result))
    copying = best(lambda _: sink.copy_(source))
    return Roofline(2 * size**3 / seconds / 1e12, 2 * copy_bytes / copying / 1e9)
