"""Intervals and tests for accuracy and for aggregates over cells. numpy and scipy only.

Scores are per item and lie in [0, 1]; everything random is seeded. Every interval is two-sided at
95 % unless ``confidence`` says otherwise. A degenerate sample (no variance at all) never gets an
interval of width zero: the exact binomial bound on what the sample cannot have seen is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

RESAMPLES = 10_000
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A point estimate with its interval; ``n`` is the number of items (or cells) it rests on."""

    value: float
    low: float
    high: float
    n: int

    def scaled(self, factor: float) -> Interval:
        """Return the interval in another unit (100 for percent); ``factor`` must be positive."""
        return Interval(self.value * factor, self.low * factor, self.high * factor, self.n)


@dataclass(frozen=True)
class PairedDifference(Interval):
    """Mean of second minus first over paired items, with the two-sided bootstrap p value."""

    p: float


@dataclass(frozen=True)
class Flips:
    """Items that the second run lost (scored lower) and gained (scored higher), of ``n``."""

    lost: int
    gained: int
    n: int


def wilson(successes: int, n: int, *, confidence: float = 0.95) -> Interval:
    """Return the Wilson score interval of a proportion; no item at all gives [0, 1] around NaN.

    Raises:
        ValueError: If ``successes`` is not in [0, n].
    """
    if not 0 <= successes <= n:
        raise ValueError(f"wilson: successes must be in [0, {n}], got {successes}")
    if n == 0:
        return Interval(float("nan"), 0.0, 1.0, 0)
    return _score_interval(successes / n, n, n, float(stats.norm.ppf(0.5 + confidence / 2)))


def mean_interval(scores: ArrayLike, *, confidence: float = 0.95) -> Interval:
    """Return the mean of scores in [0, 1] with a score interval that stays inside [0, 1].

    Zeros and ones get the Wilson interval. Fractional scores get the same formula with the
    effective number of items ``n * mean * (1 - mean) / variance`` and Student's quantile: a sample
    with less variance than a coin of the same mean knows more. No variance counts as a coin.
    """
    values = _vector("mean_interval: scores", scores)
    n = values.size
    if n == 0:
        return Interval(float("nan"), 0.0, 1.0, 0)
    if is_binary(values):
        return wilson(int(values.sum()), n, confidence=confidence)
    mean, variance = float(values.mean()), float(values.var())
    if n == 1 or variance < 1e-15:
        return _score_interval(mean, n, n, float(stats.norm.ppf(0.5 + confidence / 2)))
    effective = n * mean * (1 - mean) / variance
    return _score_interval(mean, effective, n, float(stats.t.ppf(0.5 + confidence / 2, n - 1)))


def stratified_mean(strata: Sequence[ArrayLike], *, confidence: float = 0.95) -> Interval:
    """Return the mean over strata (tasks) of mean scores, every stratum weighing the same.

    The variance is that of the mean of stratum means; the interval is a score interval as in
    ``mean_interval``.
    """
    values = [_vector("stratified_mean: scores", scores) for scores in strata]
    if not values or any(v.size == 0 for v in values):
        raise ValueError("stratified_mean: every stratum must hold at least one score")
    if len(values) == 1:
        return mean_interval(values[0], confidence=confidence)
    n = sum(v.size for v in values)
    mean = float(np.mean([v.mean() for v in values]))
    variance = sum(float(v.var()) / v.size for v in values) / len(values) ** 2
    effective = mean * (1 - mean) / variance if variance > 1e-15 else n
    return _score_interval(mean, effective, n, float(stats.norm.ppf(0.5 + confidence / 2)))


def _score_interval(mean: float, effective: float, n: int, z: float) -> Interval:
    """Invert the score test of a proportion ``mean`` seen on ``effective`` items."""
    shrink = 1 + z * z / effective
    centre = (mean + z * z / (2 * effective)) / shrink
    variance = mean * (1 - mean) / effective + z * z / (4 * effective * effective)
    half = z * float(np.sqrt(max(variance, 0.0))) / shrink
    low = 0.0 if mean <= 0 else max(0.0, min(centre - half, mean))
    high = 1.0 if mean >= 1 else min(1.0, max(centre + half, mean))
    return Interval(mean, low, high, n)


