"""Specialisations of the Triton kernel that are compiled for GPUs which need not be present."""

from __future__ import annotations

from repro.kernel_compile import CompileCase
from repro.kernels.xattention_scores.kernel import _xattention_scores_fwd_kernel, tile_sizes

_COUNTS = ("heads", "n_rep", "count_q", "count_k", "offset", "head_dim")
_LENGTHS = tuple(f"{kind}_{side}" for kind in ("tokens", "groups") for side in "qk")
_STRIDES = tuple(f"stride_{tensor}{axis}" for tensor in "qk" for axis in "bhtd")
_INTEGERS = (*_COUNTS, *_LENGTHS, *_STRIDES)


def _case(
    head_dim: int,
    stride: int,
    block_size: int = 128,
    *,
    causal: bool = True,
    padded: bool = False,
    reversed_: bool = True,
) -> CompileCase:
    per_block = block_size // stride
    tile = tile_sizes(per_block, head_dim)
    launch = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
    bytes_ = dict.fromkeys(("real_q_ptr", "real_k_ptr", "row_real_ptr", "column_real_ptr"), "*u8")
    pointers = {"q_ptr": "*bf16", "k_ptr": "*bf16", "order_ptr": "*i32", "mass_ptr": "*fp32"}
    return CompileCase(
        name=f"d{head_dim}_s{stride}_b{block_size}"
        + ("_causal" if causal else "")
        + ("_padded" if padded else "")
        + ("" if reversed_ else "_ordered"),
        fn=_xattention_scores_fwd_kernel,
        signature={**pointers, **bytes_, **dict.fromkeys(_INTEGERS, "i32"), "scale_log2": "fp32"},
        constants={
            "STRIDE": stride,
            "PER_BLOCK": per_block,
            **tile,
            # The launcher specialises on strides of 1 and on multiples of 16.
            "stride_qd": 1,
            "stride_kd": 1,
            "CAUSAL": causal,
            "PADDED": padded,
            "REVERSED": reversed_,
            "PRECISION": "tf32",
        },
        multiples=["head_dim", *(name for name in _STRIDES if not name.endswith("d"))],
        **launch,
    )


def cases() -> list[CompileCase]:
    """Return the strides and patterns of the paper's model, and the extremes."""
    return [
        *(_case(128, stride) for stride in (4, 8, 16, 64)),
        _case(128, 8, reversed_=False),
        _case(96, 4, causal=False, padded=True),
        _case(256, 16),
    ]
