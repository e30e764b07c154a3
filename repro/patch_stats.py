"""Joins what a patch observed in several batches of one cell into one set of numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# How the observations of a patch join over batches; every other number is averaged by items.
_SUMMED = frozenset({"dense_calls", "sparse_calls", "selection_seconds"})
_LARGEST = frozenset({"kv_bytes", "weight_bytes"})


def merge_stats(parts: Sequence[tuple[int, Mapping[str, Any]]]) -> dict[str, Any]:
    """Join the ``Patch.stats()`` of batches, given as (number of items, stats)."""
    merged: dict[str, Any] = {}
    for name in dict.fromkeys(name for _, stats in parts for name in stats):
        known = [(items, stats[name]) for items, stats in parts if stats.get(name) is not None]
        if not known:
            merged[name] = None
        elif name in _SUMMED:
            merged[name] = sum(value for _, value in known)
        elif name in _LARGEST:
            merged[name] = max(value for _, value in known)
        else:
            merged[name] = _mean(known)
    return merged


def _mean(parts: Sequence[tuple[int, Any]]) -> Any:
    """Average numbers, and lists of them place by place, weighted by items; text stays as it is."""
    first = parts[0][1]
    if isinstance(first, list):
        known = [(items, value) for items, value in parts if len(value) == len(first)]
        return [
            _mean([(items, value[place]) for items, value in known]) for place in range(len(first))
        ]
    if isinstance(first, bool) or not isinstance(first, (int, float)):
        return first
    numbers = [(items, value) for items, value in parts if value is not None]
    return sum(items * value for items, value in numbers) / sum(items for items, _ in numbers)
