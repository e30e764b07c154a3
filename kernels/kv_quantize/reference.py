"""The definition of quantise-and-append: eager, fp32 inside, one token or group at a time."""

from __future__ import annotations

import torch

from repro.kernels.paged_attention.pages import Format, Pages, pack


def quantize_reference(
    x: torch.Tensor, format: Format
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return packed codes, scale and minimum of each group; as ``quantize`` does."""
    levels = 2**format.bits - 1
    dim = -1 if format.axis == "token" else -2
    group_size = format.group_size or x.shape[dim]
    # The groups' own axis follows the one that counts them: [..., T, n, g] or [..., n, g, D].
    grouped = x.unflatten(dim, (-1, group_size)).float()
    low, high = grouped.amin(dim, keepdim=True), grouped.amax(dim, keepdim=True)
    # Codes are made with the scale that is stored, so that its rounding costs no accuracy.
    scale = ((high - low) / levels).to(x.dtype)
    scale = torch.where(scale == 0, 1.0, scale)
    codes = ((grouped - low) / scale.float()).clamp(max=levels).round().nan_to_num(nan=0.0)
    packed = pack(codes.to(torch.uint8).view(x.shape), format.bits)
    return packed, scale.squeeze(dim), low.squeeze(dim).to(x.dtype)


def append_reference(
    x: torch.Tensor,
    pages: Pages,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor | None = None,
) -> None:
    """Write the last ``counts[i]`` tokens of each row into its pages; as ``append`` does."""
    token_groups = pages.format.quantized and pages.format.axis == "channel"
    step = pages.group_size if token_groups else 1
    stored = Format(bits=pages.format.bits, axis=pages.format.axis, group_size=pages.group_size)
    for i, row in enumerate(x):
        count = row.shape[1] if counts is None else int(counts[i])
        for j in range(0, count, step):
            first = row.shape[1] - count + j
            position = int(lengths[i]) + j
            page = page_table[i, position // pages.page_size]
            slot = position % pages.page_size
            tokens = row[:, first : first + step]  # [H_kv, step, D]
            if pages.scale is None or pages.minimum is None:
                pages.data[page, :, slot : slot + step] = tokens
                continue
            packed, scale, minimum = quantize_reference(tokens, stored)
            pages.data[page, :, slot : slot + step] = packed
            pages.scale[page, :, slot // step] = scale[:, 0]
            pages.minimum[page, :, slot // step] = minimum[:, 0]
