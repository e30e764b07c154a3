"""Questions for calibration: training vocabulary, tasks in turn, greedy answers scored."""

import pytest

from repro import subjects
from repro.errors import BadInput, UnsupportedCombination
from repro.measurements.ruler.generate import generate_items
from repro.questions import accuracy, questions
from repro.testing import tiny_subject

TASKS = ("niah_single_2", "niah_multivalue")


@pytest.fixture(scope="module")
def retriever():
    return subjects.load("zoo:retriever", device="cpu")


def test_tasks_come_in_turn_from_the_training_half(retriever):
    asked = questions(retriever, tasks=TASKS, count=5, length=300, seed=4)
    assert len(asked) == 5 and all(q.ids.numel() <= 300 for q in asked)
    for place, task in enumerate(TASKS):
        own = generate_items(
            task, length=300, count=3, seed=4, tokenizer=retriever.tokenizer, split="train"
        )
        for item, question in zip(own, asked[place::2], strict=False):
            assert question.answers == item.answers
    fewer = questions(retriever, tasks=TASKS, count=1, length=300, seed=4)
    assert fewer[0].answers == asked[0].answers


def test_the_retriever_answers_them(retriever):
    asked = questions(retriever, tasks=TASKS[:1], count=2, length=300, seed=4)
    assert accuracy(retriever, asked, lambda: None, batch_size=2) == 1.0


def test_what_cannot_be_asked_is_refused(retriever):
    with pytest.raises(BadInput, match="enough for niah_single_2"):
        questions(retriever, tasks=TASKS, count=1, length=20, seed=0)
    with pytest.raises(BadInput, match="at most the 32768 positions"):
        questions(retriever, tasks=TASKS, count=1, length=40_000, seed=0)
    with pytest.raises(UnsupportedCombination, match="has no tokenizer"):
        questions(tiny_subject(), tasks=TASKS, count=1, length=300, seed=0)
