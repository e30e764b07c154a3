"""What ``kernels/<name>/bench.py`` declares as ``SUITE``: cases, costs, implementations.

A suite measures nothing itself; ``repro.bench`` does, and it needs torch, triton and the standard
library alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of a bench: a readable name and its parameters (JSON-able)."""

    name: str
    params: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Suite:
    """The bench of one kernel.

    Attributes:
        kernel: Folder name under ``kernels/``.
        cases: (device type "cpu"/"cuda", quick) -> cases.
        make_inputs: (case, device, seed) -> inputs; called once per member of the rotating pool.
        implementations: (case, device) -> name -> callable(inputs) returning the output tensor.
            One that cannot exist here (no C++ compiler, no GPU) is left out.
        baseline: Name of the one dense baseline among them.
        reference: callable(case, inputs) -> expected output, compared with every timed output; None
            entries of ``compare`` are not compared.
        compare: name -> absolute tolerance on the output against ``reference``.
        flops: (case, implementation name) -> floating-point operations actually needed.
        bytes_moved: (case, implementation name) -> bytes that must cross the memory bus.
        ideal_speedup: (case, implementation name) -> ideal speed-up over the baseline, or None.
        bar: (case, implementation name, fraction of ideal, speed-up over every other one) -> text
            of a broken bar or None; only reported, never asserted in tests.
    """

    kernel: str
    cases: Callable[[str, bool], list[Case]]
    make_inputs: Callable[[Case, torch.device, int], Any]
    implementations: Callable[[Case, torch.device], dict[str, Callable[[Any], Any]]]
    baseline: str
    flops: Callable[[Case, str], float]
    bytes_moved: Callable[[Case, str], float]
    ideal_speedup: Callable[[Case, str], float | None] = lambda case, name: None
    reference: Callable[[Case, Any], Any] | None = None
    compare: Callable[[Case, str], float | None] = lambda case, name: None
    bar: Callable[[Case, str, float, Mapping[str, float]], str | None] = (
        lambda case, name, fraction, speedups: None
    )
