"""Next-token perplexity on long text: in strided windows of prefill, or decoded token by token.

A sparse method changes what a token sees of its window, so its perplexity against dense says what
the selection loses on ordinary text. A method that prefills exactly and then stores less shows its
loss in mode ``decode`` alone, where each token reads what the cache has kept. Documents are stored
one by one; a run resumes between them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from repro.errors import check_rules
from repro.measurements import CellContext, Measurement
from repro.measurements.perplexity import texts
from repro.subjects import SubjectInfo

MODES = ("sliding", "decode")


@dataclass(frozen=True, kw_only=True)
class PerplexityOptions:
    """What to measure.

    Attributes:
        lengths: Tokens of a window (sliding) or of a document (decode); a cell each.
        documents: Number of documents, each of two windows' length in mode sliding.
        text: ``prose`` (synthetic), ``wikitext-2`` or ``c4`` (from the hub), or a local text set:
            the path of a ``.jsonl`` or ``.txt`` file or of a folder of these; the formats are in
            ``repro.measurements.perplexity.texts``.
        mode: ``sliding`` prefills strided windows; ``decode`` prefills the first ``prefix`` tokens
            of a document and feeds the others one by one through the method's cache.
        stride: Tokens that a window is moved by and that it newly scores; None is half a window.
        prefix: Tokens that mode decode prefills; None is half the document.
    """

    lengths: list[int] = field(default_factory=lambda: [2048])
    documents: int = 8
    text: str = texts.PROSE
    mode: str = "sliding"
    stride: int | None = None
    prefix: int | None = None

    def __post_init__(self) -> None:
        lengths, stride, prefix = self.lengths, self.stride, self.prefix
        decodes = self.mode == "decode"
        # What is scored has something before it; what is decoded also follows the prefix.
        fewest = 3 if decodes else 2
        shortest = min(lengths, default=fewest)
        check_rules(
            ("lengths", bool(lengths) and shortest >= fewest, f"tokens, {fewest} or more", lengths),
            ("lengths", len(set(lengths)) == len(lengths), "distinct", lengths),
            ("documents", self.documents >= 2, "at least 2", self.documents),
            ("text", bool(self.text), "a name or a path", repr(self.text)),
            ("mode", self.mode in MODES, f"one of {', '.join(MODES)}", self.mode),
            ("stride", not decodes or stride is None, "left out in mode decode", stride),
            ("prefix", decodes or prefix is None, "left out in mode sliding", prefix),
            _within("stride", stride, shortest - 1),
            _within("prefix", prefix, shortest - 2),
        )


def _within(name: str, value: int | None, most: int) -> tuple[str, bool, str, object]:
    """Return the rule, for ``check_rules``, on a number of tokens that may be left out."""
    return name, value is None or 1 <= value <= most, f"in [1, {most}]", value


def expand(options: PerplexityOptions) -> list[dict[str, Any]]:
    """Return one cell per length; the content of the text is part of each.

    Raises:
        BadInput: If a local text set is not there or not in its format.
    """
    revision = texts.revision(options.text)
    cells = []
    for length in sorted(options.lengths):
        cell: dict[str, Any] = {
            "length": length,
            "documents": options.documents,
            "text": options.text,
            "mode": options.mode,
        }
        if options.mode == "decode":
            cell["prefix"] = options.prefix or max(1, length // 2)
        else:
            cell["stride"] = options.stride or max(1, length // 2)
        cells.append(cell | ({"text_revision": revision} if revision else {}))
    return cells


def run(context: CellContext) -> dict[str, Any]:
    """Measure one cell; see ``repro.measurements.perplexity.cell``."""
    from repro.measurements.perplexity.cell import run_cell

    return run_cell(context)


def estimate_seconds(options: Mapping[str, Any], info: SubjectInfo) -> float:
    """Return rough seconds on two CPU cores."""
    length = int(options["length"])
    if options["mode"] == "decode":
        steps = length - options["prefix"]
        # A step reads all weights once and is bound by the calls of a layer, not by arithmetic.
        step = 0.016 + 4e-3 * (info.parameters or 0) / 4e6
        return 0.3 + options["documents"] * (info.prefill_seconds(length) + steps * step)
    windows = options["documents"] * (1 + length / options["stride"])
    return 0.3 + windows * info.prefill_seconds(length)


MEASUREMENT = Measurement(
    name="perplexity",
    options=PerplexityOptions,
    expand=expand,
    run=run,
    needs_training=True,
    libraries=("transformers",),
    estimate_seconds=estimate_seconds,
)
