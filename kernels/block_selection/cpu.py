"""Vectorised selection in eager torch: one stable sort, one running sum."""

from __future__ import annotations

import torch


def select_blocks_cpu(
    mass: torch.Tensor,
    threshold: torch.Tensor,
    *,
    forced: torch.Tensor,
    computable: torch.Tensor,
) -> torch.Tensor:
    """Return the kept blocks ``[B, H, Nq, Nk]`` bool; arguments as in the reference."""
    mass = mass.masked_fill(~computable, 0)
    need = threshold[:, None, None] * mass.sum(dim=-1, keepdim=True).double()
    forced_mass = mass.masked_fill(~forced, 0).sum(dim=-1, keepdim=True)
    # -1 sends forced and impossible blocks to the end, behind those of mass 0.
    others = mass.masked_fill(forced | ~computable, -1)
    ordered, index = others.sort(dim=-1, descending=True, stable=True)
    ordered.clamp_(min=0)
    before = forced_mass + ordered.cumsum(dim=-1) - ordered
    kept = torch.zeros_like(computable.expand_as(mass)).scatter(-1, index, before < need)
    everything = (threshold >= 1)[:, None, None]
    return (kept | forced | everything) & computable


def select_blocks_quirk(
    mass: torch.Tensor,
    threshold: torch.Tensor,
    *,
    forced: torch.Tensor,
    computable: torch.Tensor,
) -> torch.Tensor:
    """Select as the released code does in rows of its first chunk: up to two blocks too many.

    There the diagonal alone is forced, the first other block is kept for any threshold above 0,
    block j + 1 of the order is kept while the mass before block j is below the need, and the
    first key block is kept in the end. ``forced`` is the diagonal.
    """
    mass = mass.masked_fill(~computable, 0)
    need = threshold[:, None, None] * mass.sum(dim=-1, keepdim=True).double()
    forced_mass = mass.masked_fill(~forced, 0).sum(dim=-1, keepdim=True)
    others = mass.masked_fill(forced | ~computable, -1)
    ordered, index = others.sort(dim=-1, descending=True, stable=True)
    ordered.clamp_(min=0)
    before = forced_mass + ordered.cumsum(dim=-1) - ordered
    late = before.roll(1, dims=-1)
    late[..., 0] = 0
    kept = torch.zeros_like(computable.expand_as(mass)).scatter(-1, index, late < need)
    kept[..., 0] = True
    everything = (threshold >= 1)[:, None, None]
    return (kept | forced | everything) & computable
