"""What a manifest may say of RULER, and the cells that follow from it. No torch, no lm-eval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from repro.errors import near_matches
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
        self._check_tasks()
        _require("lengths", bool(self.lengths), "a list of at least one length", self.lengths)
        for length in self.lengths:
            _require("lengths", length >= 1, "positive numbers of tokens", length)
        _require_distinct("lengths", self.lengths)
        _require("samples", self.samples >= 1, "at least 1", self.samples)
        _require("batch_size", self.batch_size >= 1, "at least 1", self.batch_size)
        _require("source", self.source in ("embedded", "hub"), "embedded or hub", repr(self.source))
        if self.source == "hub":
            rule = f"at most {HUB_SAMPLES} with source: hub"
            _require("samples", self.samples <= HUB_SAMPLES, rule, self.samples)
        limit = self.max_new_tokens
        _require("max_new_tokens", limit is None or limit >= 1, "at least 1, or null", limit)

    def task_names(self) -> list[str]:
        """Return the names of the tasks in the order given; ``all`` in the official order."""
        if self.tasks == "all":
            return list(TASKS)
        return [self.tasks] if isinstance(self.tasks, str) else list(self.tasks)

    def _check_tasks(self) -> None:
        names = self.task_names()
        _require("tasks", bool(names), "'all' or a list of at least one task", self.tasks)
        for name in names:
            if name not in TASKS:
                remedy = near_matches(name, TASKS)
                raise ValueError(f"tasks must be known RULER tasks, got {name!r}; {remedy}")
        _require_distinct("tasks", names)


def _require(name: str, holds: bool, rule: str, got: Any) -> None:
    if not holds:
        raise ValueError(f"{name} must be {rule}, got {got}")


def _require_distinct(name: str, values: list[Any]) -> None:
    twice = sorted({value for value in values if values.count(value) > 1})
    _require(name, not twice, "distinct", f"{', '.join(map(str, twice))} more than once")


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
