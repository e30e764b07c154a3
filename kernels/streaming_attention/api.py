"""Public function of streaming attention: checks and dispatch."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch

_NAME = "streaming_attention"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_HEAD_DIM = 256


@overload
def streaming_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    sink_size: int,
    window_size: int | None = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
) -> torch.Tensor: ...


@overload
def streaming_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    sink_size: int,
    window_size: int | None = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...


def streaming_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    sink_size: int,
    window_size: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend to the first tokens (attention sinks) and the latest ones, in prefill or its chunks.

    The query of row ``i`` is token ``t = i + Tk - Tq``. It sees key ``j`` iff ``j <= t`` and
    (``j < sink_size`` or ``j > t - window_size``). Time is proportional to
    ``Tq * (sink_size + window_size)``. Scores and sums accumulate in fp32. Forward only: there is
    no gradient.

    A cache that keeps ``sink_size + recent_size`` tokens between chunks of a prefill follows
    another rule: within a chunk everything is visible. There concatenate cache and chunk and leave
    ``window_size`` None.

    Args:
        q: ``[B, H, Tq, D]``, fp16, bf16 or fp32, any strides, ``D <= 256``: the last ``Tq`` of
            the ``Tk`` tokens.
        k: ``[B, H_kv, Tk, D]``, ``H`` a multiple of ``H_kv``, ``Tk >= Tq``.
        v: ``[B, H_kv, Tk, D]``.
        sink_size: First tokens of the keys that every later query sees, 0 or more.
        window_size: Latest tokens that a query sees, its own included, 1 or more; None means all
            (causal attention).
        scale: Factor on the scores, ``D ** -0.5`` if None.
        return_lse: Also return the log-sum-exp of the visible scores.

    Returns:
        ``[B, H, Tq, D]`` in the dtype of ``q``; with ``return_lse`` also ``[B, H, Tq]`` fp32
        (natural logarithm).

    Raises:
        ValueError: If a shape, dtype, device or size breaks a rule above.
        NotImplementedError: If a gradient is asked for.

    Source: arXiv:2309.17453, section 3.2; as the streaming heads of arXiv:2410.10819, section 2.
    """
    _check_tensors(q, k, v)
    if sink_size < 0:
        raise ValueError(f"{_NAME}: sink_size must be at least 0, got {sink_size}")
    if window_size is not None and window_size < 1:
        raise ValueError(f"{_NAME}: window_size must be at least 1 or None, got {window_size}")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"{_NAME}: scale must be finite, got {scale}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise NotImplementedError(
            f"{_NAME}: q, k and v must need no gradient, got one that does; call it under "
            f"torch.no_grad()"
        )
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    # What reaches before the first key reaches no further than it.
    window = k.shape[2] if window_size is None else min(window_size, k.shape[2])
    sink = min(sink_size, k.shape[2])
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    if q.is_cuda:
        from repro.kernels.streaming_attention import kernel

        out, lse = kernel.forward(q, k, v, sink, window, scale)
    else:
        from repro.kernels.streaming_attention import cpu

        out, lse = cpu.forward(q, k, v, sink, window, scale)
    return (out, lse) if return_lse else out


def _check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    if q.ndim != 4 or 0 in q.shape or q.shape[3] > _MAX_HEAD_DIM:
        raise ValueError(
            f"{_NAME}: q must be [B, H, Tq, D], none of them 0 and D <= {_MAX_HEAD_DIM}, "
            f"got {list(q.shape)}"
        )
    if q.dtype not in _DTYPES:
        raise ValueError(f"{_NAME}: q must be float16, bfloat16 or float32, got {q.dtype}")
    batch, heads, tokens, dim = q.shape
    fits = k.ndim == 4 and 0 not in k.shape and (k.shape[0], k.shape[3]) == (batch, dim)
    if not fits or heads % k.shape[1] or k.shape[2] < tokens:
        raise ValueError(
            f"{_NAME}: k must be [B={batch}, H_kv dividing {heads}, Tk >= {tokens}, D={dim}], "
            f"got {list(k.shape)}"
        )
    if v.shape != k.shape:
        raise ValueError(
            f"{_NAME}: v must have the shape of k, {list(k.shape)}, got {list(v.shape)}"
        )
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"{_NAME}: {name} must have the dtype and device of q, {q.dtype} on {q.device}, "
                f"got {tensor.dtype} on {tensor.device}"
            )
