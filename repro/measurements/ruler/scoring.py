"""RULER's official post-processing and string-match scorers, bit-equal to the released ones.

``string_match_part`` counts an item as right when any reference is found. lm-eval 0.4.13 divides by
the number of references there instead; we follow RULER and report lm-eval's number beside it where
its own tasks run (``hub.py``).

Source: arXiv:2404.06654 and the release's ``scripts/eval`` (``postprocess_pred`` and the metrics).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f]")


def postprocess(text: str) -> str:
    """Return a generation as it is scored: stripped, each control character a line break."""
    return _CONTROL_CHARACTERS.sub("\n", text.strip()).strip()


def string_match_all(prediction: str, references: Sequence[str]) -> float:
    """Return the share of references found in the prediction, case ignored; in [0, 1]."""
    return sum(_found(prediction, references)) / len(references)


def string_match_part(prediction: str, references: Sequence[str]) -> float:
    """Return 1.0 if any reference is found in the prediction, case ignored, else 0.0."""
    return max(_found(prediction, references))


def _found(prediction: str, references: Sequence[str]) -> list[float]:
    if not references:
        raise ValueError("ruler scoring: references must hold at least one string, got none")
    lowered = prediction.lower()
    return [1.0 if reference.lower() in lowered else 0.0 for reference in references]


METRICS = {"string_match_all": string_match_all, "string_match_part": string_match_part}


def item_score(metric: str, text: str, references: Sequence[str]) -> float:
    """Return the score in [0, 1] of one raw generation."""
    return METRICS[metric](postprocess(text), references)


def corpus_score(metric: str, texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the official score of a task: percent, rounded to two decimals.

    Raises:
        ValueError: If there are no texts, or not as many as lists of references.
    """
    if not texts or len(texts) != len(references):
        raise ValueError(
            "corpus_score: texts and references must be of one length (at least 1), "
            f"got {len(texts)} and {len(references)}"
        )
    scores = [item_score(metric, *pair) for pair in zip(texts, references, strict=True)]
    return round(sum(scores) / len(texts) * 100, 2)
