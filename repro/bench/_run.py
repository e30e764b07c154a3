"""Times the cases of one kernel's suite; every case x implementation becomes one row."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from repro import roofline, timing
from repro.bench.suite import Case, Suite
from repro.timing import Arm, Comparison, Settings


def settings(quick: bool, n_arms: int) -> Settings:
    """Return how long to measure a case; quick shortens the work, never the block count."""
    if quick:
        return Settings(min_seconds=0.2 * n_arms, max_seconds=30)
    return Settings(min_seconds=1.5 * n_arms, max_seconds=240)


def rows_without_device(suite: Suite, device: str, quick: bool, why: str) -> list[dict[str, Any]]:
    """Return one "not run" row per case."""
    return [_row(suite, case, "-", "not_run", why, device) for case in suite.cases(device, quick)]


def run_suite(
    suite: Suite, device: torch.device, *, quick: bool, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a suite, case by case."""
    for case in suite.cases(device.type, quick):
        try:
            yield from _run_case(suite, case, device, quick, seed)
        except torch.OutOfMemoryError as error:
            yield _row(suite, case, "-", "oom", _short(error), device.type)
        except RuntimeError as error:  # no inputs with the properties of the case, say
            yield _row(suite, case, "-", "crashed", _short(error), device.type)
        finally:
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _run_case(
    suite: Suite, case: Case, device: torch.device, quick: bool, seed: int
) -> Iterator[dict[str, Any]]:
    pool = [suite.make_inputs(case, device, seed + member) for member in range(2 if quick else 3)]
    calls = suite.implementations(case, device)
    checker = _Checker(suite, case, pool)
    broken: dict[str, tuple[str, str]] = {}
    with torch.inference_mode():
        for name, call in calls.items():
            fault = _try(name, call, pool, checker)
            if fault:
                broken[name] = fault
        alive = [name for name in calls if name not in broken]
        # The baseline goes first: every ratio is over it.
        alive.sort(key=lambda name: name != suite.baseline)
        arms = [Arm(name, calls[name]) for name in alive]
        found = {}
        if arms:
            found = timing.compare_all(
                arms,
                inputs=pool,
                device=device,
                check=checker,
                settings=settings(quick, len(arms)),
            )
    peaks = roofline.measured(device.type, str(case.params.get("dtype", "bfloat16")))
    has_baseline = suite.baseline in alive
    times = {name: result.second_ms.value for name, result in found.items()}
    for name in calls:
        if name in broken:
            status, message = broken[name]
            yield _row(suite, case, name, status, message, device.type)
        else:
            row = _row(suite, case, name, found[name].status, found[name].message, device.type)
            yield row | _numbers(suite, case, name, found[name], peaks, times, has_baseline)


def _numbers(
    suite: Suite,
    case: Case,
    name: str,
    result: Comparison,
    peaks: roofline.Roofline,
    times: Mapping[str, float],
    has_baseline: bool,
) -> dict[str, Any]:
    """Return the measured columns of a row."""
    seconds = result.second_ms.value / 1e3
    flops, moved = suite.flops(case, name), suite.bytes_moved(case, name)
    numbers: dict[str, Any] = {
        "median_ms": result.second_ms.value,
        "p20_ms": result.second_ms.low,
        "p80_ms": result.second_ms.high,
        "tflops": flops / seconds / 1e12 if flops else None,
        "gbytes_per_s": moved / seconds / 1e9 if moved else None,
        "bound": peaks.bound_by(flops, moved) if flops or moved else None,
        "roofline_fraction": peaks.seconds(flops, moved) / seconds if flops or moved else None,
        "peak_tflops": peaks.tflops,
        "peak_gbytes_per_s": peaks.gbytes_per_s,
        "blocks": result.blocks,
        "warmup": result.warmup,
        "outliers": result.outliers,
        "attempts": result.attempts,
        "order": result.order,
        "regime": result.regime,
        "states": result.states,
        "raw_ms": result.raw["second_ms"],
    }
    if not has_baseline or name == suite.baseline:
        return numbers
    ideal = suite.ideal_speedup(case, name)
    fraction = result.ratio.value / ideal if ideal else None
    others = {other: time / times[name] for other, time in times.items() if other != name}
    return numbers | {
        "speedup": result.ratio.value,
        "speedup_low": result.ratio.low,
        "speedup_high": result.ratio.high,
        "ideal": ideal,
        "fraction_of_ideal": fraction,
        "bar": suite.bar(case, name, fraction if fraction is not None else 0.0, others) or "",
    }


def _row(
    suite: Suite, case: Case, name: str, status: str, message: str, device: str
) -> dict[str, Any]:
    return {
        "kernel": suite.kernel,
        "case": case.name,
        "params": dict(case.params),
        "implementation": name,
        "baseline": suite.baseline,
        "device": device,
        "status": status,
        "message": message,
    }


def _try(name: str, call: Any, pool: list[Any], checker: _Checker) -> tuple[str, str] | None:
    """Call once outside timing; return (status, message) of what keeps it from being timed."""
    try:
        fault = checker(name, 0, call(pool[0]))
    except torch.OutOfMemoryError as error:
        return "oom", _short(error)
    except NotImplementedError as error:
        return "unsupported", _short(error)
    except Exception as error:  # noqa: BLE001 - a broken rival must not end the bench
        return "crashed", f"{type(error).__name__}: {_short(error)}"
    return ("invalid", f"output check failed: {fault}") if fault else None


class _Checker:
    """Compares outputs with the reference of their input; references are made on demand."""

    def __init__(self, suite: Suite, case: Case, pool: list[Any]) -> None:
        self._suite, self._case, self._pool = suite, case, pool
        self._expected: dict[int, torch.Tensor] = {}

    def __call__(self, name: str, index: int, output: Any) -> str | None:
        actual = _tensor(output)
        if actual is None:
            return None
        tolerance = self._suite.compare(self._case, name)
        if self._suite.reference is None or tolerance is None:
            finite = not actual.is_floating_point() or bool(torch.isfinite(actual).all())
            return None if finite else "values are not finite"
        if index not in self._expected:
            expected = _tensor(self._suite.reference(self._case, self._pool[index]))
            if expected is None:
                return None
            self._expected[index] = expected
        wanted = self._expected[index]
        if wanted.shape != actual.shape:
            return f"shape {tuple(actual.shape)} in place of {tuple(wanted.shape)}"
        error = float((actual.float() - wanted.float()).abs().max())
        return None if error <= tolerance else f"off by {error:.3g}, allowed {tolerance:.3g}"


def _tensor(output: Any) -> torch.Tensor | None:
    value = output[0] if isinstance(output, tuple | list) and output else output
    return value if isinstance(value, torch.Tensor) else None


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
