"""CPU fast path: chunks of pages that stay in cache, one KV head at a time.

Decode reads every key and value once, so the bytes read bound the time. A chunk's pages are copied
out of the pool (``index_select`` of rows of memory, at memory bandwidth) and then met in cache:
dequantised if they are packed, attended to with the query heads of their KV head as the queries (by
two products, or torch's flash kernel where that is faster), merged by log-sum-exp. Chunks run side
by side in threads that are serial inside.

Packed codes are unpacked field by field, the lowest bits of all bytes first: a contiguous pass
instead of an interleaving one. That leaves the channels in another order, which the queries (for K)
and the output (for V) take instead.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from repro import attention_products, serial_threads
from repro.kernels.paged_attention.merge import merge_stacked
from repro.kernels.paged_attention.pages import Pages

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

#: Most tokens of one sequence and KV head in a chunk ...
_CHUNK_TOKENS = 4096
#: ... and of all that one call attends to.
_CALL_TOKENS = 16384


@dataclass(frozen=True)
class _Group:
    """Chunks of equally many pages, each of one sequence and KV head.

    ``rows`` is ``[g]``, sequence times KV heads plus KV head; ``parts`` ``[g]``, the place of a
    chunk among those of its row; ``pages`` ``[g, n]`` into the pages of all KV heads; ``tokens``
    leaves out the unused end of the last page.
    """

    rows: torch.Tensor
    parts: torch.Tensor
    pages: torch.Tensor
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
    n_rep = heads // k.kv_heads
    groups = _groups(k, page_table, lengths, selected)
    dtype = _compute_dtype(q, k, v)
    queries = _by_field(q.reshape(-1, 1, n_rep, dim).to(dtype), k)
    by_products = attention_products.are_faster(dtype)

    def attend(group: _Group) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (
            _take(pages, group, name).to(dtype)[:, None] for name, pages in (("k", k), ("v", v))
        )
        rows = queries[group.rows]
        if by_products:
            out, lse = attention_products.attend(rows[:, 0], keys[:, 0], values[:, 0], scale)
            return out[:, None], lse[:, None]
        return _flash(rows, keys, values, scale=scale)

    found = serial_threads.run(attend, groups)
    if not groups:
        return torch.zeros_like(q), torch.full((n_seq, heads), -torch.inf)
    place = tuple(
        torch.cat([getattr(group, name) for group in groups]) for name in ("parts", "rows")
    )
    count = int(place[0].max()) + 1
    outs = torch.zeros(count, n_seq * k.kv_heads, n_rep, dim)
    lses = torch.full(outs.shape[:3], -torch.inf)
    outs[place] = torch.cat([out for out, _ in found])[:, 0].float()
    lses[place] = torch.cat([lse for _, lse in found])[:, 0]
    out, lse = merge_stacked(outs, lses)
    return _by_channel(out, v).to(q.dtype).view(q.shape), lse.view(n_seq, heads)


def _compute_dtype(q: torch.Tensor, k: Pages, v: Pages) -> torch.dtype:
    """Return the dtype of the products' operands: fp32 for what was packed; sums are fp32 anyway."""
    dtype = q.dtype
    for pages in (k, v):
        stored = torch.float32 if pages.format.quantized else pages.data.dtype
        dtype = torch.promote_types(dtype, stored)
    return dtype


def _groups(
    k: Pages, page_table: torch.Tensor, lengths: torch.Tensor, selected: torch.Tensor | None
) -> list[_Group]:
    """Cut what each sequence and KV head attends to into chunks, and group equal ones."""
    width = page_table.shape[1]
    used = ((lengths + k.page_size - 1) // k.page_size)[:, None]  # [n_seq, 1]
    unused = used * k.page_size - lengths[:, None]
    if selected is None:
        counts, ends = used.expand(-1, k.kv_heads), torch.ones_like(used).bool()
        physical = page_table[:, None].expand(-1, k.kv_heads, -1)
    else:
        attended = (selected >= 0) & (selected < used[..., None])
        # Ascending order puts the last page last and what contributes nothing behind it.
        logical, _ = selected.masked_fill(~attended, width).sort(dim=-1)
        twice = (logical[..., 1:] == logical[..., :-1]) & (logical[..., 1:] < width)
        if bool(twice.any()):
            raise ValueError(
                "paged_attention: selected must name a page at most once a KV head, got page "
                f"{int(logical[..., 1:][twice][0])} twice"
            )
        table = F.pad(page_table, (0, 1), value=-1)[:, None].expand(-1, k.kv_heads, -1)
        physical = table.gather(2, logical.long())
        counts, ends = attended.sum(-1), (selected == used[..., None] - 1).any(-1)
    physical = (physical * k.kv_heads + torch.arange(k.kv_heads)[:, None]).flatten(0, 1)
    missing = torch.where(ends, unused, 0).expand_as(counts).flatten().tolist()
    size = max(1, _CHUNK_TOKENS // k.page_size)
    members = defaultdict(list)
    for row, count in enumerate(counts.flatten().tolist()):
        for start in range(0, count, size):
            n = min(size, count - start)
            tokens = n * k.page_size - (missing[row] if start + n == count else 0)
            members[n, tokens].append((row, start))
    groups = []
    for (n, tokens), places in members.items():
        for part in torch.tensor(places).split(max(1, _CALL_TOKENS // tokens)):
            rows, starts = part.unbind(1)
            pages = physical[rows[:, None], starts[:, None] + torch.arange(n)]
            groups.append(_Group(rows, starts // size, pages, tokens))
    return groups


def _take(pages: Pages, group: _Group, name: str) -> torch.Tensor:
    """Return the values ``[g, tokens, D]`` of a group, fp32 by field if they were packed.

    They lie in this thread's scratch memory of that name.
    """

    def taken(tensor: torch.Tensor, part: str) -> torch.Tensor:
        # Over 2-D rows of memory: several times faster than advanced indexing.
        memory = tensor.flatten(0, 1).flatten(1)
        out = serial_threads.scratch(
            name + part, (group.pages.numel(), memory.shape[1]), tensor.dtype
        )
        torch.index_select(memory, 0, group.pages.flatten(), out=out)
        return out.view(-1, *tensor.shape[2:])

    values = taken(pages.data, "data")
    if pages.scale is not None and pages.minimum is not None:
        values = _unpacked(values, pages.format.bits, name)
        for tensor, apply in ((pages.scale, torch.Tensor.mul_), (pages.minimum, torch.Tensor.add_)):
            view, factors = _aligned(values, taken(tensor, "group").float(), pages)
            apply(view, factors)
    return values.view(len(group.rows), -1, pages.head_dim)[:, : group.tokens]


def _unpacked(packed: torch.Tensor, bits: int, name: str) -> torch.Tensor:
    """Return codes ``[n, page_size, fields, bytes]`` fp32 of ``[n, page_size, bytes]``."""
    fields = 8 // bits
    shape = (*packed.shape[:2], fields, packed.shape[2])
    values = serial_threads.scratch(name + "values", shape, torch.float32)
    codes = serial_threads.scratch(name + "codes", packed.shape, torch.uint8)
    for field in range(fields):
        torch.bitwise_right_shift(packed, field * bits, out=codes)
        if field < fields - 1:
            codes &= 2**bits - 1
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
