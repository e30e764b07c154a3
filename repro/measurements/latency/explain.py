"""The arithmetic behind a latency: how much attention could give, and what the device allows."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from repro.measurements.latency.work import Work
from repro.method import Patch
from repro.operator_inputs import wrapped_attention
from repro.roofline import Roofline
from repro.subjects import Subject
from repro.timing import Comparison


def attention_share(subject: Subject, work: Work, *, runs: int = 3) -> float:
    """Return the share of a dense call's time that is spent inside the attention function."""
    shares = []
    for index in range(runs):
        item, patch = work.pool[index % len(work.pool)], Patch()
        clock = _Clock(subject.device)
        with wrapped_attention(subject.model, "repro_timed", clock.wrap):
            state = work.state("dense", patch, item)
            clock.spans.clear()
            clock.start()
            work.dense_call(patch, item, state)
            clock.stop()
        total, *parts = clock.seconds()
        shares.append(sum(parts) / total)
    return min(1.0, statistics.median(shares))


class _Clock:
    """Adds up spans of host time, or of device time between events."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._begin: Any = None
        self._whole: tuple[Any, Any] = (0.0, 0.0)
        self.spans: list[tuple[Any, Any]] = []

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        self._begin = self._now()

    def stop(self) -> None:
        self._whole = (self._begin, self._now())

    def wrap(self, attention: Any) -> Any:
        def timed(*arguments: Any, **options: Any) -> Any:
            begin = self._now()
            result = attention(*arguments, **options)
            self.spans.append((begin, self._now()))
            return result

        return timed

    def seconds(self) -> list[float]:
        """Return the seconds of the whole, then of each span."""
        if not self._cuda:
            return [end - begin for begin, end in [self._whole, *self.spans]]
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in [self._whole, *self.spans]]


def explanation(
    result: Comparison,
    work: Work,
    density: float | None,
    share: float,
    selection_seconds: float | None,
    peaks: Roofline,
) -> dict[str, Any]:
    """Return the explanation of a record.

    Amdahl: everything but attention stays, attention shrinks to the density. Roofline: everything
    but attention stays, attention takes what the kept blocks cost at this device's measured peak.
    """
    dense_seconds = result.first_ms.value / 1e3
    told: dict[str, Any] = {
        "attention_share": round(share, 4),
        "density": density,
        "peak_tflops": round(peaks.tflops, 4),
        "notes": [f"inputs: {work.source}"],
    }
    if work.dense_factor != 1:
        told["notes"].append("dense is timed without the causal mask, as the paper's script does")
    if density is not None:
        kept = share * density / work.dense_factor
        told["amdahl_bound"] = 1 / max((1 - share) + kept, 1e-9)
        least = work.steps * peaks.seconds(work.flops * density, work.bytes_moved * density)
        told["roofline_bound"] = dense_seconds / ((1 - share) * dense_seconds + least)
    if selection_seconds is not None:
        told["selection_share"] = selection_seconds / (result.second_ms.value / 1e3)
    return told
