"""Peak memory of a method and of dense: prefill and decode apart, weights subtracted.

On CUDA it is what the allocator handed out. On a CPU it is the resident set of this process, whose
high-water mark the kernel resets on request; where it does not, the resident set is sampled.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repro.errors import UnsupportedCombination, check_rules
from repro.measurements import CellContext, Measurement, plain_metric
from repro.measurements.latency import length_rule
from repro.method import Patch
from repro.subjects import SubjectInfo

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """What to measure.

    Attributes:
        lengths: Prompt tokens.
        batch: Sequences side by side.
        new_tokens: Decode steps, always exactly so many.
        repeats: Runs of each arm, in turn; the median counts.
    """

    lengths: tuple[int, ...] = (4096,)
    batch: int = 1
    new_tokens: int = 8
    repeats: int = 3

    def __post_init__(self) -> None:
        counts = ("batch", "new_tokens", "repeats")
        found = {name: getattr(self, name) for name in counts}
        check_rules(
            length_rule(self.lengths),
            *((name, value >= 1, "at least 1", value) for name, value in found.items()),
        )


def expand(options: MemoryOptions) -> list[dict[str, Any]]:
    """Return one cell per length."""
    shared = {
        "batch": options.batch,
        "new_tokens": options.new_tokens,
        "repeats": options.repeats,
    }
    return [{"length": length} | shared for length in options.lengths]


def positions(options: Mapping[str, Any]) -> int:
    """Return the positions that a subject must have."""
    return int(options["length"] + options["new_tokens"])


def run(context: CellContext) -> dict[str, Any]:
    """Measure dense and method in turn and return the record's body."""
    import torch

    from repro.prompts import timing_prompts

    options, subject = context.options, context.subject
    if positions(options) > subject.info.max_length:
        raise UnsupportedCombination(
            f"memory: {options['length']} prompt tokens and {options['new_tokens']} new ones "
            f"exceed the {subject.info.max_length} positions of {subject.name}"
        )
    prompts, source = timing_prompts(
        subject, length=options["length"], batch=options["batch"], count=1, seed=context.seed
    )
    meter = meter_for(subject.device)
    arms: dict[str, Callable[[], Any]] = {
        "dense": lambda: nullcontext(Patch()),
        "method": context.patch,
    }
    peaks: dict[str, list[tuple[int, int]]] = {name: [] for name in arms}
    stats: dict[str, Any] = {}
    with torch.inference_mode():
        for repeat in range(options["repeats"] + 1):
            for name, patched in arms.items():
                with patched() as patch:
                    patch.reset()
                    found = _run_once(subject.model, patch, prompts[0], options, meter)
                    stats[name] = patch.stats()
                if repeat:  # the first run of each fills caches and compiles
                    peaks[name].append(found)
            context.progress(repeat, options["repeats"])
    weights = sum(t.nbytes for t in (*subject.model.parameters(), *subject.model.buffers()))
    method_stats = dict(stats["method"]) if context.method is not None else {}
    return {
        "metrics": _metrics(peaks, weights, method_stats),
        "patch": method_stats,
        "raw": {name: [list(pair) for pair in found] for name, found in peaks.items()}
        | {"meter": meter.name, "inputs": source},
    }


def _run_once(
    model: Any, patch: Patch, ids: Any, options: Mapping[str, Any], meter: Meter
) -> tuple[int, int]:
    """Return bytes above the idle model at the peak of prefill, and of decode."""
    cache = patch.make_cache()
    given = {} if cache is None else {"past_key_values": cache}
    idle = meter.current()
    with meter.peak() as prefill:
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1, **given)
    cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
    del out
    with meter.peak() as decode:
        for _ in range(options["new_tokens"]):
            logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
            token = logits[:, -1:].argmax(-1)
    return max(0, prefill[0] - idle), max(0, decode[0] - idle)


