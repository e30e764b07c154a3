"""Triton forward kernel: one program per query block walks the list of its kept key blocks."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from repro.kernels.block_sparse_attention.backward import backward
from repro.kernels.block_sparse_attention.layout import Layout
from repro.kernels.block_sparse_attention.lists import Tuning, block_lists

__all__ = ["backward", "forward"]

_LOG2_E = math.log2(math.e)


def forward_tuning(block_q: int, block_k: int, head_dim: int, dtype: torch.dtype) -> Tuning:
    """Choose launch parameters that fit the shared memory of capability 80 and later."""
    wide = head_dim > 128
    if dtype == torch.float32:
        return Tuning(min(block_k, 16 if wide else 32), 8 if block_q == 128 else 4, 1)
    tile = min(block_k, 32 if wide else 64)
    return Tuning(tile, 8 if block_q == 128 else 4, 2 if wide else 3)


@triton.jit
def _step(
    query,  # [BLOCK_Q, BLOCK_D]
    peak,  # [BLOCK_Q] running maximum, base 2
    total,  # [BLOCK_Q] running sum
    acc,  # [BLOCK_Q, BLOCK_D] fp32
    first_key,
    k_ptr,
    v_ptr,
    real_ptr,
    stride_kt,
    stride_vt,
    position,  # [BLOCK_Q] last visible key of each query
    tokens_k,
    scale,
    head_dim,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    PADDED: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    key = first_key + tl.arange(0, TILE)
    dim = tl.arange(0, BLOCK_D)
    present = (dim < head_dim)[None, :]
    if MASKED:
        present = present & (key < tokens_k)[:, None]
    # [TILE, BLOCK_D]
    k = tl.load(k_ptr + key.to(tl.int64)[:, None] * stride_kt + dim[None, :], present, other=0.0)
    score = tl.dot(query, tl.trans(k), input_precision=PRECISION) * scale  # [BLOCK_Q, TILE]
    if MASKED:
        visible = (key < tokens_k)[None, :]
        if CAUSAL:
            visible = visible & (key[None, :] <= position[:, None])
        if PADDED:
            real = tl.load(real_ptr + key, mask=key < tokens_k, other=0)
            visible = visible & (real != 0)[None, :]
        score = tl.where(visible, score, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(score, 1))
    # A query that has seen nothing yet: subtract 0, so that exp2 gives 0 instead of NaN.
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    probability = tl.exp2(score - base[:, None])
    shrink = tl.exp2(peak - base)
    total = total * shrink + tl.sum(probability, 1)
    v = tl.load(v_ptr + key.to(tl.int64)[:, None] * stride_vt + dim[None, :], present, other=0.0)
    acc = acc * shrink[:, None]
    acc = tl.dot(probability.to(v.dtype), v, acc, input_precision=PRECISION)
    return new_peak, total, acc


@triton.jit
def _block_sparse_attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    numbers_ptr,
    full_ptr,
    total_ptr,
    stride_nb,
    stride_nh,
    stride_nr,
    stride_cb,
    stride_ch,
    real_ptr,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    heads,
    n_rep,
    tokens_q,
    tokens_k,
    head_dim,
    scale,  # times log2(e)
    CAUSAL: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Later query blocks keep more key blocks: started first, they leave no long tail.
    row = tl.num_programs(0) - 1 - tl.program_id(0)
    outer = tl.program_id(1).to(tl.int64)
    batch = outer // heads
    head = outer % heads
    k_ptr += batch * stride_kb + head // n_rep * stride_kh
    v_ptr += batch * stride_vb + head // n_rep * stride_vh
    real_ptr += batch * tokens_k
    numbers_ptr += batch * stride_nb + head * stride_nh + row.to(tl.int64) * stride_nr
    full = tl.load(full_ptr + batch * stride_cb + head * stride_ch + row)
    kept = tl.load(total_ptr + batch * stride_cb + head * stride_ch + row)

    token = row * BLOCK_Q + tl.arange(0, BLOCK_Q)
    dim = tl.arange(0, BLOCK_D)
    present = (token < tokens_q)[:, None] & (dim < head_dim)[None, :]
    q_ptr += batch * stride_qb + head * stride_qh
    # [BLOCK_Q, BLOCK_D]
    q = tl.load(q_ptr + token.to(tl.int64)[:, None] * stride_qt + dim[None, :], present, other=0.0)
    position = token + tokens_k - tokens_q
    peak = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    STEPS: tl.constexpr = BLOCK_K // TILE
    for i in range(full * STEPS):
        first = tl.load(numbers_ptr + i // STEPS) * BLOCK_K + i % STEPS * TILE
        peak, total, acc = _step(
            q, peak, total, acc, first, k_ptr, v_ptr, real_ptr, stride_kt, stride_vt, position,
            tokens_k, scale, head_dim, False, CAUSAL, PADDED, TILE, BLOCK_D, PRECISION,
        )  # fmt: skip
    for i in range(full * STEPS, kept * STEPS):
        first = tl.load(numbers_ptr + i // STEPS) * BLOCK_K + i % STEPS * TILE
        peak, total, acc = _step(
            q, peak, total, acc, first, k_ptr, v_ptr, real_ptr, stride_kt, stride_vt, position,
            tokens_k, scale, head_dim, True, CAUSAL, PADDED, TILE, BLOCK_D, PRECISION,
        )  # fmt: skip
    seen = total > 0
    lse = tl.where(seen, (peak + tl.log2(tl.where(seen, total, 1.0))) * 0.6931471805599453, peak)
    acc = acc / tl.where(seen, total, 1.0)[:, None]
    # Output and lse are contiguous.
    out_ptr += (outer * tokens_q + token)[:, None] * head_dim + dim[None, :]
    tl.store(out_ptr, acc.to(out_ptr.dtype.element_ty), mask=present)
    tl.store(lse_ptr + outer * tokens_q + token, lse, mask=token < tokens_q)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output ``[B, H, Tq, D]`` and the log-sum-exp ``[B, H, Tq]`` fp32."""
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    batch, heads, tokens_q, dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    lists = block_lists(layout.full, layout.partial)
    padding = layout.key_padding_mask
    tuning = forward_tuning(layout.block_q, layout.block_k, dim, q.dtype)
    _block_sparse_attention_fwd_kernel[(lists.full.shape[2], batch * heads)](
        q,
        k,
        v,
        out,
        lse,
        *lists.arguments(batch, heads),
        lse if padding is None else padding.contiguous().view(torch.uint8),
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        heads,
        heads // k.shape[1],
        tokens_q,
        k.shape[2],
        dim,
        scale * _LOG2_E,
        CAUSAL=layout.causal,
        PADDED=padding is not None,
        BLOCK_Q=layout.block_q,
        BLOCK_K=layout.block_k,
        TILE=tuning.tile,
        BLOCK_D=max(16, triton.next_power_of_2(dim)),
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
    )
    return out, lse
