"""One perplexity cell: the loss of each document by prefilled windows, or decoded from a cache."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch

from repro.errors import UnsupportedCombination
from repro.measurements import CellContext
from repro.measurements.perplexity import texts
from repro.method import Patch
from repro.patch_stats import merge_stats


def windows(total: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield (begin, end, first scored place): every token but the first is scored once."""
    scored = 1
    for end in itertools.count(length, stride):
        end = min(end, total)
        yield max(0, end - length), end, scored
        scored = end
        if end == total:
            return


def run_cell(context: CellContext) -> dict[str, Any]:
    """Measure one cell: the loss of each document, in the store's numbers.

    Raises:
        FloatingPointError: If a loss is not finite.
        MissingResource: If the text is no longer what was planned, or cannot be fetched.
        UnsupportedCombination: If the subject has no tokenizer or too few positions, or the text
            too few tokens.
    """
    options, subject = context.options, context.subject
    if subject.tokenizer is None:
        raise UnsupportedCombination(f"perplexity: {subject.name} has no tokenizer")
    if options["length"] > subject.info.max_length:
        raise UnsupportedCombination(
            f"perplexity: windows of {options['length']} tokens exceed the "
            f"{subject.info.max_length} positions of {subject.name}"
        )
    documents, source = texts.documents(
        options, tokenizer=subject.tokenizer, seed=context.seed, cache=context.cache
    )
    keys = []
    for place, ids in enumerate(documents):
        keys.append(hashlib.sha256(repr(ids).encode()).hexdigest())
        if context.items.get(keys[-1]) is None:
            context.items.put([(keys[-1], measure(context, ids))])
        context.progress(place + 1, len(documents))
    stored = [context.items.get(key) or {} for key in keys]
    stats = merge_stats([(1, value["stats"]) for value in stored])
    losses = [value["loss"] / value["tokens"] for value in stored]
    raw = {"keys": keys, "loss_per_token": losses, **source}
    body = {"metrics": _metrics(losses), "raw": raw}
    return body | ({"patch": stats} if stats else {})


def measure(context: CellContext, ids: list[int]) -> dict[str, Any]:
    """Return the summed loss (nats) of a document, its scored tokens and the patch's stats."""
    options, model = context.options, context.subject.model
    tokens = torch.tensor(ids, device=context.subject.device)[None]
    with context.patch() as patch, torch.no_grad():
        if options["mode"] == "decode":
            loss, count, stats = _decoded(model, patch, tokens, options["prefix"])
        else:
            loss, count, stats = _slid(model, patch, tokens, options["length"], options["stride"])
    if not math.isfinite(loss):
        raise FloatingPointError("perplexity: the loss is not finite")
    return {"loss": loss, "tokens": count, "stats": stats}


def _slid(
    model: Any, patch: Patch, tokens: torch.Tensor, length: int, stride: int
) -> tuple[float, int, dict[str, Any]]:
    """Return loss, scored tokens and stats of ``[1, T]`` ids in windows that are one prefill each.

    A window goes through the method's cache where the method has one; each is then a sample of its
    own, because what the window before left there must not be read.
    """
    loss, count = 0.0, 0
    parts: list[tuple[int, dict[str, Any]]] = []
    patch.reset()
    cache = patch.make_cache()
    for begin, end, scored in windows(tokens.shape[1], length, stride):
        if cache is not None and begin:
            parts.append((1, dict(patch.stats())))
            patch.reset()
            cache = patch.make_cache()
        given = {"use_cache": cache is not None, "past_key_values": cache}
        new = end - scored
        logits = model(input_ids=tokens[:, begin:end], logits_to_keep=new + 1, **given).logits
        loss += float(_loss(logits[0, :-1], tokens[0, scored:end]))
        count += new
    parts.append((1, dict(patch.stats())))
    return loss, count, merge_stats(parts) if len(parts) > 1 else parts[0][1]


def _decoded(
    model: Any, patch: Patch, tokens: torch.Tensor, prefix: int
) -> tuple[float, int, dict[str, Any]]:
    """Return loss, scored tokens and stats of ``[1, T]`` ids, those after ``prefix`` fed singly.

    Only what a decode step predicts is scored: the first token after the prefix, which the prefill
    predicts, is not.
    """
    patch.reset()
    cache = patch.make_cache()
    given = {} if cache is None else {"past_key_values": cache}
    out = model(input_ids=tokens[:, :prefix], use_cache=True, logits_to_keep=1, **given)
    cache = out.past_key_values
    losses = []
    for place in range(prefix, tokens.shape[1] - 1):
        step = tokens[:, place : place + 1]
        logits = model(input_ids=step, past_key_values=cache, use_cache=True).logits
        losses.append(_loss(logits[0], tokens[0, place + 1 : place + 2]))
    # One transfer for all: a step must not wait for the device.
    return float(torch.stack(losses).double().sum()), len(losses), dict(patch.stats())


def _loss(logits: torch.Tensor, targets: torch.Tensor, rows: int = 1024) -> Any:
    """Sum the cross-entropy (fp32) in slices, so that a large vocabulary fits in memory."""
    parts = zip(logits.split(rows), targets.split(rows), strict=True)
    return sum(
        torch.nn.functional.cross_entropy(part.float(), target, reduction="sum")
        for part, target in parts
    )


def _metrics(losses: list[float]) -> dict[str, dict[str, Any]]:
    """Return loss and perplexity with Student's interval over documents (95 %)."""
    import numpy as np
    from scipy import stats

    mean = float(np.mean(losses))
    half = float(stats.t.ppf(0.975, len(losses) - 1) * stats.sem(losses))
    low, high, n = mean - half, mean + half, len(losses)

    def metric(value: float, low: float, high: float, unit: str) -> dict[str, Any]:
        return {"value": value, "low": low, "high": high, "n": n, "unit": unit}

    value, below, above = (float(np.exp(loss)) for loss in (mean, low, high))
    return {
        "perplexity": metric(value, below, above, ""),
        "loss": metric(mean, low, high, "nats"),
    }
