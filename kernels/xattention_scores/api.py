"""Public function of the antidiagonal scores: checks and dispatch."""

from __future__ import annotations

import math
from typing import Any

import torch

_NAME = "xattention_scores"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_HEAD_DIM = 256
PATTERNS = ("antidiagonal", "diagonal", "random")


def xattention_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    stride: int,
    block_size: int = 128,
    causal: bool = True,
    scale: float | None = None,
    key_padding_mask: torch.Tensor | None = None,
    pattern: str = "antidiagonal",
    seed: int = 0,
    chunk_size: int | None = None,
) -> torch.Tensor:
    """Estimate how much attention each query block pays to each key block.

    Tokens are taken in groups of ``stride``; group i of the queries and group j of the keys score
    ``R[i, j] = sum_s q[i * stride + stride - 1 - s] . k[j * stride + s]``, one antidiagonal of the
    tile. The softmax of ``R * scale / stride`` over the visible groups, summed over the groups of
    a query block and of a key block, is the mass. With stride 1 it is exact. Products accumulate
    in fp32, softmax and sums are fp32; the CPU path rounds R to the input dtype before the
    softmax, as a matmul does. Tokens that pad (beyond the end of a short group too) score 0 and
    groups made of them alone are hidden, also without the causal rule.

    Args:
        q: ``[B, H, Tq, D]``, fp16, bf16 or fp32, any strides, ``D <= 256``.
        k: ``[B, H_kv, Tk, D]``, ``H`` a multiple of ``H_kv``; never expanded.
        stride: Tokens a group, a power of two that divides ``block_size``.
        block_size: Tokens a block, a power of two from 16 to 128.
        causal: Whether a query sees keys up to its own only, ``j <= i + Tk - Tq``. A group is
            visible as soon as one of its pairs is.
        scale: Softmax scale of the attention, ``D ** -0.5`` if None.
        key_padding_mask: ``[B, Tk]`` bool, True for a real key. The queries are the last ``Tq``
            of these tokens when causal or ``Tq == Tk``, and all real otherwise.
        pattern: ``antidiagonal``, ``diagonal`` (query s meets key s) or ``random`` (a permutation
            drawn from ``seed``): which ``stride`` pairs of a tile are added up.
        seed: Seed of the random pattern.
        chunk_size: Query tokens scored at a time on the CPU; bounds memory, changes nothing else.

    Returns:
        ``[B, H, ceil(Tq / block_size), ceil(Tk / block_size)]`` fp32. A row sums to the number of
        its real groups, ``block_size / stride`` for a full block.

    Raises:
        ValueError: If a shape, dtype, device or option breaks a rule above.

    Source: arXiv:2503.16428, section 2.1.
    """
    _check_tensors(q, k)
    check_grouping(stride, block_size)
    if causal and q.shape[2] > k.shape[2]:
        raise ValueError(
            f"{_NAME}: Tq must be at most Tk when causal, got {q.shape[2]} and {k.shape[2]}"
        )
    if pattern not in PATTERNS:
        raise ValueError(f"{_NAME}: pattern must be one of {', '.join(PATTERNS)}, got {pattern!r}")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"{_NAME}: scale must be finite, got {scale}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"{_NAME}: chunk_size must be at least 1, got {chunk_size}")
    real_q = real_k = None
    if key_padding_mask is not None:
        if key_padding_mask.dtype != torch.bool or key_padding_mask.shape != k.shape[::2]:
            raise ValueError(
                f"{_NAME}: key_padding_mask must be bool [B, Tk] = {list(k.shape[::2])}, got "
                f"{key_padding_mask.dtype} {list(key_padding_mask.shape)}"
            )
        real_k = key_padding_mask
        if causal or q.shape[2] == k.shape[2]:
            real_q = key_padding_mask[:, k.shape[2] - q.shape[2] :]
    options: dict[str, Any] = {
        "order": pairing(pattern, stride, seed),
        "block_size": block_size,
        "causal": causal,
        "scale": q.shape[3] ** -0.5 if scale is None else float(scale),
        "real_q": real_q,
        "real_k": real_k,
    }
    with torch.no_grad():
        if q.is_cuda:
            from repro.kernels.xattention_scores.kernel import xattention_scores_triton

            return xattention_scores_triton(q, k, **options)
        from repro.kernels.xattention_scores.cpu import xattention_scores_cpu

        return xattention_scores_cpu(q, k, **options, chunk_size=chunk_size)


def pairing(pattern: str, stride: int, seed: int = 0) -> torch.Tensor:
    """Return which query of a group meets key 0, 1, ... of a group: ``[stride]`` int64."""
    if pattern == "antidiagonal":
        return torch.arange(stride - 1, -1, -1)
    if pattern == "diagonal":
        return torch.arange(stride)
    return torch.randperm(stride, generator=torch.Generator().manual_seed(seed))


def check_grouping(stride: int, block_size: int) -> None:
    """Raise ValueError unless ``stride`` and ``block_size`` are powers of two that fit."""
    if block_size not in (16, 32, 64, 128):
        raise ValueError(f"{_NAME}: block_size must be 16, 32, 64 or 128, got {block_size}")
    if stride < 1 or block_size % stride:
        raise ValueError(f"{_NAME}: stride must divide block_size {block_size}, got {stride}")


def _check_tensors(q: torch.Tensor, k: torch.Tensor) -> None:
    """Raise ValueError unless ``q`` and ``k`` fit together."""
    for name, x in (("q", q), ("k", k)):
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(f"{_NAME}: {name} must be [B, H, T, D], none 0, got {list(x.shape)}")
        if x.dtype not in _DTYPES:
            raise ValueError(f"{_NAME}: {name} must be fp16, bf16 or fp32, got {x.dtype}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"{_NAME}: q and k must agree in B and D, got {list(q.shape)} and {list(k.shape)}"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{_NAME}: H must be a multiple of H_kv, got {q.shape[1]} and {k.shape[1]}"
        )
    if q.dtype != k.dtype or q.device != k.device:
        raise ValueError(
            f"{_NAME}: q and k must share dtype and device, got {q.dtype} on {q.device} and "
            f"{k.dtype} on {k.device}"
        )
    if q.shape[3] > _MAX_HEAD_DIM:
        raise ValueError(f"{_NAME}: D must be at most {_MAX_HEAD_DIM}, got {q.shape[3]}")
