"""Timing of two or more arms against each other: interleaved in blocks, ratio per block.

A block runs every arm once forwards and once backwards (A B B A for two), so that a linear change
of the machine's speed inside a block cancels. Where one pass takes seconds, a block is one pass
and the order alternates from block to block (A B, B A, ...). What must be set up for an arm
happens outside the timed window. Warm-up is detected afterwards, raw times are all kept.

Calls rotate through a pool of inputs. Where a block is too long to have all of them, blocks with
the same inputs are a stratum: the layers of a model differ by more than any machine's noise.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from repro import environment, timing_statistics
from repro.timing_statistics import Interval

if TYPE_CHECKING:
    import torch

#: ``check(arm, index of the input, output)`` returns what is wrong with a timed output, or None.
Check = Callable[[str, int, Any], str | None]

#: ``on_block(blocks done, blocks wanted)`` feeds a live display.
OnBlock = Callable[[int, int], None]


#: Fewest blocks with the same inputs, where a block has not all of them.
BLOCKS_PER_STRATUM = 4


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How long to measure and when to refuse the result.

    Attributes:
        blocks: Fewest blocks that must remain after the warm-up, at least 10.
        min_seconds: Fewest seconds of timed work in the remaining blocks, all arms together.
        max_repeats: Most calls of an arm in one slot; 1 where a call uses up its state.
        max_blocks: A run that has not satisfied both by then ends.
        max_seconds: Likewise in seconds of wall time; never below ``blocks`` blocks.
        long_pass_seconds: A pass over all arms that takes longer is a block of its own.
        attempts: A run stamped for drift is measured anew so many times in all.
        ratio_drift: Relative change of the ratio over the run that makes it invalid.
        baseline_drift: Relative change of the first arm over the run that makes it invalid; None
            takes 0.35 on a CPU, which others may share, and 0.10 on a GPU.
        resamples: Bootstrap samples.
        seed: Of the bootstrap.
    """

    blocks: int = 10
    min_seconds: float = 3.0
    max_repeats: int = 1000
    max_blocks: int = 200
    max_seconds: float = math.inf
    long_pass_seconds: float = 2.0
    attempts: int = 2
    ratio_drift: float = 0.10
    baseline_drift: float | None = None
    resamples: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("blocks", 10), ("resamples", 10_000), ("attempts", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.min_seconds >= 0:
            raise ValueError(f"min_seconds must be 0 or more, got {self.min_seconds}")


@dataclass(frozen=True)
class Arm:
    """One thing to time: ``call(input)`` inside the context that ``around()`` opens."""

    name: str
    call: Callable[[Any], Any]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


class Timer(Protocol):
    """Runs a call once per input and returns the timed seconds in all, and the last output."""

    device_type: str
    regime: str

    def run(self, call: Callable[[Any], Any], inputs: Sequence[Any]) -> tuple[float, Any]: ...


class CpuTimer:
    """Wall time of each call by ``perf_counter``."""

    device_type = "cpu"
    regime = "wall time; caches as the rotating inputs leave them"

    def run(self, call: Callable[[Any], Any], inputs: Sequence[Any]) -> tuple[float, Any]:
        seconds, output = 0.0, None
        for value in inputs:
            begin = time.perf_counter()
            output = call(value)
            seconds += time.perf_counter() - begin
        return seconds, output


class CudaTimer:
    """Device time of each call between two events, L2 overwritten before it.

    The overwrite also lets the host run ahead, so that launches of short kernels overlap it.
    """

    device_type = "cuda"

    def __init__(self, device: torch.device) -> None:
        import torch

        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._device = device
        self._flush = torch.empty(max(4 * cache, 1 << 28), dtype=torch.int8, device=device)
        self.regime = f"device time; cold L2: {self._flush.numel() >> 20} MiB written before a call"

    def run(self, call: Callable[[Any], Any], inputs: Sequence[Any]) -> tuple[float, Any]:
        import torch

        output, events = None, []
        with torch.cuda.device(self._device):
            for value in inputs:
                self._flush.zero_()
                begin = torch.cuda.Event(enable_timing=True)
                end = torch.cuda.Event(enable_timing=True)
                begin.record()
                output = call(value)
                end.record()
                events.append((begin, end))
            torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in events) / 1e3, output


