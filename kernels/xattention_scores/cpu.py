"""CPU fast path: groups become long vectors, one matmul per chunk of rows, the future skipped."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

# Scores held at a time, in elements: they stay within the cache of a core or two.
_CHUNK_ELEMENTS = 1 << 19


@torch.autocast("cpu", enabled=False)
def xattention_scores_cpu(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    order: torch.Tensor,
    block_size: int,
    causal: bool,
    scale: float,
    real_q: torch.Tensor | None,
    real_k: torch.Tensor | None,
    chunk_size: int | None = None,
) -> torch.Tensor:
    """Return the block mass ``[B, H, Nq, Nk]`` fp32; arguments as in the reference."""
    batch, heads = q.shape[:2]
    n_rep = heads // k.shape[1]
    count_q, count_k = math.ceil(q.shape[2] / block_size), math.ceil(k.shape[2] / block_size)
    stride = len(order)
    # Keys are permuted instead of queries: under GQA there are fewer of them.
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(stride)
    queries, hidden_rows = _vectors(q, real_q, stride, block_size, None)
    keys, hidden_columns = _vectors(k, real_k, stride, block_size, inverse)
    mass = torch.zeros(batch, heads, count_q, count_k)
    offset = k.shape[2] - q.shape[2] if causal else None
    for b in range(batch):
        for h in range(heads):
            _head_mass(
                queries[b, h],
                keys[b, h // n_rep],
                None if hidden_rows is None else hidden_rows[b],
                None if hidden_columns is None else hidden_columns[b],
                mass[b, h],
                scale=scale / stride,
                stride=stride,
                per_block=block_size // stride,
                offset=offset,
                chunk_size=chunk_size,
            )
    return mass


def _vectors(
    x: torch.Tensor,
    real: torch.Tensor | None,
    stride: int,
    block_size: int,
    order: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return ``[B, H, n, stride * D]``, n filling whole blocks, and the groups without a token."""
    tokens = x.shape[2]
    tail = -tokens % block_size
    if real is not None and bool(real.all()):
        real = None
    if real is not None:
        x = x.masked_fill(~real[:, None, :, None], 0.0)
    if tail:
        x = F.pad(x, (0, 0, 0, tail))
    hidden = None
    if real is not None or tail >= stride:
        if real is None:
            real = torch.ones(x.shape[0], tokens, dtype=torch.bool)
        hidden = ~F.pad(real, (0, tail)).unflatten(1, (-1, stride)).any(dim=-1)
    groups = x.unflatten(2, (-1, stride))
    if order is not None:
        groups = groups[:, :, :, order]
    return groups.flatten(3), hidden


def _head_mass(
    queries: torch.Tensor,
    keys: torch.Tensor,
    hidden_rows: torch.Tensor | None,
    hidden_columns: torch.Tensor | None,
    mass: torch.Tensor,
    *,
    scale: float,
    stride: int,
    per_block: int,
    offset: int | None,
    chunk_size: int | None,
) -> None:
    """Fill ``mass`` ``[Nq, Nk]`` of one head from its vectors ``[n, stride * D]``."""
    rows_total, columns_total = queries.shape[0], keys.shape[0]
    if hidden_columns is not None and bool(hidden_columns.all()):
        return
    if chunk_size is None:
        chunk = max(1, _CHUNK_ELEMENTS // (columns_total * per_block))
    else:
        chunk = max(1, chunk_size // (stride * per_block))
    for first in range(0, rows_total, chunk * per_block):
        last = min(first + chunk * per_block, rows_total)
        columns = columns_total
        if offset is not None:
            # The last row sees this many groups; whole blocks of them are computed.
            seen = (offset + last * stride - 1) // stride + 1
            columns = min(math.ceil(seen / per_block) * per_block, columns_total)
        scores = torch.mm(queries[first:last], keys[:columns].T).float().mul_(scale)
        if hidden_columns is not None:
            scores.masked_fill_(hidden_columns[:columns], -math.inf)
        if offset is not None:
            start = min((offset + first * stride + stride - 1) // stride + 1, columns)
            _hide_future(scores, first, start, stride, offset)
        weights = torch.softmax(scores, dim=-1)
        if hidden_rows is not None:
            # Rows of padding alone see no column and are 0 / 0 here.
            weights.masked_fill_(hidden_rows[first:last, None], 0.0)
        # Rows first: that sum runs along whole cache lines and leaves little for the second.
        rows = weights.unflatten(0, (-1, per_block)).sum(dim=1)
        mass[first // per_block : last // per_block, : columns // per_block] = rows.unflatten(
            1, (-1, per_block)
        ).sum(dim=-1)


def _hide_future(scores: torch.Tensor, first: int, start: int, stride: int, offset: int) -> None:
    """Set scores of groups that no query of the row sees to -inf; columns < start are seen."""
    if start >= scores.shape[1]:
        return
    rows = torch.arange(first, first + scores.shape[0])[:, None]
    columns = torch.arange(start, scores.shape[1])[None, :]
    future = columns * stride > offset + rows * stride + stride - 1
    scores[:, start:].masked_fill_(future, -math.inf)