def paired_difference(
    dense: ArrayLike,
    method: ArrayLike,
    seed: int = 0,
    *,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
) -> PairedDifference:
    """Return mean(method - dense) over paired items with the percentile bootstrap interval.

    When all differences are equal (typically: no answer changed) the bootstrap would claim
    certainty; then the interval is exact: at the given confidence at most a share
    ``1 - (alpha / 2) ** (1 / n)`` of all items can differ, by any amount.

    Args:
        dense: ``[n]`` scores in [0, 1].
        method: ``[n]`` scores in [0, 1] of the same items in the same order.
        seed: Seed of the resampling.
        resamples: Number of bootstrap resamples.
        confidence: Coverage of the interval.

    Raises:
        ValueError: If the two differ in length or are empty.
    """
    return stratified_difference(
        [(dense, method)], seed, resamples=resamples, confidence=confidence
    )


def stratified_difference(
    strata: Sequence[tuple[ArrayLike, ArrayLike]],
    seed: int = 0,
    *,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
) -> PairedDifference:
    """Return the mean over strata (tasks) of the paired differences, each stratum resampled alone.

    Every stratum weighs the same, whatever its number of items. If no stratum varies, the exact
    bound of ``paired_difference`` applies to the items of all strata together.
    """
    differences = [_difference(dense, method) for dense, method in strata]
    if not differences:
        raise ValueError("stratified_difference: strata must not be empty, got none")
    n = sum(d.size for d in differences)
    value = float(np.mean([d.mean() for d in differences]))
    alpha = 1 - confidence
    if all(np.ptp(d) == 0 for d in differences):
        unseen = 1 - (alpha / 2) ** (1 / n)
        low, high = value - unseen * (value + 1), value + unseen * (1 - value)
        return PairedDifference(value, low, high, n, 1.0 if value == 0 else min(1.0, 2 * 0.5**n))
    rng = np.random.default_rng(seed)
    means = np.mean([_bootstrap_means(d, rng, resamples) for d in differences], axis=0)
    low, high = np.quantile(means, [alpha / 2, 1 - alpha / 2])
    return PairedDifference(value, float(low), float(high), n, _bootstrap_p(means))


def _difference(dense: ArrayLike, method: ArrayLike) -> Array:
    first = _vector("paired_difference: dense", dense)
    second = _vector("paired_difference: method", method)
    if first.size != second.size or first.size == 0:
        raise ValueError(
            "paired_difference: dense and method must have the same number of items (at least 1), "
            f"got {first.size} and {second.size}"
        )
    return second - first


