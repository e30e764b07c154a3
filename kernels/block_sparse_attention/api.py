"""Public function of block-sparse attention: checks, dispatch, gradients."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, Literal, overload

import torch

from repro.kernels.block_sparse_attention.layout import Layout, make_layout, mask_from_indices

_NAME = "block_sparse_attention"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_HEAD_DIM = 256


@overload
def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_mask: torch.Tensor | None = ...,
    *,
    block_indices: torch.Tensor | None = ...,
    block_size: int | tuple[int, int] = ...,
    causal: bool = ...,
    scale: float | None = ...,
    key_padding_mask: torch.Tensor | None = ...,
    return_lse: Literal[False] = ...,
) -> torch.Tensor: ...


@overload
def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_mask: torch.Tensor | None = ...,
    *,
    block_indices: torch.Tensor | None = ...,
    block_size: int | tuple[int, int] = ...,
    causal: bool = ...,
    scale: float | None = ...,
    key_padding_mask: torch.Tensor | None = ...,
    return_lse: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...


def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_mask: torch.Tensor | None = None,
    *,
    block_indices: torch.Tensor | None = None,
    block_size: int | tuple[int, int] = (128, 128),
    causal: bool = True,
    scale: float | None = None,
    key_padding_mask: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend to the keys of the kept blocks only; dropped blocks cost nothing.

    Query ``i`` sees key ``j`` if its block is kept, the key is real and, when causal,
    ``j <= i + Tk - Tq`` (bottom-right aligned, as in chunked prefill). A query that sees no key
    gives 0, lse ``-inf`` and no gradient. Scores and sums accumulate in fp32. Differentiable in
    ``q``, ``k`` and ``v``; ``lse`` carries no gradient.

    Args:
        q: ``[B, H, Tq, D]``, fp16, bf16 or fp32, any strides, ``D <= 256``.
        k: ``[B, H_kv, Tk, D]``, ``H`` a multiple of ``H_kv``.
        v: ``[B, H_kv, Tk, D]``.
        block_mask: ``[B or 1, H or 1, Nq, Nk]`` bool, True for a kept block, with
            ``Nq = ceil(Tq / block_q)`` and ``Nk = ceil(Tk / block_k)``. Blocks that the causal
            rule hides may be set or not.
        block_indices: Instead of the mask, ``[B or 1, H or 1, Nq, M]`` int32 or int64: numbers of
            the kept key blocks in any order, -1 for an unused slot.
        block_size: Tokens a block, ``(block_q, block_k)`` or one number for both: 16, 32, 64, 128.
        causal: Whether the causal rule applies.
        scale: Factor on the scores, ``D ** -0.5`` if None.
        key_padding_mask: ``[B, Tk]`` bool, True for a real key. Block grids lie on the padded axis.
        return_lse: Also return the log-sum-exp of the visible scores.

    Returns:
        ``[B, H, Tq, D]`` in the dtype of ``q``; with ``return_lse`` also ``[B, H, Tq]`` fp32
        (natural logarithm), with which results over disjoint keys merge exactly.

    Raises:
        ValueError: If a shape, dtype, device or block size breaks a rule above. Block numbers out
            of range are found on the CPU only, since looking would stall a GPU.
    """
    block_q, block_k = _checked_block_size(block_size)
    _check_tensors(q, k, v)
    count_q, count_k = math.ceil(q.shape[2] / block_q), math.ceil(k.shape[2] / block_k)
    mask = _checked_mask(q, block_mask, block_indices, count_q, count_k)
    if key_padding_mask is not None:
        _check_padding(k, key_padding_mask)
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"{_NAME}: scale must be finite, got {scale}")
    layout = make_layout(
        mask,
        tokens_q=q.shape[2],
        tokens_k=k.shape[2],
        block_q=block_q,
        block_k=block_k,
        causal=causal,
        key_padding_mask=key_padding_mask,
    )
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    out, lse = _BlockSparseAttention.apply(q, k, v, layout, scale)
    return (out, lse) if return_lse else out


def _backend(q: torch.Tensor) -> ModuleType:
    """Return the module whose ``forward`` and ``backward`` run on the device of ``q``."""
    if q.is_cuda:
        from repro.kernels.block_sparse_attention import kernel

        return kernel
    from repro.kernels.block_sparse_attention import cpu

    return cpu


