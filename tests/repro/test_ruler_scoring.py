"""The scorers against frozen cases, RULER's definition and lm-eval's implementation."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repro.measurements.ruler.scoring import (
    METRICS,
    corpus_score,
    item_score,
    postprocess,
    string_match_all,
    string_match_part,
)
from repro.measurements.ruler.tasks import TASKS

FROZEN = json.loads(Path(__file__).with_name("ruler_frozen_cases.json").read_text("utf-8"))
CASES = [pytest.param(case, id=case["name"]) for case in FROZEN["items"]]
CORPORA = [pytest.param(case, id=case["name"]) for case in FROZEN["corpora"]]
texts = st.text(st.sampled_from("aAbB 1\n\t\x00\x1f\x7f"), max_size=12)
references = st.lists(st.text(st.sampled_from("aAbB1 "), max_size=3), min_size=1, max_size=4)


def official_percent(metric, predictions, references):
    """RULER's released definition, written out again: predictions are already post-processed."""
    total = 0.0
    for prediction, wanted in zip(predictions, references, strict=True):
        hits = [1.0 if one.lower() in prediction.lower() else 0.0 for one in wanted]
        total += max(hits) if metric == "string_match_part" else sum(hits) / len(wanted)
    return round(total / len(predictions) * 100, 2)


@pytest.mark.parametrize("case", CASES)
def test_frozen_item(case):
    assert postprocess(case["prediction"]) == case["postprocessed"]
    assert item_score(case["metric"], case["prediction"], case["references"]) == case["score"]


@pytest.mark.parametrize("case", CORPORA)
def test_frozen_corpus(case):
    score = corpus_score(case["metric"], case["predictions"], case["references"])
    assert score == case["percent"]


@pytest.mark.parametrize("case", CASES)
def test_lm_eval_agrees(case):
    common = pytest.importorskip("lm_eval.tasks.ruler.common_utils")
    processed = common.postprocess_pred([case["prediction"]])
    assert processed == [case["postprocessed"]]
    assert common.string_match_all(processed, [case["references"]]) == string_match_all(
        processed[0], case["references"]
    )


def test_where_lm_eval_differs_for_any_reference():
    """lm-eval divides by the number of references; RULER's release takes the best one."""
    common = pytest.importorskip("lm_eval.tasks.ruler.common_utils")
    assert common.string_match_part(["red"], [["red", "green", "blue"]]) == pytest.approx(1 / 3)
    assert string_match_part("red", ["red", "green", "blue"]) == 1.0


@given(st.sampled_from(sorted(METRICS)), st.lists(st.tuples(texts, references), min_size=1))
def test_corpus_is_bit_equal_to_the_definition(metric, pairs):
    predictions = [text for text, _ in pairs]
    wanted = [answers for _, answers in pairs]
    processed = [postprocess(text) for text in predictions]
    assert corpus_score(metric, predictions, wanted) == official_percent(metric, processed, wanted)


@given(texts)
def test_postprocess_is_idempotent_and_leaves_no_control_character(text):
    once = postprocess(text)
    assert postprocess(once) == once
    assert not any(character < " " and character != "\n" for character in once)


@given(texts, references)
def test_any_is_never_below_all(text, wanted):
    assert string_match_part(text, wanted) >= string_match_all(text, wanted)


def test_no_references_are_refused():
    for metric in METRICS:
        with pytest.raises(ValueError, match="at least one"):
            item_score(metric, "text", [])


def test_corpora_of_different_lengths_are_refused():
    for predictions, wanted in (([], []), (["a"], [])):
        with pytest.raises(ValueError, match="one length"):
            corpus_score("string_match_all", predictions, wanted)


def test_every_task_names_a_known_metric():
    assert len(TASKS) == 13
    assert {task.metric for task in TASKS.values()} <= set(METRICS)
    assert [name for name, task in TASKS.items() if task.metric == "string_match_part"] == [
        "qa_1",
        "qa_2",
    ]