def _bootstrap_means(values: Array, rng: np.random.Generator, resamples: int) -> Array:
    """Return ``[resamples]`` means; counts of distinct values are drawn, not single items."""
    distinct, counts = np.unique(values, return_counts=True)
    shares = counts / values.size
    chunk = max(1, 2_000_000 // distinct.size)
    parts = []
    for start in range(0, resamples, chunk):
        drawn = rng.multinomial(values.size, shares, size=min(chunk, resamples - start))
        parts.append(drawn @ distinct / values.size)
    return np.concatenate(parts)


def _bootstrap_p(means: Array) -> float:
    """Return the two-sided p value: how often a resample lies on the other side of zero."""
    # One resample is added to both sides, so that p is never 0.
    below = (np.sum(means <= 0) + 1) / (means.size + 1)
    above = (np.sum(means >= 0) + 1) / (means.size + 1)
    return min(1.0, 2 * float(np.minimum(below, above)))


def crossed_interval(
    values: ArrayLike,
    seed: int = 0,
    *,
    bounds: tuple[float, float] = (-1.0, 1.0),
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
) -> Interval:
    """Return the mean of ``[draws, items]`` values, interval over draws and items together.

    Draws and items are resampled independently of each other (the crossed bootstrap), so that the
    interval speaks of other draws of a random control and of other items alike. If all values are
    equal, the exact bound of ``paired_difference`` over the items holds.

    Args:
        values: ``[draws, items]``, scores or paired differences.
        seed: Seed of the resampling.
        bounds: What a value can be at all: (0, 1) for scores.
        resamples: Number of bootstrap resamples.
        confidence: Coverage of the interval.
    """
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or 0 in table.shape:
        raise ValueError(f"crossed_interval: values must be [draws, items], got {table.shape}")
    value = float(table.flat[0])
    if np.ptp(table) == 0:
        unseen = 1 - ((1 - confidence) / 2) ** (1 / table.shape[1])
        low, high = value - unseen * (value - bounds[0]), value + unseen * (bounds[1] - value)
        return Interval(value, low, high, table.size)
    return _crossed(table.tobytes(), *table.shape, seed, resamples, confidence)


@lru_cache(maxsize=1024)
def _crossed(
    raw: bytes, draws: int, items: int, seed: int, resamples: int, confidence: float
) -> Interval:
    """Compute ``crossed_interval``; a table and a verdict often ask for the same one."""
    table = np.frombuffer(raw, dtype=np.float64).reshape(draws, items)
    rng = np.random.default_rng(seed)
    index = np.uint16 if items <= 2**16 else np.int64
    chunk = max(1, 500_000 // items)
    means = []
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        by_draw = rng.multinomial(draws, np.full(draws, 1 / draws), size=size) @ table / draws
        # A gather of drawn items is an order of magnitude cheaper than multinomial weights.
        drawn = rng.integers(0, items, size=(size, items), dtype=index)
        means.append(np.take_along_axis(by_draw, drawn, axis=1).mean(axis=1))
    alpha = 1 - confidence
    low, high = np.quantile(np.concatenate(means), [alpha / 2, 1 - alpha / 2])
    return Interval(float(table.mean()), float(low), float(high), draws * items)


def mcnemar_exact(lost: int, gained: int) -> float:
    """Return the exact two-sided McNemar p value of ``lost`` against ``gained`` discordant pairs."""
    if lost < 0 or gained < 0:
        raise ValueError(f"mcnemar_exact: counts must be >= 0, got {lost} and {gained}")
    n = lost + gained
    return 1.0 if n == 0 else float(min(1.0, 2 * stats.binom.cdf(min(lost, gained), n, 0.5)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm-adjusted p values in the order given (family-wise over all of them)."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def flips(dense: ArrayLike, method: ArrayLike) -> Flips:
    """Count items that scored lower and higher with the method than dense."""
    difference = _difference(dense, method)
    return Flips(int((difference < 0).sum()), int((difference > 0).sum()), difference.size)


def minimum_detectable_difference(
    dense: ArrayLike, method: ArrayLike, *, power: float = 0.8, confidence: float = 0.95
) -> float:
    """Return the smallest absolute mean difference that this many items could have shown.

    It is the difference that a paired test at ``1 - confidence`` finds with probability ``power``,
    given the spread of the observed differences; never less than the fewest one-way flips that
    exact McNemar can call significant (six of them at 95 %), divided by the number of items.
    """
    difference = _difference(dense, method)
    alpha = 1 - confidence
    z = stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(power)
    spread = float(difference.std(ddof=1)) if difference.size > 1 else 1.0
    fewest = int(np.ceil(1 + np.log2(1 / alpha)))
    return float(min(1.0, max(z * spread / np.sqrt(difference.size), fewest / difference.size)))


def geometric_mean(ratios: ArrayLike, *, confidence: float = 0.95) -> Interval:
    """Return the geometric mean of positive ratios with Student's interval of the logarithms.

    One ratio alone has no interval over cells: ``low`` and ``high`` are then NaN.
    """
    values = _vector("geometric_mean: ratios", ratios)
    if values.size == 0 or (values <= 0).any():
        raise ValueError("geometric_mean: ratios must be positive and at least one")
    logs = np.log(values)
    value = float(np.exp(logs.mean()))
    if values.size == 1:
        return Interval(value, float("nan"), float("nan"), 1)
    half = stats.t.ppf(0.5 + confidence / 2, values.size - 1) * stats.sem(logs)
    low, high = np.exp(logs.mean() - half), np.exp(logs.mean() + half)
    return Interval(value, float(low), float(high), values.size)


def is_binary(scores: ArrayLike) -> bool:
    """Tell whether all scores are 0 or 1, so that exact tests of counts apply."""
    values = np.asarray(scores, dtype=np.float64)
    return bool(np.isin(values, (0.0, 1.0)).all())


def _vector(where: str, values: ArrayLike) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{where} must be one-dimensional, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{where} must be finite, got NaN or infinity")
    return array


def as_json(value: Any) -> Any:
    """Return plain floats with NaN and infinity as None, for JSON."""
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    if isinstance(value, np.integer):
        return int(value)
    return value
