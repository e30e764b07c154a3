"""Specialisations of the Triton kernels that are compiled for GPUs which need not be present."""

from __future__ import annotations

from typing import Any

from repro.kernel_compile import CompileCase
from repro.kernels.kv_quantize.kernel import (
    _append_channel_kernel,
    _append_token_kernel,
    channel_tile,
    token_tile,
)

_DIM = 128


def cases() -> list[CompileCase]:
    """Return copies, and groups of channels or of tokens at the sizes in use and the extremes."""
    return [
        _token_case(16, _DIM, 8192),
        _token_case(4, _DIM, 1),
        _token_case(8, 32, 8192),
        _token_case(2, 96, 8192),
        _channel_case(2, 32),
        _channel_case(4, 64),
        _channel_case(8, 256),
    ]


def _token_case(bits: int, group_size: int, rows: int) -> CompileCase:
    block_r, block_g = token_tile(group_size, rows)
    constants = {"BITS": bits, "COUNTED": rows > 1, "BLOCK_R": block_r, "BLOCK_G": block_g}
    name = f"token {bits} bits g={group_size} rows={rows}"
    return _case(name, _append_token_kernel, constants)


def _channel_case(bits: int, group_size: int) -> CompileCase:
    block_t, block_d = channel_tile(group_size, _DIM)
    constants = {"BITS": bits, "COUNTED": True, "BLOCK_T": block_t, "BLOCK_D": block_d}
    return _case(f"channel {bits} bits g={group_size}", _append_channel_kernel, constants)


def _case(name: str, fn: Any, constants: dict[str, Any]) -> CompileCase:
    stored = "*bf16" if constants["BITS"] == 16 else "*u8"
    pointers = {"data_ptr": stored, "scale_ptr": "*bf16", "minimum_ptr": "*bf16", "x_ptr": "*bf16"}
    if constants["BITS"] == 16:  # the launcher passes the data in their place
        pointers |= {"scale_ptr": stored, "minimum_ptr": stored}
    signature = {
        argument: pointers.get(argument, "*i32" if argument.endswith("_ptr") else "i32")
        for argument in fn.arg_names
        if argument not in constants
    }
    whole = ("stride_x", "stride_d", "dim", "group_size", "page_size")
    return CompileCase(
        name=name,
        fn=fn,
        signature=signature,
        constants=constants,
        multiples=[argument for argument in fn.arg_names if argument.startswith(whole)],
    )