def timer_for(device: str | torch.device) -> Timer:
    """Return the timer of a device."""
    import torch

    device = torch.device(device)
    return CudaTimer(device) if device.type == "cuda" else CpuTimer()


@dataclass
class Blocks:
    """Raw block times of one run.

    Attributes:
        names: One per arm, the first is the baseline.
        seconds: ``[n_blocks, n_arms]`` per call, warm-up included.
        device_seconds: ``[n_blocks]`` timed work of a block, all arms and repeats.
        order: ``palindrome`` or ``alternating``.
        repeats: Calls per slot, one per arm.
        faults: Messages of the output checks, by arm.
        states: Clocks, power, load: at start, on the way, at the end.
        warmup: Leading blocks that the result leaves out.
        period: After so many blocks the inputs come again.
    """

    names: list[str]
    seconds: np.ndarray
    device_seconds: np.ndarray
    order: str
    repeats: list[int]
    faults: dict[str, str]
    states: list[dict[str, Any]]
    warmup: int
    regime: str
    period: int = 1

    @property
    def strata(self) -> np.ndarray:
        """``[n_blocks]``, which inputs the blocks after the warm-up had."""
        return np.arange(self.warmup, len(self.seconds)) % self.period


@dataclass
class Comparison:
    """The outcome of ``compare``: first over second, above 1 if the second is faster.

    ``first_ms`` and ``second_ms`` are medians with the 20th and 80th percentile, the mean of these
    over strata; ``raw`` keeps the block times of every attempt, warm-up included.
    """

    first: str
    second: str
    status: str
    message: str
    ratio: Interval
    first_ms: Interval
    second_ms: Interval
    blocks: int
    warmup: int
    outliers: list[int]
    device_seconds: float
    attempts: int
    order: str
    regime: str
    repeats: list[int] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)

    @property
    def valid(self) -> bool:
        return self.status == "ok"

    def to_dict(self) -> dict[str, Any]:
        """Return everything, JSON-able."""
        return asdict(self)


def compare(
    first: Arm | Callable[[Any], Any],
    second: Arm | Callable[[Any], Any],
    *,
    inputs: Any,
    device: str | torch.device = "cpu",
    blocks: int = 10,
    min_seconds: float = 3.0,
    check: Check | None = None,
    settings: Settings | None = None,
    timer: Timer | None = None,
    on_block: OnBlock | None = None,
) -> Comparison:
    """Time two arms in A B B A blocks and return the ratio first / second with its interval.

    Args:
        first: The baseline (dense).
        second: What is compared with it.
        inputs: A list is a pool that the calls rotate through; anything else its one member.
        device: Where the arms compute.
        blocks: Fewest blocks, at least 10.
        min_seconds: Fewest seconds of timed work.
        check: Looks at timed outputs, outside the timed window.
        settings: All settings; replaces ``blocks`` and ``min_seconds``.
        timer: Replaces the device's timer.
        on_block: Called after every block.
    """
    arms = [_as_arm(first, "first"), _as_arm(second, "second")]
    chosen = settings or Settings(blocks=blocks, min_seconds=min_seconds)
    results = compare_all(
        arms,
        inputs=inputs,
        device=device,
        check=check,
        settings=chosen,
        timer=timer,
        on_block=on_block,
    )
    return results[arms[1].name]


def compare_all(
    arms: Sequence[Arm],
    *,
    inputs: Any,
    device: str | torch.device = "cpu",
    check: Check | None = None,
    settings: Settings | None = None,
    timer: Timer | None = None,
    on_block: OnBlock | None = None,
) -> dict[str, Comparison]:
    """Time all arms together and compare each with the first; keys are the arms' names.

    A single arm is compared with itself: ratio 1, its times and their drift are of interest.
    """
    names = [arm.name for arm in arms]
    if not arms or len(set(names)) != len(names):
        raise ValueError(f"timing: arms must be one or more of different names, got {names}")
    settings = settings or Settings()
    timer = timer or timer_for(device)
    pool = list(inputs) if isinstance(inputs, list | tuple) else [inputs]
    runs: list[Blocks] = []
    while True:
        runs.append(_run(arms, pool, check, settings, timer, on_block))
        results = {name: summarise(runs, name, settings, timer.device_type) for name in names}
        drifted = any(result.status == "invalid" for result in results.values())
        if not drifted or runs[-1].faults or len(runs) >= settings.attempts:
            return results


