"""Triton kernel of the antidiagonal scores: the score map never leaves the chip."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

_LOG2_E = 1.4426950408889634


@triton.jit
def _score_tile(
    q_base,
    k_base,
    order_ptr,
    real_q_base,
    real_k_base,
    column_real_base,
    rows,
    columns,
    tokens_q,
    tokens_k,
    groups_k,
    offset,
    head_dim,
    scale_log2,
    stride_qt,
    stride_qd,
    stride_kt,
    stride_kd,
    STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
    CAUSAL: tl.constexpr,
    PADDED: tl.constexpr,
    REVERSED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Z[i, j] = scale / stride * sum_s q[i * stride + order[s]] . k[j * stride + s], base 2."""
    b_z = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    # One flat loop over (s, part of the head dimension): short tiles keep addresses in registers.
    for step in range(STRIDE * PARTS):
        s = step // PARTS
        o_d = (step % PARTS) * BLOCK_D + tl.arange(0, BLOCK_D)
        m_d = o_d < head_dim
        if REVERSED:  # known without a load, so that the loads below can be pipelined
            o_q = rows * STRIDE + (STRIDE - 1 - s)
        else:
            o_q = rows * STRIDE + tl.load(order_ptr + s)
        o_k = columns * STRIDE + s
        m_q = o_q < tokens_q
        m_k = o_k < tokens_k
        if PADDED:
            m_q = m_q & (tl.load(real_q_base + o_q, mask=m_q, other=0) != 0)
            m_k = m_k & (tl.load(real_k_base + o_k, mask=m_k, other=0) != 0)
        # [BLOCK_M, BLOCK_D]
        b_q = tl.load(
            q_base + o_q[:, None] * stride_qt + o_d[None, :] * stride_qd,
            mask=m_q[:, None] & m_d[None, :],
            other=0.0,
        )
        # [BLOCK_D, BLOCK_N]
        b_k = tl.load(
            k_base + o_k[None, :] * stride_kt + o_d[:, None] * stride_kd,
            mask=m_k[None, :] & m_d[:, None],
            other=0.0,
        )
        b_z = tl.dot(b_q, b_k, b_z, input_precision=PRECISION)
    visible = (columns < groups_k)[None, :]
    if PADDED:
        real = tl.load(column_real_base + columns, mask=columns < groups_k, other=0) != 0
        visible = visible & real[None, :]
    if CAUSAL:
        last_query = offset + rows * STRIDE + (STRIDE - 1)
        visible = visible & (columns[None, :] * STRIDE <= last_query[:, None])
    return tl.where(visible, b_z * scale_log2, float("-inf"))


