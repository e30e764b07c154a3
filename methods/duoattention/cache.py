"""The two caches of DuoAttention: pages for retrieval heads, a ring for streaming heads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from repro.attention_patch import dense_causal
from repro.kernels.paged_attention import Format, Pages, merge_attention, paged_attention
from repro.kv_cache import LayerCache, LayerShape, NewTokens
from repro.kv_pages import PagedStore
from repro.kv_window import SinkWindow
from repro.methods.duoattention import DuoAttentionConfig

#: Query tokens of one call that needs a mask: it bounds the mask, and what it hides is not computed.
_ROWS = 1024


class DuoLayer(LayerCache):
    """One layer whose first ``n_retrieval`` KV heads are retrieval heads; any number, also 0."""

    def __init__(self, shape: LayerShape, config: DuoAttentionConfig, n_retrieval: int) -> None:
        self.config = config
        self.kv_heads = (n_retrieval, shape.kv_heads - n_retrieval)
        n_rep = shape.heads // shape.kv_heads
        self.heads = tuple(n_rep * count for count in self.kv_heads)
        parts = [
            replace(shape, heads=heads, kv_heads=kv_heads)
            for heads, kv_heads in zip(self.heads, self.kv_heads, strict=True)
        ]
        self.retrieval = _Retrieval(parts[0], config) if self.kv_heads[0] else None
        self.streaming = _Streaming(parts[1], config) if self.kv_heads[1] else None
        self._lengths = [0] * shape.batch
        self._read = self._seen = 0

    def prefill(self, sequence: int, new: NewTokens) -> torch.Tensor:
        tokens = new.k.shape[2]
        steps = min(max(self.config.simulated_decode - new.remaining, 0), tokens)
        self._lengths[sequence] += tokens
        retrieval, streaming = self._split(new)
        parts = []
        if self.retrieval is not None:
            parts.append(self.retrieval.prefill(sequence, retrieval))
        if self.streaming is not None:
            parts.append(self.streaming.prefill(sequence, streaming, steps))
        return torch.cat(parts, dim=1)

    def decode(self, new: NewTokens) -> torch.Tensor:
        retrieval, streaming = self._split(new)
        self._lengths = [length + 1 for length in self._lengths]
        seen, parts = sum(self._lengths), []
        if self.retrieval is not None:
            parts.append(self.retrieval.decode(retrieval))
            self._read += self.kv_heads[0] * seen
        if self.streaming is not None:
            self._read += self.kv_heads[1] * (self.streaming.held() + len(self._lengths))
            parts.append(self.streaming.decode(streaming))
        self._seen += sum(self.kv_heads) * seen
        return torch.cat(parts, dim=1)

    def fill(self, sequence: int, k: torch.Tensor, v: torch.Tensor) -> None:
        self._lengths[sequence] += k.shape[2]
        (k_full, k_stream), (v_full, v_stream) = (x.split(self.kv_heads, dim=1) for x in (k, v))
        if self.retrieval is not None:
            self.retrieval.store.append(k_full, v_full, sequence)
        if self.streaming is not None:
            self.streaming.fill(sequence, k_stream, v_stream)

    def end_prefill(self) -> None:
        if self.streaming is not None:
            self.streaming.end_prefill()

    def observed(self) -> tuple[int, int]:
        return self._read, self._seen

    def tensors(self) -> Iterable[torch.Tensor]:
        for part in (self.retrieval, self.streaming):
            if part is not None:
                yield from part.tensors()

    def _split(self, new: NewTokens) -> tuple[NewTokens, NewTokens]:
        """Return what is for retrieval heads and what is for streaming heads."""
        queries = new.q.split(self.heads, dim=1)
        keys, values = (x.split(self.kv_heads, dim=1) for x in (new.k, new.v))
        first, second = (
            NewTokens(*part, new.scale) for part in zip(queries, keys, values, strict=True)
        )
        return first, second


class _Retrieval:
    """Heads that keep and see everything."""

    def __init__(self, shape: LayerShape, config: DuoAttentionConfig) -> None:
        self.store = PagedStore(shape, max_tokens=config.max_tokens)

    def prefill(self, sequence: int, new: NewTokens) -> torch.Tensor:
        before = self.store.lengths[sequence]
        self.store.append(new.k, new.v, sequence)
        k, v = new.k, new.v
        if before:
            end = before + k.shape[2]
            k, v = self.store.keys(sequence, 0, end), self.store.values(sequence, 0, end)
        return _causal(new.q, k, v, new.scale)

    def decode(self, new: NewTokens) -> torch.Tensor:
        self.store.append(new.k, new.v)
        return self.store.attend(new.q, new.scale)[0]

    def tensors(self) -> Iterable[torch.Tensor]:
        return self.store.tensors()


class _Streaming:
    """Heads that keep sinks and a recent window, and forget at the end of each chunk.

    A chunk that a pass leaves unfinished is held whole until it ends, so that the outcome does not
    depend on where passes are cut.
    """

    def __init__(self, shape: LayerShape, config: DuoAttentionConfig) -> None:
        self.chunk_size = config.chunk_size
        self.window = SinkWindow(shape, sink_size=config.sink_size, recent_size=config.recent_size)
        self._n_rep = shape.heads // shape.kv_heads
        self._open: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by sequence
        self._whole = False  # whether the prompt is
        self._table = torch.arange(shape.batch, dtype=torch.int32, device=shape.device)[:, None]

    def prefill(self, sequence: int, new: NewTokens, steps: int) -> torch.Tensor:
        """Attend chunk by chunk, the last ``steps`` tokens by the rule of decode."""
        parts, begin, end = [], 0, new.k.shape[2] - steps
        while begin < end:
            stop = min(begin + self._room(sequence), end)
            q, k, v = (x[:, :, begin:stop] for x in (new.q, new.k, new.v))
            cached = self.window.ordered(sequence)
            own = self._extend(sequence, k, v)
            k, v = (torch.cat(pair, dim=2) for pair in zip(cached, own, strict=True))
            parts.append(_causal(q, k, v, new.scale))
            begin = stop
        if steps:
            self._close(sequence)
            parts.append(
                self._steps(sequence, *(x[:, :, end:] for x in (new.q, new.k, new.v)), new.scale)
            )
        return torch.cat(parts, dim=2)

    def fill(self, sequence: int, k: torch.Tensor, v: torch.Tensor) -> None:
        if self._whole:
            self.window.append(sequence, k, v)
            return
        begin = 0
        while begin < k.shape[2]:
            stop = min(begin + self._room(sequence), k.shape[2])
            self._extend(sequence, k[:, :, begin:stop], v[:, :, begin:stop])
            begin = stop

    def end_prefill(self) -> None:
        self._whole = True
        for sequence in list(self._open):
            self._close(sequence)

    def decode(self, new: NewTokens) -> torch.Tensor:
        # The window is one page a sequence; what it holds lies in its first slots.
        held = torch.tensor(self._held(), dtype=torch.int32, device=new.q.device)
        out, lse = paged_attention(
            new.q[:, :, 0],
            Pages(self.window.k, Format()),
            Pages(self.window.v, Format()),
            self._table,
            held,
            scale=new.scale,
            return_lse=True,
        )
        own_k, own_v = (
            x[:, :, 0].repeat_interleave(self._n_rep, dim=1) for x in (new.k, new.v)
        )  # [B, H, D]
        own = new.scale * (new.q[:, :, 0].float() * own_k.float()).sum(-1)
        self.window.append_each(new.k, new.v)
        return merge_attention([out, own_v], [lse, own])[0][:, :, None]

    def held(self) -> int:
        """Return the tokens held of all sequences."""
        return sum(self._held())

    def tensors(self) -> Iterable[torch.Tensor]:
        yield from self.window.tensors()
        for pair in self._open.values():
            yield from pair

    def _held(self) -> list[int]:
        return [self.window.held(row) for row in range(len(self.window.lengths))]

    def _room(self, sequence: int) -> int:
        """Return how many tokens the chunk in progress still takes."""
        unfinished = self._open[sequence][0].shape[2] if sequence in self._open else 0
        return self.chunk_size - (self.window.lengths[sequence] + unfinished) % self.chunk_size

    def _extend(
        self, sequence: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take tokens into the chunk in progress, which may end here, and return all of its own."""
        ends = k.shape[2] == self._room(sequence)
        own = (k, v)
        before = self._open.pop(sequence, None)
        if before is not None:
            own = (torch.cat([before[0], k], dim=2), torch.cat([before[1], v], dim=2))
        if ends:
            self.window.append(sequence, *own)
        else:  # a copy: a view would keep the whole pass
            self._open[sequence] = own if before is not None else (k.clone(), v.clone())
        return own

    def _close(self, sequence: int) -> None:
        """Forget what streaming heads do not keep of the chunk in progress."""
        own = self._open.pop(sequence, None)
        if own is not None:
            self.window.append(sequence, *own)

    def _steps(
        self, sequence: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Attend as if the tokens came one by one: sinks, the recent ones before, itself."""
        cached_k, cached_v = self.window.ordered(sequence)
        self.window.append(sequence, k, v)
        k, v = torch.cat([cached_k, k], dim=2), torch.cat([cached_v, v], dim=2)
        places = torch.arange(k.shape[2], device=k.device)
        behind = places[-q.shape[2] :, None] - places
        recent = (behind >= 0) & (behind <= self.window.recent_size)
        seen = recent | ((behind >= 0) & (places < self.window.sink_size))
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, scale=scale, enable_gqa=self._n_rep > 1
        )


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Return causal attention ``[1, H, Tq, D]`` of the last ``Tq`` of the ``Tk`` tokens."""
    before = k.shape[2] - q.shape[2]
    if not before or q.shape[2] <= _ROWS:
        return dense_causal(q, k, v, scale)
    parts = []
    for begin in range(0, q.shape[2], _ROWS):
        rows = q[:, :, begin : begin + _ROWS]
        end = before + begin + rows.shape[2]
        parts.append(dense_causal(rows, k[:, :, :end], v[:, :, :end], scale))
    return torch.cat(parts, dim=2)
