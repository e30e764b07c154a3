"""XAttention: block-sparse prefill, blocks chosen by antidiagonal sums of the score matrix.

Source: arXiv:2503.16428 (ICML 2025). Deviations from the paper and its code: ``README.md`` here.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from repro.errors import check_rules
from repro.method import Artifact, CalibrationData, CalibrationSpec, Method, Patch

if TYPE_CHECKING:
    from collections.abc import Callable

    from repro.subjects import Subject


@dataclass(frozen=True, kw_only=True)
class XAttentionConfig:
    """Options of XAttention.

    Attributes:
        stride: Tokens a group of the estimate, a divisor of ``block_size``; larger is cheaper.
        threshold: Share of the estimated mass that each row of blocks keeps, in [0, 1]. From 1 on
            attention is dense, bit for bit.
        per_head: Take one threshold per layer and head from calibration instead.
        block_size: Tokens a block: 16, 32, 64 or 128.
        estimator_chunk: Query tokens scored at a time, a multiple of ``block_size``; None takes
            the released code's formula. Bounds memory; changes the outcome only under
            ``first_chunk_quirk``, which holds in the first chunk.
        keep_sink: Always keep the first key block.
        keep_recent: Always keep the diagonal block.
        first_chunk_quirk: Select in the first chunk as the released code does, which keeps up to
            two blocks a row too many.
        pattern: Which pairs of a tile are added up (ablation of the paper).
        control: ``random`` or ``oracle`` replaces the chosen blocks by as many random ones, or by
            those of the largest exact mass; sink and diagonal stay.
        draw: Seed of the random control and of the random pattern.
        min_tokens: Prompts of fewer keys run dense; counted with density 1.
    """

    stride: int = 16
    threshold: float = 0.9
    per_head: bool = False
    block_size: int = 128
    estimator_chunk: int | None = None
    keep_sink: bool = True
    keep_recent: bool = True
    first_chunk_quirk: bool = False
    pattern: Literal["antidiagonal", "diagonal", "random"] = "antidiagonal"
    control: Literal["none", "random", "oracle"] = "none"
    draw: int = 0
    min_tokens: int = 0

    def __post_init__(self) -> None:
        chunk = self.estimator_chunk
        patterns, controls = ("antidiagonal", "diagonal", "random"), ("none", "random", "oracle")
        rules = [
            ("block_size", self.block_size in (16, 32, 64, 128), "16, 32, 64 or 128"),
            ("stride", _divides(self.stride, self.block_size), f"a divisor of {self.block_size}"),
            ("threshold", 0 <= self.threshold <= 1, "in [0, 1]"),
            (
                "estimator_chunk",
                chunk is None or _divides(self.block_size, chunk),
                f"None or a positive multiple of {self.block_size}",
            ),
            ("pattern", self.pattern in patterns, f"one of {', '.join(patterns)}"),
            ("control", self.control in controls, f"one of {', '.join(controls)}"),
            ("draw", self.draw >= 0, "at least 0"),
            ("min_tokens", self.min_tokens >= 0, "at least 0"),
        ]
        check_rules(*((name, kept, rule, getattr(self, name)) for name, kept, rule in rules))


def _divides(divisor: int, number: int) -> bool:
    return divisor >= 1 and number >= divisor and number % divisor == 0


def apply(
    subject: Subject, config: XAttentionConfig, artifact: Artifact | None = None
) -> AbstractContextManager[Patch]:
    """Run the prefill of ``subject`` with XAttention inside the block; decode stays dense.

    Args:
        subject: An LLM whose model takes its attention from transformers' ``AttentionInterface``.
        config: Options.
        artifact: What ``calibrate`` made, with ``per_head``.

    Raises:
        UnsupportedCombination: If the model's attention is not plain causal attention.
        MissingResource: If ``per_head`` and no artifact, or one of another shape or stride.
    """
    from repro.methods.xattention.attention import patched

    return patched(subject, config, artifact)


def calibrate(
    subject: Subject,
    config: XAttentionConfig,
    data: CalibrationData,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Artifact:
    """Profile one threshold per layer and query head on texts that never score.

    Returns:
        Artifact with ``threshold`` ``[layers, H]`` fp32.
    """
    from repro.methods.xattention.calibrate import profile_thresholds

    return profile_thresholds(subject, config, data, progress=progress)


METHOD = Method(
    slug="xattention",
    title="XAttention",
    arxiv="2503.16428",
    kind="attention",
    config=XAttentionConfig,
    apply=apply,
    needs_artifact=lambda config: config.per_head,
    calibrate=calibrate,
    calibration_data=CalibrationSpec(count=8, length=4096),
)
