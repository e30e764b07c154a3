"""Which blocks are computed, and which of them need a mask per element."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The blocks to compute, split by whether every score in them counts.

    Attributes:
        full: ``[B or 1, H or 1, Nq, Nk]`` bool: kept, every query sees every key, no token missing.
        partial: Same shape: kept, but causality, padding or the end of the keys hides some scores.
        block_q: Queries a block, 16 to 128.
        block_k: Keys a block, 16 to 128.
        causal: Whether query ``i`` sees keys up to ``i + offset`` only.
        offset: ``Tk - Tq``, tokens.
        key_padding_mask: ``[B, Tk]`` bool, True for a real key, or None.
    """

    full: torch.Tensor
    partial: torch.Tensor
    block_q: int
    block_k: int
    causal: bool
    offset: int
    key_padding_mask: torch.Tensor | None


def make_layout(
    block_mask: torch.Tensor,
    *,
    tokens_q: int,
    tokens_k: int,
    block_q: int,
    block_k: int,
    causal: bool,
    key_padding_mask: torch.Tensor | None,
) -> Layout:
    """Drop kept blocks in which nothing is visible and split the rest into full and partial."""
    device = block_mask.device
    count_q, count_k = block_mask.shape[-2:]
    offset = tokens_k - tokens_q
    first_key = torch.arange(count_k, device=device) * block_k  # [Nk]
    end_key = first_key + block_k
    complete = end_key <= tokens_k
    some = torch.ones_like(complete)
    if key_padding_mask is not None:
        missing = count_k * block_k - tokens_k
        real = torch.nn.functional.pad(key_padding_mask, (0, missing))
        real = real.view(real.shape[0], 1, 1, count_k, block_k)
        some, complete = real.any(dim=-1), real.all(dim=-1)  # [B, 1, 1, Nk]
    if causal:
        first_query = torch.arange(count_q, device=device)[:, None] * block_q  # [Nq, 1]
        last_query = (first_query + block_q).clamp(max=tokens_q) - 1
        some = some & (first_key <= last_query + offset)
        complete = complete & (end_key - 1 <= first_query + offset)
    full = block_mask & complete
    return Layout(
        full=full,
        partial=block_mask & some & ~full,
        block_q=block_q,
        block_k=block_k,
        causal=causal,
        offset=offset,
        key_padding_mask=key_padding_mask,
    )


def mask_from_indices(block_indices: torch.Tensor, count_k: int) -> torch.Tensor:
    """Turn key-block numbers ``[..., M]`` (-1 pads) into a bool mask ``[..., count_k]``."""
    shape = (*block_indices.shape[:-1], count_k + 1)
    mask = torch.zeros(shape, dtype=torch.bool, device=block_indices.device)
    target = torch.where(block_indices < 0, count_k, block_indices).long()
    return mask.scatter_(-1, target, True)[..., :count_k]
