"""Statistics of block times: warm-up, interval, drift, outliers. Pure functions of arrays.

A *block* holds one time per arm, taken close together, so what slows the machine for longer than
a block slows all arms of it; the statistic of interest is the ratio per block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

_NORMAL = NormalDist()

#: Factor from the median absolute deviation to the standard deviation of a normal.
_MAD = 1.4826


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval, in the unit of the input."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Trend:
    """A monotone trend over the run: p-value, and relative change from first to last block."""

    p: float
    change: float


def warmup_blocks(times: np.ndarray, *, floor: float = 0.03) -> int | None:
    """Return how many leading blocks belong to the warm-up, None if nothing has settled yet.

    The later half of the run says what settled means: median and spread of the log time of each
    arm. A leading stretch is warm-up if its last block, and at least half of its blocks, lie
    outside four standard deviations (and outside ``floor``, relative) in some arm. A stretch
    longer than a third of the run is no warm-up: more blocks must show which level lasts.

    Args:
        times: ``[n_blocks, n_arms]``, any positive unit.
        floor: Smallest relative difference that counts.
    """
    n_blocks = len(times)
    log = np.log(times)
    settled = log[n_blocks // 2 :]
    centre = np.median(settled, axis=0)
    spread = _MAD * np.median(np.abs(settled - centre), axis=0)
    outside = (np.abs(log - centre) > np.maximum(4 * spread, floor)).any(axis=1)
    share = np.cumsum(outside) / np.arange(1, n_blocks + 1)
    ends = [k for k in range(1, n_blocks // 2 + 1) if outside[k - 1] and share[k - 1] >= 0.5]
    length = max(ends, default=0)
    return length if length <= n_blocks // 3 else None


def levelled(values: np.ndarray, strata: np.ndarray) -> np.ndarray:
    """Return values with the level of each stratum taken out, so that what is left is noise.

    Args:
        values: ``[n_blocks]`` or ``[n_blocks, n_arms]``, positive.
        strata: ``[n_blocks]``, which inputs a block had.
    """
    log = np.log(values)
    level = np.zeros_like(log)
    for stratum in np.unique(strata):
        level[strata == stratum] = np.median(log[strata == stratum], axis=0)
    return np.exp(log - level + level.mean(axis=0))


def ratio_interval(
    first: np.ndarray,
    second: np.ndarray,
    strata: np.ndarray | None = None,
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Return first over second for all inputs together, with a bootstrap interval over blocks.

    Blocks of one stratum had the same inputs. Its ratio is the median over its blocks; the whole
    is the time of one arm on all strata over that of the other, so each stratum counts by its share
    of the first arm's time: inputs that gain nothing and take long are not outvoted.

    The percentile interval is taken at levels widened for few blocks (Hesterberg 2015, "expanded
    percentile"), and once more where neighbouring blocks are correlated, so that it covers the
    truth about 95 times in 100 from 10 blocks on.

    Args:
        first: ``[n_blocks]`` times, positive.
        second: ``[n_blocks]``, of the same blocks.
        strata: ``[n_blocks]``, which inputs a block had; None if all had the same.
        resamples: Bootstrap samples, at least 10,000 where the result is reported.
        seed: Of the resampling.
    """
    strata = np.zeros(len(first), int) if strata is None else strata
    log = np.log(first / second)
    groups = [strata == stratum for stratum in np.unique(strata)]
    shares = np.array([np.median(first[group]) for group in groups])
    shares = shares / shares.sum()
    sizes = [int(group.sum()) for group in groups]

    def whole(medians: np.ndarray) -> np.ndarray:  # [..., n_strata] -> [...]
        return -np.log(np.exp(-medians) @ shares)

    value = float(whole(np.array([np.median(log[group]) for group in groups])))
    n = min(sizes)
    if n < 2:
        return Interval(math.exp(value), 0.0, math.inf)
    generator = np.random.default_rng(seed)
    drawn = [
        np.median(log[group][generator.integers(0, size, (resamples, size))], axis=1)
        for group, size in zip(groups, sizes, strict=True)
    ]
    tail = _NORMAL.cdf(-math.sqrt(n / (n - 1)) * _student_quantile(0.975, n - 1))
    low, high = np.quantile(whole(np.stack(drawn, axis=1)), [tail, 1 - tail])
    widen = _correlation_factor(np.log(levelled(first / second, strata)))
    return Interval(
        math.exp(value),
        math.exp(value - widen * (value - float(low))),
        math.exp(value + widen * (float(high) - value)),
    )


