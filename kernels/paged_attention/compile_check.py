"""Specialisations to compile without a GPU: ``repro.kernel_compile.check`` walks them."""

from __future__ import annotations

from typing import Any

import torch

from repro.kernel_compile import CompileCase
from repro.kernels.paged_attention.kernel import (
    NUM_STAGES,
    NUM_WARPS,
    _paged_attention_fwd_kernel,
    _paged_attention_merge_kernel,
    constants,
)
from repro.kernels.paged_attention.pages import Format, Pages


def cases() -> list[CompileCase]:
    """Return mixes of bits and axes for D = 64 and 128, with and without ``selected``, and merging."""
    plain = Format()
    channel_4, channel_2 = (Format(bits=n, axis="channel", group_size=32) for n in (4, 2))
    token_4, token_2 = (Format(bits=n, axis="token", group_size=32) for n in (4, 2))
    return [
        *(
            CompileCase(
                name=f"merge splits={splits} D=128",
                fn=_paged_attention_merge_kernel,
                signature=_signature(_paged_attention_merge_kernel, plain, plain),
                constants={"BLOCK_S": splits, "BLOCK_D": 128},
                multiples=["head_dim"],
            )
            for splits in (1, 128)
        ),
        decode_case(plain, plain, 128, selected=False),
        decode_case(plain, plain, 64, selected=True),
        decode_case(Format(bits=8), Format(bits=8), 128, selected=True),
        decode_case(channel_4, token_4, 128, selected=True),
        decode_case(token_4, channel_2, 64, selected=False),
        decode_case(channel_2, plain, 128, selected=False),
        decode_case(plain, token_2, 128, selected=False, dtype=torch.float16),
    ]


def decode_case(
    k: Format, v: Format, dim: int, *, selected: bool, dtype: torch.dtype = torch.bfloat16
) -> CompileCase:
    """Return the decode kernel for four query heads a KV head and pages of 64 tokens."""
    k_pages, v_pages = (Pages.allocate(1, 1, 64, dim, dtype=dtype, format=f) for f in (k, v))
    fn = _paged_attention_fwd_kernel
    label = " ".join(f"{name}{f.bits}{f.axis[0]}" for name, f in (("k", k), ("v", v)))
    return CompileCase(
        name=f"decode {label} D={dim}{' selected' if selected else ''}",
        fn=fn,
        signature=_signature(fn, k, v, dtype),
        constants=constants(dtype, 4, dim, k_pages, v_pages, selected=selected),
        # Scales of few groups a token: their strides are not multiples of 16.
        multiples=[
            n
            for n in fn.arg_names
            if n.startswith(("stride_q", "stride_kp", "stride_kh", "stride_kt", "stride_vp"))
            or n in ("stride_vh", "stride_vt", "head_dim", "page_size")
        ],
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )


def _signature(
    fn: Any, k: Format, v: Format, dtype: torch.dtype = torch.bfloat16
) -> dict[str, str]:
    """Return the run-time types of a kernel's arguments, which their names tell."""
    short = {torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    fixed = dict.fromkeys(("table_ptr", "lengths_ptr", "selected_ptr"), "*i32")
    fixed |= dict.fromkeys(("part_ptr", "part_lse_ptr", "lse_ptr"), "*fp32")
    fixed |= {
        "k_ptr": "*u8" if k.quantized else short,
        "v_ptr": "*u8" if v.quantized else short,
        "scale": "fp32",
    }
    return {
        name: fixed.get(name) or (short if name.endswith("_ptr") else "i32")
        for name in fn.arg_names
        if name.islower()
    }
