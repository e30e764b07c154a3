"""When a cell of a run with a budget may end: no outcome of its other items changes a verdict.

A cell is judged by every claim that it enters, itself or as what others are compared with. Items
that are not known, of this cell or of another one, may score anything in [0, 1]. A claim is decided
if none of the numbers that ``verdict.compare`` looks at (the point and both ends of the interval)
can cross one of the claim's thresholds. Where these numbers can lie, over all completions:

The point is a mean: it lies between those of the lowest completion (the judged cells score 0, what
they are compared with 1) and the highest.

A mean of scores has a score interval: its ends move up with the mean and apart as the effective
number of items falls, which is at least the strata times the smallest one, since a variance in
[0, 1] is at most mean * (1 - mean) and that is concave. The ends lie on their side of the mean.

A crossed bootstrap draws with weights that depend on the table's shape and the seed alone: every
resample, and so every quantile, moves up with every item. The two extremes bound it exactly.
Tables without any variance are judged by another formula; they are looked at where one is possible.

A stratified bootstrap draws counts of distinct values; what is drawn depends on how often each
occurs, and no two extremes bound it. But for given counts of all strata the draws are fixed and
every resample moves up with the values, so that the lowest values with these counts bound them all.
The share of resamples below a number is at most p there by Chernoff's bound, which falls with every
item: the lowest completion bounds all. Of R resamples a share a is then below it with probability
exp(-R * KL(a, p)) at most. Strata of n items have 2 ** (n - 1) counts; p is so small that all of
them together fail with probability ``FAILURE``. This rests on numpy's multinomial draws being such.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from scipy import stats
from scipy.special import logsumexp

from repro import evidence, statistics, verdict
from repro.claims import Claim, Query
from repro.evidence import Evidence, Record
from repro.statistics import Array, Interval
from repro.store import is_cut
from repro.verdict import Verdict

FAILURE = 1e-12
TAIL = 0.025  # of the intervals of ``statistics``, on each side
#: In points: rounding moves an interval by less.
ROUNDING = 1e-7
#: Of Chernoff's bound; every one gives a valid bound.
_SLOPES = np.geomspace(1.0, 1e6, 120)
Span = tuple[float, float]


@dataclass(frozen=True)
class Spans:
    """Where the point and the ends of an interval can lie, in the unit of the claim."""

    value: Span
    low: Span
    high: Span

    def avoid(self, thresholds: Iterable[float]) -> bool:
        """Tell whether none of the three can cross a threshold."""
        return not any(
            low - ROUNDING <= edge <= high + ROUNDING
            for edge in thresholds
            for low, high in (self.value, self.low, self.high)
        )


def is_of_scores(claim: Claim) -> bool:
    """Tell whether a claim reads nothing but scores of items."""
    query = claim.query
    return query is not None and (query.compare != "none" or query.metric == "score")


def members(claim: Claim, records: Evidence) -> list[Record]:
    """Return the cells that enter a claim: those judged, and what they are compared with."""
    query = claim.query
    if query is None:
        return []
    found = verdict.exact_of(query, verdict.related_to(query, records))
    partners: list[Record] = []
    for record in found:
        if query.compare == "minus_dense":
            dense = records.dense_of(record)
            partners += [] if dense is None else [dense]
        elif query.compare == "minus_control":
            partners += records.controls_of(record, query.control)
    chosen = {id(record) for record in (*found, *partners)}
    return [record for record in records.records if id(record) in chosen]


def completed(records: Iterable[Record], score: Callable[[Record], float]) -> Evidence:
    """Return the records with a score for every item that has none."""
    return Evidence([_complete(record, score(record)) for record in records])


def _complete(record: Record, score: float) -> Record:
    if not is_cut(record):
        return record
    part = record["settled"]
    scores = [score if known is None else known for known in part["scores"]]
    return {**record, "items": {"keys": part["keys"], "scores": scores}}


def decide(claim: Claim, records: Evidence) -> Verdict | None:
    """Return the one verdict that every completion of the records gives, None if there may be two.

    ``too few items`` and the like are no answer of the items and decide nothing.
    """
    query = claim.query
    if query is None:
        return None
    found: dict[str, list[Span]] = {}
    lowest: Evidence | None = None
    for low, high in _configurations(claim, records):
        spans = _spans(query, verdict.thresholds(claim), low, high)
        if spans is None or not spans.avoid(verdict.thresholds(claim)):
            return None
        point = Interval(spans.value[0], spans.low[0], spans.high[0], 0)
        found.setdefault(verdict.compare(claim, point)[0], []).append(spans.value)
        lowest = low.world
    if lowest is None:
        return None
    # Everything that is no number of the interval is the same in all completions.
    said = verdict.judge(claim, lowest)
    if set(found) != {said.verdict}:
        return None
    lows, highs = zip(*found[said.verdict], strict=True)
    return replace(said, measured=None, possible=(min(lows), max(highs)))


def can_be_decided(claim: Claim, now: Evidence, then: Evidence) -> bool:
    """Tell whether an open claim may be decided by what is unknown now and known then.

    The point is linear in the items: what is unknown then leaves it a range whose length does not
    depend on where it lies. There must be room for it between two thresholds.
    """
    query = claim.query
    if query is None:
        return False
    reaches, rests = (
        [_value(query, low, high) for low, high in _configurations(claim, records)]
        for records in (now, then)
    )
    for reach, rest in zip(reaches, rests, strict=True):
        if reach is None or rest is None:
            return False
        inside = [t for t in verdict.thresholds(claim) if reach[0] < t < reach[1]]
        room = max(b - a for a, b in pairwise(sorted((*reach, *inside))))
        if rest[1] - rest[0] > room + ROUNDING:
            return False
    return bool(reaches)


def judge(claim: Claim, records: Evidence) -> Verdict:
    """Judge a claim as ``verdict.judge`` does; one with cells that ended early by what is decided."""
    plain = verdict.judge(claim, records)
    entering = members(claim, completed(records.records, lambda record: 0.0))
    keys = {record["key"] for record in entering}
    cut = [r for r in records.records if is_cut(r) and r["key"] in keys]
    if not cut:
        return plain
    asked, of = (sum(record["settled"][name] for record in cut) for name in ("asked", "of"))
    told = f"{len(cut)} of {len(keys)} cells ended early, {asked} of their {of} items asked"
    settled = decide(claim, records)
    if settled is None:
        remedy = "run again without --budget to finish them"
        return replace(plain, verdict=verdict.NOT_RUN, reason=f"{told}; {remedy}", measured=None)
    return replace(settled, reason=f"settled early: no outcome of the others changes it; {told}")


@dataclass(frozen=True)
class _End:
    """One of the two extreme completions, and the judged cells of one configuration in it."""

    world: Evidence
    cells: list[Record]


def _configurations(claim: Claim, records: Evidence) -> list[tuple[_End, _End]]:
    """Return the lowest and the highest completion for every configuration that a claim judges."""
    query = claim.query
    if query is None or not is_of_scores(claim):
        return []
    exact = verdict.exact_of(query, verdict.related_to(query, records))
    if any(_is_compared_with_itself(query, record) for record in exact):
        return []
    judged = {id(record) for record in exact}

    def end(score: float) -> Evidence:
        return completed(records.records, lambda r: score if id(r) in judged else 1.0 - score)

    low, high = end(0.0), end(1.0)
    variants: dict[evidence.Variant, list[int]] = {}
    for place, record in enumerate(records.records):
        if id(record) in judged:
            variants.setdefault(evidence.variant_of(record), []).append(place)
    return [
        (
            _End(low, [low.records[place] for place in places]),
            _End(high, [high.records[place] for place in places]),
        )
        for places in variants.values()
    ]


def _is_compared_with_itself(query: Query, record: Record) -> bool:
    variant = evidence.variant_of(record)
    if query.compare == "minus_dense":
        return variant.is_dense
    return query.compare == "minus_control" and variant.control != "none"


# Where the numbers of an interval can lie


def _value(query: Query, low: _End, high: _End) -> Span | None:
    """Return where the point can lie, None if there is no number."""
    found = [_numbers(query, end) for end in (low, high)]
    if not all(found):
        return None
    first, last = (100 * float(np.mean([part.mean() for part in parts])) for parts in found)
    return first, last


def _spans(query: Query, thresholds: Sequence[float], low: _End, high: _End) -> Spans | None:
    """Return the spans of one configuration; None if there is no number, or the point decides."""
    value = _value(query, low, high)
    if value is None or not Spans(value, value, value).avoid(thresholds):
        return None  # a bootstrap less
    lowest, highest = _numbers(query, low), _numbers(query, high)
    if query.compare == "minus_control":
        return _crossed(lowest[0], highest[0], value)
    if query.compare == "minus_dense":
        return _stratified(lowest, highest, value)
    return _means(lowest, value)


def _numbers(query: Query, end: _End) -> list[Array]:
    """Return the scores or differences of a completion, a stratum each, or one table by draws."""
    if query.compare == "minus_control":
        table = end.world.minus_control(end.cells, query.control)
        return [] if table is None else [table]
    if query.compare == "minus_dense":
        pairs = end.world.pairs(end.cells)
        return [after - before for before, after in pairs] if len(pairs) == len(end.cells) else []
    scored = all(evidence.is_ok(record) and evidence.has_scores(record) for record in end.cells)
    return [evidence.scores_of(record) for record in end.cells] if scored else []


def _means(scores: Sequence[Array], value: Span) -> Spans:
    effective = len(scores) * min(part.size for part in scores)
    quantile = float(stats.norm.ppf(1 - TAIL))
    if len(scores) == 1 and effective > 1:  # the wider of the two that ``mean_interval`` takes
        quantile = float(stats.t.ppf(1 - TAIL, effective - 1))
    low, high = (
        statistics._score_interval(point / 100, effective, effective, quantile).scaled(100)
        for point in value
    )
    return Spans(value, (low.low, value[1]), (value[0], high.high))


def _crossed(low: Array, high: Array, value: Span) -> Spans:
    found = [_resampled(low), _resampled(high)]
    if low.max() <= high.min():
        constants = (low.max(), high.min())
        found += [statistics.crossed_interval(np.full(low.shape, c)) for c in constants]
    return _hull(value, [interval.scaled(100) for interval in found])


def _resampled(table: Array) -> Interval:
    """Return the bootstrap's interval, of width zero where nothing varies: others come near it."""
    if np.ptp(table) == 0:
        return Interval(table.flat[0], table.flat[0], table.flat[0], table.size)
    return statistics.crossed_interval(table)


