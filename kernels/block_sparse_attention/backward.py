"""Triton backward kernels: queries' gradient by rows, keys' and values' gradient by columns."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from repro.kernels.block_sparse_attention.layout import Layout
from repro.kernels.block_sparse_attention.lists import Tuning, block_lists

_LOG2_E = math.log2(math.e)


@triton.jit
def _load(ptr, token, stride, tokens, head_dim, BLOCK_D: tl.constexpr):
    """Load ``[len(token), BLOCK_D]``, zeros outside."""
    dim = tl.arange(0, BLOCK_D)
    present = (token < tokens)[:, None] & (dim < head_dim)[None, :]
    return tl.load(ptr + token.to(tl.int64)[:, None] * stride + dim[None, :], present, other=0.0)


@triton.jit
def _probability(
    query,  # [Q, BLOCK_D]
    keys,  # [K, BLOCK_D]
    sums,  # [Q] log-sum-exp, base 2
    token,  # [Q]
    key,  # [K]
    real_ptr,
    tokens_q,
    tokens_k,
    scale,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Recompute the attention weights ``[Q, K]`` fp32."""
    score = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * (scale * 1.4426950408889634)
    weight = tl.exp2(score - sums[:, None])
    if MASKED:
        visible = (key < tokens_k)[None, :]
        if CAUSAL:
            visible = visible & (key[None, :] <= (token + tokens_k - tokens_q)[:, None])
        if PADDED:
            real = tl.load(real_ptr + key, mask=key < tokens_k, other=0)
            visible = visible & (real != 0)[None, :]
        weight = tl.where(visible, weight, 0.0)
    return weight


