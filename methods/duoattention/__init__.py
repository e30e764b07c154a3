"""DuoAttention: a full cache for retrieval heads, sinks and a recent window for streaming heads.

Source: arXiv:2410.10819 (ICLR 2025). Deviations from the paper and its code: ``README.md`` here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from repro.errors import check_rules
from repro.method import Artifact, CalibrationData, Method, Patch

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from repro.subjects import Subject


@dataclass(frozen=True, kw_only=True)
class DuoAttentionConfig:
    """Options of DuoAttention; those from ``steps`` on are of the training of the gates.

    Attributes:
        sparsity: Share of KV heads that stream, in [0, 1].
        sink_size: First tokens that a streaming head keeps.
        recent_size: Latest tokens that it keeps, the query's own not counted.
        chunk_size: Tokens of a prefill chunk, counted from the start of the prompt. Streaming heads
            forget after each; inside the first one all heads are dense.
        pattern: Folder or ``full_attention_heads.tsv`` with published gates, None for trained ones.
        control: ``random`` takes as many retrieval heads at random, ``inverted`` those of the
            smallest gates.
        draw: Seed of the random control.
        max_tokens: Tokens that the pool of a layer may hold for all sequences, None for any number.
        simulated_decode: Last tokens of the prompt that are treated as decode steps.
        steps: Training steps, a document each.
        learning_rate: Peak rate.
        l1_weight: Weight of the mean gate in the loss.
        shortest: Tokens of the shortest document.
        longest: Tokens of the longest document.
        lengths: Different document lengths, equally spaced.
        passkeys: Most passkeys in a document.
        train_sink_size: Sinks of the student, in whole blocks of 128 tokens.
        train_recent_size: Recent tokens of the student, in whole blocks, the query's counted.
        seed: Of the documents and their order.
    """

    sparsity: float = 0.5
    sink_size: int = 64
    recent_size: int = 256
    chunk_size: int = 32000
    pattern: str | None = None
    control: Literal["none", "random", "inverted"] = "none"
    draw: int = 0
    max_tokens: int | None = None
    simulated_decode: int = 0
    steps: int = 2000
    learning_rate: float = 0.02
    l1_weight: float = 0.05
    shortest: int = 1000
    longest: int = 32000
    lengths: int = 50
    passkeys: int = 10
    train_sink_size: int = 128
    train_recent_size: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        controls, pool = ("none", "random", "inverted"), self.max_tokens
        at_least_0 = ("sink_size", "draw", "simulated_decode", "train_sink_size", "seed")
        at_least_1 = ("recent_size", "chunk_size", "steps", "lengths", "passkeys")
        rate, weight = self.learning_rate, self.l1_weight
        rules = [
            ("sparsity", 0 <= self.sparsity <= 1, "in [0, 1]"),
            ("pattern", self.pattern != "", "a path, or null"),
            ("control", self.control in controls, f"one of {', '.join(controls)}"),
            ("max_tokens", pool is None or pool >= 1, "at least 1, or null"),
            ("learning_rate", 0 < rate < math.inf, "positive"),
            ("l1_weight", 0 <= weight < math.inf, "at least 0"),
            ("shortest", self.shortest >= 256, "at least 256"),
            ("longest", self.longest >= self.shortest, f"at least shortest {self.shortest}"),
            ("train_recent_size", self.train_recent_size >= 1, "at least 1"),
            *((name, getattr(self, name) >= 0, "at least 0") for name in at_least_0),
            *((name, getattr(self, name) >= 1, "at least 1") for name in at_least_1),
        ]
        check_rules(*((name, kept, rule, getattr(self, name)) for name, kept, rule in rules))


#: Options on which the trained gates depend.
TRAINING = (
    "steps",
    "learning_rate",
    "l1_weight",
    "shortest",
    "longest",
    "lengths",
    "passkeys",
    "train_sink_size",
    "train_recent_size",
    "seed",
)


def needs_gates(config: DuoAttentionConfig) -> bool:
    """Whether the split of the heads depends on gates."""
    return 0 < config.sparsity < 1 and config.control != "random"


@contextmanager
def apply(
    subject: Subject, config: DuoAttentionConfig, artifact: Artifact | None = None
) -> Iterator[Patch]:
    """Run ``subject`` with two caches a layer inside the block.

    The weights of the attention are reordered in place, retrieval heads first, and set back to the
    bit on exit, error or not.

    Args:
        subject: An LLM with ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj`` in every layer.
        config: Options.
        artifact: What ``calibrate`` made; not needed with ``pattern``, the random control, or a
            sparsity of 0 or 1.

    Raises:
        UnsupportedCombination: If the model's attention is of another form.
        MissingResource: If gates are needed and missing, of another shape, or trained otherwise.
    """
    from repro.kv_cache import LayerCache, LayerShape, patched_kv_cache
    from repro.methods.duoattention.cache import DuoLayer
    from repro.methods.duoattention.heads import choose_heads, reordered

    heads = choose_heads(subject.model, config, artifact)

    def make_layer(shape: LayerShape) -> LayerCache:
        return DuoLayer(shape, config, sum(heads.retrieval[shape.layer]))

    with (
        reordered(subject.model, heads.retrieval),
        patched_kv_cache(subject.model, make_layer, facts=heads.facts()) as patch,
    ):
        yield patch


def calibrate(
    subject: Subject,
    config: DuoAttentionConfig,
    data: CalibrationData,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
    workdir: Path | None = None,
) -> Artifact:
    """Train one gate per layer and KV head on passkey documents, which it makes itself.

    Args:
        subject: An LLM with a tokenizer; its weights stay as they are.
        config: Options from ``steps`` on.
        data: Not used: an ordinary prompt has one question at most.
        progress: Is told (steps done, steps in all).
        workdir: Folder for what a killed training goes on from; None to keep nothing.

    Returns:
        Artifact with ``gates`` ``[layers, H_kv]`` and ``losses`` ``[steps]``, fp32.
    """
    from repro.methods.duoattention.calibrate import train_gates

    return train_gates(subject, config, progress=progress, workdir=workdir)


METHOD = Method(
    slug="duoattention",
    title="DuoAttention",
    arxiv="2410.10819",
    kind="kv_cache",
    config=DuoAttentionConfig,
    apply=apply,
    needs_artifact=lambda config: config.pattern is None and needs_gates(config),
    calibrate=calibrate,
    calibration_fields=TRAINING,
)
