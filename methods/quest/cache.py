"""The cache of Quest: everything in pages, with the least and largest key of each beside it."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from repro.kv_cache import LayerShape, NewTokens
from repro.kv_pages import PagedStore
from repro.kv_prompt import PromptLayer
from repro.methods.quest import QuestConfig


def page_bounds(q: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Return ``[B, H, n_pages]`` fp32: no key of the page has a larger product with the query.

    Args:
        q: ``[B, H, 1, D]``.
        low: ``[B, H_kv, n_pages, D]``, the least key of each page by channel.
        high: The largest.

    Source: arXiv:2406.10774, section 3.3.
    """
    grouped = q.float().unflatten(1, (low.shape[1], -1))[..., 0, :]  # [B, H_kv, n_rep, D]
    upper = grouped.clamp_min(0) @ high.float().mT + grouped.clamp_max(0) @ low.float().mT
    return upper.flatten(1, 2)


class QuestLayer(PromptLayer):
    """One layer. A KV head reads the pages of the largest bound among its query heads."""

    def __init__(self, shape: LayerShape, config: QuestConfig) -> None:
        super().__init__(shape)
        self.config = config
        self.store = PagedStore(shape, page_size=config.page_size)
        bounds = (shape.batch, shape.kv_heads, 0, shape.head_dim)
        self._low, self._high = (
            torch.empty(bounds, dtype=shape.dtype, device=shape.device) for _ in range(2)
        )

    def keep(self, sequence: int, k: torch.Tensor, v: torch.Tensor) -> None:
        size = self.config.page_size
        pages, short = -(-k.shape[2] // size), -k.shape[2] % size
        self._grow(pages)
        for bounds, fill in ((self._low, torch.inf), (self._high, -torch.inf)):
            padded = torch.nn.functional.pad(k[0], (0, 0, 0, short), value=fill)
            by_page = padded.unflatten(1, (pages, size))
            bounds[sequence, :, :pages] = by_page.amin(2) if fill > 0 else by_page.amax(2)
        self.store.append(k, v, sequence)

    def decode(self, new: NewTokens) -> torch.Tensor:
        self.store.append(new.k, new.v)
        lengths, size = self.store.lengths, self.config.page_size
        current = torch.tensor([(n - 1) // size for n in lengths], device=new.k.device)
        self._grow(int(max(lengths) - 1) // size + 1)
        rows = torch.arange(len(lengths), device=new.k.device)
        key = new.k[:, :, 0]
        self._low[rows, :, current] = torch.minimum(self._low[rows, :, current], key)
        self._high[rows, :, current] = torch.maximum(self._high[rows, :, current], key)
        selected = None
        if self.shape.layer >= self.config.dense_layers:
            selected = self._selected(new.q, current)
        self._count(lengths, selected)
        return self.store.attend(new.q, new.scale, selected=selected)[0]

    def _selected(self, q: torch.Tensor, current: torch.Tensor) -> torch.Tensor | None:
        """Return the pages to read, the one in progress included, ``[B, H_kv, n]`` int32."""
        pages, count = self._low.shape[2], self.config.pages
        if pages <= count:
            return None
        bounds = page_bounds(q, self._low, self._high)
        bounds = bounds.unflatten(1, (self.shape.kv_heads, -1)).amax(2)  # [B, H_kv, n_pages]
        places = torch.arange(pages, device=q.device)
        bounds = bounds.masked_fill(places > current[:, None, None], -torch.inf)
        bounds = bounds.masked_fill(places == current[:, None, None], torch.inf)
        top = bounds.topk(count, dim=-1)
        return top.indices.masked_fill(top.values == -torch.inf, -1).to(torch.int32)

    def _count(self, lengths: list[int], selected: torch.Tensor | None) -> None:
        heads, seen = self.shape.kv_heads, sum(lengths)
        if selected is None:
            self.count(heads * seen, heads * seen)
            return
        size, read = self.config.page_size, 0
        for tokens in lengths:
            pages = -(-tokens // size)
            read += min(tokens, (self.config.pages - 1) * size + tokens - (pages - 1) * size)
        self.count(heads * read, heads * seen)

    def _grow(self, pages: int) -> None:
        """Make room for the bounds of so many pages; a page without keys has none."""
        more = pages - self._low.shape[2]
        if more > 0:
            pad = (0, 0, 0, more)
            self._low = torch.nn.functional.pad(self._low, pad, value=torch.inf)
            self._high = torch.nn.functional.pad(self._high, pad, value=-torch.inf)

    def tensors(self) -> Iterable[torch.Tensor]:
        yield from super().tensors()
        yield from self.store.tensors()
        yield from (self._low, self._high)
