"""What the Triton kernels share: lists of kept block numbers, and launch parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class Tuning:
    """Launch parameters: rows of a sub-block that one step loads, warps, pipeline depth."""

    tile: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, kw_only=True)
class BlockLists:
    """For each row of blocks the numbers of its kept columns: full ones first, then partial ones.

    Attributes:
        numbers: ``[B or 1, H or 1, rows, columns]`` int32, valid up to ``total``.
        full: ``[B or 1, H or 1, rows]`` int32, how many are full.
        total: Same shape, how many are kept.
    """

    numbers: torch.Tensor
    full: torch.Tensor
    total: torch.Tensor

    def arguments(self, batch: int, heads: int) -> tuple[object, ...]:
        """Return the three pointers, then batch and head strides of lists and of counts."""
        shape = (batch, heads, -1)
        numbers, counts = self.numbers.expand(*shape, -1), self.full.expand(shape)
        return (self.numbers, self.full, self.total, *numbers.stride()[:3], *counts.stride()[:2])


@triton.jit
def _compact_kernel(
    full_ptr,
    partial_ptr,
    numbers_ptr,
    full_count_ptr,
    total_ptr,
    columns,
    rows,
    stride_f,  # between batch-heads of the two masks
    stride_r,
    stride_c,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0)
    outer = tl.program_id(1).to(tl.int64)
    source = outer * stride_f + row * stride_r
    target = numbers_ptr + (outer * rows + row) * columns
    filled = 0
    for start in range(0, columns, CHUNK):
        column = start + tl.arange(0, CHUNK)
        keep = tl.load(full_ptr + source + column * stride_c, mask=column < columns, other=0)
        keep = keep.to(tl.int32)
        tl.store(target + filled + tl.cumsum(keep, 0) - keep, column, mask=keep != 0)
        filled += tl.sum(keep, 0)
    tl.store(full_count_ptr + outer * rows + row, filled)
    for start in range(0, columns, CHUNK):
        column = start + tl.arange(0, CHUNK)
        keep = tl.load(partial_ptr + source + column * stride_c, mask=column < columns, other=0)
        keep = keep.to(tl.int32)
        tl.store(target + filled + tl.cumsum(keep, 0) - keep, column, mask=keep != 0)
        filled += tl.sum(keep, 0)
    tl.store(total_ptr + outer * rows + row, filled)


def block_lists(full: torch.Tensor, partial: torch.Tensor, *, by_key: bool = False) -> BlockLists:
    """List the kept key blocks of every query block, or with ``by_key`` the other way round.

    Args:
        full: ``[B or 1, H or 1, Nq, Nk]`` bool.
        partial: Same shape.
    """
    full, partial = full.contiguous(), partial.contiguous()
    batch, heads = full.shape[:2]
    rows, columns = (full.shape[3], full.shape[2]) if by_key else full.shape[2:]
    numbers = torch.empty(batch, heads, rows, columns, dtype=torch.int32, device=full.device)
    full_count = torch.empty(batch, heads, rows, dtype=torch.int32, device=full.device)
    total = torch.empty_like(full_count)
    stride_r, stride_c = (1, full.shape[3]) if by_key else (full.shape[3], 1)
    _compact_kernel[(rows, batch * heads)](
        full.view(torch.uint8),
        partial.view(torch.uint8),
        numbers,
        full_count,
        total,
        columns,
        rows,
        full.shape[2] * full.shape[3],
        stride_r,
        stride_c,
        CHUNK=min(1024, triton.next_power_of_2(columns)),
    )
    return BlockLists(numbers=numbers, full=full_count, total=total)
