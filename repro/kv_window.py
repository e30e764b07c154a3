"""The first and the latest tokens of every sequence in memory of constant size."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from repro.kv_cache import LayerShape


class SinkWindow:
    """Keys and values of the first ``sink_size`` and the last ``recent_size`` tokens.

    The recent ones are a ring: their order does not matter to attention, a new one takes the place
    of the oldest.
    """

    def __init__(self, shape: LayerShape, *, sink_size: int, recent_size: int) -> None:
        self.shape, self.sink_size, self.recent_size = shape, sink_size, recent_size
        slots = (shape.batch, shape.kv_heads, sink_size + recent_size, shape.head_dim)
        values: dict[str, Any] = {"dtype": shape.dtype, "device": shape.device}
        self.k, self.v = (torch.zeros(slots, **values) for _ in range(2))
        self.lengths = [0] * shape.batch  # tokens seen

    @property
    def size(self) -> int:
        """Most tokens that are held of a sequence."""
        return self.sink_size + self.recent_size

    def append(self, sequence: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Take in the next tokens of a sequence, ``[1, H_kv, T, D]``."""
        begin, tokens = self.lengths[sequence], k.shape[2]
        self.lengths[sequence] = begin + tokens
        positions = torch.arange(begin, begin + tokens)
        stays = (positions < self.sink_size) | (positions >= begin + tokens - self.recent_size)
        taken = positions[stays]
        slots = self._slots(taken).to(k.device)
        index = (taken - begin).to(k.device)
        self.k[sequence, :, slots] = k[0, :, index]
        self.v[sequence, :, slots] = v[0, :, index]

    def append_each(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Take in one token of every sequence, ``[B, H_kv, 1, D]``."""
        slots = self._slots(torch.tensor(self.lengths)).to(k.device)
        rows = torch.arange(len(self.lengths), device=k.device)
        self.k[rows, :, slots] = k[:, :, 0]
        self.v[rows, :, slots] = v[:, :, 0]
        self.lengths = [length + 1 for length in self.lengths]

    def ordered(self, sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what is held of a sequence by position, ``[1, H_kv, n, D]`` each."""
        slots = self._slots(self.positions(sequence)).to(self.k.device)
        return self.k[sequence : sequence + 1, :, slots], self.v[sequence : sequence + 1, :, slots]

    def positions(self, sequence: int) -> torch.Tensor:
        """Return the positions of the tokens held, ascending, int64 on the CPU."""
        length = self.lengths[sequence]
        sinks = torch.arange(min(length, self.sink_size))
        first = max(self.sink_size, length - self.recent_size)
        recent = torch.arange(min(first, length), length)
        return torch.cat([sinks, recent])

    def held(self, sequence: int) -> int:
        """Return how many tokens are held of a sequence."""
        return min(self.lengths[sequence], self.size)

    def tensors(self) -> Iterable[torch.Tensor]:
        """Return every tensor that is held."""
        return self.k, self.v

    def _slots(self, positions: torch.Tensor) -> torch.Tensor:
        ring = self.sink_size + (positions - self.sink_size) % max(self.recent_size, 1)
        return torch.where(positions < self.sink_size, positions, ring)


def visible_slots(window: SinkWindow) -> torch.Tensor | None:
    """Return which slots hold a token, ``[B, 1, 1, size]`` bool, or None if all of them do."""
    if min(window.lengths) >= window.size:
        return None
    counts = torch.tensor([window.held(row) for row in range(len(window.lengths))])
    places = torch.arange(window.size)
    return (places < counts[:, None])[:, None, None].to(window.k.device)
