"""Caches whose prompt is prefilled densely and kept, whole or in part, once it is there."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable

import torch

from repro.attention_patch import dense_causal
from repro.kv_cache import LayerCache, LayerShape, NewTokens


class PromptLayer(LayerCache):
    """Holds a prompt's keys and values until it is whole, then hands them to ``keep``.

    In a prefill of several passes later chunks attend to the exact keys of earlier ones, so that it
    equals a whole one.
    """

    def __init__(self, shape: LayerShape) -> None:
        self.shape = shape
        empty = torch.empty(
            1, shape.kv_heads, 0, shape.head_dim, dtype=shape.dtype, device=shape.device
        )
        self._prompts = [(empty, empty)] * shape.batch
        self._read = self._seen = 0

    @abstractmethod
    def keep(self, sequence: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store what the method keeps of a whole prompt, ``[1, H_kv, T, D]``; T may be 0."""

    def observe(self, sequence: int, new: NewTokens, k: torch.Tensor) -> None:
        """Look at the queries of a pass, the last of the tokens whose keys are ``k``."""

    def prefill(self, sequence: int, new: NewTokens) -> torch.Tensor:
        self.fill(sequence, new.k, new.v)
        k, v = self._prompts[sequence]
        self.observe(sequence, new, k)
        return dense_causal(new.q, k, v, new.scale)

    def fill(self, sequence: int, k: torch.Tensor, v: torch.Tensor) -> None:
        before = self._prompts[sequence]
        if before[0].shape[2]:
            k, v = (torch.cat(pair, dim=2) for pair in zip(before, (k, v), strict=True))
        self._prompts[sequence] = (k, v)

    def end_prefill(self) -> None:
        for sequence, (k, v) in enumerate(self._prompts):
            self.keep(sequence, k, v)
        self._prompts = []

    def count(self, read: int, seen: int) -> None:
        """Add one decode step: tokens read and seen, summed over sequences and KV heads."""
        self._read += read
        self._seen += seen

    def observed(self) -> tuple[int, int]:
        return self._read, self._seen

    def tensors(self) -> Iterable[torch.Tensor]:
        for pair in self._prompts:
            yield from pair
