"""CPU fast path: quantisation in place piece by piece, whole pages written at once.

Pieces run side by side in worker threads, each of them serial inside: no barrier ends an operation.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from repro import serial_threads
from repro.kernels.paged_attention.pages import Format, Pages, pack

#: Values quantised at once: an fp32 copy of them stays in cache.
_PIECE = 1 << 17


def quantize(x: torch.Tensor, format: Format) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return packed codes, scale and minimum; arguments are checked already."""
    tokens, dim = x.shape[-2:]
    packed = x.new_empty(*x.shape[:-1], dim * format.bits // 8, dtype=torch.uint8)
    if format.axis == "token":
        size, along = format.group_size or dim, 2
        groups = x.reshape(-1, dim // size, size)  # [n, D // g, g]
        scale = x.new_empty(*x.shape[:-1], dim // size)
        codes = packed.view(-1, packed.shape[-1])
    else:
        size, along = format.group_size or tokens, 1
        groups = x.reshape(-1, size, dim)  # [n, g, D]
        scale = x.new_empty(*x.shape[:-2], tokens // size, dim)
        codes = packed.view(-1, size, packed.shape[-1])
    minimum = torch.empty_like(scale)
    shape = [1 if i == along else extent for i, extent in enumerate(groups.shape)]
    outputs = (codes, scale.view(shape), minimum.view(shape))
    at_once = max(1, _PIECE // groups[0].numel())
    pieces = list(zip(*(tensor.split(at_once) for tensor in (groups, *outputs)), strict=True))
    serial_threads.run(lambda piece: _quantize_piece(piece, along, format.bits), pieces)
    return packed, scale, minimum


def _quantize_piece(piece: Sequence[torch.Tensor], along: int, bits: int) -> None:
    """Quantise the first of ``piece``, groups along one dimension, into codes, scale, minimum."""
    x, packed, scale, minimum = piece
    # In fp32, and one after the other: all else takes torch's slow ways.
    values = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    low, high = values.amin(along, keepdim=True), values.amax(along, keepdim=True)
    minimum.copy_(low)
    scale.copy_((high - low).div_(2**bits - 1))
    scale.masked_fill_(scale == 0, 1.0)
    values.sub_(low).div_(scale.float())
    values.clamp_(max=2**bits - 1).round_().nan_to_num_(nan=0.0)
    # Through int16: straight to uint8 is several times slower.
    codes = values.to(torch.int16).to(torch.uint8)
    packed.copy_(_packed(codes, bits).view(packed.shape))


def _packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack contiguous codes whose number fills whole bytes: a machine word at a time."""
    if bits == 8 or sys.byteorder != "little" or codes.shape[-1] * bits % 8:
        return pack(codes.flatten(), bits)
    if bits == 4:
        words = codes.view(torch.int16)  # 0000bbbb0000aaaa
        return words.bitwise_or(words >> 4).to(torch.uint8)
    words = codes.view(torch.int32)
    words = words | (words >> 6)
    return words.bitwise_or(words >> 12).to(torch.uint8)


def append(
    x: torch.Tensor, pages: Pages, page_table: torch.Tensor, lengths: list[int], counts: list[int]
) -> None:
    """Write the last ``counts[i]`` tokens of each row into its pages; all is checked already."""
    if pages.scale is None or pages.minimum is None:
        parts = [(pages.data, x)]
    else:
        # Padding is no whole number of groups, the tokens behind it are.
        first = x.shape[2] - max(counts)
        format = Format(bits=pages.format.bits, axis=pages.format.axis, group_size=pages.group_size)
        packed, scale, minimum = quantize(x[:, :, first:], format)
        parts = [(pages.data, packed), (pages.scale, scale), (pages.minimum, minimum)]
    for target, source in parts:
        unit = pages.page_size // target.shape[2]  # tokens
        for i, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            taken = source[i, :, source.shape[2] - count // unit :]
            _write(target, taken, page_table[i], length // unit)


def _write(target: torch.Tensor, x: torch.Tensor, table: torch.Tensor, start: int) -> None:
    """Write ``x`` ``[H_kv, n, C]`` into slots ``start`` ... of a sequence's pages."""
    size, count = target.shape[2], x.shape[1]
    done = 0
    while done < count:
        page, slot = divmod(start + done, size)
        whole = (count - done) // size if slot == 0 else 0
        if whole:
            numbers = table[page : page + whole]
            blocks = x[:, done : done + whole * size].unflatten(1, (whole, size))
            target.index_copy_(0, numbers.long(), blocks.transpose(0, 1))
            done += whole * size
        else:
            taken = min(size - slot, count - done)
            target[int(table[page]), :, slot : slot + taken] = x[:, done : done + taken]
            done += taken
