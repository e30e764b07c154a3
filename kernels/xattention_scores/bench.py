"""Bench of the whole of XAttention (scores, selection, attention) against dense attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from repro.bench.suite import Case, Suite
from repro.kernels.block_selection import causal_blocks, select_blocks
from repro.kernels.block_sparse_attention import block_sparse_attention
from repro.kernels.xattention_scores.api import xattention_scores

_BLOCK = 128
DENSE = "dense SDPA"
WHOLE = "xattention (scores+selection+attention)"
SELECTION = "scores+selection alone"
SCORES = "scores alone"


@dataclass(frozen=True)
class Inputs:
    """q, k, v and the threshold at which the method has the density of the case."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    threshold: float


def cases(device: str, quick: bool) -> list[Case]:
    """Return the cases: 16,384 tokens on the CPU, up to 128K on a GPU."""
    lengths: list[int]
    densities = [0.1] if quick else [0.05, 0.10, 0.25]
    if device == "cpu":
        lengths = [8192] if quick else [16384]
        dims, heads = [64] if quick else [64, 128], (4, 4)
    else:
        lengths = [8192] if quick else [8192, 16384, 32768, 65536, 131072]
        dims, heads = [128], (32, 8)
        densities += [] if quick else [0.50]
    return [
        Case(
            name=f"T={tokens} D={dim} S=16 density={density:.0%}",
            params={
                "tokens": tokens,
                "head_dim": dim,
                "heads": heads[0],
                "kv_heads": heads[1],
                "stride": 16,
                "density": density,
                "dtype": "bfloat16",
                "inputs": "structured",
            },
        )
        for tokens in lengths
        for dim in dims
        for density in densities
    ]


def make_inputs(case: Case, device: torch.device, seed: int) -> Inputs:
    """Make structured q, k, v and find the threshold that gives the density of the case.

    Raises:
        RuntimeError: If no threshold comes within 3 % of the density.
    """
    from repro.operator_inputs import Structure, structured

    params = case.params
    shape = (1, params["heads"], params["kv_heads"], params["tokens"], params["head_dim"])
    made = structured(
        shape,
        Structure(density=params["density"]),
        seed=seed,
        dtype=torch.bfloat16,
        device=device,
    )
    mass = xattention_scores(made.q, made.k, stride=params["stride"], block_size=_BLOCK)
    computable = int(causal_blocks(*mass.shape[2:]).sum()) * mass.shape[1]
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        if int(select_blocks(mass, middle).sum()) < params["density"] * computable:
            low = middle
        else:
            high = middle
    density = int(select_blocks(mass, high).sum()) / computable
    if abs(density / params["density"] - 1) > 0.03:
        raise RuntimeError(f"{case.name}: no threshold gives that density, nearest {density:.3f}")
    return Inputs(made.q, made.k, made.v, high)


def _mask(case: Case, x: Inputs) -> torch.Tensor:
    mass = xattention_scores(x.q, x.k, stride=case.params["stride"], block_size=_BLOCK)
    return select_blocks(mass, x.threshold)


def implementations(case: Case, device: torch.device) -> dict[str, Callable[[Inputs], Any]]:
    """Return the dense baseline, the whole method, and its parts before the attention."""
    gqa = case.params["heads"] != case.params["kv_heads"]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return {
        DENSE: lambda x: sdpa(x.q, x.k, x.v, is_causal=True, enable_gqa=gqa),
        WHOLE: lambda x: block_sparse_attention(x.q, x.k, x.v, _mask(case, x)),
        SELECTION: lambda x: _mask(case, x),
        SCORES: lambda x: xattention_scores(
            x.q, x.k, stride=case.params["stride"], block_size=_BLOCK
        ),
    }


def reference(case: Case, x: Inputs) -> torch.Tensor:
    """Return dense attention under the token mask of the kept blocks, in chunks of queries."""
    tokens = case.params["tokens"]
    mask = _mask(case, x)
    gqa = case.params["heads"] != case.params["kv_heads"]
    chunks = []
    for first in range(0, tokens, 8 * _BLOCK):
        last = min(first + 8 * _BLOCK, tokens)
        rows = mask[:, :, first // _BLOCK : -(-last // _BLOCK)]
        seen = rows.repeat_interleave(_BLOCK, 2).repeat_interleave(_BLOCK, 3)
        seen = seen[:, :, : last - first, :last]
        seen &= torch.ones_like(seen[0, 0]).tril(first)
        chunks.append(
            torch.nn.functional.scaled_dot_product_attention(
                x.q[:, :, first:last],
                x.k[:, :, :last],
                x.v[:, :, :last],
                attn_mask=seen,
                enable_gqa=gqa,
            )
        )
    return torch.cat(chunks, dim=2)


def flops(case: Case, name: str) -> float:
    """Return the operations of the blocks computed plus those of the scores."""
    p = case.params
    dense = 2.0 * p["heads"] * p["tokens"] ** 2 * p["head_dim"]
    scores = dense / (2 * p["stride"])
    return {DENSE: dense, WHOLE: dense * p["density"] + scores}.get(name, scores)


def bytes_moved(case: Case, name: str) -> float:
    """Return one pass over q, k, v and the output (the scores: over q and k)."""
    p = case.params
    tensors = p["heads"] + p["kv_heads"]
    passes = {DENSE: 2, WHOLE: 3}.get(name, 1)
    return 2.0 * passes * tensors * p["tokens"] * p["head_dim"]


def ideal_speedup(case: Case, name: str) -> float | None:
    """Return 1 / (density + 1 / (2 S)) for the whole method."""
    if name != WHOLE:
        return None
    return 1 / (case.params["density"] + 1 / (2 * case.params["stride"]))


def bar(case: Case, name: str, fraction: float, speedups: Mapping[str, float]) -> str | None:
    """The whole method reaches 0.3 of its ideal at 16,384 tokens and 5 % or 10 % density."""
    judged = case.params["tokens"] >= 16384 and case.params["density"] <= 0.1
    if name == WHOLE and judged and fraction < 0.3:
        return f"{fraction:.2f} of the ideal speed-up, 0.30 wanted"
    return None


SUITE = Suite(
    kernel="xattention_scores",
    cases=cases,
    make_inputs=make_inputs,
    implementations=implementations,
    baseline=DENSE,
    flops=flops,
    bytes_moved=bytes_moved,
    ideal_speedup=ideal_speedup,
    reference=reference,
    # bf16 keeps 8 bits of outputs up to about 4.
    compare=lambda case, name: 0.05 if name == WHOLE else None,
    bar=bar,
)