@triton.jit
def _query_step(
    acc,  # [BLOCK_Q, BLOCK_D] fp32
    q,
    grad,
    sums,
    delta,
    token,
    first_key,
    k_ptr,
    v_ptr,
    real_ptr,
    tokens_q,
    tokens_k,
    head_dim,
    scale,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    PADDED: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the share of ``TILE`` keys to the gradient of the queries."""
    key = first_key + tl.arange(0, TILE)
    k = _load(k_ptr, key, head_dim, tokens_k, head_dim, BLOCK_D)
    v = _load(v_ptr, key, head_dim, tokens_k, head_dim, BLOCK_D)
    weight = _probability(
        q, k, sums, token, key, real_ptr, tokens_q, tokens_k, scale,
        MASKED, CAUSAL, PADDED, PRECISION,
    )  # fmt: skip
    grad_weight = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    grad_score = weight * (grad_weight - delta[:, None])  # [BLOCK_Q, TILE]
    return tl.dot(grad_score.to(k.dtype), k, acc, input_precision=PRECISION)


@triton.jit
def _key_step(
    acc_k,  # [BLOCK_K, BLOCK_D] fp32
    acc_v,
    k,
    v,
    key,
    first_query,
    rows,  # offset of the head, in queries
    q_ptr,
    grad_ptr,
    sums_ptr,
    delta_ptr,
    real_ptr,
    tokens_q,
    tokens_k,
    head_dim,
    scale,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    PADDED: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the share of ``TILE`` queries to the gradients of the keys and values."""
    token = first_query + tl.arange(0, TILE)
    q = _load(q_ptr + rows * head_dim, token, head_dim, tokens_q, head_dim, BLOCK_D)
    grad = _load(grad_ptr + rows * head_dim, token, head_dim, tokens_q, head_dim, BLOCK_D)
    sums = tl.load(sums_ptr + rows + token, mask=token < tokens_q, other=float("inf"))
    delta = tl.load(delta_ptr + rows + token, mask=token < tokens_q, other=0.0)
    weight = _probability(
        q, k, sums, token, key, real_ptr, tokens_q, tokens_k, scale,
        MASKED, CAUSAL, PADDED, PRECISION,
    )  # fmt: skip
    acc_v = tl.dot(tl.trans(weight).to(grad.dtype), grad, acc_v, input_precision=PRECISION)
    grad_weight = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    grad_score = weight * (grad_weight - delta[:, None])  # [TILE, BLOCK_K]
    acc_k = tl.dot(tl.trans(grad_score).to(q.dtype), q, acc_k, input_precision=PRECISION)
    return acc_k, acc_v


@triton.jit
def _block_sparse_attention_bwd_q_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    sums_ptr,
    delta_ptr,
    dq_ptr,
    numbers_ptr,
    full_ptr,
    total_ptr,
    stride_nb,
    stride_nh,
    stride_nr,
    stride_cb,
    stride_ch,
    real_ptr,
    heads,
    n_rep,
    tokens_q,
    tokens_k,
    head_dim,
    scale,
    CAUSAL: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of one query block; every tensor is contiguous ``[B, heads, T, D]``."""
    row = tl.num_programs(0) - 1 - tl.program_id(0)
    outer = tl.program_id(1).to(tl.int64)
    batch = outer // heads
    head = outer % heads
    kv_outer = batch * (heads // n_rep) + head // n_rep
    k_ptr += kv_outer * tokens_k * head_dim
    v_ptr += kv_outer * tokens_k * head_dim
    real_ptr += batch * tokens_k
    numbers_ptr += batch * stride_nb + head * stride_nh + row.to(tl.int64) * stride_nr
    full = tl.load(full_ptr + batch * stride_cb + head * stride_ch + row)
    kept = tl.load(total_ptr + batch * stride_cb + head * stride_ch + row)

    token = row * BLOCK_Q + tl.arange(0, BLOCK_Q)
    start = outer * tokens_q
    q = _load(q_ptr + start * head_dim, token, head_dim, tokens_q, head_dim, BLOCK_D)
    grad = _load(grad_ptr + start * head_dim, token, head_dim, tokens_q, head_dim, BLOCK_D)
    sums = tl.load(sums_ptr + start + token, mask=token < tokens_q, other=float("inf"))
    delta = tl.load(delta_ptr + start + token, mask=token < tokens_q, other=0.0)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    STEPS: tl.constexpr = BLOCK_K // TILE
    for i in range(full * STEPS):
        first = tl.load(numbers_ptr + i // STEPS) * BLOCK_K + i % STEPS * TILE
        acc = _query_step(
            acc, q, grad, sums, delta, token, first, k_ptr, v_ptr, real_ptr, tokens_q, tokens_k,
            head_dim, scale, False, CAUSAL, PADDED, TILE, BLOCK_D, PRECISION,
        )  # fmt: skip
    for i in range(full * STEPS, kept * STEPS):
        first = tl.load(numbers_ptr + i // STEPS) * BLOCK_K + i % STEPS * TILE
        acc = _query_step(
            acc, q, grad, sums, delta, token, first, k_ptr, v_ptr, real_ptr, tokens_q, tokens_k,
            head_dim, scale, True, CAUSAL, PADDED, TILE, BLOCK_D, PRECISION,
        )  # fmt: skip
    dim = tl.arange(0, BLOCK_D)
    present = (token < tokens_q)[:, None] & (dim < head_dim)[None, :]
    dq_ptr += (start + token)[:, None] * head_dim + dim[None, :]
    tl.store(dq_ptr, (acc * scale).to(dq_ptr.dtype.element_ty), mask=present)


@triton.jit
def _block_sparse_attention_bwd_kv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    sums_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    numbers_ptr,
    full_ptr,
    total_ptr,
    stride_nb,
    stride_nh,
    stride_nr,
    stride_cb,
    stride_ch,
    real_ptr,
    heads,
    n_rep,
    tokens_q,
    tokens_k,
    head_dim,
    scale,
    CAUSAL: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of one key block: sum over the query heads of its group, no atomics."""
    column = tl.program_id(0)
    kv_outer = tl.program_id(1).to(tl.int64)
    kv_heads = heads // n_rep
    batch = kv_outer // kv_heads
    real_ptr += batch * tokens_k
    key = column * BLOCK_K + tl.arange(0, BLOCK_K)
    start = kv_outer * tokens_k
    k = _load(k_ptr + start * head_dim, key, head_dim, tokens_k, head_dim, BLOCK_D)
    v = _load(v_ptr + start * head_dim, key, head_dim, tokens_k, head_dim, BLOCK_D)
    acc_k = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    STEPS: tl.constexpr = BLOCK_Q // TILE
    for member in range(n_rep):
        head = kv_outer % kv_heads * n_rep + member
        count = batch * stride_cb + head * stride_ch + column
        full = tl.load(full_ptr + count)
        kept = tl.load(total_ptr + count)
        numbers = numbers_ptr + batch * stride_nb + head * stride_nh
        numbers += column.to(tl.int64) * stride_nr
        rows = (batch * heads + head) * tokens_q
        for i in range(full * STEPS):
            first = tl.load(numbers + i // STEPS) * BLOCK_Q + i % STEPS * TILE
            acc_k, acc_v = _key_step(
                acc_k, acc_v, k, v, key, first, rows, q_ptr, grad_ptr, sums_ptr, delta_ptr,
                real_ptr, tokens_q, tokens_k, head_dim, scale, False, CAUSAL, PADDED, TILE,
                BLOCK_D, PRECISION,
            )  # fmt: skip
        for i in range(full * STEPS, kept * STEPS):
            first = tl.load(numbers + i // STEPS) * BLOCK_Q + i % STEPS * TILE
            acc_k, acc_v = _key_step(
                acc_k, acc_v, k, v, key, first, rows, q_ptr, grad_ptr, sums_ptr, delta_ptr,
                real_ptr, tokens_q, tokens_k, head_dim, scale, True, CAUSAL, PADDED, TILE,
                BLOCK_D, PRECISION,
            )  # fmt: skip
    dim = tl.arange(0, BLOCK_D)
    present = (key < tokens_k)[:, None] & (dim < head_dim)[None, :]
    place = (start + key)[:, None] * head_dim + dim[None, :]
    tl.store(dk_ptr + place, (acc_k * scale).to(dk_ptr.dtype.element_ty), mask=present)
    tl.store(dv_ptr + place, acc_v.to(dv_ptr.dtype.element_ty), mask=present)


def backward_tuning(block: int, other: int, head_dim: int, dtype: torch.dtype) -> Tuning:
    """Choose launch parameters for a kernel that keeps ``block`` rows and walks ``other`` ones."""
    small = head_dim > 128 or dtype == torch.float32
    warps = 8 if block == 128 else 4
    return Tuning(min(other, 16 if small else 32), warps, 1 if dtype == torch.float32 else 2)


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
    """Return the gradients of ``q``, ``k`` and ``v`` in their dtypes."""
    q, k, v, grad_out = (x.contiguous() for x in (q, k, v, grad_out))
    batch, heads, tokens_q, dim = q.shape
    kv_heads, tokens_k = k.shape[1:3]
    # Where a query sees nothing this is -inf, and the mask replaces the infinite weight by 0.
    sums = lse * _LOG2_E
    delta = (out.float() * grad_out.float()).sum(dim=-1)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    padding = layout.key_padding_mask
    real = sums if padding is None else padding.contiguous().view(torch.uint8)
    inputs = (q, k, v, grad_out, sums, delta)
    sizes = (real, heads, heads // kv_heads, tokens_q, tokens_k, dim, scale)
    options = {
        "CAUSAL": layout.causal,
        "PADDED": padding is not None,
        "BLOCK_Q": layout.block_q,
        "BLOCK_K": layout.block_k,
        "BLOCK_D": max(16, triton.next_power_of_2(dim)),
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }
    by_row = backward_tuning(layout.block_q, layout.block_k, dim, q.dtype)
    by_column = backward_tuning(layout.block_k, layout.block_q, dim, q.dtype)
    by_query = block_lists(layout.full, layout.partial)
    _block_sparse_attention_bwd_q_kernel[(by_query.full.shape[2], batch * heads)](
        *inputs,
        dq,
        *by_query.arguments(batch, heads),
        *sizes,
        TILE=by_row.tile,
        num_warps=by_row.num_warps,
        num_stages=by_row.num_stages,
        **options,
    )
    by_key = block_lists(layout.full, layout.partial, by_key=True)
    _block_sparse_attention_bwd_kv_kernel[(by_key.full.shape[2], batch * kv_heads)](
        *inputs,
        dk,
        dv,
        *by_key.arguments(batch, heads),
        *sizes,
        TILE=by_column.tile,
        num_warps=by_column.num_warps,
        num_stages=by_column.num_stages,
        **options,
    )
    return dq, dk, dv
