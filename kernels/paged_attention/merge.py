"""Merging of attention over disjoint keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def merge_attention(
    outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge attention of the same queries over disjoint keys into attention over all of them.

    Weights and sums are fp32.

    Args:
        outs: Each ``[..., D]``, one per set of keys.
        lses: Each ``[...]``, log-sum-exps of the scores (natural logarithm), ``-inf`` where a set
            shows the query no key; what the output holds there does not matter.

    Returns:
        Output ``[..., D]`` in the dtype of the first one and lse ``[...]`` fp32; 0 and ``-inf``
        where no set shows a key.

    Raises:
        ValueError: If there is none, or shapes differ.
    """
    if len(outs) == 0 or len(outs) != len(lses):
        raise ValueError(
            f"merge_attention: outs and lses must be equally many, at least one, "
            f"got {len(outs)} and {len(lses)}"
        )
    for out, lse in zip(outs, lses, strict=True):
        if out.shape != outs[0].shape or lse.shape != out.shape[:-1]:
            raise ValueError(
                f"merge_attention: outs must all be [..., D] and lses [...], got "
                f"{tuple(out.shape)} and {tuple(lse.shape)} beside {tuple(outs[0].shape)}"
            )
    return merge_stacked(torch.stack(tuple(outs)), torch.stack(tuple(lses)))


def merge_stacked(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge as ``merge_attention`` over the first dimension of ``[n, ..., D]`` and ``[n, ...]``."""
    lses = lses.float()
    whole = lses.logsumexp(dim=0)
    # Where nothing is seen: subtract 0, so that the weights are exp(-inf) = 0 instead of NaN.
    weights = (lses - whole.masked_fill(whole == -torch.inf, 0.0)).exp_()[..., None]
    merged = (outs.float() * weights).masked_fill_(weights == 0, 0.0).sum(dim=0)
    return merged.to(outs.dtype), whole
