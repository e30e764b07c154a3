"""Passkey documents: long prose with needles, then a question and its answer for each of them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch

from repro.measurements.ruler.tasks import Draw, Problem, ask, niah
from repro.methods.duoattention import DuoAttentionConfig

#: What hides in what, in turn. The words come from the half of the vocabulary that never scores.
KINDS: tuple[dict[str, Any], ...] = (
    {"haystack": "essay", "value": "number"},
    {"haystack": "essay", "value": "code"},
)
#: Share of a document that needles and questions may take.
_MOST_QUESTIONS = 0.6


@dataclass(frozen=True)
class Document:
    """Token ids ``[T]`` int64; the labels are those from ``labels`` on: questions and answers."""

    ids: torch.Tensor
    labels: int


def document_lengths(config: DuoAttentionConfig) -> list[int]:
    """Return the lengths in tokens, equally spaced from ``shortest`` to ``longest``."""
    if config.lengths == 1:
        return [config.longest]
    span, last = config.longest - config.shortest, config.lengths - 1
    return [config.shortest + span * place // last for place in range(config.lengths)]


def training_document(tokenizer: Any, config: DuoAttentionConfig, step: int) -> Document:
    """Return the document of a step: every length once, shuffled, then again with other passkeys."""
    lengths = document_lengths(config)
    epoch, place = divmod(step, len(lengths))
    random.Random(f"duoattention/{config.seed}/{epoch}").shuffle(lengths)
    return passkey_document(
        tokenizer,
        length=lengths[place],
        passkeys=config.passkeys,
        kind=step % len(KINDS),
        seed=f"{config.seed}/{step}",
    )


def passkey_document(
    tokenizer: Any, *, length: int, passkeys: int, kind: int, seed: str
) -> Document:
    """Return a document of at most ``length`` tokens, and not much less.

    Args:
        tokenizer: Of the model.
        length: Most tokens.
        passkeys: Most passkeys; fewer where they would fill the document.
        kind: Place in ``KINDS``.
        seed: Fixes the content.

    Raises:
        ValueError: If not even one passkey fits.
    """
    rng = random.Random(f"duoattention/{seed}")
    depth = rng.uniform(0.05, 0.95)

    def problem_of(passkeys: int, units: int) -> Problem:
        draw = Draw(f"duoattention/{seed}", "train", units, length, depth)
        return niah(draw, **KINDS[kind], keys=passkeys, questions=passkeys)

    bare = _encode(tokenizer, problem_of(passkeys, 0))
    while passkeys > 1 and len(bare.ids) > _MOST_QUESTIONS * length:
        passkeys = min(passkeys - 1, int(passkeys * _MOST_QUESTIONS * length / len(bare.ids)) + 1)
        bare = _encode(tokenizer, problem_of(passkeys, 0))
    if len(bare.ids) > length:
        raise ValueError(
            f"duoattention: shortest must leave room for a passkey of {len(bare.ids)} tokens with "
            f"this tokenizer, got {length}"
        )
    trial = _encode(tokenizer, problem_of(passkeys, 64))
    units = int(64 * (length - len(bare.ids)) / max(len(trial.ids) - len(bare.ids), 1))
    document = _encode(tokenizer, problem_of(passkeys, units))
    while len(document.ids) > length:
        units = min(units - 1, int(units * length / len(document.ids)))
        document = _encode(tokenizer, problem_of(passkeys, units))
    return document


def _encode(tokenizer: Any, problem: Problem) -> Document:
    """Return the tokens of a problem; an answer ends with the end token, where there is one."""
    ids = list(tokenizer(problem.preamble)["input_ids"])
    labels = len(ids)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for query in problem.queries:
        ids += tokenizer(ask(query), add_special_tokens=False)["input_ids"]
        ids += tokenizer(query.completion, add_special_tokens=False)["input_ids"] + end
    return Document(torch.tensor(ids), labels)