def _metrics(
    peaks: Mapping[str, list[tuple[int, int]]], weights: int, stats: Mapping[str, Any]
) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    medians: dict[str, float] = {}
    for name, prefix in (("dense", "dense_"), ("method", "")):
        for column, phase in enumerate(("prefill", "decode")):
            values = [pair[column] for pair in peaks[name]]
            medians[name + phase] = statistics.median(values)
            metrics[f"{prefix}{phase}_peak_bytes"] = {
                "value": int(medians[name + phase]),
                "low": min(values),
                "high": max(values),
                "n": len(values),
                "unit": "bytes",
            }
    metrics["dense_weight_bytes"] = plain_metric(weights, "bytes")
    metrics["weight_bytes"] = plain_metric(int(stats.get("weight_bytes") or weights), "bytes")
    for name, phase in (("ratio", "prefill"), ("decode_ratio", "decode")):
        if medians["method" + phase] > 0:
            value = medians["dense" + phase] / medians["method" + phase]
            metrics[name] = plain_metric(value, "x")
    return metrics


class Meter:
    """Reads memory in use now, and its peak inside a block."""

    name = ""

    def current(self) -> int:
        """Return bytes in use after everything unused was given back."""
        raise NotImplementedError

    def peak(self) -> contextlib.AbstractContextManager[list[int]]:
        """Yield a list that holds the peak in bytes once the block has ended."""
        raise NotImplementedError


class CudaMeter(Meter):
    name = "CUDA allocator"

    def __init__(self, device: Any) -> None:
        self._device = device

    def current(self) -> int:
        import torch

        gc.collect()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        return int(torch.cuda.memory_allocated(self._device))

    @contextlib.contextmanager
    def peak(self) -> Iterator[list[int]]:
        import torch

        torch.cuda.reset_peak_memory_stats(self._device)
        found = [0]
        yield found
        torch.cuda.synchronize(self._device)
        found[0] = int(torch.cuda.max_memory_allocated(self._device))


class ResidentMeter(Meter):
    """Resident set by its high-water mark, which writing 5 to ``clear_refs`` resets."""

    name = "resident set, high-water mark"

    def current(self) -> int:
        _give_back()
        return _status_bytes("VmRSS")

    @contextlib.contextmanager
    def peak(self) -> Iterator[list[int]]:
        _CLEAR.write_text("5")
        found = [0]
        yield found
        found[0] = _status_bytes("VmHWM")


class SamplingMeter(Meter):
    """Resident set read every two milliseconds by a thread; may miss a short peak."""

    name = "resident set, sampled"

    def current(self) -> int:
        import psutil

        _give_back()
        return int(psutil.Process().memory_info().rss)

    @contextlib.contextmanager
    def peak(self) -> Iterator[list[int]]:
        import psutil

        process, done, found = psutil.Process(), threading.Event(), [0]

        def sample() -> None:
            while True:
                found[0] = max(found[0], int(process.memory_info().rss))
                if done.wait(0.002):
                    return

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield found
        finally:
            done.set()
            thread.join()


def meter_for(device: Any) -> Meter:
    """Return the best meter of a device."""
    if device.type == "cuda":
        return CudaMeter(device)
    try:
        _CLEAR.write_text("5")
        _status_bytes("VmHWM")
    except (OSError, KeyError):
        return SamplingMeter()
    return ResidentMeter()


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def _give_back() -> None:
    """Return freed memory to the system: what the C library keeps would count as in use."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def estimate_seconds(options: Mapping[str, Any], info: SubjectInfo) -> float:
    """Return rough seconds on 2 CPU cores."""
    once = options["batch"] * info.prefill_seconds(options["length"])
    return 2.0 + 2 * (options["repeats"] + 1) * once


MEASUREMENT = Measurement(
    name="memory",
    options=MemoryOptions,
    expand=expand,
    run=run,
    positions=positions,
    alone=True,
    paired=True,
    kinds=("llm",),
    libraries=("torch", "transformers"),
    estimate_seconds=estimate_seconds,
)
