"""Token ids that a subject is timed on: real prompts where it has learnt to read them."""

from __future__ import annotations

import torch

from repro.subjects import Subject

_SEED = 7_100_000


def timing_prompts(
    subject: Subject, *, length: int, batch: int = 1, count: int = 2, seed: int = 0
) -> tuple[list[torch.Tensor], str]:
    """Return prompts of exactly ``length`` tokens, and what they are.

    A trained subject with a tokenizer gets RULER prompts of the training split, cut to length or
    continued with the next one; any other gets random token ids in which stretches come back, as
    they do in text. The same arguments give the same prompts; they are kept with the subject.

    Args:
        subject: The model that will read them.
        length: Tokens of each prompt.
        batch: Prompts side by side.
        count: Number of batches.
        seed: Fixes the content.

    Returns:
        ``count`` tensors ``[batch, length]`` int64 on the subject's device.
    """
    key = f"timing_prompts {length} {batch} {count} {seed}"
    if key not in subject.extra:
        rows, source = _rows(subject, length=length, wanted=batch * count, seed=seed)
        stacked = torch.stack(rows).view(count, batch, length).to(subject.device)
        subject.extra[key] = (list(stacked), source)
    found: tuple[list[torch.Tensor], str] = subject.extra[key]
    return found


def _rows(
    subject: Subject, *, length: int, wanted: int, seed: int
) -> tuple[list[torch.Tensor], str]:
    if subject.tokenizer is None or not subject.info.trained:
        generator = torch.Generator().manual_seed(_SEED + seed)
        vocabulary = int(subject.model.get_input_embeddings().num_embeddings)
        rows = [_recurring(length, vocabulary, generator) for _ in range(wanted)]
        return rows, "random token ids with recurring stretches"
    from repro.calibration import calibration_prompts

    texts = calibration_prompts(subject, count=wanted, length=length, seed=_SEED + seed)
    tokens = [text[0] for text in texts]
    rows = []
    for index in range(wanted):
        row = tokens[index]
        following = index
        while len(row) < length:
            following = (following + 1) % wanted
            row = torch.cat([row, tokens[following]])
        rows.append(row[:length])
    return rows, "RULER prompts of the training split"


def _recurring(length: int, vocabulary: int, generator: torch.Generator) -> torch.Tensor:
    """Random ids ``[T]`` of which every fourth stretch of 64 repeats an earlier one."""
    ids = torch.randint(0, vocabulary, (length,), generator=generator)
    for start in range(256, length - 64, 256):
        source = int(torch.randint(0, start - 64, (1,), generator=generator))
        ids[start : start + 64] = ids[source : source + 64]
    return ids
