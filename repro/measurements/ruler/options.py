"""What a manifest may say of RULER, and the cells that follow from it. No torch, no lm-eval."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from repro.errors import check_rules, near_matches
from repro.measurements.ruler.tasks import TASKS
from repro.subjects import SubjectInfo

#: lm-eval's generators make exactly this many items per task and length.
HUB_SAMPLES = 500


@dataclass(frozen=True, kw_only=True)
class RulerOptions:
    """The manifest's options of the measurement ``ruler``.

    Args:
        tasks: ``all`` 13, or a list of their names.
        lengths: Tokens of prompt and answer together; a cell each.
        samples: Items per task and length.
        batch_size: Items generated together, and stored together.
        source: ``embedded`` (made here, offline) or ``hub`` (lm-eval's own prompts and data).
        max_new_tokens: Limit for every task, or None for the official limit of each.
        chat_template: Wrap the prompt in the subject's chat template, within the length.
    """

    tasks: str | list[str] = "all"
    lengths: list[int] = field(default_factory=lambda: [4096])
    samples: int = 20
    batch_size: int = 4
    source: Literal["embedded", "hub"] = "embedded"
    max_new_tokens: int | None = None
    chat_template: bool = False

    def __post_init__(self) -> None:
        names, limit = self.task_names(), self.max_new_tokens
        unknown = [name for name in names if name not in TASKS]
        most = HUB_SAMPLES if self.source == "hub" else math.inf
        lengths = self.lengths
        low = ", ".join(str(length) for length in lengths if length < 1)
        check_rules(
            ("tasks", bool(names), "'all' or a list of at least one task", self.tasks),
            *(
                ("tasks", False, "known RULER tasks", f"{name!r}; {near_matches(name, TASKS)}")
                for name in unknown
            ),
            ("tasks", not _twice(names), "distinct", f"{_twice(names)} more than once"),
            ("lengths", bool(lengths), "a list of at least one length", lengths),
            ("lengths", not low, "positive numbers of tokens", low),
            ("lengths", not _twice(lengths), "distinct", f"{_twice(lengths)} more than once"),
            ("samples", self.samples >= 1, "at least 1", self.samples),
            ("samples", self.samples <= most, f"at most {most} with source: hub", self.samples),
            ("batch_size", self.batch_size >= 1, "at least 1", self.batch_size),
            ("source", self.source in ("embedded", "hub"), "embedded or hub", repr(self.source)),
            ("max_new_tokens", limit is None or limit >= 1, "at least 1, or null", limit),
        )

    def task_names(self) -> list[str]:
        """Return the names of the tasks in the order given; ``all`` in the official order."""
        if self.tasks == "all":
            return list(TASKS)
        return [self.tasks] if isinstance(self.tasks, str) else list(self.tasks)


def _twice(values: list[Any]) -> str:
    return ", ".join(map(str, sorted({value for value in values if values.count(value) > 1})))


def expand(options: RulerOptions) -> list[dict[str, Any]]:
    """Return the options of each cell: one length and task, shortest lengths first."""
    return [
        {
            "task": task,
            "length": length,
            "samples": options.samples,
            "batch_size": options.batch_size,
            "source": options.source,
            "max_new_tokens": options.max_new_tokens or TASKS[task].max_new_tokens,
            "chat_template": options.chat_template,
        }
        for length in sorted(options.lengths)
        for task in options.task_names()
    ]


def estimate_seconds(options: Mapping[str, Any], info: SubjectInfo) -> float:
    """Return rough seconds of one cell on two CPU cores: prefills, and a step per new token."""
    size = (info.parameters or 4_000_000) / 4e6
    samples = int(options["samples"])
    batches = -(-samples // int(options["batch_size"]))
    # Most answers end well before their limit.
    decoding = batches * 0.006 * max(1.0, size) * 0.25 * int(options["max_new_tokens"])
    return 0.3 + samples * info.prefill_seconds(int(options["length"])) + decoding
