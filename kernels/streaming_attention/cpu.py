"""CPU fast path: blocks of queries against the sinks and their own window, side by side.

The first ``sink_size + window_size`` tokens see everything before them: dense causal attention.
Every later block of queries sees the sinks and the same band of the keys before it. Its keys are
copied together, so that one call of torch's flash kernel with one mask serves many blocks: that
mask costs next to nothing, and there is nothing to merge. The calls run side by side in worker
threads, each of them serial inside, so that a busy core delays its own call alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from repro import serial_threads

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

#: Most bytes of copied keys (as many of values again) of one call.
_COPY_BYTES = 2 << 20
#: Least and most queries a block: they add to the keys computed, and share the keys copied.
_BLOCKS = (64, 256)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sink_size: int,
    window_size: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output ``[B, H, Tq, D]`` and the log-sum-exp ``[B, H, Tq]`` fp32."""
    batch, heads, tokens, dim = q.shape
    kv_heads, offset = k.shape[1], k.shape[2] - tokens
    # The query heads of a KV head lie side by side: [B * H_kv, n_rep, Tq, D] and [B * H_kv, Tk, D].
    grouped = q.reshape(batch * kv_heads, heads // kv_heads, tokens, dim)
    keys, values = (x.reshape(batch * kv_heads, -1, dim) for x in (k, v))
    out = torch.empty(grouped.shape, dtype=q.dtype)
    lse = torch.empty(grouped.shape[:3])
    dense = min(tokens, max(0, sink_size + window_size - offset))
    if dense:
        end = offset + dense
        out[:, :, :dense], lse[:, :, :dense] = _causal(
            grouped[:, :, :dense], keys[:, :end], values[:, :end], scale
        )

    def attend(part: tuple[int, int, int]) -> None:
        start, count, size = part
        rows = slice(start, start + count * size)
        first = offset + start - window_size + 1
        around = slice(first, first + window_size - 1 + count * size)
        part_k, part_v = (_beside(x, sink_size, x[:, around], count, size) for x in (keys, values))
        queries = grouped[:, :, rows].unflatten(2, (count, size)).transpose(1, 2)
        found = _flash(
            queries.flatten(0, 1),
            part_k.expand(-1, queries.shape[2], -1, -1),
            part_v.expand(-1, queries.shape[2], -1, -1),
            scale=scale,
            attn_mask=_band(sink_size, window_size, size, q.dtype),
        )
        for target, x in zip((out, lse), found[:2], strict=True):
            x = x.unflatten(0, (-1, count)).transpose(1, 2)
            target[:, :, rows].unflatten(2, (count, size)).copy_(x)

    copied = (sink_size + window_size) * dim * q.element_size() * len(keys)
    serial_threads.run(attend, list(_parts(dense, tokens, window_size, copied)))
    return out.view(q.shape), lse.view(q.shape[:3])


def _parts(start: int, end: int, window_size: int, copied: int) -> Iterator[tuple[int, int, int]]:
    """Yield (first row, blocks, queries a block) until all rows are covered.

    ``copied`` is about how many bytes of keys one block copies.
    """
    least, most = _BLOCKS
    size = min(most, max(least, window_size // 4))
    # Several parts a thread balance the threads.
    share = (end - start) // size // (4 * torch.get_num_threads())
    at_once = max(1, min(_COPY_BYTES // copied, share))
    while start < end:
        count = min(at_once, (end - start) // size)
        part = (start, count, size) if count else (start, 1, end - start)
        yield part
        start += part[1] * part[2]


def _beside(
    x: torch.Tensor, sink_size: int, around: torch.Tensor, count: int, size: int
) -> torch.Tensor:
    """Return ``[g * count, 1, sink_size + window_size - 1 + size, D]``: what each block sees."""
    width = around.shape[1] - (count - 1) * size
    windows = around.unfold(1, width, size).transpose(2, 3)  # [g, count, width, D]
    sinks = x[:, None, :sink_size].expand(-1, count, -1, -1)
    return torch.cat([sinks, windows], dim=2).flatten(0, 1)[:, None]


def _band(sink_size: int, window_size: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the bias ``[1, 1, size, sink_size + window_size - 1 + size]`` of every block."""
    hidden = torch.ones(size, window_size - 1 + size, dtype=torch.bool)
    hidden = hidden.triu(window_size) | hidden.tril(-1)
    bias = torch.zeros(size, sink_size + hidden.shape[1], dtype=dtype)
    bias[:, sink_size:].masked_fill_(hidden, -torch.inf)
    return bias[None, None]


def _causal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to all keys up to the query's own; ``q`` holds the last of them."""
    n_rep, tokens = q.shape[1:3]
    k, v = (x[:, None].expand(-1, n_rep, -1, -1) for x in (k, v))
    first = k.shape[2] - tokens
    out, lse = _flash(q, k[:, :, first:], v[:, :, first:], is_causal=True, scale=scale)[:2]
    if first:
        earlier, earlier_lse = _flash(q, k[:, :, :first], v[:, :, :first], scale=scale)[:2]
        share = torch.sigmoid(earlier_lse - lse)[..., None]
        out = torch.lerp(out.float(), earlier.float(), share)
        lse = torch.logaddexp(lse, earlier_lse)
    return out, lse
