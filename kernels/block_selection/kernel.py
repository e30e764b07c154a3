"""Triton kernel of the block selection: no sort, a binary search for the lightest kept mass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _block_selection_kernel(
    mass_ptr,
    threshold_ptr,
    forced_ptr,
    computable_ptr,
    kept_ptr,
    heads,
    count_q,
    count_k,
    stride_fb,
    stride_cb,
    BLOCK_K: tl.constexpr,
):
    """Keep others of mass > t, and the first few of mass t.

    t = min {v : forced + sum of others > v is below the need}; all sums are of integers.
    """
    i_row = tl.program_id(0).to(tl.int64)
    i_m = i_row % count_q
    i_h = (i_row // count_q) % heads
    i_b = i_row // (count_q * heads)
    o_n = tl.arange(0, BLOCK_K)
    m_n = o_n < count_k
    # [BLOCK_K]
    computable = tl.load(computable_ptr + i_b * stride_cb + i_m * count_k + o_n, mask=m_n, other=0)
    forced = tl.load(forced_ptr + i_b * stride_fb + i_m * count_k + o_n, mask=m_n, other=0)
    b_possible = computable != 0
    b_forced = b_possible & (forced != 0)
    b_other = b_possible & (forced == 0)
    b_mass = tl.load(mass_ptr + i_row * count_k + o_n, mask=m_n, other=0)
    b_mass = tl.where(b_possible, b_mass, 0)
    share = tl.load(threshold_ptr + i_h)
    need = share * tl.sum(b_mass, axis=0).to(tl.float64)
    collected = tl.sum(tl.where(b_forced, b_mass, 0), axis=0)

    # Invariant: high satisfies the condition if anything does, every v < low does not.
    low = i_row * 0
    high = tl.max(b_mass, axis=0)
    while low < high:
        middle = (low + high) // 2
        above = tl.sum(tl.where(b_other & (b_mass > middle), b_mass, 0), axis=0)
        enough = (collected + above).to(tl.float64) < need
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle + 1)
    above = tl.sum(tl.where(b_other & (b_mass > high), b_mass, 0), axis=0)
    b_tied = b_other & (b_mass == high)
    # How many equal ones come before: the lower block goes first.
    b_rank = tl.cumsum(b_tied.to(tl.int32), axis=0).to(tl.int64) - 1
    b_before = tl.where(b_mass > high, collected, collected + above + b_rank * high)
    b_kept = b_other & (b_mass >= high) & (b_before.to(tl.float64) < need)
    b_kept = tl.where(share >= 1.0, b_possible, b_kept | b_forced)
    tl.store(kept_ptr + i_row * count_k + o_n, b_kept.to(tl.uint8), mask=m_n)


def select_blocks_triton(
    mass: torch.Tensor,
    threshold: torch.Tensor,
    *,
    forced: torch.Tensor,
    computable: torch.Tensor,
) -> torch.Tensor:
    """Return the kept blocks ``[B, H, Nq, Nk]`` bool; arguments as in the reference."""
    batch, heads, count_q, count_k = mass.shape
    mass, forced, computable = mass.contiguous(), forced.contiguous(), computable.contiguous()
    kept = torch.empty(mass.shape, dtype=torch.uint8, device=mass.device)
    block_k = max(16, triton.next_power_of_2(count_k))
    _block_selection_kernel[(batch * heads * count_q,)](
        mass,
        threshold.contiguous(),
        forced.to(torch.uint8),
        computable.to(torch.uint8),
        kept,
        heads,
        count_q,
        count_k,
        0 if forced.shape[0] == 1 else forced.stride(0),
        0 if computable.shape[0] == 1 else computable.stride(0),
        BLOCK_K=block_k,
        num_warps=4 if block_k >= 512 else 1,
    )
    return kept.bool()