class _BlockSparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: Layout,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = _backend(q).forward(q, k, v, layout, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout, ctx.scale = layout, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        backend = _backend(grad_out)
        grads = backend.backward(*ctx.saved_tensors, grad_out, ctx.layout, ctx.scale)
        return *grads, None, None


def _checked_block_size(block_size: int | tuple[int, int]) -> tuple[int, int]:
    sizes = (block_size, block_size) if isinstance(block_size, int) else tuple(block_size)
    if len(sizes) != 2 or any(size not in (16, 32, 64, 128) for size in sizes):
        raise ValueError(
            f"{_NAME}: block_size must be one or two of 16, 32, 64, 128, got {block_size}"
        )
    return sizes


def _check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    if q.ndim != 4 or 0 in q.shape or q.shape[3] > _MAX_HEAD_DIM:
        raise ValueError(
            f"{_NAME}: q must be [B, H, Tq, D], none of them 0 and D <= {_MAX_HEAD_DIM}, "
            f"got {tuple(q.shape)}"
        )
    if q.dtype not in _DTYPES:
        raise ValueError(f"{_NAME}: q must be float16, bfloat16 or float32, got {q.dtype}")
    batch, heads, _, dim = q.shape
    fits = k.ndim == 4 and k.shape[0] == batch and k.shape[3] == dim and 0 not in k.shape
    if not fits or heads % k.shape[1] != 0:
        raise ValueError(
            f"{_NAME}: k must be [B={batch}, H_kv dividing {heads}, Tk > 0, D={dim}], "
            f"got {tuple(k.shape)}"
        )
    if v.shape != k.shape:
        raise ValueError(
            f"{_NAME}: v must have the shape of k, {tuple(k.shape)}, got {tuple(v.shape)}"
        )
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"{_NAME}: {name} must have the dtype and device of q, {q.dtype} on {q.device}, "
                f"got {tensor.dtype} on {tensor.device}"
            )


def _checked_mask(
    q: torch.Tensor,
    block_mask: torch.Tensor | None,
    block_indices: torch.Tensor | None,
    count_q: int,
    count_k: int,
) -> torch.Tensor:
    """Return the checked block mask ``[B or 1, H or 1, Nq, Nk]``."""
    if (block_mask is None) == (block_indices is None):
        given = "neither" if block_mask is None else "both"
        raise ValueError(
            f"{_NAME}: exactly one of block_mask and block_indices must be given, got {given}"
        )
    if block_mask is not None:
        _check_grid(q, "block_mask", block_mask, count_q, f"{count_k}")
        if block_mask.dtype != torch.bool or block_mask.shape[3] != count_k:
            raise ValueError(
                f"{_NAME}: block_mask must be bool with {count_k} key blocks, "
                f"got {block_mask.dtype} with {block_mask.shape[3]}"
            )
        return block_mask
    assert block_indices is not None  # for the type checker: exactly one is given
    _check_grid(q, "block_indices", block_indices, count_q, "M")
    if block_indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{_NAME}: block_indices must be int32 or int64, got {block_indices.dtype}"
        )
    if not q.is_cuda and block_indices.numel():
        low, high = block_indices.aminmax()
        if low < -1 or high >= count_k:
            raise ValueError(
                f"{_NAME}: block_indices must lie in [-1, {count_k - 1}], "
                f"got {int(low)} to {int(high)}"
            )
    return mask_from_indices(block_indices, count_k)


def _check_grid(q: torch.Tensor, name: str, grid: torch.Tensor, count_q: int, last: str) -> None:
    batch, heads = q.shape[:2]
    fits = (
        grid.ndim == 4
        and grid.shape[0] in (1, batch)
        and grid.shape[1] in (1, heads)
        and grid.shape[2] == count_q
    )
    if not fits or grid.device != q.device:
        raise ValueError(
            f"{_NAME}: {name} must be [1 or {batch}, 1 or {heads}, {count_q}, {last}] "
            f"on {q.device}, got {tuple(grid.shape)} on {grid.device}"
        )


def _check_padding(k: torch.Tensor, mask: torch.Tensor) -> None:
    expected = (k.shape[0], k.shape[2])
    if tuple(mask.shape) != expected or mask.dtype != torch.bool or mask.device != k.device:
        raise ValueError(
            f"{_NAME}: key_padding_mask must be bool {expected} on {k.device}, "
            f"got {mask.dtype} {tuple(mask.shape)} on {mask.device}"
        )
