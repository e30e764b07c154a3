"""Bench of the block selection alone, against the plain sort in eager torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from repro.bench.suite import Case, Suite
from repro.kernels.block_selection.api import MASS_UNITS, causal_blocks, select_blocks
from repro.kernels.block_selection.cpu import select_blocks_cpu

_THRESHOLD = 0.9
EAGER = "eager sort"
KERNEL = "select_blocks"


def cases(device: str, quick: bool) -> list[Case]:
    """Return square grids: 16K tokens on the CPU, up to 128K on a GPU."""
    sizes = (128,) if device == "cpu" or quick else (64, 256, 1024)
    heads = 4 if device == "cpu" else 32
    return [
        Case(
            name=f"H={heads} N={size}",
            params={"heads": heads, "blocks": size, "dtype": "float32"},
        )
        for size in sizes
    ]


def make_inputs(case: Case, device: torch.device, seed: int) -> torch.Tensor:
    """Draw masses ``[1, H, N, N]`` fp32 that fall off as attention's do."""
    generator = torch.Generator().manual_seed(seed)
    size = case.params["blocks"]
    return (torch.rand(1, case.params["heads"], size, size, generator=generator) ** 8).to(device)


def _eager(mass: torch.Tensor) -> torch.Tensor:
    computable = causal_blocks(*mass.shape[2:], device=mass.device)[None, None]
    forced = torch.eye(mass.shape[3], dtype=torch.bool, device=mass.device)[None, None].clone()
    forced[..., 0] = True
    threshold = torch.full((mass.shape[1],), _THRESHOLD, dtype=torch.float64, device=mass.device)
    units = (mass.double() * MASS_UNITS).to(torch.int64)
    return select_blocks_cpu(units, threshold, forced=forced, computable=computable).float()


def implementations(case: Case, device: torch.device) -> dict[str, Callable[[Any], Any]]:
    """Return the eager selection and the public function (the same sort on the CPU)."""
    return {EAGER: _eager, KERNEL: lambda mass: select_blocks(mass, _THRESHOLD).float()}


SUITE = Suite(
    kernel="block_selection",
    cases=cases,
    make_inputs=make_inputs,
    implementations=implementations,
    baseline=EAGER,
    # Comparisons of a sort, N log2 N a row.
    flops=lambda case, name: float(
        case.params["heads"] * case.params["blocks"] ** 2 * (case.params["blocks"].bit_length() - 1)
    ),
    bytes_moved=lambda case, name: 5.0 * case.params["heads"] * case.params["blocks"] ** 2,
    reference=lambda case, mass: _eager(mass),
    compare=lambda case, name: 0.0,
)
