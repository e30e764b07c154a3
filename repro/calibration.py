"""Prompts that calibration, search and tuning may see: they share no vocabulary with items that
score, since they come from the training half of RULER's word lists."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from repro.errors import BadInput, Fault, UnsupportedCombination
from repro.subjects import Subject

if TYPE_CHECKING:
    import torch


def calibration_prompts(
    subject: Subject, *, count: int, length: int, seed: int
) -> list[torch.Tensor]:
    """Return training-split RULER prompts as token ids, the tasks in turn.

    Tasks that are too large for ``length`` are left out. The same arguments give the same prompts.

    Args:
        subject: Whose tokenizer is used.
        count: Number of prompts, at least 1.
        length: Tokens of prompt and answer together; a prompt is never longer.
        seed: Fixes the content.

    Returns:
        ``count`` tensors ``[1, T]`` int64 on the CPU, ``T <= length``.

    Raises:
        BadInput: If ``count`` is below 1, or ``length`` is beyond the subject's positions or below
            what any task takes.
        UnsupportedCombination: If the subject has no tokenizer.
    """
    if subject.tokenizer is None:
        raise UnsupportedCombination(f"calibration: {subject.name} has no tokenizer")
    if count < 1:
        raise BadInput(Fault("calibration", "count", "at least 1", count))
    positions = subject.info.max_length
    if length > positions:
        rule = f"at most the {positions} positions of {subject.name}"
        raise BadInput(Fault("calibration", "length", rule, length))

    from repro.measurements.ruler.decoding import encode

    texts = _texts(subject, count=count, length=length, seed=seed)
    return [encode(subject.tokenizer, text).long()[None] for text in texts]


def _texts(subject: Subject, *, count: int, length: int, seed: int) -> list[str]:
    """Return ``count`` prompts: the first of every task that fits, then the second of each, ..."""
    from repro.measurements.ruler.generate import generate_items
    from repro.measurements.ruler.tasks import TASKS

    def prompts_of(task: str, wanted: int) -> list[str]:
        items = generate_items(
            task,
            length=length,
            count=wanted,
            seed=seed,
            tokenizer=subject.tokenizer,
            split="train",
        )
        return [item.prompt for item in items]

    fitting, refusal = [], ""
    for task in TASKS:
        try:
            prompts_of(task, 1)
            fitting.append(task)
        except ValueError as error:
            refusal = str(error)
    if not fitting:
        raise BadInput(Fault("calibration", "length", "enough for one task", length, refusal))
    used = fitting[:count]
    rounds = zip(*(prompts_of(task, -(-count // len(used))) for task in used), strict=True)
    return list(itertools.islice(itertools.chain.from_iterable(rounds), count))