@triton.jit
def _xattention_scores_fwd_kernel(
    q_ptr,
    k_ptr,
    order_ptr,
    real_q_ptr,
    real_k_ptr,
    row_real_ptr,
    column_real_ptr,
    mass_ptr,
    heads,
    n_rep,
    tokens_q,
    tokens_k,
    groups_q,
    groups_k,
    count_q,
    count_k,
    offset,
    head_dim,
    scale_log2,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_kd,
    STRIDE: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
    CAUSAL: tl.constexpr,
    PADDED: tl.constexpr,
    REVERSED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Pass 1: maximum and sum of each row. Pass 2: scores again, normalised, summed in cells."""
    # The longest rows start first: they would otherwise end last.
    i_m = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    i_bh = tl.program_id(1).to(tl.int64)
    i_b = i_bh // heads
    i_h = i_bh % heads
    q_base = q_ptr + i_b * stride_qb + i_h * stride_qh
    k_base = k_ptr + i_b * stride_kb + (i_h // n_rep) * stride_kh
    real_q_base = real_q_ptr + i_b * tokens_q
    real_k_base = real_k_ptr + i_b * tokens_k
    column_real_base = column_real_ptr + i_b * groups_k
    rows = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    end = groups_k
    if CAUSAL:
        last = tl.minimum((i_m + 1) * BLOCK_M, groups_q)
        end = tl.minimum(end, ((offset + last * STRIDE - 1) // STRIDE + 1).to(tl.int32))
    m_row = rows < groups_q
    if PADDED:
        row_real = tl.load(row_real_ptr + i_b * groups_q + rows, mask=m_row, other=0)
        m_row = m_row & (row_real != 0)

    b_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    for start in range(0, end, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        b_z = _score_tile(
            q_base, k_base, order_ptr, real_q_base, real_k_base, column_real_base, rows, columns,
            tokens_q, tokens_k, groups_k, offset, head_dim, scale_log2,
            stride_qt, stride_qd, stride_kt, stride_kd,
            STRIDE, BLOCK_M, BLOCK_N, BLOCK_D, PARTS, CAUSAL, PADDED, REVERSED, PRECISION,
        )  # fmt: skip
        b_new = tl.maximum(b_max, tl.max(b_z, axis=1))
        # A row that has seen nothing yet keeps -inf; 0 avoids -inf minus -inf.
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_sum = b_sum * tl.exp2(b_max - b_shift) + tl.sum(tl.exp2(b_z - b_shift[:, None]), axis=1)
        b_max = b_new

    b_shift = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_factor = tl.where(m_row, 1.0 / tl.where(b_sum > 0.0, b_sum, 1.0), 0.0)
    CELLS_M: tl.constexpr = BLOCK_M // PER_BLOCK
    CELLS_N: tl.constexpr = BLOCK_N // PER_BLOCK
    o_m = i_m * CELLS_M + tl.arange(0, CELLS_M)
    mass_base = mass_ptr + i_bh * count_q * count_k
    for start in range(0, end, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        b_z = _score_tile(
            q_base, k_base, order_ptr, real_q_base, real_k_base, column_real_base, rows, columns,
            tokens_q, tokens_k, groups_k, offset, head_dim, scale_log2,
            stride_qt, stride_qd, stride_kt, stride_kd,
            STRIDE, BLOCK_M, BLOCK_N, BLOCK_D, PARTS, CAUSAL, PADDED, REVERSED, PRECISION,
        )  # fmt: skip
        b_p = tl.exp2(b_z - b_shift[:, None]) * b_factor[:, None]
        # [CELLS_M, CELLS_N]
        b_p = tl.reshape(b_p, (BLOCK_M, CELLS_N, PER_BLOCK))
        b_p = tl.reshape(tl.sum(b_p, axis=2), (CELLS_M, PER_BLOCK, CELLS_N))
        b_a = tl.sum(b_p, axis=1)
        o_n = start // PER_BLOCK + tl.arange(0, CELLS_N)
        tl.store(
            mass_base + o_m[:, None] * count_k + o_n[None, :],
            b_a,
            mask=(o_m < count_q)[:, None] & (o_n < count_k)[None, :],
        )


def tile_sizes(per_block: int, head_dim: int) -> dict[str, int]:
    """Return the tile of one program and its launch options."""
    block_d = min(64, max(16, triton.next_power_of_2(head_dim)))
    return {
        "BLOCK_M": max(per_block, 64),
        "BLOCK_N": 128,
        "BLOCK_D": block_d,
        "PARTS": triton.cdiv(head_dim, block_d),
        "num_warps": 8,
        "num_stages": 3,
    }


def xattention_scores_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    order: torch.Tensor,
    block_size: int,
    causal: bool,
    scale: float,
    real_q: torch.Tensor | None,
    real_k: torch.Tensor | None,
) -> torch.Tensor:
    """Return the block mass ``[B, H, Nq, Nk]`` fp32; arguments as in the reference."""
    if triton.knobs.runtime.interpret and q.dtype == torch.bfloat16:
        # The interpreter multiplies the bit patterns of bf16; fp32 holds the same numbers.
        q, k = q.float(), k.float()
    batch, heads, tokens_q, head_dim = q.shape
    tokens_k = k.shape[2]
    stride = len(order)
    count_q, count_k = triton.cdiv(tokens_q, block_size), triton.cdiv(tokens_k, block_size)
    groups_q, groups_k = triton.cdiv(tokens_q, stride), triton.cdiv(tokens_k, stride)
    # Blocks beyond the diagonal are never visited.
    mass = torch.zeros(batch, heads, count_q, count_k, dtype=torch.float32, device=q.device)
    # Compared on the CPU, where the API makes it: a GPU would stall.
    antidiagonal = order.tolist() == list(range(stride - 1, -1, -1))
    order = order.to(q.device)
    real = [order] * 4
    if real_k is not None:
        if real_q is None:
            real_q = torch.ones(batch, tokens_q, dtype=torch.bool, device=q.device)
        real = [
            x.to(torch.uint8).contiguous()
            for x in (real_q, real_k, _any_real(real_q, stride), _any_real(real_k, stride))
        ]
    per_block = block_size // stride
    tile = tile_sizes(per_block, head_dim)
    _xattention_scores_fwd_kernel[(triton.cdiv(groups_q, tile["BLOCK_M"]), batch * heads)](
        q,
        k,
        order.to(torch.int32),
        *real,
        mass,
        heads,
        heads // k.shape[1],
        tokens_q,
        tokens_k,
        groups_q,
        groups_k,
        count_q,
        count_k,
        tokens_k - tokens_q,
        head_dim,
        scale / stride * _LOG2_E,
        *q.stride(),
        *k.stride(),
        STRIDE=stride,
        PER_BLOCK=per_block,
        CAUSAL=causal,
        PADDED=real_k is not None,
        REVERSED=antidiagonal,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        **tile,
    )
    return mass


def _any_real(real: torch.Tensor, stride: int) -> torch.Tensor:
    """Return which groups hold a real token: ``[B, n]`` bool."""
    return F.pad(real, (0, -real.shape[1] % stride)).unflatten(1, (-1, stride)).any(dim=-1)
