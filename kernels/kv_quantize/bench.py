"""Bench of quantise-and-append against appending 16-bit copies, by bytes that cross the bus."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from repro.bench.suite import Case, Suite
from repro.kernels.kv_quantize.api import append, quantize
from repro.kernels.kv_quantize.reference import quantize_reference
from repro.kernels.paged_attention import Format, Pages

COPY = "append 16-bit copies"
APPEND = "append"
QUANTIZE = "quantize alone"
EAGER = "eager quantize alone"


@dataclass(frozen=True)
class Inputs:
    """New tokens ``[n_seq, H_kv, T, D]``, where they go, and both kinds of pages."""

    x: torch.Tensor
    page_table: torch.Tensor
    lengths: torch.Tensor
    plain: Pages
    packed: Pages


def cases(device: str, quick: bool) -> list[Case]:
    """Return prefills of one sequence and decode steps of many, K by channel and V by token."""
    if device == "cpu":
        prefill, decode, heads = 4096 if quick else 16384, (8, 8192), 4
    else:
        prefill, decode, heads = 8192 if quick else 131072, (64, 32768), 8
    groups = [("token", 64)] if quick else [("token", 64), ("channel", 64)]
    found = [
        Case(
            name=f"prefill T={prefill} bits={bits} axis={axis} g={size}",
            params=_params(1, heads, prefill, 0, bits, axis, size),
        )
        for axis, size in groups
        for bits in ((4,) if quick else (2, 4, 8))
    ]
    # With groups of tokens nothing is quantised at most steps.
    step = _params(decode[0], heads, 1, decode[1], 4, "token", 64)
    return [*found, Case(name=f"decode n_seq={decode[0]} bits=4 axis=token g=64", params=step)]


def _params(
    sequences: int, heads: int, tokens: int, held: int, bits: int, axis: str, group_size: int
) -> dict[str, Any]:
    return {
        "sequences": sequences,
        "heads": heads,
        "tokens": tokens,
        "held": held,
        "head_dim": 128,
        "page_size": 64,
        "bits": bits,
        "axis": axis,
        "group_size": group_size,
        "dtype": "bfloat16",
    }


def _format(case: Case) -> Format:
    p = case.params
    return Format(bits=p["bits"], axis=p["axis"], group_size=p["group_size"])


def make_inputs(case: Case, device: torch.device, seed: int) -> Inputs:
    """Draw Gaussian tokens and a permuted page table; the pools hold no more than it needs."""
    p = case.params
    generator = torch.Generator().manual_seed(seed)
    shape = (p["sequences"], p["heads"], p["tokens"], p["head_dim"])
    x = torch.randn(shape, generator=generator).to(device, torch.bfloat16)
    pages_max = -(-(p["held"] + p["tokens"]) // p["page_size"])
    count = p["sequences"] * pages_max
    table = torch.randperm(count, generator=generator).int().view(p["sequences"], -1)
    plain, packed = (
        Pages.allocate(
            count,
            p["heads"],
            p["page_size"],
            p["head_dim"],
            dtype=torch.bfloat16,
            device=device,
            format=format,
        )
        for format in (Format(), _format(case))
    )
    lengths = torch.full((p["sequences"],), p["held"], dtype=torch.int32, device=device)
    return Inputs(x, table.to(device), lengths, plain, packed)


def implementations(case: Case, device: torch.device) -> dict[str, Callable[[Inputs], Any]]:
    """Return the plain append, ours, and what of it is quantisation; all give codes or copies."""
    format = _format(case)

    def append_to(x: Inputs, pages: Pages) -> torch.Tensor:
        append(x.x, pages, x.page_table, x.lengths)
        return pages.data

    return {
        COPY: lambda x: append_to(x, x.plain),
        APPEND: lambda x: append_to(x, x.packed),
        QUANTIZE: lambda x: quantize(x.x, format),
        EAGER: lambda x: quantize_reference(x.x, format),
    }


def bytes_moved(case: Case, name: str) -> float:
    """Read the new tokens, write copies, or codes with a scale and a minimum a group."""
    p = case.params
    count = p["sequences"] * p["heads"] * p["tokens"] * p["head_dim"]
    if name == COPY:
        return 4.0 * count
    return count * (2.0 + p["bits"] / 8 + 4.0 / p["group_size"])


SUITE = Suite(
    kernel="kv_quantize",
    cases=cases,
    make_inputs=make_inputs,
    implementations=implementations,
    baseline=COPY,
    # Two comparisons, a subtraction, a division, a clamp and a rounding a value.
    flops=lambda case, name: 0.0 if name == COPY else 1.5 * bytes_moved(case, COPY),
    bytes_moved=bytes_moved,
    ideal_speedup=lambda case, name: bytes_moved(case, COPY) / bytes_moved(case, name),
    reference=lambda case, x: quantize_reference(x.x, _format(case))[0],
    compare=lambda case, name: 0.0 if name in (QUANTIZE, EAGER) else None,
)
