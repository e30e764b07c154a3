"""The layout of a paged cache: K or V of one layer in pages of equally many tokens, packed or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

BITS = (2, 4, 8, 16)
AXES = ("token", "channel")


@dataclass(frozen=True, kw_only=True)
class Format:
    """How K or V is stored.

    A value is ``code * scale + minimum``, both per group: with ``axis`` token a group is
    ``group_size`` neighbouring channels of one token, with ``axis`` channel ``group_size``
    consecutive tokens of one channel, aligned to the page.

    Attributes:
        bits: 2, 4 or 8; 16 stores the values themselves, whatever their floating type.
        axis: ``token`` or ``channel``; of no meaning with 16 bits.
        group_size: Values of a group; None is a whole head (axis token) or page (axis channel).
    """

    bits: int = 16
    axis: Literal["token", "channel"] = "token"
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"Format: bits must be one of {BITS}, got {self.bits}")
        if self.axis not in AXES:
            raise ValueError(f"Format: axis must be one of {AXES}, got {self.axis}")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"Format: group_size must be at least 1, got {self.group_size}")

    @property
    def quantized(self) -> bool:
        return self.bits < 16


@dataclass(frozen=True)
class Pages:
    """K or V of one layer, in pages.

    Attributes:
        data: ``[n_pages, H_kv, page_size, D]`` floating, or ``[n_pages, H_kv, page_size,
            D * bits // 8]`` uint8: packed along D, the lower index in the lower bits.
        format: How a value is stored.
        scale: ``[n_pages, H_kv, page_size, D // group_size]`` (axis token) or ``[n_pages, H_kv,
            page_size // group_size, D]`` (axis channel), in the dtype of the values that were
            stored; None with 16 bits.
        minimum: The same, the least value of the group.
    """

    data: torch.Tensor
    format: Format
    scale: torch.Tensor | None = None
    minimum: torch.Tensor | None = None

    @classmethod
    def allocate(
        cls,
        n_pages: int,
        kv_heads: int,
        page_size: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        format: Format | None = None,
    ) -> Pages:
        """Return zeroed pages: a value outside every sequence is finite.

        Args:
            n_pages: Pages of the pool.
            kv_heads: Heads of a page.
            page_size: Tokens of a page.
            head_dim: Channels of a head.
            dtype: Of the values, and of scales and minima.
            device: Where they lie.
            format: 16 bits by default.

        Raises:
            ValueError: If groups or bytes do not divide the page.
        """
        format = format or Format()
        shape = (n_pages, kv_heads, page_size)
        if not format.quantized:
            return cls(torch.zeros(*shape, head_dim, dtype=dtype, device=device), format)
        extent = head_dim if format.axis == "token" else page_size
        group_size = format.group_size or extent
        if extent % group_size:
            what = "head dimension" if format.axis == "token" else "page size"
            raise ValueError(
                f"Pages: group_size must divide the {what} of {extent}, got {group_size}"
            )
        if head_dim * format.bits % 8:
            raise ValueError(
                f"Pages: head dimension x {format.bits} bits must be whole bytes, got {head_dim}"
            )
        packed = torch.zeros(*shape, head_dim * format.bits // 8, dtype=torch.uint8, device=device)
        groups = (
            (*shape, head_dim // group_size)
            if format.axis == "token"
            else (*shape[:2], page_size // group_size, head_dim)
        )
        scale, minimum = (torch.zeros(groups, dtype=dtype, device=device) for _ in range(2))
        return cls(packed, format, scale, minimum)

    @property
    def n_pages(self) -> int:
        return self.data.shape[0]

    @property
    def kv_heads(self) -> int:
        return self.data.shape[1]

    @property
    def page_size(self) -> int:
        return self.data.shape[2]

    @property
    def head_dim(self) -> int:
        return self.data.shape[3] * (8 // self.format.bits if self.format.quantized else 1)

    @property
    def group_size(self) -> int:
        """Values of a group: channels (axis token) or tokens (axis channel)."""
        if self.scale is None:
            return 1
        axis, extent = (3, self.head_dim) if self.format.axis == "token" else (2, self.page_size)
        return extent // self.scale.shape[axis]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors: values or codes, scales, minima."""
        tensors = (self.data, self.scale, self.minimum)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the codes ``[..., D]`` uint8 of ``[..., D * bits // 8]`` packed bytes."""
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    codes = (packed[..., None] >> shifts) & (2**bits - 1)
    return codes.flatten(-2)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the packed bytes ``[..., D * bits // 8]`` of codes ``[..., D]`` uint8."""
    if bits == 8:
        return codes
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    # The fields do not overlap: a sum is a bitwise or.
    return (codes.unflatten(-1, (-1, 8 // bits)) << shifts).sum(-1, dtype=torch.uint8)


def dequantize(pages: Pages, numbers: torch.Tensor | None = None) -> torch.Tensor:
    """Return the values ``[n, H_kv, page_size, D]`` fp32 of the numbered pages (None: all)."""

    def taken(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if numbers is None else tensor.index_select(0, numbers.reshape(-1))

    if not pages.format.quantized or pages.scale is None or pages.minimum is None:
        return taken(pages.data).float()
    codes = unpack(taken(pages.data), pages.format.bits).float()
    dim = -1 if pages.format.axis == "token" else -2
    scale, minimum = (
        taken(tensor).float().repeat_interleave(pages.group_size, dim=dim)
        for tensor in (pages.scale, pages.minimum)
    )
    return codes * scale + minimum
