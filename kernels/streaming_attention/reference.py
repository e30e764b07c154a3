"""The definition of streaming attention: eager, fp32 inside, every score computed."""

from __future__ import annotations

import torch


def streaming_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    sink_size: int,
    window_size: int | None = None,
    scale: float | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to sinks and window; the query of token ``t = row + Tk - Tq`` sees key ``j`` iff
    ``j <= t`` and (``j < sink_size`` or ``j > t - window_size``).

    Args:
        q: ``[B, H, Tq, D]``, the last ``Tq`` of the ``Tk`` tokens.
        k: ``[B, H_kv, Tk, D]``, ``H`` a multiple of ``H_kv``.
        v: ``[B, H_kv, Tk, D]``.
        sink_size: First tokens, which all later ones see.
        window_size: Latest tokens that a query sees, its own included; None sees all.
        scale: Factor on the scores, ``D ** -0.5`` if None.
        compute_dtype: Dtype of scores and probabilities; None means fp32, or fp64 for fp64 inputs.

    Returns:
        Output ``[B, H, Tq, D]`` in the dtype of ``q`` and the log-sum-exp of the visible scores
        (natural logarithm), ``[B, H, Tq]`` in the compute dtype.
    """
    heads, tokens_q, tokens_k = q.shape[1], q.shape[2], k.shape[2]
    compute = compute_dtype or torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    with torch.autocast(q.device.type, enabled=False):
        n_rep = heads // k.shape[1]
        keys = k.to(compute).repeat_interleave(n_rep, dim=1)
        values = v.to(compute).repeat_interleave(n_rep, dim=1)
        scores = q.to(compute) @ keys.mT * scale  # [B, H, Tq, Tk]
        key = torch.arange(tokens_k, device=q.device)
        position = key[tokens_k - tokens_q :, None]
        visible = key <= position
        if window_size is not None:
            visible = visible & ((key < sink_size) | (key > position - window_size))
        scores = scores.masked_fill(~visible, -torch.inf)
        return (scores.softmax(dim=-1) @ values).to(q.dtype), scores.logsumexp(dim=-1)
