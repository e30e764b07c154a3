"""Latency of a method against dense: prefill, decode, end to end, or the attention operator alone.

Dense and method alternate in one process (``repro.timing``); selection, planning and quantisation
are inside the method's time, entering the patch is not. The same code runs on CPU and CUDA.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from repro.errors import check_rules
from repro.measurements import CellContext, Measurement
from repro.subjects import SubjectInfo

PHASES = ("prefill", "decode", "end_to_end", "attention")
INPUTS = ("captured", "gaussian", "structured")
PROTOCOLS = ("fair", "paper")


@dataclass(frozen=True, kw_only=True)
class LatencyOptions:
    """What to time.

    Attributes:
        phases: Of ``PHASES``; decode is the time of one token, end to end a whole generation.
        lengths: Prompt tokens.
        batch: Sequences side by side.
        new_tokens: Tokens generated in decode and end to end, always exactly so many.
        inputs: Of ``INPUTS``, for the attention phase: q/k/v captured from the subject, normal, or
            of planted structure.
        protocols: Of ``PROTOCOLS``, for the attention phase: fair times causal against causal,
            paper a causal method against dense attention without the causal mask.
        blocks: Fewest blocks, at least 10.
        min_seconds: Fewest seconds of timed work.
    """

    phases: tuple[str, ...] = ("prefill",)
    lengths: tuple[int, ...] = (4096,)
    batch: int = 1
    new_tokens: int = 16
    inputs: tuple[str, ...] = ("captured",)
    protocols: tuple[str, ...] = ("fair",)
    blocks: int = 10
    min_seconds: float = 3.0

    def __post_init__(self) -> None:
        check_rules(
            _names("phases", self.phases, PHASES),
            length_rule(self.lengths),
            ("batch", self.batch >= 1, "at least 1", self.batch),
            ("new_tokens", self.new_tokens >= 2, "at least 2", self.new_tokens),
            _names("inputs", self.inputs, INPUTS),
            _names("protocols", self.protocols, PROTOCOLS),
            ("blocks", self.blocks >= 10, "at least 10", self.blocks),
            ("min_seconds", 0 <= self.min_seconds < math.inf, "0 or more", self.min_seconds),
        )


def _names(
    name: str, values: tuple[str, ...], known: tuple[str, ...]
) -> tuple[str, bool, str, object]:
    """Return the rule, for ``check_rules``, that these are one or more different known names."""
    wrong = [value for value in values if value not in known]
    holds = bool(values) and not wrong and len(set(values)) == len(values)
    rule = f"one or more different of {', '.join(known)}"
    return name, holds, rule, ", ".join(wrong or values) or "none"


def length_rule(lengths: tuple[int, ...]) -> tuple[str, bool, str, object]:
    """Return the rule, for ``check_rules``, on the lengths of a timed or weighed prompt."""
    holds = bool(lengths) and min(lengths) >= 16 and len(set(lengths)) == len(lengths)
    return "lengths", holds, "one or more different numbers >= 16", lengths


def expand(options: LatencyOptions) -> list[dict[str, Any]]:
    """Return one cell per phase x length, the attention phase also x inputs x protocol."""
    shared = {
        "batch": options.batch,
        "blocks": options.blocks,
        "min_seconds": options.min_seconds,
    }
    cells: list[dict[str, Any]] = []
    for phase in options.phases:
        for length in options.lengths:
            if phase == "attention":
                cells += [
                    {"phase": phase, "length": length, "inputs": inputs, "protocol": protocol}
                    | shared
                    for inputs in options.inputs
                    for protocol in options.protocols
                ]
                continue
            cell = {"phase": phase, "length": length, "inputs": "model", "protocol": "fair"}
            if phase != "prefill":
                cell["new_tokens"] = options.new_tokens
            cells.append(cell | shared)
    return cells


def run(context: CellContext) -> dict[str, Any]:
    """Run one cell; see ``repro.measurements.latency.cell``."""
    from repro.measurements.latency.cell import run_cell

    return run_cell(context)


def estimate_seconds(options: Mapping[str, Any], info: SubjectInfo) -> float:
    """Return rough seconds on 2 CPU cores: 25 calls of each arm, or the asked work if longer."""
    prefill = options["batch"] * info.prefill_seconds(options["length"])
    once, before = prefill, 0.0
    if options["phase"] == "attention":
        once = prefill / 4
    if options["phase"] == "decode":  # from one cache per arm, bound by the calls of a layer
        size = (info.parameters or 4_000_000) / 4e6
        once, before = 0.01 * max(1.0, size) * options["new_tokens"], 2 * prefill
    return 5.0 + before + max(1.5 * options["min_seconds"], 50 * once)


def positions(options: Mapping[str, Any]) -> int:
    """Return the positions that a subject must have; made inputs pass no model."""
    if options["phase"] == "attention" and options["inputs"] != "captured":
        return 0
    return options["length"] + options.get("new_tokens", 0)


MEASUREMENT = Measurement(
    name="latency",
    options=LatencyOptions,
    expand=expand,
    run=run,
    positions=positions,
    alone=True,
    paired=True,
    kinds=("llm",),
    libraries=("torch", "transformers"),
    estimate_seconds=estimate_seconds,
)