def summarise(
    runs: Sequence[Blocks], name: str, settings: Settings, device_type: str = "cpu"
) -> Comparison:
    """Compare one arm of the last run with the first arm; pure, no clock involved."""
    run = runs[-1]
    column = run.names.index(name)
    first, second = run.seconds[run.warmup :, 0], run.seconds[run.warmup :, column]
    message = _fault(run, column, settings, device_type)
    strata = run.strata
    return Comparison(
        first=run.names[0],
        second=name,
        status="invalid" if message else "ok",
        message=message,
        ratio=timing_statistics.ratio_interval(
            first, second, strata, resamples=settings.resamples, seed=settings.seed
        ),
        first_ms=_spread(first, strata),
        second_ms=_spread(second, strata),
        blocks=len(first),
        warmup=run.warmup,
        outliers=timing_statistics.outliers(timing_statistics.levelled(first / second, strata)),
        device_seconds=float(run.device_seconds[run.warmup :].sum()),
        attempts=len(runs),
        order=run.order,
        regime=run.regime,
        repeats=[run.repeats[0], run.repeats[column]],
        states=run.states,
        raw={
            "period": run.period,
            "first_ms": _milliseconds(run.seconds[:, 0]),
            "second_ms": _milliseconds(run.seconds[:, column]),
            "discarded": [
                {
                    "first_ms": _milliseconds(other.seconds[:, 0]),
                    "second_ms": _milliseconds(other.seconds[:, column]),
                }
                for other in runs[:-1]
            ],
        },
    )


def _fault(run: Blocks, column: int, settings: Settings, device_type: str) -> str:
    """Return why this result must not be used, or "" if it may."""
    first, second = run.seconds[run.warmup :, 0], run.seconds[run.warmup :, column]
    for name in (run.names[0], run.names[column]):
        if name in run.faults:
            return f"output check failed for {name}: {run.faults[name]}"
    if len(first) < settings.blocks:
        return f"too few blocks: {len(first)} after the warm-up, at least {settings.blocks} needed"
    work = float(run.device_seconds[run.warmup :].sum())
    if work < settings.min_seconds:
        return f"too little timed work: {work:.2f} s, at least {settings.min_seconds:g} s needed"
    first, second = (timing_statistics.levelled(arm, run.strata) for arm in (first, second))
    jump = timing_statistics.stepped(first / second, floor=settings.ratio_drift)
    if jump is not None:
        return f"drift: the ratio jumped by {jump:+.0%} during the run"
    found = timing_statistics.drifted(first / second, floor=settings.ratio_drift)
    if found is not None:
        return f"drift: the ratio moved by {found.change:+.0%} over the run (p = {found.p:.2g})"
    floor = settings.baseline_drift or (0.10 if device_type == "cuda" else 0.35)
    found = timing_statistics.drifted(first, floor=floor)
    if found is not None:
        return (
            f"drift: {run.names[0]} moved by {found.change:+.0%} over the run (p = {found.p:.2g})"
        )
    if any(environment.is_throttled(state) for state in run.states):
        return "throttled: the device reports a thermal or hardware slowdown"
    return ""


