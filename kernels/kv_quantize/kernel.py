"""Triton kernels of quantise-and-append: a group stays in registers from its load to its store."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from repro.kernels.paged_attention.pages import Format, Pages

#: Values of one program: 32 a thread.
_TILE = 4096


@triton.jit
def _slots(
    offset,  # of the tokens among the new ones of their sequence
    i_seq,
    table_ptr,
    lengths_ptr,
    counts_ptr,
    stride_table,
    tokens,
    pages_max,
    n_pages,
    page_size,
    COUNTED: tl.constexpr,
):
    """Return (position in x, page, slot, whether it may be written) of new tokens."""
    count = tokens
    if COUNTED:
        count = tl.load(counts_ptr + i_seq)
    position = tl.load(lengths_ptr + i_seq) + offset
    entry = position // page_size
    inside = (offset < count) & (position >= 0) & (entry < pages_max)
    page = tl.load(table_ptr + i_seq * stride_table + entry, mask=inside, other=-1)
    inside = inside & (page >= 0) & (page < n_pages)
    return tokens - count + offset, page.to(tl.int64), position % page_size, inside


@triton.jit
def _stored_scale(low, high, scale_ptr, BITS: tl.constexpr):
    """Return the scale in the dtype in which it is stored; 1 in place of 0."""
    scale = tl.div_rn(high - low, 2.0**BITS - 1.0).to(scale_ptr.dtype.element_ty)
    return tl.where(scale == 0, 1.0, scale).to(scale_ptr.dtype.element_ty)


@triton.jit
def _packed(x, low, scale, BITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the packed codes [ROWS, COLUMNS * BITS // 8] of x [ROWS, COLUMNS]."""
    code = tl.div_rn(x - low, scale.to(tl.float32))
    # The larger of NaN and 0 is 0: what is not finite spoils no other code of its byte.
    code = tl.maximum(tl.minimum(code, 2.0**BITS - 1.0), 0.0)
    # 1.5 * 2**23: its sum with a small number has no bits after the point, halves go to even.
    code = (code + 12582912.0) - 12582912.0
    code = code.to(tl.int32)
    if BITS < 8:
        PER_BYTE: tl.constexpr = 8 // BITS
        fields = tl.reshape(code, [ROWS, COLUMNS // PER_BYTE, PER_BYTE])
        shift = tl.arange(0, PER_BYTE) * BITS
        code = tl.sum(fields << shift[None, None, :], axis=2)
    return code.to(tl.uint8)


@triton.jit
def _append_token_kernel(
    x_ptr,
    data_ptr,
    scale_ptr,
    minimum_ptr,
    table_ptr,
    lengths_ptr,
    counts_ptr,
    stride_xb,
    stride_xh,
    stride_xt,
    stride_dn,
    stride_dh,
    stride_dt,
    stride_sn,
    stride_sh,
    stride_st,
    stride_table,
    heads,
    tokens,
    pages_max,
    n_pages,
    page_size,
    n_groups,  # of a token
    group_size,
    BITS: tl.constexpr,
    COUNTED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """A row is one group of one token; 16 bits copy it."""
    i_seq = tl.program_id(1).to(tl.int64) // heads
    i_h = tl.program_id(1).to(tl.int64) % heads
    o_row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_group = o_row % n_groups
    position, page, slot, m_row = _slots(
        o_row // n_groups, i_seq, table_ptr, lengths_ptr, counts_ptr, stride_table, tokens,
        pages_max, n_pages, page_size, COUNTED,
    )  # fmt: skip
    o_c = tl.arange(0, BLOCK_G)
    m_c = (o_c < group_size)[None, :]
    x_ptr += i_seq * stride_xb + i_h * stride_xh
    column = (o_group * group_size)[:, None] + o_c[None, :]
    # [BLOCK_R, BLOCK_G]
    x = tl.load(
        x_ptr + position.to(tl.int64)[:, None] * stride_xt + column,
        mask=m_row[:, None] & m_c,
        other=0.0,
    )
    data_ptr += i_h * stride_dh + (page * stride_dn + slot * stride_dt)[:, None]
    if BITS == 16:
        tl.store(data_ptr + column, x, mask=m_row[:, None] & m_c)
    else:
        x = x.to(tl.float32)
        low = tl.min(tl.where(m_c, x, float("inf")), axis=1)
        high = tl.max(tl.where(m_c, x, float("-inf")), axis=1)
        scale = _stored_scale(low, high, scale_ptr, BITS)
        packed = _packed(x, low[:, None], scale[:, None], BITS, BLOCK_R, BLOCK_G)
        o_byte = tl.arange(0, BLOCK_G * BITS // 8)
        group_bytes = group_size * BITS // 8
        at = (o_group * group_bytes)[:, None] + o_byte[None, :]
        tl.store(data_ptr + at, packed, mask=m_row[:, None] & (o_byte < group_bytes)[None, :])
        o_s = page * stride_sn + i_h * stride_sh + slot * stride_st + o_group
        tl.store(scale_ptr + o_s, scale, mask=m_row)
        tl.store(minimum_ptr + o_s, low.to(minimum_ptr.dtype.element_ty), mask=m_row)


@triton.jit
def _append_channel_kernel(
    x_ptr,
    data_ptr,
    scale_ptr,
    minimum_ptr,
    table_ptr,
    lengths_ptr,
    counts_ptr,
    stride_xb,
    stride_xh,
    stride_xt,
    stride_dn,
    stride_dh,
    stride_dt,
    stride_sn,
    stride_sh,
    stride_st,
    stride_table,
    heads,
    tokens,
    pages_max,
    n_pages,
    page_size,
    dim,
    group_size,
    BITS: tl.constexpr,
    COUNTED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program is one group of tokens in some channels."""
    i_seq = tl.program_id(1).to(tl.int64) // heads
    i_h = tl.program_id(1).to(tl.int64) % heads
    first, page, slot, inside = _slots(
        tl.program_id(0) * group_size, i_seq, table_ptr, lengths_ptr, counts_ptr, stride_table,
        tokens, pages_max, n_pages, page_size, COUNTED,
    )  # fmt: skip
    o_t = tl.arange(0, BLOCK_T)
    o_d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    # Outside the pages nothing is left of the tile.
    m_t = (o_t < tl.where(inside, group_size, 0))[:, None]
    m_d = o_d < tl.where(inside, dim, 0)
    x_ptr += i_seq * stride_xb + i_h * stride_xh
    # [BLOCK_T, BLOCK_D]
    x = tl.load(
        x_ptr + (first + o_t).to(tl.int64)[:, None] * stride_xt + o_d[None, :],
        mask=m_t & m_d[None, :],
        other=0.0,
    ).to(tl.float32)
    low = tl.min(tl.where(m_t, x, float("inf")), axis=0)
    high = tl.max(tl.where(m_t, x, float("-inf")), axis=0)
    scale = _stored_scale(low, high, scale_ptr, BITS)
    packed = _packed(x, low[None, :], scale[None, :], BITS, BLOCK_T, BLOCK_D)
    o_byte = tl.program_id(2) * (BLOCK_D * BITS // 8) + tl.arange(0, BLOCK_D * BITS // 8)
    data_ptr += page * stride_dn + i_h * stride_dh
    at = (slot + o_t).to(tl.int64)[:, None] * stride_dt + o_byte[None, :]
    tl.store(data_ptr + at, packed, mask=m_t & (o_byte < dim * BITS // 8)[None, :])
    o_s = page * stride_sn + i_h * stride_sh + slot // group_size * stride_st + o_d
    tl.store(scale_ptr + o_s, scale, mask=m_d)
    tl.store(minimum_ptr + o_s, low.to(minimum_ptr.dtype.element_ty), mask=m_d)


def quantize_triton(
    x: torch.Tensor, format: Format
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return packed codes, scale and minimum: every ``[T, D]`` is appended to a page of its own."""
    *outer, tokens, dim = x.shape
    rows = x.reshape(-1, 1, tokens, dim)
    if format.axis == "token":
        groups = (tokens, dim // (format.group_size or dim))
    else:
        groups = (tokens // (format.group_size or tokens), dim)
    data = x.new_empty(*rows.shape[:3], dim * format.bits // 8, dtype=torch.uint8)
    scale = x.new_empty(*rows.shape[:2], *groups)
    minimum = torch.empty_like(scale)
    table = torch.arange(len(rows), dtype=torch.int32, device=x.device)[:, None]
    append_triton(rows, Pages(data, format, scale, minimum), table, torch.zeros_like(table[:, 0]))
    shape = (*outer, *groups)
    return data.view(*outer, tokens, -1), scale.view(shape), minimum.view(shape)


def append_triton(
    x: torch.Tensor,
    pages: Pages,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor | None = None,
) -> None:
    """Write the last ``counts[i]`` tokens of each row into its pages; arguments as in ``append``.

    Raises:
        NotImplementedError: If groups of channels share a byte, or the pages are strided views.
    """
    sequences, heads, tokens, dim = x.shape
    bits, data = pages.format.bits, pages.data
    scale = data if pages.scale is None else pages.scale
    minimum = data if pages.minimum is None else pages.minimum
    strided = {tensor.stride(3) for tensor in (data, scale)} != {1}
    if strided or minimum.stride() != scale.stride():
        raise NotImplementedError(
            f"append: pages must lie side by side along the last dimension, scale and minimum "
            f"alike, got strides {data.stride()}, {scale.stride()} and {minimum.stride()}"
        )
    x = x if x.stride(3) == 1 else x.contiguous()
    arguments = (
        x,
        data,
        scale,
        minimum,
        page_table.contiguous(),
        lengths.contiguous(),
        lengths if counts is None else counts.contiguous(),
        *x.stride()[:3],
        *data.stride()[:3],
        *scale.stride()[:3],
        page_table.shape[1],
        heads,
        tokens,
        page_table.shape[1],
        data.shape[0],
        pages.page_size,
    )
    if pages.format.quantized and pages.format.axis == "channel":
        size = pages.group_size
        block_t, block_d = channel_tile(size, dim)
        grid = (triton.cdiv(tokens, size), sequences * heads, triton.cdiv(dim, block_d))
        _append_channel_kernel[grid](
            *arguments,
            dim,
            size,
            BITS=bits,
            COUNTED=counts is not None,
            BLOCK_T=block_t,
            BLOCK_D=block_d,
        )
        return
    size = pages.group_size if pages.format.quantized else dim
    if bits < 8 and size * bits % 8:
        raise NotImplementedError(
            f"append: group_size must be whole bytes of {bits} bits on a GPU, got {size}"
        )
    rows = tokens * (dim // size)
    block_r, block_g = token_tile(size, rows)
    _append_token_kernel[triton.cdiv(rows, block_r), sequences * heads](
        *arguments,
        dim // size,
        size,
        BITS=bits,
        COUNTED=counts is not None,
        BLOCK_R=block_r,
        BLOCK_G=block_g,
    )


def token_tile(group_size: int, rows: int) -> tuple[int, int]:
    """Return (BLOCK_R, BLOCK_G) for groups of channels, so many ``rows`` of them a head."""
    block_g = max(4, triton.next_power_of_2(group_size))
    return min(triton.next_power_of_2(rows), max(1, _TILE // block_g)), block_g


def channel_tile(group_size: int, dim: int) -> tuple[int, int]:
    """Return (BLOCK_T, BLOCK_D) for groups of tokens: at least 16 channels, whole sectors."""
    block_t = triton.next_power_of_2(group_size)
    return block_t, min(max(16, _TILE // block_t), max(4, triton.next_power_of_2(dim)))
