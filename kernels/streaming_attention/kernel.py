"""Triton kernel: one program per block of queries walks the tiles of its sinks and its window."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Tuning:
    """Launch parameters: queries and keys of a tile, warps, depth of the load pipeline."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


def tuning(head_dim: int, dtype: torch.dtype) -> Tuning:
    """Choose launch parameters that fit the shared memory of capability 80 and later."""
    if dtype == torch.float32:
        return Tuning(64, 16, 8, 1)
    return Tuning(64, 32, 8, 2) if head_dim > 128 else Tuning(128, 64, 8, 3)


@triton.jit
def _step(
    query,  # [BLOCK_Q, BLOCK_D]
    peak,  # [BLOCK_Q] running maximum, base 2
    total,  # [BLOCK_Q] running sum
    acc,  # [BLOCK_Q, BLOCK_D] fp32
    first_key,
    last_key,  # of the part that this tile belongs to
    position,  # [BLOCK_Q] token of each query
    k_ptr,
    v_ptr,
    stride_kt,
    stride_vt,
    sink_size,
    window_size,
    head_dim,
    scale,
    MASKED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    key = first_key + tl.arange(0, BLOCK_K)
    dim = tl.arange(0, BLOCK_D)
    present = (dim < head_dim)[None, :]
    if MASKED:
        present = present & (key <= last_key)[:, None]
    # [BLOCK_K, BLOCK_D]
    k = tl.load(k_ptr + key.to(tl.int64)[:, None] * stride_kt + dim[None, :], present, other=0.0)
    score = tl.dot(query, tl.trans(k), input_precision=PRECISION) * scale  # [BLOCK_Q, BLOCK_K]
    if MASKED:
        near = key[None, :] > position[:, None] - window_size
        visible = (key <= last_key)[None, :] & (key[None, :] <= position[:, None])
        visible = visible & (near | (key < sink_size)[None, :])
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
def _streaming_attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
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
    sink_size,
    window_size,
    scale,  # times log2(e)
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Later blocks see no fewer keys: started first, they leave no long tail.
    row = tl.num_programs(0) - 1 - tl.program_id(0)
    outer = tl.program_id(1).to(tl.int64)
    batch = outer // heads
    head = outer % heads
    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + head // n_rep * stride_kh
    v_ptr += batch * stride_vb + head // n_rep * stride_vh

    token = row * BLOCK_Q + tl.arange(0, BLOCK_Q)
    dim = tl.arange(0, BLOCK_D)
    present = (token < tokens_q)[:, None] & (dim < head_dim)[None, :]
    # [BLOCK_Q, BLOCK_D]
    q = tl.load(q_ptr + token.to(tl.int64)[:, None] * stride_qt + dim[None, :], present, other=0.0)
    position = token + tokens_k - tokens_q
    first_query = row * BLOCK_Q + tokens_k - tokens_q
    last_query = tl.minimum(first_query + BLOCK_Q, tokens_k) - 1

    # The sinks, then the window from the key behind them: no key is met twice.
    last_sink = tl.minimum(sink_size - 1, last_query)
    sink_tiles = tl.cdiv(last_sink + 1, BLOCK_K)
    left = tl.maximum(first_query - window_size + 1, sink_size)
    # Tiles from the left edge on that some query does not see, then those that all queries see.
    left_tiles = tl.cdiv(tl.maximum(last_query - window_size + 1 - left, 0), BLOCK_K)
    middle = left + left_tiles * BLOCK_K
    middle_tiles = tl.maximum(first_query + 1 - middle, 0) // BLOCK_K
    right = middle + middle_tiles * BLOCK_K
    right_tiles = tl.cdiv(tl.maximum(last_query + 1 - right, 0), BLOCK_K)

    peak = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for i in range(middle_tiles):
        peak, total, acc = _step(
            q, peak, total, acc, middle + i * BLOCK_K, last_query, position, k_ptr, v_ptr,
            stride_kt, stride_vt, sink_size, window_size, head_dim, scale, False, BLOCK_K,
            BLOCK_D, PRECISION,
        )  # fmt: skip
    for i in range(sink_tiles + left_tiles + right_tiles):
        in_sink = i < sink_tiles
        in_left = i < sink_tiles + left_tiles
        window_tile = tl.where(in_left, left, right - left_tiles * BLOCK_K)
        first = tl.where(in_sink, i * BLOCK_K, window_tile + (i - sink_tiles) * BLOCK_K)
        last = tl.where(in_sink, last_sink, last_query)
        peak, total, acc = _step(
            q, peak, total, acc, first, last, position, k_ptr, v_ptr,
            stride_kt, stride_vt, sink_size, window_size, head_dim, scale, True, BLOCK_K,
            BLOCK_D, PRECISION,
        )  # fmt: skip
    # Rows behind the last query see nothing.
    seen = total > 0
    lse = tl.where(seen, (peak + tl.log2(tl.where(seen, total, 1.0))) * 0.6931471805599453, peak)
    acc = acc / tl.where(seen, total, 1.0)[:, None]
    # Output and lse are contiguous.
    out_ptr += (outer * tokens_q + token)[:, None] * head_dim + dim[None, :]
    tl.store(out_ptr, acc.to(out_ptr.dtype.element_ty), mask=present)
    tl.store(lse_ptr + outer * tokens_q + token, lse, mask=token < tokens_q)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sink_size: int,
    window_size: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output ``[B, H, Tq, D]`` and the log-sum-exp ``[B, H, Tq]`` fp32."""
    batch, heads, tokens_q, dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    tuned = tuning(dim, q.dtype)
    _streaming_attention_fwd_kernel[triton.cdiv(tokens_q, tuned.block_q), batch * heads](
        q,
        k,
        v,
        out,
        lse,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        heads,
        heads // k.shape[1],
        tokens_q,
        k.shape[2],
        dim,
        sink_size,
        window_size,
        scale * _LOG2_E,
        BLOCK_Q=tuned.block_q,
        BLOCK_K=tuned.block_k,
        BLOCK_D=max(16, triton.next_power_of_2(dim)),
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=tuned.num_warps,
        num_stages=tuned.num_stages,
    )
    return out, lse
