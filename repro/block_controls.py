"""Control masks at the density of a method: blocks chosen at random, or by exact mass.

A control keeps, in each row of blocks, as many blocks as the method did. What it shows: whether the
method's *choice* is worth anything (it must beat random), and how far it is from the best choice.
"""

from __future__ import annotations

import hashlib

import torch

from repro.kernels.xattention_scores import xattention_scores


def random_blocks(
    block_mask: torch.Tensor,
    *,
    forced: torch.Tensor,
    computable: torch.Tensor,
    seed: int,
) -> torch.Tensor:
    """Choose blocks uniformly, as many in each row as ``block_mask`` keeps; forced ones stay.

    Args:
        block_mask: ``[B, H, Nq, Nk]`` bool, what the method kept.
        forced: Bool, broadcastable to it: blocks that stay (sink and diagonal).
        computable: Bool, broadcastable to it: blocks that may be kept at all.
        seed: Fixes the draw, which is made on the CPU so that it means the same everywhere.

    Returns:
        ``[B, H, Nq, Nk]`` bool; a row keeps at least its forced blocks.
    """
    generator = torch.Generator().manual_seed(seed)
    priority = torch.rand(block_mask.shape, generator=generator).to(block_mask.device)
    return keep_highest(priority, block_mask, forced=forced, computable=computable)


def oracle_blocks(
    block_mask: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    forced: torch.Tensor,
    computable: torch.Tensor,
    scale: float,
    block_size: int,
    causal: bool = True,
) -> torch.Tensor:
    """Choose the blocks of the largest exact attention mass, as many as ``block_mask`` keeps.

    Costs a dense attention; the score map is made in chunks.

    Args:
        block_mask: ``[B, H, Nq, Nk]`` bool, what the method kept.
        q: ``[B, H, Tq, D]``.
        k: ``[B, H_kv, Tk, D]``.
        forced: Bool, broadcastable to the mask: blocks that stay.
        computable: Bool, broadcastable to the mask: blocks that may be kept at all.
        scale: Softmax scale.
        block_size: Tokens a block.
        causal: Whether a query sees keys up to its own only.
    """
    mass = exact_block_mass(q, k, scale=scale, block_size=block_size, causal=causal)
    return keep_highest(mass, block_mask, forced=forced, computable=computable)


def exact_block_mass(
    q: torch.Tensor, k: torch.Tensor, *, scale: float, block_size: int, causal: bool = True
) -> torch.Tensor:
    """Return the softmax mass of dense attention per block: ``[B, H, Nq, Nk]`` fp32."""
    return xattention_scores(q, k, stride=1, block_size=block_size, causal=causal, scale=scale)


def keep_highest(
    priority: torch.Tensor,
    block_mask: torch.Tensor,
    *,
    forced: torch.Tensor,
    computable: torch.Tensor,
) -> torch.Tensor:
    """Keep the blocks of highest priority, per row as many as ``block_mask`` keeps.

    Forced blocks come first, then blocks by falling priority; of equal ones the lower block.
    """
    forced = forced & computable
    count = torch.maximum((block_mask & computable).sum(-1), forced.sum(-1))[..., None]
    rank_by = priority.double().masked_fill(forced, torch.inf).masked_fill(~computable, -torch.inf)
    order = rank_by.argsort(dim=-1, descending=True, stable=True)
    kept = torch.arange(block_mask.shape[-1], device=block_mask.device) < count
    return torch.zeros_like(block_mask).scatter(-1, order, kept) & computable


def seed_of(*parts: int | str) -> int:
    """Return a seed in [0, 2**63) that depends on every part, e.g. draw, layer, call number."""
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
