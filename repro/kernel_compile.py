"""Compile Triton kernels to cubin for GPUs that need not be present, and report their resources.

A kernel folder offers ``compile_check.py`` with ``cases() -> list[CompileCase]``. ``check(module)``
compiles them in a fresh process: Triton decides at decoration whether a function is interpreted,
so a process that runs the interpreter cannot compile.

``python -m repro.kernel_compile repro.kernels.<name>.compile_check`` prints one JSON line a kernel.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

#: Compute capability -> largest shared memory of one thread block, bytes (CUDA programming guide).
SHARED_LIMIT = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448}


@dataclass(frozen=True, kw_only=True)
class CompileCase:
    """One specialisation of a kernel.

    Attributes:
        name: Readable id, unique in its module.
        fn: The ``@triton.jit`` function.
        signature: Run-time argument -> Triton type (``"*bf16"``, ``"i32"``, ``"fp32"``).
        constants: ``tl.constexpr`` argument -> value.
        multiples: Integer arguments that are multiples of 16 in real launches (strides, sizes):
            Triton specialises on it, without it loads are neither vectorised nor pipelined.
        num_warps: Warps per program.
        num_stages: Depth of the load pipeline.
    """

    name: str
    fn: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    multiples: Sequence[str] = ()
    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True, kw_only=True)
class CompileReport:
    """What one cubin needs: bytes of shared memory and of register spills, registers a thread."""

    name: str
    capability: int
    shared_bytes: int
    registers: int
    spill_bytes: int


def compile_kernel(case: CompileCase, capability: int) -> CompileReport:
    """Compile one case for one compute capability (80, 90, 100, ...), without a GPU.

    Pointers are taken as 16-byte aligned, as the launcher's specialisation finds them.

    Raises:
        RuntimeError: If ``TRITON_INTERPRET`` is on in this process.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not hasattr(case.fn, "arg_names") or os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError(
            "compile_kernel: TRITON_INTERPRET must be off, got 1; use check() instead"
        )
    names = case.fn.arg_names
    types = {
        name: "constexpr" if name in case.constants else case.signature[name] for name in names
    }
    aligned = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(names)
        if types[name].startswith("*") or name in case.multiples
    }
    source = ASTSource(fn=case.fn, signature=types, constexprs=dict(case.constants), attrs=aligned)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": case.num_warps, "num_stages": case.num_stages},
    )
    registers, spill = _resources(compiled.asm["cubin"])
    return CompileReport(
        name=case.name,
        capability=capability,
        shared_bytes=int(compiled.metadata.shared),
        registers=registers,
        spill_bytes=spill,
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Return (registers a thread, bytes of stack a thread: spilled registers) of a cubin."""
    from triton.knobs import nvidia

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        shown = subprocess.run(
            [nvidia.cuobjdump.path, "-res-usage", str(path)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", shown)
    if found is None:
        raise RuntimeError(f"cuobjdump: output must name REG and STACK, got {shown!r}")
    return int(found[1]), int(found[2])


def check(
    module: str, capabilities: Sequence[int] = (80, 90, 100), *, timeout: float = 300.0
) -> list[CompileReport]:
    """Compile every case of ``module`` for every capability in a fresh process.

    Args:
        module: Import path of a module with ``cases() -> list[CompileCase]``.
        capabilities: Compute capabilities, major * 10 + minor.
        timeout: Seconds.

    Raises:
        RuntimeError: If a kernel does not compile; carries the compiler's output.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    root = Path(__file__).resolve().parents[1]
    environment["PYTHONPATH"] = os.pathsep.join(
        part for part in (str(root), environment.get("PYTHONPATH", "")) if part
    )
    command = [sys.executable, "-m", "repro.kernel_compile", module, *map(str, capabilities)]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=timeout, env=environment
    )
    if done.returncode != 0:
        raise RuntimeError(f"{module}: every kernel must compile, got\n{done.stderr[-4000:]}")
    return [CompileReport(**json.loads(line)) for line in done.stdout.splitlines() if line]


def main(arguments: Sequence[str]) -> None:
    """Print one JSON line per (case, capability) of the named module."""
    module, *capabilities = arguments
    for case in importlib.import_module(module).cases():
        for capability in map(int, capabilities or ("80", "90", "100")):
            print(json.dumps(asdict(compile_kernel(case, capability))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
