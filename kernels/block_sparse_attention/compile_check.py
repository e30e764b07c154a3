"""Specialisations to compile without a GPU: ``repro.kernel_compile.check`` walks them."""

from __future__ import annotations

from typing import Any

import torch

from repro.kernel_compile import CompileCase
from repro.kernels.block_sparse_attention.backward import (
    _block_sparse_attention_bwd_kv_kernel,
    _block_sparse_attention_bwd_q_kernel,
    backward_tuning,
)
from repro.kernels.block_sparse_attention.kernel import (
    _block_sparse_attention_fwd_kernel,
    forward_tuning,
)
from repro.kernels.block_sparse_attention.lists import _compact_kernel


def cases() -> list[CompileCase]:
    """Return all kernels at the shapes of language models, and forward with small, mixed blocks."""
    compact = CompileCase(
        name="compact",
        fn=_compact_kernel,
        signature=_signature(_compact_kernel),
        constants={"CHUNK": 1024},
    )
    small = [
        attention_cases(block_q, block_k, 64, causal=block_q != 64, padded=True)[0]
        for block_q, block_k in ((64, 64), (16, 16), (32, 128))
    ]
    return [compact, *attention_cases(128, 128, 128, causal=True, padded=False), *small]


def attention_cases(
    block_q: int,
    block_k: int,
    dim: int,
    *,
    causal: bool,
    padded: bool,
    dtype: torch.dtype = torch.bfloat16,
) -> list[CompileCase]:
    """Return the forward kernel and both backward kernels with the launchers' own tuning."""
    constants = {
        "CAUSAL": causal,
        "PADDED": padded,
        "BLOCK_Q": block_q,
        "BLOCK_K": block_k,
        "BLOCK_D": dim,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }
    label = f"{block_q}x{block_k} D={dim}{' causal' if causal else ''}"
    label += " padded" if padded else ""
    kernels = {
        "forward": (
            _block_sparse_attention_fwd_kernel,
            forward_tuning(block_q, block_k, dim, dtype),
        ),
        "backward queries": (
            _block_sparse_attention_bwd_q_kernel,
            backward_tuning(block_q, block_k, dim, dtype),
        ),
        "backward keys": (
            _block_sparse_attention_bwd_kv_kernel,
            backward_tuning(block_k, block_q, dim, dtype),
        ),
    }
    return [
        CompileCase(
            name=f"{name} {label}",
            fn=fn,
            signature=_signature(fn, dtype),
            constants={**constants, "TILE": tuning.tile},
            multiples=[n for n in fn.arg_names if n.startswith("stride_") or n == "head_dim"],
            num_warps=tuning.num_warps,
            num_stages=tuning.num_stages,
        )
        for name, (fn, tuning) in kernels.items()
    ]


def _signature(fn: Any, dtype: torch.dtype = torch.bfloat16) -> dict[str, str]:
    """Return the run-time types of a kernel's arguments, which their names tell."""
    fixed = {
        "numbers_ptr": "*i32",
        "full_count_ptr": "*i32",
        "total_ptr": "*i32",
        "lse_ptr": "*fp32",
        "sums_ptr": "*fp32",
        "delta_ptr": "*fp32",
        "real_ptr": "*u8",
        "partial_ptr": "*u8",
        "scale": "fp32",
    }
    full = "*u8" if fn is _compact_kernel else "*i32"
    short = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    return {
        name: fixed.get(name)
        or (full if name == "full_ptr" else f"*{short}" if name.endswith("_ptr") else "i32")
        for name in fn.arg_names
        if name.islower()
    }
