"""Specialisations of the Triton kernel that are compiled for GPUs which need not be present."""

from __future__ import annotations

from repro.kernel_compile import CompileCase
from repro.kernels.block_selection.kernel import _block_selection_kernel


def cases() -> list[CompileCase]:
    """Return rows of 16, 128, 1,024 and 2,048 key blocks (256K tokens)."""
    pointers = {
        "mass_ptr": "*i64",
        "threshold_ptr": "*fp64",
        "forced_ptr": "*u8",
        "computable_ptr": "*u8",
        "kept_ptr": "*u8",
    }
    integers = dict.fromkeys(("heads", "count_q", "count_k", "stride_fb", "stride_cb"), "i32")
    return [
        CompileCase(
            name=f"k{count}",
            fn=_block_selection_kernel,
            signature={**pointers, **integers},
            constants={"BLOCK_K": count},
            num_warps=4 if count >= 512 else 1,
        )
        for count in (16, 128, 1024, 2048)
    ]
