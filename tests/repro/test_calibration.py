"""Calibration prompts: reproducible, within the length, and apart from everything that scores."""

import pytest

from repro.calibration import calibration_prompts
from repro.errors import BadInput, UnsupportedCombination
from repro.measurements.ruler.generate import generate_items
from repro.measurements.ruler.tasks import TASKS
from repro.testing import byte_tokenizer, tiny_subject


@pytest.fixture(scope="module")
def subject():
    made = tiny_subject(vocabulary=300, positions=4096)
    made.tokenizer = byte_tokenizer()
    return made


def texts_of(subject, prompts):
    return [subject.tokenizer.decode(prompt[0].tolist()) for prompt in prompts]


def test_shape_type_and_length(subject):
    prompts = calibration_prompts(subject, count=15, length=1536, seed=3)
    assert len(prompts) == 15
    for prompt in prompts:
        assert prompt.ndim == 2 and prompt.shape[0] == 1 and prompt.shape[1] <= 1536
        assert str(prompt.dtype) == "torch.int64"


def test_tasks_take_turns_and_no_prompt_comes_twice(subject):
    texts = texts_of(subject, calibration_prompts(subject, count=26, length=1536, seed=3))
    assert len(set(texts)) == 26
    first, second = texts[:13], texts[13:]
    endings = [text.rpartition("Question:")[2].split()[:2] for text in first]
    assert endings == [text.rpartition("Question:")[2].split()[:2] for text in second]


def test_the_same_seed_gives_the_same_prompts_and_another_seed_others(subject):
    once, again, other = (
        texts_of(subject, calibration_prompts(subject, count=4, length=1024, seed=seed))
        for seed in (1, 1, 2)
    )
    assert once == again
    assert not set(once) & set(other)


def test_fewer_prompts_are_the_first_of_more(subject):
    more = texts_of(subject, calibration_prompts(subject, count=13, length=1536, seed=1))
    fewer = texts_of(subject, calibration_prompts(subject, count=5, length=1536, seed=1))
    assert fewer == more[:5]


def test_nothing_that_scores_is_seen(subject):
    """Not the prompts, and none of the answers that an evaluation item asks for."""
    texts = texts_of(subject, calibration_prompts(subject, count=26, length=1536, seed=0))
    for task in TASKS:
        items = generate_items(task, length=1536, count=3, seed=0, tokenizer=subject.tokenizer)
        assert not {item.prompt for item in items} & set(texts)
        if task.startswith("niah"):
            answers = {answer for item in items for answer in item.answers}
            assert not any(answer in text for answer in answers for text in texts)


def test_a_length_that_only_some_tasks_fit_uses_those(subject):
    prompts = calibration_prompts(subject, count=4, length=500, seed=0)
    assert len(prompts) == 4
    assert max(prompt.shape[1] for prompt in prompts) <= 500


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"count": 0, "length": 1024}, "count must be at least 1, got 0"),
        ({"count": 1, "length": 8192}, "length must be at most the 4096 positions"),
        ({"count": 1, "length": 40}, "length must be enough for one task, got 40"),
    ],
)
def test_bad_input(subject, options, text):
    with pytest.raises(BadInput, match=text):
        calibration_prompts(subject, seed=0, **options)


def test_a_subject_without_tokenizer_is_refused():
    with pytest.raises(UnsupportedCombination, match="no tokenizer"):
        calibration_prompts(tiny_subject(), count=1, length=1024, seed=0)
