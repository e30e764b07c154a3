"""Specialisations to compile without a GPU: ``repro.kernel_compile.check`` walks them."""

from __future__ import annotations

import torch

from repro.kernel_compile import CompileCase
from repro.kernels.streaming_attention.kernel import _streaming_attention_fwd_kernel, tuning

_TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}


def cases() -> list[CompileCase]:
    """Return the usual head dimension in bf16 and fp32, and the largest."""
    return [
        _case(128, torch.bfloat16),
        _case(256, torch.bfloat16),
        _case(128, torch.float32),
    ]


def _case(dim: int, dtype: torch.dtype) -> CompileCase:
    fn, tuned = _streaming_attention_fwd_kernel, tuning(dim, dtype)
    fixed = {"lse_ptr": "*fp32", "scale": "fp32"}
    return CompileCase(
        name=f"forward D={dim} {dtype}",
        fn=fn,
        signature={
            name: fixed.get(name) or (_TYPES[dtype] if name.endswith("_ptr") else "i32")
            for name in fn.arg_names
            if name.islower()
        },
        constants={
            "BLOCK_Q": tuned.block_q,
            "BLOCK_K": tuned.block_k,
            "BLOCK_D": dim,
            "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        },
        multiples=[n for n in fn.arg_names if n.startswith("stride_") or n == "head_dim"],
        num_warps=tuned.num_warps,
        num_stages=tuned.num_stages,
    )
