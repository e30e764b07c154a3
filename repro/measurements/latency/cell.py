"""One latency cell: dense and method interleaved, outputs checked, the arithmetic beside it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import torch

from repro import roofline, timing
from repro.measurements import CellContext, plain_metric
from repro.measurements.latency.explain import attention_share, explanation
from repro.measurements.latency.work import Work, make_work
from repro.method import Patch
from repro.timing import Arm, Comparison, Settings

#: Relative L2 difference between a timed output and the same arm's untimed one. Kernels may add
#: up in another order from call to call; a stale or unfinished output is far beyond it.
_TOLERANCE = 0.02


def run_cell(context: CellContext) -> dict[str, Any]:
    """Run one cell and return the record's body."""
    work = make_work(context)
    options = context.options
    settings = Settings(
        blocks=options["blocks"],
        min_seconds=options["min_seconds"],
        max_seconds=300.0,
        max_repeats=1000 if work.resets else 1,
    )
    with torch.inference_mode():
        arms = {
            "dense": _PatchedArm("dense", work, work.dense_call, lambda: nullcontext(Patch())),
            "method": _PatchedArm("method", work, work.call, context.patch),
        }
        stats = _statistics(context, work)
        result = timing.compare(
            *(Arm(name, arm.call, arm.around) for name, arm in arms.items()),
            inputs=work.pool,
            device=context.subject.device,
            settings=settings,
            check=_OutputCheck(arms, work),
            on_block=context.progress,
        )
        share = 1.0 if work.only_attention else attention_share(context.subject, work)
    seconds = arms["method"].selection_seconds()
    peaks = roofline.measured(context.subject.device.type, _dtype_name(context))
    return {
        "status": result.status,
        "message": result.message,
        "metrics": _metrics(result, work, stats, seconds),
        "patch": stats,
        "raw": _raw(result, work),
        "explanation": explanation(
            result, work, stats.get(work.density_key), share, seconds, peaks
        ),
    }


class _PatchedArm:
    """Runs the work under a patch; everything but the call is outside the timed window."""

    def __init__(
        self,
        name: str,
        work: Work,
        call: Callable[[Patch, Any, Any], torch.Tensor],
        patched: Callable[[], AbstractContextManager[Patch]],
    ) -> None:
        self._name, self._work, self._call, self._patched = name, work, call, patched
        self._patch = Patch()
        self._state: Any = None
        self._calls = 0
        self._selection: list[float] = []

    @contextmanager
    def around(self) -> Iterator[None]:
        with self._patched() as patch:
            patch.reset()
            self._patch, self._calls = patch, 0
            self._state = self._work.state(self._name, patch, self._work.pool[0])
            try:
                yield
                spent = patch.stats().get("selection_seconds")
                if spent is not None:
                    # A call that resets leaves the time of the last call alone.
                    calls = 1 if self._work.resets else max(self._calls, 1)
                    self._selection.append(float(spent) / calls)
            finally:
                self._patch, self._state = Patch(), None

    def call(self, item: Any) -> torch.Tensor:
        if self._work.resets:
            self._patch.reset()
        self._calls += 1
        return self._call(self._patch, item, self._state)

    def once(self, item: Any) -> torch.Tensor:
        """Run one call outside any timing."""
        with self.around():
            return self.call(item)

    def selection_seconds(self) -> float | None:
        """Return the median seconds of selection in a call, None if the method tells none."""
        return statistics.median(self._selection) if self._selection else None


class _OutputCheck:
    """Compares timed outputs with untimed ones of the same arm and input."""

    def __init__(self, arms: Mapping[str, _PatchedArm], work: Work) -> None:
        self._arms, self._work = arms, work
        self._expected: dict[tuple[str, int], torch.Tensor] = {}

    def __call__(self, arm: str, index: int, output: torch.Tensor) -> str | None:
        if not bool(torch.isfinite(output.float()).all()):
            return "values are not finite"
        key = (arm, index)
        if key not in self._expected:
            self._expected[key] = self._arms[arm].once(self._work.pool[index]).clone()
        difference = _relative(output, self._expected[key])
        if difference > _TOLERANCE:
            return f"differs by {difference:.3g} (relative) from the untimed output"
        return None


def _relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    scale = float(expected.float().norm())
    return float((actual.float() - expected.float()).norm()) / max(scale, 1e-12)


def _statistics(context: CellContext, work: Work) -> dict[str, Any]:
    """Run every input once under the method and return what the patch observed."""
    if context.method is None:
        return {}
    with context.patch() as patch:
        patch.reset()
        for item in work.pool:
            work.call(patch, item, work.state("method", patch, item))
        return dict(patch.stats())


def _metrics(
    result: Comparison, work: Work, stats: Mapping[str, Any], selection: float | None
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "ratio": asdict(result.ratio) | {"n": result.blocks, "unit": "x"},
        "dense_ms": _per_step(asdict(result.first_ms), work.steps, result.blocks),
        "method_ms": _per_step(asdict(result.second_ms), work.steps, result.blocks),
    }
    density = stats.get(work.density_key)
    if density is not None:
        found["density"] = plain_metric(float(density), "")
    if selection is not None:
        found["selection_ms"] = plain_metric(1e3 * selection / work.steps, "ms")
    return found


def _per_step(interval: dict[str, float], steps: int, blocks: int) -> dict[str, Any]:
    return {name: value / steps for name, value in interval.items()} | {"n": blocks, "unit": "ms"}


def _raw(result: Comparison, work: Work) -> dict[str, Any]:
    return {
        "dense_ms": result.raw["first_ms"],
        "method_ms": result.raw["second_ms"],
        "discarded": result.raw["discarded"],
        "per_call_tokens": work.steps,
        "inputs": work.source,
        "timing": {
            name: getattr(result, name)
            for name in (
                "blocks",
                "warmup",
                "outliers",
                "attempts",
                "order",
                "regime",
                "repeats",
                "device_seconds",
                "states",
            )
        },
    }


def _dtype_name(context: CellContext) -> str:
    return str(context.subject.dtype).removeprefix("torch.")
