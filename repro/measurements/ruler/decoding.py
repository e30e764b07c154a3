"""Greedy decoding of one left-padded batch through ``model.generate``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from repro.subjects import Subject


@dataclass(frozen=True)
class Generation:
    """What the model said: text without special tokens and stop strings, tokens before the end."""

    text: str
    new_tokens: int


class _NotANumber(LogitsProcessor):
    """Remembers on the device whether any logit was NaN; asks for no synchronisation per step."""

    def __init__(self) -> None:
        self.seen: torch.Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Any:
        found = torch.isnan(scores).any()
        self.seen = found if self.seen is None else self.seen | found
        return scores


def encode(tokenizer: Any, text: str) -> torch.Tensor:
    """Return the ids ``[T]`` int32 of a prompt, with the special tokens its tokenizer adds.

    A prompt that already begins with the beginning-of-sequence token (a chat template) gets none.
    """
    begin = getattr(tokenizer, "bos_token", None)
    special = not (begin and text.startswith(begin))
    ids = tokenizer(text, add_special_tokens=special)["input_ids"]
    return torch.tensor(ids, dtype=torch.int32)


def decode_batch(
    subject: Subject,
    prompts: Sequence[torch.Tensor],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    cache: Any | None = None,
) -> list[Generation]:
    """Continue each prompt greedily until its end token, a stop string or the limit.

    Whatever the model's own generation settings ask for (sampling, penalties) is switched off.

    Args:
        subject: The model and its tokenizer.
        prompts: Ids ``[T_i]`` int32 each; padded on the left to one ``[B, T]``.
        max_new_tokens: Limit of new tokens for each prompt.
        stop: Strings that end a generation; they are cut off with all that follows.
        cache: The ``Cache`` to use, or None for the model's own.

    Raises:
        FloatingPointError: If a logit was NaN at any step.
    """
    model, tokenizer = subject.model, subject.tokenizer
    ends = _end_ids(model, tokenizer)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    ids, mask = _pad_left(prompts, padding)
    guard = _NotANumber()
    options: dict[str, Any] = {"past_key_values": cache} if cache is not None else {}
    if stop:
        options |= {"stop_strings": list(stop), "tokenizer": tokenizer}
    output = model.generate(
        input_ids=ids.to(subject.device),
        attention_mask=mask.to(subject.device),
        generation_config=_greedy(max_new_tokens, ends, padding),
        logits_processor=LogitsProcessorList([guard]),
        **options,
    )
    if guard.seen is not None and bool(guard.seen):
        raise FloatingPointError(f"ruler: NaN logits while generating for {len(prompts)} prompts")
    rows = output[:, ids.shape[1] :].tolist()
    return [_read(tokenizer, row, ends, padding, stop) for row in rows]


def _greedy(max_new_tokens: int, ends: list[int], padding: int) -> GenerationConfig:
    # generate() fills what is None from the model's own settings: say every neutral value.
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        min_new_tokens=0,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=ends,
        pad_token_id=padding,
    )


def _end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return the ids that end a generation: the model's own, else the tokenizer's."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    if ends is None:
        ends = tokenizer.eos_token_id
    if ends is None:
        raise ValueError("ruler: the tokenizer must have an end-of-sequence token, got none")
    return [ends] if isinstance(ends, int) else list(ends)


def _pad_left(prompts: Sequence[torch.Tensor], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask (1 = real), both ``[B, T]`` int64."""
    longest = max(prompt.numel() for prompt in prompts)
    ids = torch.full((len(prompts), longest), padding, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - prompt.numel() :] = prompt
        mask[row, longest - prompt.numel() :] = 1
    return ids, mask


def _read(
    tokenizer: Any, row: list[int], ends: list[int], padding: int, stop: Sequence[str]
) -> Generation:
    """Cut one row of new ids at its end token and at the earliest stop string."""
    end = next((place for place, token in enumerate(row) if token in ends), len(row))
    row = row[:end]
    if stop:
        # A row that a stop string ended is padded up to the longest of its batch.
        while row and row[-1] == padding:
            row.pop()
    text = tokenizer.decode(row, skip_special_tokens=True)
    places = [place for place in map(text.find, filter(None, stop)) if place >= 0]
    return Generation(text[: min(places)] if places else text, len(row))
