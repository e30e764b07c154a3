"""Intervals and tests against scipy, known values, and their own coverage."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from repro import statistics

scores = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=60)


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (3, 10), (10, 10), (93, 100), (1, 1)])
def test_wilson_matches_scipy(successes, n):
    ours = statistics.wilson(successes, n)
    theirs = stats.binomtest(successes, n).proportion_ci(method="wilson")
    assert ours.low == pytest.approx(theirs.low, abs=1e-12)
    assert ours.high == pytest.approx(theirs.high, abs=1e-12)


def test_wilson_of_nothing_knows_nothing():
    empty = statistics.wilson(0, 0)
    assert math.isnan(empty.value) and (empty.low, empty.high) == (0.0, 1.0)


@pytest.mark.parametrize(("successes", "n"), [(-1, 3), (4, 3)])
def test_wilson_refuses_impossible_counts(successes, n):
    with pytest.raises(ValueError, match=r"successes must be in \[0, 3\]"):
        statistics.wilson(successes, n)


@settings(deadline=None)
@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=200))
def test_mean_interval_of_zeros_and_ones_is_wilson(values):
    assert statistics.mean_interval(values) == statistics.wilson(int(sum(values)), len(values))


@settings(deadline=None)
@given(scores)
def test_mean_interval_holds_the_mean_and_stays_inside(values):
    interval = statistics.mean_interval(values)
    assert 0 <= interval.low <= interval.value <= interval.high <= 1
    assert interval.low < interval.high  # never certain


def test_mean_interval_covers_fractional_scores():
    rng = np.random.default_rng(0)
    truth = 0.9
    inside = 0
    for _ in range(400):
        values = 1 - rng.binomial(4, 0.1, size=50) / 4
        interval = statistics.mean_interval(values)
        inside += interval.low <= truth <= interval.high
    assert 0.92 <= inside / 400 <= 0.99


def test_mean_interval_of_many_items_is_close_to_the_normal_one():
    values = np.random.default_rng(1).beta(4, 2, size=4000)
    interval = statistics.mean_interval(values)
    half = 1.96 * values.std() / math.sqrt(values.size)
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.02)


def test_paired_difference_is_seeded():
    dense, method = np.random.default_rng(2).random((2, 80))
    one = statistics.paired_difference(dense, method, 7)
    assert one == statistics.paired_difference(dense, method, 7)
    assert one != statistics.paired_difference(dense, method, 8)


def test_paired_difference_matches_scipy_bootstrap():
    rng = np.random.default_rng(3)
    dense = (rng.random(120) < 0.9).astype(float)
    method = (rng.random(120) < 0.8).astype(float)
    ours = statistics.paired_difference(dense, method)
    theirs = stats.bootstrap(
        (method - dense,), np.mean, method="percentile", n_resamples=10_000, random_state=rng
    ).confidence_interval
    assert ours.value == pytest.approx((method - dense).mean())
    assert ours.low == pytest.approx(theirs.low, abs=0.01)
    assert ours.high == pytest.approx(theirs.high, abs=0.01)


@settings(deadline=None, max_examples=25)
@given(scores, st.integers(0, 5))
def test_paired_difference_swaps_its_sign_with_its_arguments(values, shift):
    other = values[shift % len(values) :] + values[: shift % len(values)]
    forward = statistics.paired_difference(values, other, resamples=2000)
    backward = statistics.paired_difference(other, values, resamples=2000)
    assert forward.value == pytest.approx(-backward.value)
    assert forward.low <= forward.value <= forward.high
    assert forward.low == pytest.approx(-backward.high, abs=0.15)


def test_unchanged_answers_do_not_prove_certainty():
    same = statistics.paired_difference([1.0] * 100, [1.0] * 100)
    bound = 1 - 0.025 ** (1 / 100)
    assert (same.value, same.p) == (0.0, 1.0)
    assert (same.low, same.high) == pytest.approx((-bound, bound))
    # The Clopper-Pearson bound of "0 of 100 differ" is the same number.
    exact = stats.binomtest(0, 100).proportion_ci(method="exact")
    assert same.high == pytest.approx(exact.high)


def test_all_lost_is_bounded_on_the_other_side_only():
    lost = statistics.paired_difference([1.0] * 10, [0.0] * 10)
    assert lost.value == lost.low == -1.0
    assert -1.0 < lost.high < 0.0
    assert lost.p == pytest.approx(2 * 0.5**10)


def test_paired_difference_covers_the_truth():
    rng = np.random.default_rng(4)
    inside = 0
    for trial in range(300):
        draw = rng.random(100)
        # 8 % lost and 2 % gained: the truth is -6 points.
        method = np.where(draw < 0.08, 0.0, 0.5) + np.where(draw > 0.98, 0.5, 0.0)
        dense = np.full(100, 0.5)
        result = statistics.paired_difference(dense, method, trial, resamples=2000)
        inside += result.low <= 0.5 * (0.02 - 0.08) <= result.high
    assert 0.90 <= inside / 300 <= 0.99


def test_paired_difference_refuses_unpaired_scores():
    with pytest.raises(ValueError, match="same number of items"):
        statistics.paired_difference([1.0], [1.0, 0.0])
    with pytest.raises(ValueError, match="finite"):
        statistics.paired_difference([1.0], [float("nan")])


def test_strata_weigh_the_same():
    small = ([1.0] * 4, [0.0, 1.0, 1.0, 1.0])
    large = ([1.0] * 400, [1.0] * 400)
    both = statistics.stratified_difference([small, large])
    assert both.value == pytest.approx(-0.125)
    assert both.n == 404
    assert both.low <= both.value <= both.high


def test_unchanged_strata_share_one_bound():
    strata = [([1.0] * 50, [1.0] * 50), ([0.0] * 50, [0.0] * 50)]
    together = statistics.stratified_difference(strata)
    assert together.high == pytest.approx(1 - 0.025 ** (1 / 100))


def test_crossed_interval_is_wider_than_items_alone_when_draws_differ():
    rng = np.random.default_rng(5)
    items = (rng.random(100) < 0.5).astype(float)
    offsets = np.linspace(-0.2, 0.2, 10)[:, None]
    differing = np.clip(items[None] * 0.5 + 0.25 + offsets, 0, 1)
    alike = np.repeat(items[None] * 0.5 + 0.25, 10, axis=0)
    wide = statistics.crossed_interval(differing)
    narrow = statistics.crossed_interval(alike)
    assert wide.high - wide.low > 1.2 * (narrow.high - narrow.low)
    assert wide.low <= wide.value <= wide.high
    assert wide.value == pytest.approx(differing.mean())


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (5, 0), (0, 6), (3, 9), (12, 12), (40, 20)])
def test_mcnemar_matches_the_binomial_test(lost, gained):
    expected = 1.0 if lost + gained == 0 else stats.binomtest(lost, lost + gained).pvalue
    assert statistics.mcnemar_exact(lost, gained) == pytest.approx(expected)


def test_holm_on_a_known_case():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([]) == []


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=13))
def test_holm_keeps_order_and_only_raises(p_values):
    adjusted = statistics.holm(p_values)
    assert all(a >= p for a, p in zip(adjusted, p_values, strict=True))
    assert max(adjusted) <= 1
    ranked = [adjusted[i] for i in sorted(range(len(p_values)), key=p_values.__getitem__)]
    assert ranked == sorted(ranked)


def test_flips_count_both_ways():
    result = statistics.flips([1, 1, 0, 0.5, 1], [0, 1, 1, 0.25, 1])
    assert (result.lost, result.gained, result.n) == (2, 1, 5)


def test_smallest_difference_has_the_power_it_promises():
    rng = np.random.default_rng(6)
    n, noise = 400, 0.1
    # Null: as many items gained as lost.
    draw = rng.random(n)
    dense = np.full(n, 0.5)
    method = dense + np.where(draw < noise, -0.5, np.where(draw > 1 - noise, 0.5, 0))
    smallest = statistics.minimum_detectable_difference(dense, method)
    found = 0
    for _ in range(300):
        draw = rng.random(n)
        lost = noise + smallest  # each lost item costs 0.5, each gained one brings 0.5
        shifted = np.where(draw < lost, -0.5, np.where(draw > 1 - noise + smallest, 0.5, 0))
        found += abs(stats.ttest_1samp(shifted, 0).pvalue) < 0.05
    assert 0.7 <= found / 300 <= 0.9


def test_smallest_difference_without_flips_is_six_items():
    assert statistics.mcnemar_exact(5, 0) > 0.05 >= statistics.mcnemar_exact(6, 0)
    assert statistics.minimum_detectable_difference([1.0] * 100, [1.0] * 100) == 0.06
    assert statistics.minimum_detectable_difference([1.0], [1.0]) == 1.0


def test_geometric_mean():
    interval = statistics.geometric_mean([2.0, 8.0])
    assert interval.value == pytest.approx(4.0)
    assert interval.low < 4.0 < interval.high
    alone = statistics.geometric_mean([3.0])
    assert alone.value == pytest.approx(3.0) and math.isnan(alone.low)
    with pytest.raises(ValueError, match="positive"):
        statistics.geometric_mean([1.0, 0.0])


def test_as_json_has_no_infinity():
    assert statistics.as_json({"a": [float("nan"), np.float64(1.5)], "n": np.int64(3)}) == {
        "a": [None, 1.5],
        "n": 3,
    }


def test_draws_that_never_differ_do_not_prove_certainty():
    scores = statistics.crossed_interval(np.ones((10, 100)), bounds=(0, 1))
    assert (scores.value, scores.high) == (1.0, 1.0)
    assert scores.low == pytest.approx(0.025 ** (1 / 100))
    same = statistics.crossed_interval(np.zeros((10, 100)))
    assert same.high == -same.low == pytest.approx(1 - 0.025 ** (1 / 100))
