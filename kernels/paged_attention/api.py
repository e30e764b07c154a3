"""Public function of paged decode attention: checks and dispatch."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch

from repro.kernels.paged_attention.pages import Pages

_NAME = "paged_attention"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_HEAD_DIM = 256


@overload
def paged_attention(
    q: torch.Tensor,
    k: Pages,
    v: Pages,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    *,
    selected: torch.Tensor | None = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
) -> torch.Tensor: ...


@overload
def paged_attention(
    q: torch.Tensor,
    k: Pages,
    v: Pages,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    *,
    selected: torch.Tensor | None = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...


def paged_attention(
    q: torch.Tensor,
    k: Pages,
    v: Pages,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    *,
    selected: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend from one query per sequence to the tokens of its pages, all or selected ones.

    Scores and sums accumulate in fp32; packed pages are dequantised on the way, never as a whole.
    For decoding only: no gradients.

    Args:
        q: ``[n_seq, H, D]``, fp16, bf16 or fp32; ``D`` a multiple of 8, at most 256.
        k: Keys, ``H_kv`` a divisor of ``H``; query head ``h`` belongs to KV head
            ``h // (H // H_kv)``.
        v: Values of the same number, heads, size and width of pages; the format may differ.
        page_table: ``[n_seq, n_pages_max]`` int32: logical page -> page of the pool. Entries past a
            sequence's last page are never read.
        lengths: ``[n_seq]`` int32, tokens held; token ``t`` is in logical page ``t // page_size``.
            What lies behind them in the last page does not matter.
        selected: ``[n_seq, H_kv, n_selected]`` int32 logical pages that a KV head attends to, in
            any order, each at most once; -1 pads, and pages that begin at or behind the
            length contribute nothing. None attends to all pages.
        scale: Factor on the scores, ``D ** -0.5`` if None.
        return_lse: Also return the log-sum-exp of the attended scores.

    Returns:
        ``[n_seq, H, D]`` in the dtype of ``q``; with ``return_lse`` also ``[n_seq, H]`` fp32
        (natural logarithm), for ``merge_attention``. 0 and ``-inf`` where nothing is attended.

    Raises:
        TypeError: If a dtype breaks a rule above.
        ValueError: If a shape, device or layout does. Lengths and page numbers out of range and
            pages selected twice are found on the CPU only, since looking would stall a GPU.
        NotImplementedError: If a gradient is asked for.
    """
    _check_query(q, k)
    _check_pages(q, k, v)
    _check_lists(q, k, page_table, lengths, selected)
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"{_NAME}: scale must be finite, got {scale}")
    if torch.is_grad_enabled() and (
        q.requires_grad or k.data.requires_grad or v.data.requires_grad
    ):
        raise NotImplementedError(
            f"{_NAME}: q, k and v must not require gradients, which this kernel has none of; "
            "call it under torch.no_grad()"
        )
    scale = q.shape[2] ** -0.5 if scale is None else float(scale)
    if q.is_cuda:
        from repro.kernels.paged_attention.kernel import paged_attention_triton

        out, lse = paged_attention_triton(
            q, k, v, page_table, lengths, selected=selected, scale=scale
        )
    else:
        from repro.kernels.paged_attention.cpu import paged_attention_cpu

        _check_numbers(k, page_table, lengths, selected)
        out, lse = paged_attention_cpu(q, k, v, page_table, lengths, selected=selected, scale=scale)
    return (out, lse) if return_lse else out


def _check_query(q: torch.Tensor, k: Pages) -> None:
    if q.ndim != 3 or 0 in q.shape or q.shape[2] % 8 or q.shape[2] > _MAX_HEAD_DIM:
        raise ValueError(
            f"{_NAME}: q must be [n_seq, H, D], none of them 0 and D a multiple of 8 up to "
            f"{_MAX_HEAD_DIM}, got {tuple(q.shape)}"
        )
    if q.dtype not in _DTYPES:
        raise TypeError(f"{_NAME}: q must be float16, bfloat16 or float32, got {q.dtype}")
    if k.data.ndim != 4 or 0 in k.data.shape or q.shape[1] % k.kv_heads:
        raise ValueError(
            f"{_NAME}: k must hold [n_pages, H_kv dividing {q.shape[1]}, page_size, D], "
            f"none of them 0, got {tuple(k.data.shape)}"
        )


