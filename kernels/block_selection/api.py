"""Public function of the block selection: checks, fixed point, dispatch."""

from __future__ import annotations

from typing import Any

import torch

_NAME = "select_blocks"
# Masses become integers of this unit, so that sums do not depend on their order and every
# implementation agrees on ties: 2**40 leaves 12 bits for the sum of a row before fp64 rounds it.
MASS_UNITS = 2.0**40


def select_blocks(
    mass: torch.Tensor,
    threshold: float | torch.Tensor,
    *,
    causal: bool = True,
    query_offset: int = 0,
    block_size: int = 128,
    keep_sink: bool = True,
    keep_recent: bool = True,
    real_blocks: torch.Tensor | None = None,
    quirk_rows: int = 0,
) -> torch.Tensor:
    """Keep the fewest blocks of each row that collect ``threshold`` of its mass.

    Forced blocks come first and count; then blocks by falling mass, of equal ones the lower
    first, while the mass collected before a block is less than ``threshold`` times the row's sum.
    So the block that crosses the threshold is kept. Sums are exact: masses are taken in units of
    ``2**-40`` (smaller ones count as 0), the product with the threshold is fp64.

    Args:
        mass: ``[B, H, Nq, Nk]`` fp32 or fp64, >= 0; a row may sum to 4096.
        threshold: Share of the mass in [0, 1], or one per query head ``[H]``. From 1 on every
            computable block is kept, of whatever mass.
        causal: Whether only blocks up to the diagonal may be kept.
        query_offset: Position of the first query on the key axis, ``Tk - Tq`` tokens. Where no
            block divides it, the queries of a block lie in two key blocks: both are its diagonal.
        block_size: Tokens a block; together with ``query_offset`` it places the diagonal.
        keep_sink: Whether the first key block is forced (causal only).
        keep_recent: Whether the diagonal is forced (causal only).
        real_blocks: ``[B, Nk]`` bool, key blocks that hold a real token; under left padding the
            first of them is the sink. None if all do.
        quirk_rows: The first so many rows are selected as the released code does in a first
            chunk, which keeps up to two blocks too many.

    Returns:
        ``[B, H, Nq, Nk]`` bool, True for a kept block.

    Raises:
        ValueError: If a shape, dtype or option breaks a rule above.

    Source: arXiv:2503.16428, section 2.2.
    """
    if mass.ndim != 4 or 0 in mass.shape or not mass.is_floating_point():
        raise ValueError(
            f"{_NAME}: mass must be floating [B, H, Nq, Nk], none 0, got {mass.dtype} "
            f"{list(mass.shape)}"
        )
    shares = _checked_threshold(threshold, mass)
    grid: dict[str, Any] = {
        "query_offset": query_offset,
        "block_size": block_size,
        "device": mass.device,
    }
    computable = causal_blocks(mass.shape[2], mass.shape[3], causal=causal, **grid)[None, None]
    if real_blocks is not None:
        if real_blocks.dtype != torch.bool or real_blocks.shape != mass.shape[::3]:
            raise ValueError(
                f"{_NAME}: real_blocks must be bool [B, Nk] = {list(mass.shape[::3])}, got "
                f"{real_blocks.dtype} {list(real_blocks.shape)}"
            )
        computable = computable & real_blocks[:, None, None, :]
    forced = torch.zeros_like(computable)
    diagonal = torch.zeros_like(computable)
    if causal:
        diagonal = computable & diagonal_blocks(mass.shape[2], mass.shape[3], **grid)
        if keep_recent:
            forced = forced | diagonal
        if keep_sink:
            forced = forced | (computable & (computable.cumsum(dim=-1) == 1))
    units = (mass.detach().double() * MASS_UNITS).to(torch.int64)
    options = {"forced": forced, "computable": computable}
    if mass.is_cuda:
        from repro.kernels.block_selection.kernel import select_blocks_triton

        kept = select_blocks_triton(units, shares, **options)
    else:
        from repro.kernels.block_selection.cpu import select_blocks_cpu

        kept = select_blocks_cpu(units, shares, **options)
    if quirk_rows > 0 and causal:
        from repro.kernels.block_selection.cpu import select_blocks_quirk

        kept[:, :, :quirk_rows] = select_blocks_quirk(
            units[:, :, :quirk_rows],
            shares,
            forced=diagonal[:, :, :quirk_rows],
            computable=computable[:, :, :quirk_rows],
        )
    return kept


def causal_blocks(
    count_q: int,
    count_k: int,
    *,
    causal: bool = True,
    query_offset: int = 0,
    block_size: int = 128,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Return the blocks ``[Nq, Nk]`` bool that hold a pair which the causal rule lets through.

    Args:
        count_q: Query blocks.
        count_k: Key blocks.
        causal: False lets every block through.
        query_offset: Position of the first query on the key axis, tokens.
        block_size: Tokens a block.
        device: Where to make it.
    """
    if not causal:
        return torch.ones(count_q, count_k, dtype=torch.bool, device=device)
    last_query = query_offset + torch.arange(1, count_q + 1, device=device) * block_size - 1
    first_key = torch.arange(count_k, device=device) * block_size
    return first_key[None, :] <= last_query[:, None]


def diagonal_blocks(
    count_q: int,
    count_k: int,
    *,
    query_offset: int = 0,
    block_size: int = 128,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Return the blocks ``[Nq, Nk]`` bool that hold the own key of one of their queries."""
    first_query = query_offset + torch.arange(count_q, device=device) * block_size
    first_key = torch.arange(count_k, device=device) * block_size
    return (first_key[None, :] - first_query[:, None]).abs() < block_size


def _checked_threshold(threshold: float | torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """Return the thresholds as ``[H]`` fp64 on the device of ``mass``."""
    heads = mass.shape[1]
    if isinstance(threshold, torch.Tensor):
        if threshold.shape != (heads,):
            raise ValueError(
                f"{_NAME}: threshold must be a number or [H] = [{heads}], got "
                f"{list(threshold.shape)}"
            )
        return threshold.to(device=mass.device, dtype=torch.float64)
    if not 0 <= threshold <= 1:
        raise ValueError(f"{_NAME}: threshold must be in [0, 1], got {threshold}")
    return torch.full((heads,), float(threshold), dtype=torch.float64, device=mass.device)
