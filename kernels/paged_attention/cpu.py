"""CPU fast path: chunks of pages that stay in cache, one KV head at a time.

Decode reads every key and value once, so the bytes read bound the time. A chunk's pages are copied
out of the pool (``index_select`` of rows of memory, at memory bandwidth) and then met in cache:
widened or dequantised, multiplied by the query heads of their KV head, merged by log-sum-exp.
Chunks run side by side in threads that are serial inside.

Packed codes are unpacked field by field, the lowest bits of all bytes first: a contiguous pass
instead of an interleaving one. That leaves the channels in another order, which the queries (for K)
and the output (for V) take instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from repro import serial_threads
from repro.kernels.paged_attention.merge import merge_stacked
from repro.kernels.paged_attention.pages import Pages

#: Most bytes of a chunk's keys in fp32 (its values are met after them): half of a 1 MiB L2 cache.
_CHUNK_BYTES = 1 << 19


@dataclass(frozen=True)
class _Chunk:
    """Pages of one sequence and KV head; ``tokens`` leaves out the unused end of the last one."""

    sequence: int
    kv_head: int
    index: int
    pages: torch.Tensor  # [n] physical
    tokens: int


def paged_attention_cpu(
    q: torch.Tensor,
    k: Pages,
    v: Pages,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    *,
    selected: torch.Tensor | None = None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output ``[n_seq, H, D]`` and the log-sum-exp ``[n_seq, H]`` fp32."""
    n_seq, heads, dim = q.shape
    kv_heads, n_rep = k.kv_heads, heads // k.kv_heads
    chunks = _chunks(k, page_table, lengths, selected)
    count = 1 + max((chunk.index for chunk in chunks), default=0)
    outs = torch.zeros(count, n_seq, kv_heads, n_rep, dim)
    lses = torch.full((count, n_seq, kv_heads, n_rep), -torch.inf)
    queries = _by_field(q.view(n_seq, kv_heads, n_rep, dim).float() * scale, k)
    narrow = q.dtype == v.data.dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()

    def attend(chunk: _Chunk) -> None:
        place = (chunk.index, chunk.sequence, chunk.kv_head)
        keys = _take(k, chunk).float()
        weights = queries[chunk.sequence, chunk.kv_head] @ keys.T  # [n_rep, tokens] scores
        peak = weights.amax(-1, keepdim=True)
        total = weights.sub_(peak).exp_().sum(-1, keepdim=True)
        torch.add(peak, total.log(), out=lses[place].unsqueeze(-1))
        values = _take(v, chunk)
        if narrow:
            out = weights.bfloat16() @ values
        else:
            out = weights @ values.float()
        torch.div(out, total, out=outs[place])

    serial_threads.run(attend, chunks)
    out, lse = merge_stacked(outs, lses)
    out = _by_channel(out, v).to(q.dtype)
    return out.view(q.shape), lse.view(n_seq, heads)


def _chunks(
    k: Pages, page_table: torch.Tensor, lengths: torch.Tensor, selected: torch.Tensor | None
) -> list[_Chunk]:
    """Cut what each sequence and KV head attends to into chunks, logical pages ascending."""
    used = (lengths + k.page_size - 1) // k.page_size  # [n_seq]
    if selected is None:
        physical = page_table[:, None]
        counts = used[:, None].tolist()
        ends = [[True]] * len(counts)
    else:
        width = page_table.shape[1]
        attended = (selected >= 0) & (selected < used[:, None, None])
        # Ascending order puts the last page last and what contributes nothing behind it.
        logical, _ = selected.masked_fill(~attended, width).sort(dim=-1)
        twice = (logical[..., 1:] == logical[..., :-1]) & (logical[..., 1:] < width)
        if bool(twice.any()):
            raise ValueError(
                "paged_attention: selected must name a page at most once a KV head, got page "
                f"{int(logical[..., 1:][twice][0])} twice"
            )
        padded = torch.nn.functional.pad(page_table, (0, 1), value=-1)
        physical = padded[:, None].expand(-1, k.kv_heads, -1).gather(2, logical.long())
        counts = attended.sum(-1).tolist()
        ends = (selected == used[:, None, None] - 1).any(-1).tolist()
    size = max(1, _CHUNK_BYTES // (k.page_size * k.head_dim * 4))
    chunks = []
    for i, length in enumerate(lengths.tolist()):
        unused = -length % k.page_size
        for head in range(k.kv_heads):
            row = 0 if selected is None else head
            count = counts[i][row]
            for index, start in enumerate(range(0, count, size)):
                pages = physical[i, row, start : min(start + size, count)]
                tokens = len(pages) * k.page_size
                if start + size >= count and ends[i][row]:
                    tokens -= unused
                chunks.append(_Chunk(i, head, index, pages, tokens))
    return chunks


def _take(pages: Pages, chunk: _Chunk) -> torch.Tensor:
    """Return the values ``[tokens, D]`` of a chunk, fp32 by field if they were packed."""

    def taken(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[:, chunk.kv_head].index_select(0, chunk.pages)

    data = taken(pages.data)
    if pages.scale is None or pages.minimum is None:
        return data.flatten(0, 1)[: chunk.tokens]
    values = _unpacked(data, pages.format.bits)
    for tensor, apply in ((pages.scale, torch.Tensor.mul_), (pages.minimum, torch.Tensor.add_)):
        view, factors = _aligned(values, taken(tensor).float(), pages)
        apply(view, factors)
    return values.view(-1, pages.head_dim)[: chunk.tokens]


def _unpacked(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Return codes ``[n, page_size, fields, bytes]`` fp32 of ``[n, page_size, bytes]``."""
    fields = 8 // bits
    values = torch.empty(*packed.shape[:2], fields, packed.shape[2])
    for field in range(fields):
        codes = packed >> field * bits if field else packed
        if field < fields - 1:
            codes = codes & 2**bits - 1
        values[:, :, field].copy_(codes)
    return values


def _aligned(
    values: torch.Tensor, factors: torch.Tensor, pages: Pages
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return views of ``values`` and of their groups' ``factors`` that broadcast."""
    n, page_size, fields, width = values.shape
    group_size = pages.group_size
    if pages.format.axis == "channel":
        factors = _by_field(factors, pages).view(n, -1, 1, fields * width)
        return values.view(n, -1, group_size, fields * width), factors
    if group_size % fields:
        factors = _by_field(factors.repeat_interleave(group_size, dim=-1), pages)
        return values.flatten(2), factors
    grouped = values.view(n, page_size, fields, -1, group_size // fields)
    return grouped, factors[:, :, None, :, None]


def _by_field(x: torch.Tensor, pages: Pages) -> torch.Tensor:
    """Reorder the last dimension from channels to the fields of bytes: all lowest bits first."""
    fields = 8 // pages.format.bits if pages.format.quantized else 1
    return x.unflatten(-1, (-1, fields)).transpose(-1, -2).flatten(-2)


def _by_channel(x: torch.Tensor, pages: Pages) -> torch.Tensor:
    """Undo ``_by_field``."""
    fields = 8 // pages.format.bits if pages.format.quantized else 1
    return x.unflatten(-1, (fields, -1)).transpose(-1, -2).flatten(-2)
