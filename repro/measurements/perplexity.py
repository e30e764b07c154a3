"""Next-token perplexity on long synthetic prose, in strided windows: every window is one prefill.

A sparse method changes what a token sees of its window, so its perplexity against dense says what
the selection loses on ordinary text. Documents are stored one by one; a run resumes between them.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from repro.errors import UnsupportedCombination, check_rules
from repro.measurements import CellContext, Measurement
from repro.subjects import SubjectInfo


@dataclass(frozen=True, kw_only=True)
class PerplexityOptions:
    """What to measure.

    Attributes:
        lengths: Tokens of a window; a cell each.
        documents: Number of documents, each of two windows' length.
        stride: Tokens that a window is moved by and that it newly scores; None is half a window.
    """

    lengths: list[int] = field(default_factory=lambda: [2048])
    documents: int = 8
    stride: int | None = None

    def __post_init__(self) -> None:
        lengths, stride = self.lengths, self.stride
        # One token less than the window: what is scored has something before it.
        longest = min(lengths, default=2) - 1
        check_rules(
            ("lengths", min(lengths, default=0) >= 2, "tokens, each at least 2", lengths),
            ("lengths", len(set(lengths)) == len(lengths), "distinct", lengths),
            ("documents", self.documents >= 2, "at least 2", self.documents),
            ("stride", stride is None or 1 <= stride <= longest, f"in [1, {longest}]", stride),
        )


def expand(options: PerplexityOptions) -> list[dict[str, Any]]:
    """Return one cell per length."""
    return [
        {
            "length": length,
            "documents": options.documents,
            "stride": options.stride or max(1, length // 2),
        }
        for length in sorted(options.lengths)
    ]


def windows(total: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield (begin, end, first scored place): every token but the first is scored once."""
    scored = 1
    for end in itertools.count(length, stride):
        end = min(end, total)
        yield max(0, end - length), end, scored
        scored = end
        if end == total:
            return


def run(context: CellContext) -> dict[str, Any]:
    """Measure one cell: the loss of each document, in the store's numbers.

    Raises:
        FloatingPointError: If a loss is not finite.
        UnsupportedCombination: If the subject has no tokenizer or too few positions.
    """
    from repro.patch_stats import merge_stats

    options, subject = context.options, context.subject
    if subject.tokenizer is None:
        raise UnsupportedCombination(f"perplexity: {subject.name} has no tokenizer")
    if options["length"] > subject.info.max_length:
        raise UnsupportedCombination(
            f"perplexity: windows of {options['length']} tokens exceed the "
            f"{subject.info.max_length} positions of {subject.name}"
        )
    keys = []
    for place in range(options["documents"]):
        ids = _document(subject.tokenizer, context.seed, place, 2 * options["length"])
        keys.append(hashlib.sha256(repr(ids).encode()).hexdigest())
        if context.items.get(keys[-1]) is None:
            context.items.put([(keys[-1], _measure(context, ids))])
        context.progress(place + 1, options["documents"])
    stored = [context.items.get(key) or {} for key in keys]
    stats = merge_stats([(1, value["stats"]) for value in stored])
    losses = [value["loss"] / value["tokens"] for value in stored]
    body = {"metrics": _metrics(losses), "raw": {"keys": keys, "loss_per_token": losses}}
    return body | ({"patch": stats} if stats else {})


def _document(tokenizer: Any, seed: int, place: int, tokens: int) -> list[int]:
    """Return exactly ``tokens`` ids of prose."""
    from repro.measurements.ruler.lexicon import prose

    sentences = prose(random.Random(f"perplexity/{seed}/{place}"))
    text = ""
    ids: list[int] = []
    while len(ids) < tokens:
        text += " ".join(itertools.islice(sentences, max(8, tokens // 8))) + " "
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids[:tokens]


def _measure(context: CellContext, ids: list[int]) -> dict[str, Any]:
    """Return the summed loss (nats) of a document, its scored tokens and the patch's stats."""
    import torch

    options, subject = context.options, context.subject
    tokens = torch.tensor(ids, device=subject.device)[None]
    loss, count = 0.0, 0
    with context.patch() as patch, torch.no_grad():
        patch.reset()
        for begin, end, scored in windows(len(ids), options["length"], options["stride"]):
            new = end - scored
            logits = subject.model(
                input_ids=tokens[:, begin:end], use_cache=False, logits_to_keep=new + 1
            ).logits[0, :-1]
            loss += float(_loss(logits, tokens[0, scored:end]))
            count += new
        stats = patch.stats()
    if not math.isfinite(loss):
        raise FloatingPointError("perplexity: the loss is not finite")
    return {"loss": loss, "tokens": count, "stats": stats}


def _loss(logits: Any, targets: Any, rows: int = 1024) -> Any:
    """Sum the cross-entropy (fp32) in slices, so that a large vocabulary fits in memory."""
    import torch

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


def estimate_seconds(options: Mapping[str, Any], info: SubjectInfo) -> float:
    """Return rough seconds on two CPU cores."""
    length = int(options["length"])
    windows = options["documents"] * (1 + length / options["stride"])
    return 0.3 + windows * info.prefill_seconds(length)


MEASUREMENT = Measurement(
    name="perplexity",
    options=PerplexityOptions,
    expand=expand,
    run=run,
    needs_training=True,
    libraries=("transformers",),
    estimate_seconds=estimate_seconds,
)
