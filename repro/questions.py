"""Questions with answers that calibration and search may ask: none of them ever scores.

As ``repro.calibration`` they come from the training half of RULER's word lists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from repro.errors import BadInput, Fault, UnsupportedCombination

if TYPE_CHECKING:
    import torch

    from repro.subjects import Subject


@dataclass(frozen=True)
class Question:
    """A prompt ``[T]`` int32, what must be in the answer, and how that is scored."""

    ids: torch.Tensor
    answers: tuple[str, ...]
    metric: str
    max_new_tokens: int


def questions(
    subject: Subject, *, tasks: Sequence[str], count: int, length: int, seed: int
) -> list[Question]:
    """Return training-split RULER questions, the tasks in turn.

    Args:
        subject: Whose tokenizer is used.
        tasks: RULER tasks.
        count: Number of questions, at least 1.
        length: Tokens of prompt and answer together.
        seed: Fixes the content.

    Raises:
        BadInput: If ``length`` is too short for a task or beyond the subject's positions.
        UnsupportedCombination: If the subject has no tokenizer.
    """
    from repro.measurements.ruler.decoding import encode
    from repro.measurements.ruler.generate import generate_items
    from repro.measurements.ruler.tasks import TASKS

    tokenizer, positions = subject.tokenizer, subject.info.max_length
    if tokenizer is None:
        raise UnsupportedCombination(f"questions: {subject.name} has no tokenizer")
    if length > positions:
        rule = f"at most the {positions} positions of {subject.name}"
        raise BadInput(Fault("questions", "length", rule, length))
    used = tasks[:count]
    found: list[list[Question]] = []
    for place, task in enumerate(used):
        own = (count - place + len(used) - 1) // len(used)
        try:
            items = generate_items(
                task, length=length, count=own, seed=seed, tokenizer=tokenizer, split="train"
            )
        except ValueError as error:
            raise BadInput(
                Fault("questions", "length", f"enough for {task}", length, str(error))
            ) from error
        metric, limit = TASKS[task].metric, TASKS[task].max_new_tokens
        found.append(
            [Question(encode(tokenizer, i.prompt), i.answers, metric, limit) for i in items]
        )
    rounds = range(max(map(len, found)))
    return [own[index] for index in rounds for own in found if index < len(own)]


def accuracy(
    subject: Subject,
    asked: Sequence[Question],
    make_cache: Callable[[], Any | None],
    *,
    batch_size: int = 4,
) -> float:
    """Return the mean score in [0, 1] of greedy answers.

    Args:
        subject: Who answers.
        asked: The questions.
        make_cache: Makes the ``Cache`` of a batch, or returns None for the model's own.
        batch_size: Questions answered together.
    """
    from repro.measurements.ruler.decoding import decode_batch
    from repro.measurements.ruler.scoring import item_score

    order = sorted(asked, key=lambda question: -question.ids.numel())
    total = 0.0
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        said = decode_batch(
            subject,
            [question.ids for question in batch],
            max_new_tokens=max(question.max_new_tokens for question in batch),
            cache=make_cache(),
        )
        for question, answer in zip(batch, said, strict=True):
            total += item_score(question.metric, answer.text, question.answers)
    return total / len(asked)
