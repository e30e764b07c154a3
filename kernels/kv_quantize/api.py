"""Public functions of the quantisation of K and V: checks and dispatch."""

from __future__ import annotations

import torch

from repro.kernels.paged_attention import Format, Pages

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@torch.no_grad()
def quantize(x: torch.Tensor, format: Format) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantise groups of values to integers between their minimum and maximum.

    With ``B`` bits a group has ``minimum = min(x)``, ``scale = (max(x) - min(x)) / (2**B - 1)``
    and codes ``round((x - minimum) / scale)``, halves to even, clamped to ``0 .. 2**B - 1``; a
    value is read back as ``code * scale + minimum``. All of it is fp32; the scale is rounded to
    the dtype of ``x`` before the codes are made with it, the minimum is exact. A scale that is 0
    then is stored as 1: equal values are read back exactly. A group that holds a value which is
    not finite, or whose range is not in fp32, gets codes and scales without meaning; others keep
    theirs. No gradients.

    Args:
        x: ``[..., T, D]``, fp16, bf16 or fp32, any strides, none of them 0.
        format: 2, 4 or 8 bits; ``group_size`` None is ``D`` (axis token) or ``T`` (axis channel).

    Returns:
        Codes ``[..., T, D * bits // 8]`` uint8, packed along D with the lower index in the lower
        bits; scale and minimum in the dtype of ``x``, ``[..., T, D // group_size]`` (axis token)
        or ``[..., T // group_size, D]`` (axis channel).

    Raises:
        ValueError: If the format is not quantised, or groups or bytes do not divide ``x``.
        NotImplementedError: On a GPU, if groups of channels share a byte.

    Source: arXiv:2502.04420, eq. 2.
    """
    if x.ndim < 2 or 0 in x.shape or x.dtype not in _DTYPES:
        raise ValueError(
            f"quantize: x must be float16, bfloat16 or float32 [..., T, D], none 0, got {x.dtype} "
            f"{list(x.shape)}"
        )
    if not format.quantized:
        raise ValueError(f"quantize: format must have less than 16 bits, got {format.bits}")
    if x.shape[-1] * format.bits % 8:
        raise ValueError(
            f"quantize: x must have whole bytes a token, got D={x.shape[-1]} of {format.bits} bits"
        )
    name, extent = ("D", x.shape[-1]) if format.axis == "token" else ("T", x.shape[-2])
    if format.group_size is not None and extent % format.group_size:
        raise ValueError(
            f"quantize: group_size must divide {name}={extent}, got {format.group_size}"
        )
    if x.is_cuda:
        from repro.kernels.kv_quantize.kernel import quantize_triton

        return quantize_triton(x, format)
    from repro.kernels.kv_quantize import cpu

    return cpu.quantize(x, format)


@torch.no_grad()
def append(
    x: torch.Tensor,
    pages: Pages,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor | None = None,
) -> None:
    """Write new tokens of each sequence into its pages, in place, quantised as the pages are.

    The last ``counts[i]`` tokens of row ``i`` (left-padded batches) go to the positions from
    ``lengths[i]`` on; position ``p`` is slot ``p % page_size`` of page
    ``page_table[i, p // page_size]``. Nothing else is written. Pages of 16 bits get copies.
    Otherwise see ``quantize``. Two sequences must not write to the same slot.

    Args:
        x: ``[n_seq, H_kv, T, D]`` in the dtype of the pages' values, any strides.
        pages: Where they go.
        page_table: ``[n_seq, n_pages_max]`` int32; entries that no new token needs may be
            anything.
        lengths: ``[n_seq]`` int32, tokens that the sequences hold already.
        counts: ``[n_seq]`` int32, new tokens, 0 to T; None is T for all. With groups of tokens
            (axis channel) lengths and counts must be multiples of the group size.

    Raises:
        ValueError: If a shape, dtype or device breaks a rule above. On the CPU also if numbers
            do: a context over the paged pool, a page that is not there, part of a group. Looking
            at them would stall a GPU: there they must be right (of wrong ones, no page outside
            the table and the pool is written).
        NotImplementedError: On a GPU, if groups of channels share a byte.
    """
    _check_tensors(x, pages, page_table, lengths, counts)
    if x.is_cuda:
        from repro.kernels.kv_quantize.kernel import append_triton

        append_triton(x, pages, page_table, lengths, counts)
        return
    held = lengths.tolist()
    new = [x.shape[2]] * x.shape[0] if counts is None else counts.tolist()
    _check_numbers(x, pages, page_table, held, new)
    if max(new) > 0:
        from repro.kernels.kv_quantize import cpu

        cpu.append(x, pages, page_table, held, new)


def _check_tensors(
    x: torch.Tensor,
    pages: Pages,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor | None,
) -> None:
    dtype = (pages.data if pages.scale is None else pages.scale).dtype
    heads, dim = pages.kv_heads, pages.head_dim
    if x.ndim != 4 or 0 in x.shape or (x.shape[1], x.shape[3]) != (heads, dim):
        raise ValueError(
            f"append: x must be [n_seq, H_kv={heads}, T, D={dim}], none 0, got {list(x.shape)}"
        )
    if x.dtype != dtype or x.device != pages.data.device:
        raise ValueError(
            f"append: x must be of the pages' {dtype} on {pages.data.device}, got {x.dtype} on "
            f"{x.device}"
        )
    sequences = x.shape[0]
    for name, tensor, dims in (
        ("page_table", page_table, 2),
        ("lengths", lengths, 1),
        ("counts", counts, 1),
    ):
        if tensor is None:
            continue
        fits = tensor.ndim == dims and tensor.shape[0] == sequences
        if not fits or tensor.dtype != torch.int32 or tensor.device != x.device:
            shape = f"[{sequences}, n_pages_max]" if dims == 2 else f"[{sequences}]"
            raise ValueError(
                f"append: {name} must be int32 {shape} on {x.device}, got {tensor.dtype} "
                f"{list(tensor.shape)} on {tensor.device}"
            )


def _check_numbers(
    x: torch.Tensor, pages: Pages, page_table: torch.Tensor, held: list[int], new: list[int]
) -> None:
    """Check what is cheap to look at on the CPU alone."""
    if min(held) < 0:
        raise ValueError(f"append: lengths must be at least 0, got {min(held)}")
    if min(new) < 0 or max(new) > x.shape[2]:
        raise ValueError(
            f"append: counts must be 0 to T={x.shape[2]}, got {min(new)} to {max(new)}"
        )
    size = pages.page_size
    longest = max(length + count for length, count in zip(held, new, strict=True))
    if longest > page_table.shape[1] * size:
        raise ValueError(
            f"append: lengths + counts must be within {page_table.shape[1]} pages of {size} "
            f"tokens a sequence, got {longest}: context over the paged pool"
        )
    if pages.format.quantized and pages.format.axis == "channel":
        group = pages.group_size
        for name, numbers in (("lengths", held), ("counts", new)):
            odd = [number for number in numbers if number % group]
            if odd:
                raise ValueError(
                    f"append: {name} must be multiples of the {group} tokens of a group (axis "
                    f"channel), got {odd[0]}; keep the rest of a group unquantised until it is "
                    f"whole"
                )
    for row, length, count in zip(page_table, held, new, strict=True):
        needed = row[length // size : -(-(length + count) // size)] if count else row[:0]
        if len(needed) and not 0 <= int(needed.min()) <= int(needed.max()) < pages.n_pages:
            raise ValueError(
                f"append: page_table must name pages 0 to {pages.n_pages - 1} of the paged pool "
                f"where tokens go, got {needed.tolist()}"
            )