def _stratified(low: Sequence[Array], high: Sequence[Array], value: Span) -> Spans:
    uncertain = sum(a.size for a, b in zip(low, high, strict=True) if (a < b).any())
    if not uncertain:
        known = statistics.stratified_difference([(np.zeros(part.size), part) for part in low])
        return _hull(value, [known.scaled(100)])
    resamples = statistics.RESAMPLES * TAIL
    # R * KL(a, p) >= R * a * (log(a / p) - 1), which is to be the logarithm of counts / FAILURE.
    counts = uncertain * np.log(2) - np.log(FAILURE)
    log_p = float(np.log(TAIL) - 1 - counts / resamples)
    ends = [_quantile_above(low, log_p), -_quantile_above([-part for part in high], log_p)]
    if all(a.max() <= b.min() for a, b in zip(low, high, strict=True)):
        for constants in ([a.max() for a in low], [b.min() for b in high]):
            pairs = [
                (np.zeros(part.size), np.full(part.size, constant))
                for part, constant in zip(low, constants, strict=True)
            ]
            flat = statistics.stratified_difference(pairs)
            ends += [flat.low, flat.high]
    # Either end may lie anywhere between the outermost.
    outer = 100 * min(ends), 100 * max(ends)
    return Spans(value, outer, outer)


def _quantile_above(strata: Sequence[Array], log_p: float) -> float:
    """Return a number that a resampled mean of stratum means is below with at most so low a chance.

    P(Y < y) <= exp(s * y) * E exp(-s * Y) for every slope s > 0.
    """
    logs = np.zeros(_SLOPES.size)
    for part in strata:
        scaled = -np.outer(_SLOPES / (len(strata) * part.size), part)
        logs += part.size * (logsumexp(scaled, axis=1) - np.log(part.size))
    return float(np.max((log_p - logs) / _SLOPES))


def _hull(value: Span, found: Sequence[Interval]) -> Spans:
    lows, highs = [interval.low for interval in found], [interval.high for interval in found]
    return Spans(value, (min(lows), max(lows)), (min(highs), max(highs)))
