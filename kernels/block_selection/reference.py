"""The definition of the selection: one greedy walk per row, in plain Python."""

from __future__ import annotations

import torch


def select_blocks_reference(
    mass: torch.Tensor,
    threshold: torch.Tensor,
    *,
    forced: torch.Tensor,
    computable: torch.Tensor,
) -> torch.Tensor:
    """Return the kept blocks ``[B, H, Nq, Nk]`` bool; see ``select_blocks``.

    Args:
        mass: ``[B, H, Nq, Nk]`` int64, in fixed point.
        threshold: ``[H]`` fp64.
        forced: ``[B, 1, Nq, Nk]`` bool, blocks that are always kept.
        computable: ``[B, 1, Nq, Nk]`` bool, blocks that may be kept at all.
    """
    kept = torch.zeros(mass.shape, dtype=torch.bool)
    for b, h, m in torch.cartesian_prod(*map(torch.arange, mass.shape[:3])).tolist():
        row = mass[b, h, m].tolist()
        allowed = computable[b, 0, m].tolist()
        chosen = {n for n, flag in enumerate(forced[b, 0, m].tolist()) if flag and allowed[n]}
        total = sum(value for n, value in enumerate(row) if allowed[n])
        need = threshold[h].item() * float(total)
        collected = sum(row[n] for n in chosen)
        others = [n for n in range(len(row)) if allowed[n] and n not in chosen]
        # sorted() is stable: of equal masses the lower block comes first.
        for n in sorted(others, key=lambda n: -row[n]):
            if collected >= need and threshold[h] < 1:
                break
            chosen.add(n)
            collected += row[n]
        kept[b, h, m, list(chosen)] = True
    return kept
