"""Triton kernels: split-K decode, one program per sequence, KV head and share of its tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from repro.kernels.paged_attention.pages import Pages

_LOG2_E = math.log2(math.e)
#: Tokens of a step; half as many where they are wider than 16 bits in registers.
_TILE = 64
#: Fewest tokens for which another split pays its merging.
_SPLIT_TOKENS = 256
#: Programs per multiprocessor: enough loads in flight.
_PROGRAMS = 4
NUM_WARPS, NUM_STAGES = 4, 2


@triton.jit
def _spread(x, GROUP: tl.constexpr, BLOCK_D: tl.constexpr):
    """Repeat each of ``[TILE, groups]`` over the channels of its group."""
    wide = tl.broadcast_to(x[:, :, None], [x.shape[0], x.shape[1], GROUP])
    return tl.reshape(wide, [x.shape[0], BLOCK_D])


@triton.jit
def _load(
    data_ptr,  # of the KV head
    scale_ptr,
    minimum_ptr,
    page,  # [TILE] int64
    within,  # [TILE] token of the page
    valid,  # [TILE]
    head_dim,
    stride_p,
    stride_t,
    stride_gp,
    stride_gt,
    BITS: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Return the values ``[TILE, BLOCK_D]``, 0 where there is none."""
    dim = tl.arange(0, BLOCK_D)
    present = valid[:, None] & (dim < head_dim)[None, :]
    row = page * stride_p + within * stride_t
    if BITS == 16:
        values = tl.load(data_ptr + row[:, None] + dim[None, :], present, other=0.0)
    else:
        PER_BYTE: tl.constexpr = 8 // BITS
        byte = tl.arange(0, BLOCK_D // PER_BYTE)
        held = valid[:, None] & (byte < head_dim // PER_BYTE)[None, :]
        # [TILE, BLOCK_D // PER_BYTE]
        codes = tl.load(data_ptr + row[:, None] + byte[None, :], held, other=0)
        if BITS == 4:
            codes = tl.interleave(codes & 15, codes >> 4)
        if BITS == 2:
            codes = tl.interleave(
                tl.interleave(codes & 3, (codes >> 4) & 3),
                tl.interleave((codes >> 2) & 3, codes >> 6),
            )
        SPREAD: tl.constexpr = BY_TOKEN and GROUP & (GROUP - 1) == 0 and GROUP <= BLOCK_D
        if SPREAD:
            # [TILE, groups]: one load a group, then spread over its channels.
            number = tl.arange(0, BLOCK_D // GROUP)
            held = valid[:, None] & (number < head_dim // GROUP)[None, :]
            group = (page * stride_gp + within * stride_gt)[:, None] + number[None, :]
        elif BY_TOKEN:
            held = present
            group = (page * stride_gp + within * stride_gt)[:, None] + (dim // GROUP)[None, :]
        else:
            # [TILE, BLOCK_D]: the tokens of a group load the same from cache.
            held = present
            group = (page * stride_gp + within // GROUP * stride_gt)[:, None] + dim[None, :]
        scale = tl.load(scale_ptr + group, held, other=0.0).to(tl.float32)
        minimum = tl.load(minimum_ptr + group, held, other=0.0).to(tl.float32)
        if SPREAD:
            scale = _spread(scale, GROUP, BLOCK_D)
            minimum = _spread(minimum, GROUP, BLOCK_D)
        values = codes.to(tl.float32) * scale + minimum
    return values.to(DTYPE)


@triton.jit
def _paged_attention_fwd_kernel(
    q_ptr,
    k_ptr,
    k_scale_ptr,
    k_minimum_ptr,
    v_ptr,
    v_scale_ptr,
    v_minimum_ptr,
    table_ptr,
    lengths_ptr,
    selected_ptr,
    part_ptr,
    part_lse_ptr,
    stride_qn,
    stride_qh,
    stride_kp,
    stride_kh,
    stride_kt,
    stride_kgp,
    stride_kgh,
    stride_kgt,
    stride_vp,
    stride_vh,
    stride_vt,
    stride_vgp,
    stride_vgh,
    stride_vgt,
    stride_tn,
    stride_sn,
    stride_sh,
    kv_heads,
    n_rep,
    n_selected,
    head_dim,
    page_size,
    scale,  # times log2(e)
    SELECTED: tl.constexpr,
    K_BITS: tl.constexpr,
    K_BY_TOKEN: tl.constexpr,
    K_GROUP: tl.constexpr,
    V_BITS: tl.constexpr,
    V_BY_TOKEN: tl.constexpr,
    V_GROUP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    split = tl.program_id(0)
    splits = tl.num_programs(0)
    outer = tl.program_id(1).to(tl.int64)
    sequence = outer // kv_heads
    kv_head = outer % kv_heads
    k_ptr += kv_head * stride_kh
    v_ptr += kv_head * stride_vh
    k_scale_ptr += kv_head * stride_kgh
    k_minimum_ptr += kv_head * stride_kgh
    v_scale_ptr += kv_head * stride_vgh
    v_minimum_ptr += kv_head * stride_vgh
    table_ptr += sequence * stride_tn
    selected_ptr += sequence * stride_sn + kv_head * stride_sh
    length = tl.load(lengths_ptr + sequence)

    rep = tl.arange(0, BLOCK_R)
    dim = tl.arange(0, BLOCK_D)
    real = (rep < n_rep)[:, None] & (dim < head_dim)[None, :]
    head = kv_head * n_rep + rep
    q_ptr += sequence * stride_qn
    # [BLOCK_R, BLOCK_D]: the query heads of one KV head, so that its keys are read once.
    q = tl.load(q_ptr + head[:, None] * stride_qh + dim[None, :], real, other=0.0).to(DTYPE)
    peak = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    # Slots are tokens of the attended pages in the order of the list.
    slots = length
    if SELECTED:
        slots = n_selected * page_size
    share = tl.cdiv(tl.cdiv(slots, splits), TILE) * TILE
    first = split * share
    for start in range(first, tl.minimum(first + share, slots), TILE):
        slot = start + tl.arange(0, TILE)
        within = slot % page_size
        logical = slot // page_size
        valid = slot < slots
        if SELECTED:
            logical = tl.load(selected_ptr + logical, mask=valid, other=-1)
            valid = (logical >= 0) & (logical.to(tl.int64) * page_size + within < length)
        page = tl.load(table_ptr + logical, mask=valid, other=0).to(tl.int64)
        k = _load(
            k_ptr, k_scale_ptr, k_minimum_ptr, page, within, valid, head_dim, stride_kp, stride_kt,
            stride_kgp, stride_kgt, K_BITS, K_BY_TOKEN, K_GROUP, BLOCK_D, DTYPE,
        )  # fmt: skip
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale  # [BLOCK_R, TILE]
        score = tl.where(valid[None, :], score, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(score, 1))
        # Nothing seen yet: subtract 0, so that exp2 gives 0 instead of NaN.
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        probability = tl.exp2(score - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(probability, 1)
        v = _load(
            v_ptr, v_scale_ptr, v_minimum_ptr, page, within, valid, head_dim, stride_vp, stride_vt,
            stride_vgp, stride_vgt, V_BITS, V_BY_TOKEN, V_GROUP, BLOCK_D, DTYPE,
        )  # fmt: skip
        acc = acc * shrink[:, None]
        acc = tl.dot(probability.to(DTYPE), v, acc, input_precision=PRECISION)
        peak = new_peak
    seen = total > 0
    acc = acc / tl.where(seen, total, 1.0)[:, None]
    lse = tl.where(seen, (peak + tl.log2(tl.where(seen, total, 1.0))) * 0.6931471805599453, peak)
    # Parts are contiguous [n_seq, H, splits, D].
    row = (sequence * kv_heads * n_rep + head) * splits + split
    tl.store(part_ptr + row[:, None] * head_dim + dim[None, :], acc, mask=real)
    tl.store(part_lse_ptr + row, lse, mask=rep < n_rep)


@triton.jit
def _paged_attention_merge_kernel(
    part_ptr,
    part_lse_ptr,
    out_ptr,
    lse_ptr,
    splits,
    head_dim,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out = sum of parts weighted by exp(lse of the part - lse)."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, BLOCK_S)
    dim = tl.arange(0, BLOCK_D)
    lses = tl.load(part_lse_ptr + row * splits + split, mask=split < splits, other=float("-inf"))
    peak = tl.max(lses, 0)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    weight = tl.exp(lses - base)
    total = tl.sum(weight, 0)
    present = (split < splits)[:, None] & (dim < head_dim)[None, :]
    # [BLOCK_S, BLOCK_D]
    offset = (row * splits + split)[:, None] * head_dim + dim[None, :]
    parts = tl.load(part_ptr + offset, present, other=0.0)
    divisor = tl.where(total > 0, total, 1.0)
    out = tl.sum(parts * weight[:, None], 0) / divisor
    tl.store(out_ptr + row * head_dim + dim, out.to(out_ptr.dtype.element_ty), dim < head_dim)
    tl.store(lse_ptr + row, tl.where(total > 0, base + tl.log(divisor), peak))


def choose_splits(tokens: int, programs: int, multiprocessors: int) -> int:
    """Return how many programs share a sequence and KV head, at most 128.

    Args:
        tokens: Upper bound of what one attends to; its own length would cost a read-back.
        programs: Sequences times KV heads.
        multiprocessors: Of the GPU.
    """
    wanted = triton.cdiv(_PROGRAMS * multiprocessors, programs)
    return max(1, min(wanted, triton.cdiv(tokens, _SPLIT_TOKENS), 128))


def constants(
    q_dtype: torch.dtype, n_rep: int, head_dim: int, k: Pages, v: Pages, *, selected: bool
) -> dict[str, Any]:
    """Return the compile-time arguments of the decode kernel."""
    dtype = q_dtype
    for pages in (k, v):
        stored = pages.data if pages.scale is None else pages.scale
        dtype = torch.promote_types(dtype, stored.dtype)
    wide = dtype == torch.float32 or k.format.quantized or v.format.quantized
    names = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    return {
        "SELECTED": selected,
        "K_BITS": k.format.bits,
        "K_BY_TOKEN": k.format.axis == "token",
        "K_GROUP": k.group_size,
        "V_BITS": v.format.bits,
        "V_BY_TOKEN": v.format.axis == "token",
        "V_GROUP": v.group_size,
        "BLOCK_R": max(16, triton.next_power_of_2(n_rep)),
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "TILE": _TILE // 2 if wide else _TILE,
        "DTYPE": names[dtype],
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }


def paged_attention_triton(
    q: torch.Tensor,
    k: Pages,
    v: Pages,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    *,
    selected: torch.Tensor | None = None,
    scale: float,
    splits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output ``[n_seq, H, D]`` and the log-sum-exp ``[n_seq, H]`` fp32.

    ``splits`` overrides how many programs share a sequence and KV head.
    """
    q = q if q.stride(2) == 1 else q.contiguous()
    page_table, lengths = page_table.contiguous(), lengths.contiguous()
    n_seq, heads, dim = q.shape
    kv_heads, n_rep = k.kv_heads, heads // k.kv_heads
    picked = page_table[:, None] if selected is None else selected.contiguous()
    if splits is None:
        properties = torch.cuda.get_device_properties(q.device)
        splits = choose_splits(
            picked.shape[2] * k.page_size, n_seq * kv_heads, properties.multi_processor_count
        )
    parts = torch.empty(n_seq, heads, splits, dim, dtype=torch.float32, device=q.device)
    part_lses = torch.empty(n_seq, heads, splits, dtype=torch.float32, device=q.device)
    out = torch.empty(n_seq, heads, dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(n_seq, heads, dtype=torch.float32, device=q.device)
    # Without groups: never read.
    k_scale, k_minimum = (k.data if x is None else x for x in (k.scale, k.minimum))
    v_scale, v_minimum = (v.data if x is None else x for x in (v.scale, v.minimum))
    static = constants(q.dtype, n_rep, dim, k, v, selected=selected is not None)
    _paged_attention_fwd_kernel[(splits, n_seq * kv_heads)](
        q,
        k.data,
        k_scale,
        k_minimum,
        v.data,
        v_scale,
        v_minimum,
        page_table,
        lengths,
        picked,
        parts,
        part_lses,
        *q.stride()[:2],
        *k.data.stride()[:3],
        *k_scale.stride()[:3],
        *v.data.stride()[:3],
        *v_scale.stride()[:3],
        page_table.stride(0),
        *picked.stride()[:2],
        kv_heads,
        n_rep,
        picked.shape[2],
        dim,
        k.page_size,
        scale * _LOG2_E,
        **static,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )
    _paged_attention_merge_kernel[(n_seq * heads,)](
        parts,
        part_lses,
        out,
        lse,
        splits,
        dim,
        BLOCK_S=triton.next_power_of_2(splits),
        BLOCK_D=static["BLOCK_D"],
        num_warps=4,
    )
    return out, lse
