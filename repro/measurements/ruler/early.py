"""Scores of RULER's items one by one, for a cell that may end early."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from repro.measurements import CellContext, Scoring
from repro.measurements.ruler import load
from repro.measurements.ruler.scoring import item_score


def scoring(context: CellContext) -> Scoring:
    """Return the items of a cell and RULER's official score of a stored generation."""
    _, documents = load(context)
    known = {document["key"]: document for document in documents}

    def score(key: str, value: Mapping[str, Any]) -> float:
        document = known[key]
        return item_score(document["metric"], value["text"], document["outputs"])

    return Scoring([document["key"] for document in documents], score)
