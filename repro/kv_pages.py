"""K and V of one layer in pages that a batch of sequences shares, growing as tokens come."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from repro.errors import MissingResource
from repro.kernels.kv_quantize import append
from repro.kernels.paged_attention import Format, Pages, dequantize, paged_attention
from repro.kv_cache import LayerShape


class PagedStore:
    """A pool of pages, a table of which sequence has which, and how many tokens each has.

    The pool grows by a thirty-second of itself, at least by what is needed: what is held stays
    within a few percent of what is used, and the copies cost little.

    Args:
        shape: Layer and batch.
        page_size: Tokens of a page.
        k_format: How keys are stored.
        v_format: How values are stored.
        max_tokens: Tokens that the pool may hold in all, None for as many as memory takes.
    """

    def __init__(
        self,
        shape: LayerShape,
        *,
        page_size: int = 64,
        k_format: Format | None = None,
        v_format: Format | None = None,
        max_tokens: int | None = None,
    ) -> None:
        self.shape, self.page_size, self.max_tokens = shape, page_size, max_tokens
        self.k_lengths, self.v_lengths = [0] * shape.batch, [0] * shape.batch
        self.k, self.v = (self._allocate(0, form) for form in (k_format, v_format))
        self._used = 0  # pages of the pool
        self._pages: list[list[int]] = [[] for _ in range(shape.batch)]
        whole: dict[str, Any] = {"dtype": torch.int32, "device": shape.device}
        self._table = torch.full((shape.batch, 0), -1, **whole)
        self._k_held, self._v_held = (torch.zeros(shape.batch, **whole) for _ in range(2))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence that have both a key and a value here."""
        return [min(pair) for pair in zip(self.k_lengths, self.v_lengths, strict=True)]

    def append(
        self, k: torch.Tensor | None, v: torch.Tensor | None, sequence: int | None = None
    ) -> None:
        """Store new tokens after those that are there.

        Args:
            k: ``[B, H_kv, T, D]``, or ``[1, H_kv, T, D]`` for one sequence; None for no keys.
            v: The same for values, of as many tokens or not: what is packed may lag behind.
            sequence: Whose they are, None for all.

        Raises:
            MissingResource: If the pool may not hold so many.
        """
        rows = range(self.shape.batch) if sequence is None else range(sequence, sequence + 1)
        for x, lengths in ((k, self.k_lengths), (v, self.v_lengths)):
            if x is not None:
                self._reserve({row: lengths[row] + x.shape[2] for row in rows})
        part = slice(rows.start, rows.stop)
        for x, pages, held, lengths in (
            (k, self.k, self._k_held, self.k_lengths),
            (v, self.v, self._v_held, self.v_lengths),
        ):
            if x is not None and x.shape[2]:
                append(x, pages, self._table[part], held[part])
                held[part] += x.shape[2]
                for row in rows:
                    lengths[row] += x.shape[2]

    def attend(
        self, q: torch.Tensor, scale: float, *, selected: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend over the tokens that have both a key and a value here.

        Args:
            q: ``[B, H, 1, D]``.
            scale: Softmax scale.
            selected: Pages that each KV head reads, as ``paged_attention`` takes them.

        Returns:
            ``[B, H, 1, D]`` and the log-sum-exp ``[B, H]`` fp32.
        """
        out, lse = paged_attention(
            q[:, :, 0],
            self.k,
            self.v,
            self._table,
            torch.minimum(self._k_held, self._v_held),
            selected=selected,
            scale=scale,
            return_lse=True,
        )
        return out[:, :, None], lse

    def keys(self, sequence: int, begin: int, end: int) -> torch.Tensor:
        """Return the keys ``[1, H_kv, T, D]`` of a sequence's tokens from ``begin`` to ``end``."""
        return self._read(self.k, sequence, begin, end)

    def values(self, sequence: int, begin: int, end: int) -> torch.Tensor:
        """Return the values ``[1, H_kv, T, D]`` of a sequence's tokens from ``begin`` to ``end``."""
        return self._read(self.v, sequence, begin, end)

    def _read(self, pages: Pages, sequence: int, begin: int, end: int) -> torch.Tensor:
        first, last = begin // self.page_size, -(-end // self.page_size)
        numbers = self._table[sequence, first:last].long()
        found = dequantize(pages, numbers).to(self.shape.dtype)  # [n, H_kv, page_size, D]
        offset = begin - first * self.page_size
        return found.transpose(0, 1).flatten(1, 2)[None, :, offset : offset + end - begin]

    def tensors(self) -> Iterable[torch.Tensor]:
        """Return every tensor that is held."""
        for pages in (self.k, self.v):
            yield from (x for x in (pages.data, pages.scale, pages.minimum) if x is not None)
        yield from (self._table, self._k_held, self._v_held)

    def _allocate(self, n_pages: int, format: Format | None) -> Pages:
        shape = self.shape
        return Pages.allocate(
            n_pages,
            shape.kv_heads,
            self.page_size,
            shape.head_dim,
            dtype=shape.dtype,
            device=shape.device,
            format=format,
        )

    def _reserve(self, lengths: dict[int, int]) -> None:
        """Give sequences the pages that so many tokens need."""
        wanted = {row: -(-tokens // self.page_size) for row, tokens in lengths.items()}
        # What is held already may be more: values of a row may lag behind its keys.
        fresh = {row: max(0, count - len(self._pages[row])) for row, count in wanted.items()}
        new = sum(fresh.values())
        if not new:
            return
        total = self._used + new
        if self.max_tokens is not None and total * self.page_size > self.max_tokens:
            raise MissingResource(
                f"kv cache: the context must fit in the pool of {self.max_tokens} tokens, got "
                f"{max(lengths.values())} for one of {self.shape.batch} sequences; raise max_tokens"
            )
        if total > self.k.n_pages:
            self.k, self.v = (self._grown(pages, total) for pages in (self.k, self.v))
        for row, count in fresh.items():
            self._pages[row] += range(self._used, self._used + count)
            self._used += count
        width = max(map(len, self._pages))
        rows = [pages + [-1] * (width - len(pages)) for pages in self._pages]
        self._table = torch.tensor(rows, dtype=torch.int32, device=self.shape.device)

    def _grown(self, pages: Pages, total: int) -> Pages:
        more = self._allocate(max(total, self.k.n_pages * 33 // 32) - pages.n_pages, pages.format)

        def joined(old: torch.Tensor | None, new: torch.Tensor | None) -> torch.Tensor | None:
            return None if old is None or new is None else torch.cat([old, new])

        data = torch.cat([pages.data, more.data])
        scale, minimum = joined(pages.scale, more.scale), joined(pages.minimum, more.minimum)
        return Pages(data, pages.format, scale, minimum)
