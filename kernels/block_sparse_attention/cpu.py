"""CPU fast path: attention over gathered kept blocks, many query blocks in one call.

Every (batch, head, query block) is a *row*. Rows that keep equally many blocks form a group: their
key blocks are gathered whole (``index_select`` of rows of memory, near memory bandwidth) and
attended to with rows as the batch dimension, by matrix products around an exponential or by torch's
flash kernel, whichever is faster here. Only the last block of a group may hide keys by causality
(the products), or such blocks are a group of their own (the flash kernel, whose causal rule takes
nothing else). What hides keys otherwise (padding, the end of the keys, unequal block sizes) goes to
the flash kernel under an explicit mask. Results merge through log-sum-exp. Groups run side by side
in worker threads, each of them serial inside: no barrier ends a group, so that a busy core delays
its own group alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from repro import attention_products, serial_threads
from repro.kernels.block_sparse_attention.layout import Layout

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

#: Most bytes of gathered keys (as many of values again) of one call: they stay in cache.
_GATHER_BYTES = 2 << 20


@dataclass(frozen=True)
class _Part:
    """One call: rows, the key blocks of each row, and what hides scores in them.

    ``rows`` is ``[g]`` int64, ``blocks`` ``[g, n]`` int64 into the key blocks of all batches and KV
    heads; ``diagonal`` says that the last block is causal, query ``i`` sees its keys up to ``i``;
    ``mask`` is ``[g, 1, block_q, n * block_k]`` bool, True where visible.
    """

    rows: torch.Tensor
    blocks: torch.Tensor
    diagonal: bool = False
    mask: torch.Tensor | None = None

    def flash_options(self, dtype: torch.dtype) -> dict[str, object]:
        bias = None
        if self.mask is not None:
            bias = torch.zeros(self.mask.shape, dtype=dtype).masked_fill_(~self.mask, -torch.inf)
        return {"dropout_p": 0.0, "is_causal": self.diagonal, "attn_mask": bias}


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output ``[B, H, Tq, D]`` and the log-sum-exp ``[B, H, Tq]`` fp32."""
    queries = _blocks(q, layout.block_q)
    keys, values = _blocks(k, layout.block_k), _blocks(v, layout.block_k)
    out = torch.zeros_like(queries)
    lse = torch.full(queries.shape[:2], -torch.inf)

    by_products = attention_products.are_faster(q.dtype)

    def attend(part: _Part) -> None:
        part_q = queries.index_select(0, part.rows)
        part_k, part_v = (_gather(x, part.blocks) for x in (keys, values))
        if by_products and part.mask is None:
            o, part_lse = attention_products.attend(
                part_q, part_k[:, 0], part_v[:, 0], scale, diagonal=part.diagonal
            )
        else:
            options = part.flash_options(q.dtype)
            found = _flash(part_q[:, None], part_k, part_v, scale=scale, **options)
            o, part_lse = (x[:, 0] for x in found)
        _merge(out, lse, part, o, part_lse)

    for parts in _phases(q, k, layout, join=by_products):
        # The largest first.
        serial_threads.run(attend, sorted(parts, key=lambda part: -part.blocks.numel()))
    return _tokens(out, q), lse.view(*q.shape[:2], -1)[..., : q.shape[2]].contiguous()


def backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    layout: Layout,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of ``q``, ``k`` and ``v``.

    With the output and log-sum-exp of all keys, the gradient of a subset of keys is exact on its
    own, so that the parts only add up (in fp32, in a fixed order: no worker threads here).
    """
    queries, outs = _blocks(q, layout.block_q), _blocks(out, layout.block_q)
    grads = _blocks(grad_out, layout.block_q)
    keys, values = _blocks(k, layout.block_k), _blocks(v, layout.block_k)
    # A query that sees nothing: exp(score - inf) = 0 leaves it without gradient.
    missing = queries.shape[0] // (q.shape[0] * q.shape[1]) * layout.block_q - q.shape[2]
    sums = F.pad(lse, (0, missing), value=torch.inf).view(-1, 1, layout.block_q)
    sums = sums.masked_fill(sums == -torch.inf, torch.inf)
    dq = torch.zeros(queries.shape, dtype=torch.float32)
    dk = torch.zeros(keys.shape, dtype=torch.float32)
    dv = torch.zeros(keys.shape, dtype=torch.float32)
    for part in itertools.chain.from_iterable(_phases(q, k, layout, join=False)):
        rows = part.rows
        part_q, part_k, part_v = _flash_backward(
            grads[rows][:, None],
            queries[rows][:, None],
            _gather(keys, part.blocks),
            _gather(values, part.blocks),
            outs[rows][:, None],
            sums[rows],
            scale=scale,
            **part.flash_options(q.dtype),
        )
        dq.index_add_(0, rows, part_q[:, 0].float())
        blocks = part.blocks.reshape(-1)
        dk.index_add_(0, blocks, part_k.reshape(-1, *keys.shape[1:]).float())
        dv.index_add_(0, blocks, part_v.reshape(-1, *keys.shape[1:]).float())
    return (
        _tokens(dq, q).to(q.dtype),
        _tokens(dk, k).to(k.dtype),
        _tokens(dv, v).to(v.dtype),
    )


def _blocks(x: torch.Tensor, size: int) -> torch.Tensor:
    """Cut ``[B, H, T, D]`` into blocks ``[B * H * N, size, D]``; zeros fill the last one."""
    missing = -x.shape[2] % size
    padded = F.pad(x, (0, 0, 0, missing)) if missing else x.contiguous()
    return padded.view(-1, size, x.shape[3])


def _tokens(blocks: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Undo ``_blocks``."""
    batch, heads, tokens, dim = like.shape
    return blocks.view(batch, heads, -1, dim)[:, :, :tokens].contiguous()


