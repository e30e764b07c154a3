"""Perplexity in windows: each token scored once, against a direct computation, resumable."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from repro import measurements
from repro.errors import UnsupportedCombination
from repro.measurements import perplexity
from repro.measurements.perplexity import PerplexityOptions, expand, windows
from repro.testing import byte_tokenizer, cell_context, tiny_subject


@pytest.fixture(scope="module")
def subject():
    made = tiny_subject(vocabulary=300, positions=512)
    made.tokenizer = byte_tokenizer()
    return made


def cell(**changes):
    return expand(PerplexityOptions(**{"lengths": [64], "documents": 3} | changes))[0]


@given(st.integers(2, 200), st.integers(2, 60), st.data())
def test_windows_score_every_token_but_the_first_once(total, length, data):
    stride = data.draw(st.integers(1, length - 1))
    scored = []
    for begin, end, first in windows(total, length, stride):
        assert 0 <= begin < end <= total and end - begin <= length
        assert first > begin  # a scored token has something before it
        scored += range(first, end)
    assert scored == list(range(1, total))


def test_is_the_direct_loss(subject):
    body = perplexity.run(cell_context(subject, cell(stride=32), seed=2))
    expected = []
    for place in range(3):
        ids = torch.tensor(perplexity._document(subject.tokenizer, 2, place, 128))
        loss = 0.0
        for begin, first in ((0, 1), (32, 64), (64, 96)):
            window = ids[begin : begin + 64]
            chances = subject.model(window[None]).logits[0].log_softmax(-1)
            loss -= sum(float(chances[at - begin - 1, ids[at]]) for at in range(first, begin + 64))
        expected.append(loss / 127)
    assert body["raw"]["loss_per_token"] == pytest.approx(expected, rel=1e-5)
    value = body["metrics"]["perplexity"]
    assert value["low"] < value["value"] < value["high"]
    assert math.log(value["value"]) == pytest.approx(sum(expected) / 3, rel=1e-5)


def test_resumes_between_documents(subject, monkeypatch):
    whole = cell_context(subject, cell())
    body = perplexity.run(whole)
    cut = cell_context(subject, cell())
    key = body["raw"]["keys"][0]
    cut.items.values[key] = whole.items.values[key]
    measured = []
    measure = perplexity._measure
    monkeypatch.setattr(
        perplexity, "_measure", lambda context, ids: measured.append(ids) or measure(context, ids)
    )
    assert perplexity.run(cut) == body
    assert len(measured) == 2


def test_nan_is_numerical():
    broken = tiny_subject(vocabulary=300)
    broken.tokenizer = byte_tokenizer()
    torch.nn.init.constant_(broken.model.get_output_embeddings().weight, float("nan"))
    with pytest.raises(FloatingPointError):
        perplexity.run(cell_context(broken, cell()))


def test_unsupported(subject):
    with pytest.raises(UnsupportedCombination, match="exceed the 512 positions"):
        perplexity.run(cell_context(subject, cell(lengths=[1024])))
    with pytest.raises(UnsupportedCombination, match="no tokenizer"):
        perplexity.run(cell_context(tiny_subject(), cell()))


@pytest.mark.parametrize(
    "options", [{"lengths": []}, {"lengths": [8, 8]}, {"documents": 1}, {"stride": 0}]
)
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        PerplexityOptions(**options)


def test_registered():
    assert measurements.get("perplexity").needs_training