def _run(
    arms: Sequence[Arm],
    pool: list[Any],
    check: Check | None,
    settings: Settings,
    timer: Timer,
    on_block: OnBlock | None,
) -> Blocks:
    """Run blocks until enough of them are settled, or a limit is reached."""
    repeats, pass_seconds = _calibrate(arms, pool, settings, timer)
    period = 1 if all(count % len(pool) == 0 for count in repeats) else len(pool)
    wanted = max(settings.blocks, BLOCKS_PER_STRATUM * period)
    alternating = pass_seconds > settings.long_pass_seconds
    rows: list[list[float]] = []
    work: list[float] = []
    faults: dict[str, str] = {}
    states = [environment.device_state(timer.device_type)]
    begun = time.monotonic()
    while True:
        number = len(rows)
        per_call, seconds, outputs = _block(arms, pool, repeats, timer, number, alternating)
        rows.append(per_call)
        work.append(seconds)
        if on_block:
            on_block(len(rows), wanted)
        times = np.array(rows)
        level = timing_statistics.levelled(times, np.arange(len(rows)) % period)
        settled = timing_statistics.warmup_blocks(level)
        warmup = settled or 0
        done = settled is not None and (
            len(rows) - warmup >= wanted and sum(work[warmup:]) >= settings.min_seconds
        )
        late = len(rows) >= settings.blocks and (
            time.monotonic() - begun > settings.max_seconds or len(rows) >= settings.max_blocks
        )
        if check and (number == 0 or done or late):
            _check_outputs(check, outputs, faults)
        if done or late:
            break
        if number in (settings.blocks // 2, 2 * settings.blocks, 8 * settings.blocks):
            states.append(environment.device_state(timer.device_type))
    states.append(environment.device_state(timer.device_type))
    order = "alternating" if alternating else "palindrome"
    names = [arm.name for arm in arms]
    return Blocks(
        names, times, np.array(work), order, repeats, faults, states, warmup, timer.regime, period
    )


def _calibrate(
    arms: Sequence[Arm], pool: list[Any], settings: Settings, timer: Timer
) -> tuple[list[int], float]:
    """Return calls per slot for each arm, and the seconds of one pass over all arms.

    The first call of each arm (compilation, autotuning, allocation) is not looked at.
    """
    slot = settings.min_seconds / (4 * settings.blocks * len(arms))
    repeats, total = [], 0.0
    for arm in arms:
        with arm.around():
            timer.run(arm.call, pool[:1])
            seconds, _ = timer.run(arm.call, pool[-1:])
        count = min(settings.max_repeats, max(1, math.ceil(slot / max(seconds, 1e-7))))
        if count >= len(pool):  # whole rounds: every block has all inputs
            count -= count % len(pool)
        repeats.append(count)
        total += seconds * count
    return repeats, total


def _slots(n_arms: int, number: int, alternating: bool) -> Iterator[int]:
    """Yield the arms of a block in running order."""
    if not alternating or number % 2 == 0:
        yield from range(n_arms)
    if not alternating or number % 2 == 1:
        yield from reversed(range(n_arms))


def _block(
    arms: Sequence[Arm],
    pool: list[Any],
    repeats: list[int],
    timer: Timer,
    number: int,
    alternating: bool,
) -> tuple[list[float], float, dict[str, tuple[int, Any]]]:
    """Run one block; every arm sees the same inputs, the next block the next ones."""
    totals, calls = [0.0] * len(arms), [0] * len(arms)
    outputs: dict[str, tuple[int, Any]] = {}
    for index in _slots(len(arms), number, alternating):
        arm = arms[index]
        members = [(number + step) % len(pool) for step in range(repeats[index])]
        with arm.around():
            seconds, output = timer.run(arm.call, [pool[member] for member in members])
        totals[index] += seconds
        calls[index] += len(members)
        outputs[arm.name] = (members[-1], output)
    per_call = [total / count for total, count in zip(totals, calls, strict=True)]
    return per_call, sum(totals), outputs


def _check_outputs(
    check: Check, outputs: dict[str, tuple[int, Any]], faults: dict[str, str]
) -> None:
    for name, (index, output) in outputs.items():
        fault = check(name, index, output)
        if fault:
            faults.setdefault(name, fault)


def _as_arm(value: Arm | Callable[[Any], Any], name: str) -> Arm:
    return value if isinstance(value, Arm) else Arm(name, value)


def _spread(seconds: np.ndarray, strata: np.ndarray) -> Interval:
    """Median with 20th and 80th percentile, in milliseconds, as the mean over strata."""
    groups = [seconds[strata == stratum] for stratum in np.unique(strata)]
    low, middle, high = 1e3 * np.mean([np.quantile(g, [0.2, 0.5, 0.8]) for g in groups], axis=0)
    return Interval(float(middle), float(low), float(high))


def _milliseconds(seconds: np.ndarray) -> list[float]:
    return [round(float(value) * 1e3, 6) for value in seconds]