def _gather(blocks: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Return ``[g, 1, n * size, D]``: the numbered blocks of each row, one after another."""
    _, size, dim = blocks.shape
    rows, count = numbers.shape
    # Over 2-D rows of memory: several times faster than advanced indexing.
    taken = blocks.view(blocks.shape[0], -1).index_select(0, numbers.reshape(-1))
    return taken.view(rows, 1, count * size, dim)


def _merge(
    out: torch.Tensor, lse: torch.Tensor, part: _Part, o: torch.Tensor, part_lse: torch.Tensor
) -> None:
    """Merge the result of one part into the rows of ``out`` and ``lse``, in place."""
    if part.mask is not None:
        # The flash kernel calls the sum of a wholly masked query 1, not 0.
        part_lse = part_lse.masked_fill(~part.mask.any(dim=-1)[:, 0], -torch.inf)
    before = lse[part.rows]
    share = torch.sigmoid(part_lse - before).nan_to_num_(0.0)[..., None]
    if torch.isneginf(before).all():
        merged = o
    else:
        earlier = out.index_select(0, part.rows).float()
        merged = torch.lerp(earlier, o.float(), share).to(out.dtype)
    out.index_copy_(0, part.rows, merged)
    lse.index_copy_(0, part.rows, torch.logaddexp(before, part_lse))


def _phases(
    q: torch.Tensor, k: torch.Tensor, layout: Layout, *, join: bool
) -> Iterator[list[_Part]]:
    """Cover every kept block exactly once; the parts of a phase have disjoint rows.

    With ``join`` the diagonal is the last block of its row's part, else a part of its own.
    """
    full, partial = (_rows(mask, q) for mask in (layout.full, layout.partial))
    diagonal = _diagonal(q, k, layout)
    if diagonal is not None:
        on, partial = partial & diagonal, partial & ~diagonal
        has = on.any(dim=-1, keepdim=True)
        if join:
            ending, full = full & has | on, full & ~has
            yield [
                *_groups(ending.nonzero(), q, k, layout, diagonal=True),
                *_groups(full.nonzero(), q, k, layout),
            ]
            full = torch.zeros_like(full)
        else:
            yield list(_groups(on.nonzero(), q, k, layout, diagonal=True))
    yield list(_groups(full.nonzero(), q, k, layout))
    yield [
        _Part(part.rows, part.blocks, mask=_visible(part, q, k, layout))
        for part in _groups(partial.nonzero(), q, k, layout)
    ]


def _rows(mask: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Return a block mask as ``[B * H * Nq, Nk]``."""
    return mask.expand(*q.shape[:2], -1, -1).reshape(-1, mask.shape[-1])


def _diagonal(q: torch.Tensor, k: torch.Tensor, layout: Layout) -> torch.Tensor | None:
    """Return the aligned diagonal ``[B * H * Nq, Nk]`` that holds no padding, if there is one."""
    aligned = layout.block_q == layout.block_k and layout.offset % layout.block_k == 0
    if not (layout.causal and aligned):
        return None
    count_q, count_k = layout.full.shape[-2:]
    first = layout.offset // layout.block_k
    on = torch.arange(count_k) == torch.arange(count_q)[:, None] + first
    on = on.expand(q.shape[0], 1, -1, -1)
    if layout.key_padding_mask is not None:
        missing = count_k * layout.block_k - k.shape[2]
        real = F.pad(layout.key_padding_mask, (0, missing), value=True)
        on = on & real.view(-1, 1, 1, count_k, layout.block_k).all(dim=-1)
    return _rows(on, q)


def _groups(
    pairs: torch.Tensor, q: torch.Tensor, k: torch.Tensor, layout: Layout, diagonal: bool = False
) -> Iterator[_Part]:
    """Group the sorted (row, key block) ``pairs`` ``[P, 2]`` by how many blocks their row has."""
    if not len(pairs):
        return
    rows, counts = pairs[:, 0].unique_consecutive(return_counts=True)
    starts = counts.cumsum(0) - counts
    count_q, count_k = layout.full.shape[-2:]
    head = pairs[:, 0] // count_q  # of all batches
    kv_head = head // (q.shape[1] // k.shape[1])
    blocks = kv_head * count_k + pairs[:, 1]
    block_bytes = layout.block_k * k.shape[3] * k.element_size()
    # Several parts a thread, also in small problems, balance the threads.
    share = len(pairs) // (4 * torch.get_num_threads())
    limit = min(_GATHER_BYTES // block_bytes, max(16, share))
    for count in counts.unique().tolist():
        members = (counts == count).nonzero()[:, 0]
        for part in members.split(max(1, limit // count)):
            taken = starts[part, None] + torch.arange(count)
            yield _Part(rows[part], blocks[taken], diagonal)


def _visible(part: _Part, q: torch.Tensor, k: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Return which keys each query of a part sees, ``[g, 1, block_q, n * block_k]`` bool."""
    count_q, count_k = layout.full.shape[-2:]
    within = torch.arange(layout.block_k)
    key = ((part.blocks % count_k)[..., None] * layout.block_k + within).flatten(1)  # [g, n * bk]
    seen = (key < k.shape[2])[:, None, None, :]
    if layout.causal:
        query = (part.rows % count_q)[:, None] * layout.block_q + torch.arange(layout.block_q)
        seen = seen & (key[:, None, None, :] <= query[:, None, :, None] + layout.offset)
    if layout.key_padding_mask is not None:
        batch = part.rows // (count_q * q.shape[1])
        real = layout.key_padding_mask[batch[:, None], key.clamp(max=k.shape[2] - 1)]
        seen = seen & real[:, None, None, :]
    return seen.expand(-1, -1, layout.block_q, -1)
