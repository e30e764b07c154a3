"""Measure the retriever: RULER scores by generation, perplexity, and what each head looks at."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from repro.measurements.ruler.generate import Item, generate_items
from repro.measurements.ruler.lexicon import Split
from repro.measurements.ruler.scoring import item_score
from repro.measurements.ruler.tasks import TASKS
from repro.zoo.retriever.examples import encode, make_example
from repro.zoo.retriever.skills import SKILLS


@dataclass(frozen=True)
class Answered:
    """An item with what the model said and its score in [0, 1]."""

    item: Item
    text: str
    score: float


@torch.no_grad()
def answer(
    model: Any,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    batch_size: int = 8,
) -> list[Answered]:
    """Continue each prompt greedily, in left-padded batches, and score it."""
    answered = []
    for start in range(0, len(items), batch_size):
        batch = items[start : start + batch_size]
        inputs = tokenizer(
            [item.prompt for item in batch], return_tensors="pt", padding=True, padding_side="left"
        )
        output = model.generate(
            input_ids=inputs["input_ids"].to(model.device),
            attention_mask=inputs["attention_mask"].to(model.device),
            max_new_tokens=max(TASKS[item.task].max_new_tokens for item in batch),
            do_sample=False,
        )
        new = output[:, inputs["input_ids"].shape[1] :]
        for item, text in zip(
            batch, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True
        ):
            score = item_score(TASKS[item.task].metric, text, item.answers)
            answered.append(Answered(item, text, score))
    return answered


def ruler_scores(
    model: Any,
    tokenizer: Any,
    *,
    length: int,
    count: int,
    seed: int,
    split: Split = "evaluation",
    tasks: Sequence[str] = tuple(TASKS),
) -> dict[str, list[Answered]]:
    """Return the answered items of each task at one length."""
    found = {}
    for task in tasks:
        items = generate_items(
            task, length=length, count=count, seed=seed, tokenizer=tokenizer, split=split
        )
        found[task] = answer(model, tokenizer, items, batch_size=max(1, 4096 // length))
    return found


@torch.no_grad()
def skill_scores(
    model: Any, tokenizer: Any, *, units: int, count: int, seed: str = "skills"
) -> dict[str, list[float]]:
    """Return 1 or 0 for every question about documents that no training step saw, by skill.

    A question counts if every token of its answer is the likeliest after those before it, which is
    what greedy decoding writes.

    Args:
        model: The retriever.
        tokenizer: Its tokenizer.
        units: Lines or sentences of a document.
        count: Documents a skill.
        seed: Fixes the documents.
    """
    found: dict[str, list[float]] = {}
    for skill in SKILLS:
        scores = found.setdefault(skill.__name__, [])
        for index in range(count):
            problem = skill(random.Random(f"{seed}/{index}"), units=units)
            example = encode("skill", problem, tokenizer)
            ids = torch.from_numpy(example.ids)[None].to(model.device)
            right = (model(input_ids=ids).logits[0, :-1].argmax(-1) == ids[0, 1:]).tolist()
            is_answer = example.is_answer[1:].tolist()
            for asked, part in itertools.groupby(
                zip(is_answer, right, strict=True), lambda x: x[0]
            ):
                if asked:
                    scores.append(float(all(token for _, token in part)))
    return found


@torch.no_grad()
def perplexity(
    model: Any,
    tokenizer: Any,
    *,
    length: int,
    count: int,
    seed: str = "perplexity",
) -> float:
    """Return exp of the mean loss per token on prose that no training step saw."""
    nats, tokens = 0.0, 0
    for index in range(count):
        example = make_example("prose", length=length, seed=f"{seed}/{index}", tokenizer=tokenizer)
        ids = torch.from_numpy(example.ids)[None].to(model.device)
        logits = model(input_ids=ids).logits[0, :-1].float()
        nats += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        tokens += ids.shape[1] - 1
    return float(torch.tensor(nats / tokens).exp())


def ngram_perplexities(tokenizer: Any, *, length: int, count: int, most: int = 3) -> list[float]:
    """Return the perplexities of tables of 1 to ``most`` tokens on the same prose: what to beat.

    Each table adds three observations of what the shorter one expects.
    """

    def prose(seed: str, n: int) -> list[tuple[int, ...]]:
        texts = (
            make_example("prose", length=length, seed=f"{seed}/{i}", tokenizer=tokenizer).ids
            for i in range(n)
        )
        return [tuple(text.tolist()) for text in texts]

    seen: Counter[tuple[int, ...]] = Counter()
    for text in prose("ngram", 100):
        seen[()] += len(text)
        for n in range(1, most + 1):
            seen.update(text[i : i + n] for i in range(len(text) - n + 1))
    nats = [0.0] * most
    tokens = 0
    for text in prose("perplexity", count):
        for end in range(most, len(text)):
            share = 1 / len(tokenizer)
            tokens += 1
            for n in range(most):
                before, whole = text[end - n : end], text[end - n : end + 1]
                share = (seen[whole] + 3 * share) / (seen[before] + 3)
                nats[n] -= math.log(share)
    return [math.exp(value / tokens) for value in nats]


@torch.no_grad()
def head_profile(model: Any, tokenizer: Any, *, length: int, count: int) -> dict[str, torch.Tensor]:
    """Return three numbers for each head, each ``[layers, H]``, as means over prompts.

    ``local`` is the attention within the last 8 tokens (over all queries), ``first`` that on the
    first token, ``retrieval`` that on the needle's value when its first token is predicted.
    """
    items = generate_items(
        "niah_multikey_1", length=length, count=count, seed=11, tokenizer=tokenizer
    )
    previous = model.config._attn_implementation
    model.set_attn_implementation("eager")
    sums: dict[str, Any] = {"local": 0, "first": 0, "retrieval": 0}
    try:
        for item in items:
            ids = torch.tensor(tokenizer.encode(item.prompt))
            first = tokenizer.encode(" " + item.answers[0])[:2]
            pairs = torch.stack([ids[:-1], ids[1:]], dim=1)
            place = int((pairs == torch.tensor(first)).all(1).nonzero()[0])
            output = model(input_ids=ids[None].to(model.device), output_attentions=True)
            maps = torch.stack([a[0].float().cpu() for a in output.attentions])  # [L, H, T, T]
            distance = torch.arange(len(ids))[:, None] - torch.arange(len(ids))[None]
            near = (distance >= 0) & (distance < 8)
            sums["local"] = sums["local"] + (maps * near).sum(-1)[..., 32:].mean(-1)
            sums["first"] = sums["first"] + maps[..., 32:, 0].mean(-1)
            sums["retrieval"] = sums["retrieval"] + maps[..., -1, place]
    finally:
        model.set_attn_implementation(previous)
    return {name: total / len(items) for name, total in sums.items()}