def trend(values: np.ndarray) -> Trend:
    """Test for a monotone trend (Mann-Kendall), its variance corrected for autocorrelation.

    Args:
        values: ``[n_blocks]``, positive; the change is relative (Theil-Sen on the logarithm).
    """
    log, n = np.log(values), len(values)
    if n < 4:
        return Trend(1.0, 0.0)
    first, second = np.triu_indices(n, 1)
    difference = log[second] - log[first]
    score = float(np.sign(difference).sum())
    slope = float(np.median(difference / (second - first)))
    variance = n * (n - 1) * (2 * n + 5) / 18
    residual = log - slope * np.arange(n)
    deviation = math.sqrt(variance) * _correlation_factor(residual)
    z = (abs(score) - 1) / deviation if score else 0.0
    return Trend(math.erfc(max(z, 0.0) / math.sqrt(2)), math.expm1(slope * (n - 1)))


def drifted(values: np.ndarray, *, floor: float, level: float = 0.005) -> Trend | None:
    """Return the trend if it is both certain and larger than ``floor`` (relative), else None.

    Certain means significant, or eight times the noise between neighbours: a smooth curve leaves
    correlated residuals, which would pass it off as correlated noise. Without the floor a quiet
    machine would be stamped for a change nobody cares about.
    """
    found = trend(values)
    size = abs(math.log1p(found.change))
    steps = np.diff(np.log(values))
    noise = _MAD * float(np.median(np.abs(steps - np.median(steps)))) / math.sqrt(2)
    certain = found.p < level or size > 8 * noise
    return found if certain and size > math.log1p(floor) else None


def stepped(values: np.ndarray, *, floor: float, least: int = 4) -> float | None:
    """Return the relative change at a lasting jump of the level, or None if there is none.

    A trend test corrected for autocorrelation is blind to a jump. Here the best split into two
    stretches of at least ``least`` blocks counts if their medians differ by more than ``floor``
    (relative) and by more than five robust standard deviations within the stretches.

    Args:
        values: ``[n_blocks]``, positive.
        floor: Smallest relative jump that counts.
        least: Blocks on either side.
    """
    log = np.log(values)
    best = 0.0
    for split in range(least, len(log) - least + 1):
        sides = log[:split], log[split:]
        centres = [float(np.median(side)) for side in sides]
        residual = np.concatenate([side - c for side, c in zip(sides, centres, strict=True)])
        jump = centres[1] - centres[0]
        if abs(jump) > 5 * _MAD * float(np.median(np.abs(residual))) and abs(jump) > abs(best):
            best = jump
    return math.expm1(best) if abs(best) > math.log1p(floor) else None


def outliers(values: np.ndarray, *, threshold: float = 5.0) -> list[int]:
    """Return the indices with a modified z-score above ``threshold``; they are kept all the same.

    Args:
        values: ``[n_blocks]``, positive; scores are taken of the logarithm.
        threshold: In robust standard deviations.
    """
    log = np.log(values)
    centre = np.median(log)
    spread = max(_MAD * float(np.median(np.abs(log - centre))), 1e-4)
    return [int(index) for index in np.flatnonzero(np.abs(log - centre) > threshold * spread)]


def _student_quantile(level: float, freedom: int) -> float:
    """Quantile of Student's t by its expansion in 1/freedom; within 0.5 % from 5 on."""
    z = _NORMAL.inv_cdf(level)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / freedom + second / freedom**2


def _correlation_factor(values: np.ndarray) -> float:
    """Return by what factor autocorrelation widens a standard error, 1 or more.

    Lag-1 autocorrelation, corrected for its downward bias in short series, counts only where it
    exceeds its own standard error; an AR(1) series then widens by sqrt((1 + r) / (1 - r)).
    """
    n = len(values)
    centred = values - values.mean()
    power = float(centred @ centred)
    if n < 8 or power == 0.0:
        return 1.0
    lag = float(centred[1:] @ centred[:-1]) / power
    lag = min((n * lag + 1) / (n - 4), 0.8)
    return math.sqrt((1 + lag) / (1 - lag)) if lag > 1 / math.sqrt(n) else 1.0
