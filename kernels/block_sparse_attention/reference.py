"""The definition of block-sparse attention: eager, fp32 inside, every score computed."""

from __future__ import annotations

import torch


def block_sparse_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_mask: torch.Tensor,
    *,
    block_size: tuple[int, int] = (128, 128),
    causal: bool = True,
    scale: float | None = None,
    key_padding_mask: torch.Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to the keys of the kept blocks; differentiable in ``q``, ``k`` and ``v``.

    Query ``i`` sees key ``j`` if block ``(i // block_q, j // block_k)`` is kept, the key is real,
    and, when causal, ``j <= i + Tk - Tq``. A query that sees no key gives 0 and lse ``-inf``.

    Args:
        q: ``[B, H, Tq, D]``.
        k: ``[B, H_kv, Tk, D]``, ``H`` a multiple of ``H_kv``.
        v: ``[B, H_kv, Tk, D]``.
        block_mask: ``[B or 1, H or 1, ceil(Tq / block_q), ceil(Tk / block_k)]`` bool.
        block_size: ``(block_q, block_k)`` tokens.
        causal: Whether the causal rule above applies.
        scale: Factor on the scores, ``D ** -0.5`` if None.
        key_padding_mask: ``[B, Tk]`` bool, True for a real key.
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
        visible = (
            block_mask.repeat_interleave(block_size[0], dim=2)[:, :, :tokens_q]
            .repeat_interleave(block_size[1], dim=3)[..., :tokens_k]
            .expand_as(scores)
        )
        if causal:
            position = torch.arange(tokens_q, device=q.device) + tokens_k - tokens_q
            visible = visible & (torch.arange(tokens_k, device=q.device) <= position[:, None])
        if key_padding_mask is not None:
            visible = visible & key_padding_mask[:, None, None, :]
        scores = scores.masked_fill(~visible, -torch.inf)
        sees_a_key = visible.any(dim=-1)
        # A row without visible key: finite scores keep its gradient at zero instead of NaN.
        scores = scores.masked_fill(~sees_a_key[..., None], 0.0)
        probability = scores.softmax(dim=-1) * sees_a_key[..., None]
        lse = scores.logsumexp(dim=-1).masked_fill(~sees_a_key, -torch.inf)
        return (probability @ values).to(q.dtype), lse
