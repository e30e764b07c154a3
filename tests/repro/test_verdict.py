"""Verdicts: the rules of the intervals, which records count, and what makes them invalid."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repro import verdict
from repro.claims import Claim, Query
from repro.evidence import Evidence
from repro.report.testing import CONFIG, GPU, campaign, record, scored, timed
from repro.statistics import Interval


def claim(query=None, **changes):
    asked = Query(
        **{"method": "xattention", "measurement": "latency", "metric": "ratio", **(query or {})}
    )
    values = {
        "id": "c",
        "row": "c",
        "at": "",
        "what": "a claim",
        "value": 2.0,
        "unit": "x",
        "model": "zoo:retriever",
        "hardware": "not stated",
        "setting": "",
        "source": "table 1",
        "confirmed": True,
        "proxy": False,
        "note": "",
        "needs": "a GPU",
        "direction": "at_least",
        "strict": False,
        "tolerance": 0.1,
        "points": None,
        "margin": None,
        "scope": "single",
        "min_items": 0,
        "min_draws": 0,
        "query": asked,
    }
    return Claim(**{**values, **changes})


def judged(claimed, low, value, high):
    return verdict.compare(claimed, Interval(value, low, high, 100))[0]


# From an interval to a verdict


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ((1.9, 2.0, 2.1), "reproduced"),
        ((1.6, 1.75, 1.85), "reproduced"),  # the favourable end reaches 2 less 10 %
        ((1.5, 1.6, 1.79), "not reproduced"),
        ((3.0, 3.1, 3.2), "reproduced"),
        ((0.9, 1.5, 2.1), "within noise"),  # holds 2 and 1 alike
        ((0.5, 0.9, 1.9), "not reproduced"),  # reaches 1.8, but the point is a slow-down
    ],
)
def test_at_least(interval, expected):
    assert judged(claim(), *interval) == expected


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ((0.4, 0.5, 0.6), "reproduced"),
        ((0.54, 0.6, 0.7), "reproduced"),
        ((0.56, 0.6, 0.7), "not reproduced"),
        ((0.4, 0.8, 1.1), "within noise"),
    ],
)
def test_at_most(interval, expected):
    assert judged(claim(direction="at_most", value=0.5), *interval) == expected


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ((94, 95, 96), "reproduced"),
        ((98.5, 99, 99.5), "not reproduced"),
        ((90, 92, 93), "reproduced"),
        ((90, 91, 92.9), "not reproduced"),
    ],
)
def test_equal_in_points(interval, expected):
    score = {"measurement": "ruler", "metric": "score"}
    equal = claim(score, value=95, unit="%", direction="equal", points=2.0)
    assert judged(equal, *interval) == expected


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ((-1.9, -1.0, -0.1), "reproduced"),  # a real loss, but a small one
        ((-2.0, -1.0, 0.0), "within noise"),  # the bound itself does not count
        ((-3.0, -0.5, 1.0), "within noise"),
        ((-3.0, -1.5, -0.5), "not reproduced"),
        ((-5.0, -4.0, -3.0), "not reproduced"),
        ((0.5, 1.0, 2.0), "reproduced"),
    ],
)
def test_holds_is_non_inferiority(interval, expected):
    holds = claim({"compare": "minus_dense"}, direction="holds", margin=2.0, min_items=100)
    assert judged(holds, *interval) == expected


@pytest.mark.parametrize(
    ("direction", "interval", "expected"),
    [
        ("at_least", (2.0, 2.5, 3.0), "reproduced"),
        ("at_least", (1.9, 2.5, 3.0), "within noise"),
        ("at_least", (1.0, 1.5, 1.9), "not reproduced"),
        ("at_most", (1.0, 1.5, 2.0), "reproduced"),
        ("at_most", (1.0, 1.5, 2.1), "within noise"),
        ("at_most", (2.1, 2.5, 3.0), "not reproduced"),
    ],
)
def test_strict_asks_the_whole_interval(direction, interval, expected):
    assert judged(claim(strict=True, direction=direction), *interval) == expected


def test_a_number_without_interval_is_a_point():
    density = {"measurement": "ruler", "metric": "density"}
    at_most = claim(density, direction="at_most", value=50.0, unit="%", tolerance=0)
    assert judged(at_most, math.nan, 49.0, math.nan) == "reproduced"
    assert judged(at_most, math.nan, 51.0, math.nan) == "not reproduced"


@settings(deadline=None)
@given(
    st.floats(0.1, 5),
    st.floats(0, 2),
    st.floats(0, 2),
    st.sampled_from(["at_least", "at_most", "equal"]),
    st.booleans(),
)
def test_every_interval_gets_exactly_one_known_verdict(value, below, above, direction, strict):
    claimed = claim(direction=direction, strict=strict and direction != "equal")
    assert judged(claimed, value - below, value, value + above) in verdict.CONCLUSIVE


@settings(deadline=None)
@given(st.floats(0.2, 4), st.floats(0, 1), st.floats(0, 1))
def test_a_better_result_is_never_judged_worse(value, spread, gain):
    order = ["not reproduced", "within noise", "reproduced"]
    strict = claim(strict=True)
    before = judged(strict, value - spread, value, value + spread)
    after = judged(strict, value - spread + gain, value + gain, value + spread + gain)
    assert order.index(after) >= order.index(before)


# Which records count


def test_nothing_there_is_not_run_and_says_what_it_needs():
    found = verdict.judge(claim(), Evidence([]))
    assert (found.verdict, found.reason) == ("not run", "needs a GPU")
    impossible = dataclasses.replace(claim(), query=None, needs="a camera")
    assert verdict.judge(impossible, Evidence([])).reason == "needs a camera"


def test_another_model_device_or_length_is_not_comparable_and_says_which():
    asked = claim({"subjects": ["hf:*"], "device": "cuda", "options": {"length": 8192}})
    found = verdict.judge(asked, Evidence([timed(4096, 2.0)]))
    assert found.verdict == "not comparable"
    for said in ("other model (zoo:retriever)", "CPU, Test CPU", "other length", "needs a GPU"):
        assert said in found.reason


def test_the_right_model_without_the_length_is_not_run():
    asked = claim({"options": {"length": 8192}})
    assert verdict.judge(asked, Evidence([timed(4096, 2.0)])).verdict == "not run"


def test_other_hardware_of_the_same_kind_is_not_comparable():
    asked = claim({"device": "cuda", "hardware": ["*A100*"]})
    found = verdict.judge(asked, Evidence([timed(4096, 2.0, environment=GPU)]))
    assert found.verdict == "not comparable" and "NVIDIA H100" in found.reason
    asked = claim({"device": "cuda", "hardware": ["*a100*", "*h100*"]})
    found = verdict.judge(asked, Evidence([timed(4096, 2.0, environment=GPU)]))
    assert found.verdict == "reproduced"


def test_a_proxy_without_records_is_not_run_never_not_comparable():
    asked = claim({"subjects": ["zoo:other"]}, proxy=True)
    assert verdict.judge(asked, Evidence([timed(4096, 2.0)])).verdict == "not run"


def test_the_configuration_must_match_and_controls_do_not_count():
    records = [timed(4096, 2.0, config={**CONFIG, "control": "oracle", "draw": 0})]
    assert verdict.judge(claim(), Evidence(records)).verdict == "not run"
    records.append(timed(4096, 2.0, config={**CONFIG, "stride": 8, "control": "none"}))
    asked = claim({"config": {"stride": 16}})
    assert verdict.judge(asked, Evidence(records)).verdict == "not run"
    asked = claim({"config": {"stride": 8}})
    assert verdict.judge(asked, Evidence(records)).verdict == "reproduced"


def test_fields_that_a_claim_does_not_name_are_at_their_defaults():
    asked = claim({"config": {"stride": 8}})
    own = timed(4096, 2.4, config={**CONFIG, "stride": 8})
    ablation = timed(4096, 1.1, config={**CONFIG, "stride": 8, "pattern": "diagonal"})
    assert verdict.judge(asked, Evidence([ablation])).verdict == "not run"
    found = verdict.judge(asked, Evidence([own, ablation]))
    assert found.measured.value == 2.4 and "configurations" not in found.reason
    both = claim({"config": {"stride": 8, "pattern": ("antidiagonal", "diagonal")}})
    assert verdict.judge(both, Evidence([own, ablation])).measured.value == 1.1


@pytest.mark.parametrize(
    ("needs", "reason"),
    [
        ({"min_items": 13}, "12 items a task, needs 13 (1 more)"),
        ({"min_draws": 10}, "3 draws of the control, needs 10 (7 more)"),
        ({"min_items": 12, "min_draws": 3}, None),
    ],
)
def test_the_pairs_and_draws_of_a_control_count(needs, reason):
    cells = campaign(items=40, draws=3)
    for one in cells:
        if one["cell"]["method"]["config"].get("control") == "random":
            for name, column in one["items"].items():
                one["items"][name] = column[:12]
    query = {"measurement": "ruler", "compare": "minus_control", "options": {"length": 4096}}
    found = verdict.judge(
        claim(query, value=0.0, strict=True, unit="points", **needs), Evidence(cells)
    )
    if reason is None:
        assert found.verdict == "reproduced"
    else:
        assert found.verdict == "too few items" and found.reason == reason


def test_too_few_items_says_how_many_more():
    cells = [
        scored("vt", 4096, [1.0] * 20, method=m, density=d)
        for m, d in (("dense", None), ("xattention", 0.5))
    ]
    query = {"measurement": "ruler", "metric": "score", "compare": "minus_dense"}
    asked = claim(query, direction="holds", margin=2.0, min_items=100, unit="points")
    found = verdict.judge(asked, Evidence(cells))
    assert found.verdict == "too few items"
    assert "80 more" in found.reason


def test_missing_tasks_are_too_few():
    cells = [scored("vt", 4096, [1.0] * 200, density=0.5)]
    query = {"measurement": "ruler", "metric": "score", "min_cells": 13}
    found = verdict.judge(claim(query, value=90, unit="%"), Evidence(cells))
    assert found.verdict == "too few items" and "1 of 13" in found.reason


@pytest.mark.parametrize(
    ("status", "expected"),
    [("oom", "not run"), ("crashed", "not run"), ("invalid", "invalid"), ("not_run", "not run")],
)
def test_a_failed_cell_gives_no_number(status, expected):
    failed = timed(4096, 2.0, status=status, message="because\nof this")
    found = verdict.judge(claim(), Evidence([failed]))
    assert found.verdict == expected
    assert status in found.reason and "because of this" in found.reason
    assert not found.broken


def test_one_failed_task_spoils_a_mean():
    cells = campaign(items=50)
    broken = next(
        r for r in cells if r["cell"]["measurement"]["name"] == "ruler" and r.get("patch")
    )
    broken["status"] = "crashed"
    length = broken["cell"]["measurement"]["options"]["length"]
    query = {"measurement": "ruler", "metric": "score", "options": {"length": length}}
    found = verdict.judge(claim(query, value=90), Evidence(cells))
    assert found.verdict == "not run" and "1 of 4 cells: crashed" in found.reason


def test_best_of_takes_the_best_and_single_the_least_favourable():
    cells = [timed(4096, r, config={**CONFIG, "stride": s}) for s, r in ((4, 1.2), (8, 2.4))]
    either = {"config": {"stride": (4, 8)}}
    best = verdict.judge(claim(either, scope="best_of"), Evidence(cells))
    assert best.measured.value == 2.4 and "best of 2" in best.reason
    single = verdict.judge(claim(either), Evidence(cells))
    assert single.measured.value == 1.2 and single.verdict == "not reproduced"


# From records to a number


def test_the_difference_is_paired_by_item_and_not_by_place():
    dense = scored("vt", 4096, [1, 1, 0, 0] * 25, method="dense")
    method = scored("vt", 4096, [1, 1, 0, 0] * 25, density=0.5)
    order = np.random.default_rng(0).permutation(100)
    for name in ("keys", "scores"):
        method["items"][name] = [method["items"][name][i] for i in order]
    query = {"measurement": "ruler", "metric": "score", "compare": "minus_dense"}
    asked = claim(query, direction="holds", margin=5.0, min_items=100)
    found = verdict.judge(asked, Evidence([dense, method]))
    assert found.measured.value == 0.0
    assert found.verdict == "reproduced"


def test_minus_dense_needs_the_dense_cell():
    query = {"measurement": "ruler", "metric": "score", "compare": "minus_dense"}
    found = verdict.judge(claim(query), Evidence([scored("vt", 4096, [1.0] * 10, density=0.5)]))
    assert found.verdict == "not run" and "no dense cell" in found.reason


def test_minus_control_pools_draws_and_items():
    cells = campaign(items=100, draws=10)
    query = {
        "measurement": "ruler",
        "metric": "score",
        "compare": "minus_control",
        "options": {"length": 4096},
    }
    asked = claim(query, value=0.0, strict=True, unit="points")
    found = verdict.judge(asked, Evidence(cells))
    assert found.verdict == "reproduced"
    assert found.measured.n == 10 * 4 * 100
    assert 40 < found.measured.low < found.measured.high < 70


def test_a_control_with_fewer_items_is_compared_on_those():
    cells = campaign(items=40, draws=3)
    for one in cells:
        if one["cell"]["method"]["config"].get("control") == "random":
            one["cell"]["measurement"]["options"]["samples"] = 12
            for name, column in one["items"].items():
                one["items"][name] = column[:12]
    query = {
        "measurement": "ruler",
        "metric": "score",
        "compare": "minus_control",
        "options": {"length": 4096},
    }
    found = verdict.judge(claim(query, value=0.0, strict=True, unit="points"), Evidence(cells))
    assert found.measured.n == 3 * 4 * 12
    assert found.verdict == "reproduced"


def test_density_is_in_percent_and_ratios_meet_in_the_geometric_mean():
    cells = Evidence(
        [scored("vt", 4096, [1.0], density=0.4), scored("cwe", 4096, [1.0], density=0.5)]
    )
    query = Query(method="xattention", measurement="ruler", metric="density")
    assert verdict.measure(query, cells.records, cells).value == pytest.approx(45.0)
    cells = Evidence([timed(4096, 2.0), timed(8192, 8.0)])
    query = Query(method="xattention", measurement="latency", metric="ratio")
    assert verdict.measure(query, cells.records, cells).value == pytest.approx(4.0)


# The accuracy cell and the latency cell are of one model


def clash(density, phase="prefill", **changes):
    cells = [scored(t, 4096, [1.0] * 5, density=d) for t, d in (("vt", 0.40), ("cwe", 0.50))]
    fast = timed(4096, 3.0, phase=phase, density=density, **changes)
    asked = claim({"config": {"stride": (4, 16)}}, proxy=True)
    return verdict.judge(asked, Evidence([*cells, fast]))


@pytest.mark.parametrize(
    ("density", "valid"), [(0.45, True), (0.30, True), (0.60, True), (0.2, False), (0.9, False)]
)
def test_density_of_accuracy_and_latency_must_agree(density, valid):
    found = clash(density)
    assert found.verdict == ("reproduced" if valid else "invalid")
    assert found.broken is not valid
    if not valid:
        assert "not the same computation" in found.reason


def test_density_is_compared_only_where_the_work_is_the_same():
    assert clash(0.1, phase="decode").verdict == "reproduced"
    assert clash(0.1, phase="attention").verdict == "reproduced"
    assert clash(0.1, config={**CONFIG, "stride": 4}).verdict == "reproduced"
    assert clash(0.1, subject="zoo:other").verdict == "reproduced"


# Rows


def test_broken_is_a_contradicted_proxy_alone():
    slow = Evidence([timed(4096, 0.5)])
    assert verdict.judge(claim(proxy=True), slow).broken
    assert not verdict.judge(claim(), slow).broken
    assert not verdict.judge(claim(proxy=True), Evidence([])).broken


def test_the_explanation_carries_the_arithmetic():
    found = verdict.judge(claim(), Evidence([timed(4096, 2.0)]))
    for said in (
        "70% of dense time",
        "density 0.400",
        "Amdahl bound 1.72x",
        "roofline bound 2.50x",
    ):
        assert said in found.explanation


def test_machines_are_judged_apart_and_the_larger_sample_wins_on_each():
    few, many = timed(4096, 0.5), timed(4096, 2.0, profile="embedded-full")
    few["metrics"]["ratio"]["n"] = 3
    gpu = timed(4096, 5.0, environment=GPU)
    groups = [Evidence([few]), Evidence([many]), Evidence([gpu])]
    found = verdict.judge_all([claim()], groups)
    assert [(v.environment, v.measured.value) for v in found] == [
        ("cpu-test-2t", 2.0),
        ("nvidia-h100", 5.0),
    ]
    nowhere = verdict.judge_all([claim({"subjects": ["hf:x"]})], groups)
    assert [v.verdict for v in nowhere] == ["not comparable"]


def test_a_row_is_plain_json():
    import json

    row = verdict.judge(claim(), Evidence([timed(4096, 2.0)])).row()
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert row["measured"]["low"] == pytest.approx(1.9)


def test_an_unknown_metric_in_the_record_is_said():
    bare = record("latency", {"length": 1}, metrics={})
    found = verdict.judge(claim(), Evidence([bare]))
    assert found.verdict == "not run" and "no ratio in the record" in found.reason
