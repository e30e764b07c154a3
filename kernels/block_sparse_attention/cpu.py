"""CPU fast path: attention over gathered kept blocks, many query blocks in one call.

Every (batch, head, query block) is a *row*. Rows that keep equally many blocks form a group: their
key blocks are gathered whole (``index_select`` of rows of memory, near memory bandwidth) and
attended to with rows as the batch dimension, by two matrix products around a softmax or by torch's
flash kernel, whichever is faster here. Only the last block of a group may hide keys by causality
(the products), or such blocks are a group of their own (the flash kernel, whose causal rule takes
nothing else). What hides keys otherwise (padding, the end of the keys, unequal block sizes) goes to
the flash kernel under an explicit mask. Results merge through log-sum-exp. Groups run side by side
in worker threads, each of them serial inside: no barrier ends a group, so that a busy core delays
its own group alone.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from repro import serial_threads
from repro.kernels.block_sparse_attention.layout import Layout

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

#: Most bytes of gathered keys (as many of values again) of one call: they stay in cache.
_GATHER_BYTES = 2 << 20
#: Most keys of a row whose scores are held at once: 2 MiB in bf16 for 128 queries.
_SCORE_KEYS = 8192
#: Keys from which a query's scores are guessed, at least; every 16th of a shorter row's ...
_PROBES = 128
#: ... and where its log-sum-exp is so far off, the guess missed the keys that matter.
_FAR = 4.0


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

    by_products = _products_are_faster(q.dtype)

    def attend(part: _Part) -> None:
        part_q = queries.index_select(0, part.rows)
        part_k, part_v = (_gather(x, part.blocks) for x in (keys, values))
        if by_products and part.mask is None:
            o, part_lse = attend_by_products(
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


def attend_by_products(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, *, diagonal: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to all keys: output ``[g, Tq, D]`` in the dtype of ``q`` and fp32 lse ``[g, Tq]``.

    The product of q and k is rounded to their dtype, so what is rounded is the score less a
    reference: the mean score under the query's own weights, guessed from some keys. The scores that
    matter are near 0 then, and so are their errors. A row whose guess turns out to be far off is
    done again with scores in fp32. With ``diagonal``, query ``i`` sees the last ``Tq`` keys up to
    the ``i``-th of them.
    """
    hidden = _hidden(q.shape[1]) if diagonal else None
    reference, guess = _guess(q, k, scale, hidden)
    outs, totals = [], []
    size = max(_SCORE_KEYS, q.shape[1])
    # From the end: the first piece holds the diagonal whole.
    for end in range(k.shape[1], 0, -size):
        piece = slice(max(0, end - size), end)
        weights = torch.baddbmm(-reference, q, k[:, piece].transpose(1, 2), alpha=scale)
        if hidden is not None and end == k.shape[1]:
            weights[..., -q.shape[1] :] += hidden.to(q.dtype)
        weights.exp_()
        outs.append(torch.bmm(weights, v[:, piece]).float())
        totals.append(weights.float().sum(-1, keepdim=True))
    total = functools.reduce(torch.add, totals)
    lse = total.log() + reference.float()
    out = (functools.reduce(torch.add, outs) / total).to(q.dtype)
    far = ~((lse - guess).abs() < _FAR).flatten(1).all(dim=1)  # NaN is far, too
    lse = lse[..., 0]
    if bool(far.any()):
        out[far], lse[far] = _attend_in_fp32(q[far], k[far], v[far], scale, hidden)
    return out, lse


def _guess(
    q: torch.Tensor, k: torch.Tensor, scale: float, hidden: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Guess each query's mean score, in the dtype of ``q``, and lse in fp32, ``[g, Tq, 1]`` both.

    The first key takes part and is visible to every query.
    """
    step = max(16, k.shape[1] // _PROBES)
    scores = _scores(q.float(), k[:, ::step].float(), scale)
    if hidden is not None:
        first = k.shape[1] - q.shape[1]
        scores[..., -(-first // step) :] += hidden[:, -first % step :: step]
    weights = scores.softmax(-1)
    # weight = exp(score - lse); the largest one cannot underflow.
    lse = scores.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log() + math.log(step)
    return weights.mul_(scores).sum(-1, keepdim=True).to(q.dtype), lse


def _attend_in_fp32(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, hidden: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what ``attend_by_products`` does with unrounded scores, in about twice the time."""
    scores = _scores(q.float(), k.float(), scale)
    if hidden is not None:
        scores[..., -q.shape[1] :] += hidden
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp_().to(v.dtype)
    return torch.bmm(weights, v), lse


def _scores(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.bmm(q * scale, k.transpose(1, 2))


@functools.cache
def _hidden(size: int) -> torch.Tensor:
    """Return ``[size, size]`` fp32: where a key comes after its query, what no score outweighs."""
    with torch.inference_mode(False):
        return torch.full((size, size), -1e30).triu_(1)


@functools.cache
def _products_are_faster(dtype: torch.dtype) -> bool:
    """Tell whether the two products of a part outrun torch's flash kernel here.

    That kernel cuts short query blocks into 32 rows; whole products of 128 rows are 1.3 (D = 64) to
    1.7 times (D = 128) as fast on AVX-512 with bf16. With AMX the kernel packs its tiles itself.
    """
    amx = torch.cpu._is_amx_tile_supported()
    return dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported() and not amx


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
