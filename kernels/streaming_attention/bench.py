"""Bench of streaming attention: speed-up over dense causal attention, against the pairs saved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from repro.bench.suite import Case, Suite
from repro.kernels.streaming_attention.api import streaming_attention
from repro.kernels.streaming_attention.reference import streaming_attention_reference

_OURS, _DENSE = "streaming", "sdpa"
#: Queries of which the definition is evaluated at once, to bound its memory.
_ROWS = 512


@dataclass(frozen=True)
class Inputs:
    """One member of the pool: q ``[1, H, T, D]``, k and v ``[1, H_kv, T, D]``."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def cases(device: str, quick: bool) -> list[Case]:
    """CPU: the length of the embedded models; CUDA: 8K to 128K tokens, grouped queries."""
    if device == "cpu":
        lengths, heads, dims = ([4096], (4, 4), [64]) if quick else ([16384], (4, 4), [64, 128])
    else:
        lengths = [8192, 32768] if quick else [8192, 32768, 131072]
        heads, dims = (32, 8), [128]
    return [
        Case(
            name=f"T={tokens} D={dim} sink=64 window={window}",
            params={
                "tokens": tokens,
                "heads": heads[0],
                "kv_heads": heads[1],
                "head_dim": dim,
                "sink_size": 64,
                "window_size": window,
                "dtype": "bfloat16",
                "causal": True,
            },
        )
        for tokens in lengths
        for dim in dims
        for window in (256, 1024)
    ]


def make_inputs(case: Case, device: torch.device, seed: int) -> Inputs:
    """Draw Gaussian q, k and v."""
    p = case.params
    generator = torch.Generator(device).manual_seed(seed)
    q, k, v = (
        torch.randn(
            (1, p[heads], p["tokens"], p["head_dim"]),
            generator=generator,
            device=device,
            dtype=torch.bfloat16,
        )
        for heads in ("heads", "kv_heads", "kv_heads")
    )
    return Inputs(q, k, v)


def _sizes(case: Case) -> dict[str, Any]:
    return {name: case.params[name] for name in ("sink_size", "window_size")}


def implementations(case: Case, device: torch.device) -> dict[str, Callable[[Inputs], Any]]:
    """Return ours and dense causal attention."""
    grouped = case.params["heads"] != case.params["kv_heads"]
    return {
        _DENSE: lambda x: F.scaled_dot_product_attention(
            x.q, x.k, x.v, is_causal=True, enable_gqa=grouped
        ),
        _OURS: lambda x: streaming_attention(x.q, x.k, x.v, **_sizes(case)),
    }


def reference(case: Case, x: Inputs) -> torch.Tensor:
    """Evaluate the definition some rows at a time."""
    ends = range(_ROWS, case.params["tokens"] + _ROWS, _ROWS)
    rows = [
        streaming_attention_reference(
            x.q[:, :, end - _ROWS : end], x.k[:, :, :end], x.v[:, :, :end], **_sizes(case)
        )[0]
        for end in ends
    ]
    return torch.cat(rows, dim=2)


def pairs(case: Case, name: str) -> int:
    """Return the (query, key) pairs that one head must compute."""
    tokens, most = case.params["tokens"], sum(_sizes(case).values())
    if name == _DENSE or most >= tokens:
        return tokens * (tokens + 1) // 2
    return most * (most + 1) // 2 + (tokens - most) * most


def bytes_moved(case: Case, name: str) -> float:
    """Read q, k, v and write the output once."""
    p = case.params
    return 4.0 * (p["heads"] + p["kv_heads"]) * p["tokens"] * p["head_dim"]


SUITE = Suite(
    kernel="streaming_attention",
    cases=cases,
    make_inputs=make_inputs,
    implementations=implementations,
    baseline=_DENSE,
    # Two products a pair.
    flops=lambda case, name: (
        4.0 * case.params["heads"] * case.params["head_dim"] * pairs(case, name)
    ),
    bytes_moved=bytes_moved,
    ideal_speedup=lambda case, name: pairs(case, _DENSE) / pairs(case, name),
    reference=reference,
    # Three roundings of the largest outputs (about 4) in bf16; dense is another function.
    compare=lambda case, name: 0.05 if name == _OURS else None,
)