def _check_pages(q: torch.Tensor, k: Pages, v: Pages) -> None:
    shape = (k.n_pages, k.kv_heads, k.page_size, q.shape[2])
    for name, pages in (("k", k), ("v", v)):
        found = (pages.n_pages, pages.kv_heads, pages.page_size, pages.head_dim)
        if pages.data.ndim != 4 or found != shape:
            raise ValueError(
                f"{_NAME}: {name} must hold [n_pages, H_kv, page_size, D] = {shape}, got {found}"
            )
        quantized = pages.format.quantized
        if (pages.data.dtype == torch.uint8) != quantized:
            raise TypeError(
                f"{_NAME}: {name} must hold {'uint8' if quantized else 'floating values'} with "
                f"{pages.format.bits} bits, got {pages.data.dtype}"
            )
        if (pages.scale is None or pages.minimum is None) == quantized:
            raise ValueError(
                f"{_NAME}: {name} must have scale and minimum if and only if it is packed, got "
                f"{pages.format.bits} bits"
            )
        for tensor in (pages.data, pages.scale, pages.minimum):
            if tensor is None:
                continue
            if tensor.device != q.device:
                raise ValueError(
                    f"{_NAME}: {name} must be on the device of q, {q.device}, got {tensor.device}"
                )
            if tensor.dtype not in (*_DTYPES, torch.uint8):
                raise TypeError(
                    f"{_NAME}: {name} must be float16, bfloat16 or float32, got {tensor.dtype}"
                )
            if not tensor.is_contiguous():
                raise ValueError(
                    f"{_NAME}: {name} must be contiguous, got strides {tensor.stride()}"
                )


def _check_lists(
    q: torch.Tensor,
    k: Pages,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    selected: torch.Tensor | None,
) -> None:
    n_seq = q.shape[0]
    lists: list[tuple[str, torch.Tensor, tuple[int | str, ...]]] = [
        ("page_table", page_table, (n_seq, "n_pages_max")),
        ("lengths", lengths, (n_seq,)),
    ]
    if selected is not None:
        lists.append(("selected", selected, (n_seq, k.kv_heads, "n_selected")))
    for name, tensor, shape in lists:
        fits = tensor.ndim == len(shape) and all(
            isinstance(wanted, str) or wanted == size
            for wanted, size in zip(shape, tensor.shape, strict=True)
        )
        if not fits or tensor.device != q.device:
            wanted = ", ".join(str(size) for size in shape)
            raise ValueError(
                f"{_NAME}: {name} must be [{wanted}] on {q.device}, got {tuple(tensor.shape)} "
                f"on {tensor.device}"
            )
        if tensor.dtype != torch.int32:
            raise TypeError(f"{_NAME}: {name} must be int32, got {tensor.dtype}")


def _check_numbers(
    k: Pages, page_table: torch.Tensor, lengths: torch.Tensor, selected: torch.Tensor | None
) -> None:
    least, most = (int(x) for x in lengths.aminmax())
    limit = page_table.shape[1] * k.page_size
    if least < 0 or most > limit:
        raise ValueError(
            f"{_NAME}: lengths must lie in [0, {limit}] (the pages of page_table), "
            f"got {least} to {most}"
        )
    if selected is not None and selected.numel() and int(selected.min()) < -1:
        raise ValueError(f"{_NAME}: selected must be -1 or more, got {int(selected.min())}")
    used = torch.arange(page_table.shape[1]) * k.page_size < lengths[:, None]
    wrong = page_table[used & ((page_table < 0) | (page_table >= k.n_pages))]
    if len(wrong):
        raise ValueError(
            f"{_NAME}: page_table must name pages in [0, {k.n_pages - 1}] up to the length, "
            f"got {int(wrong[0])}"
        )
