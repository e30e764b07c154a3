"""KVTuner: for each layer its own bits of keys and of values, found by a search offline.

Source: arXiv:2502.04420 (ICML 2025). Deviations from the paper and its code: ``README.md`` here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from repro.errors import check_rules, near_matches
from repro.method import Artifact, CalibrationData, CalibrationSpec, Method, Patch

if TYPE_CHECKING:
    from repro.subjects import Subject


@dataclass(frozen=True, kw_only=True)
class KVTunerConfig:
    """Options of KVTuner.

    The table of bits is ``pairs``, or a published one (``preset``), or the same for all layers
    (``k_bits`` with ``v_bits``); where none is given, calibration searches for it.

    Attributes:
        mode: ``per_token`` (a group is one token of one head) or ``kivi`` (keys per channel).
        group_size: Tokens of a group of keys, channels of a group of values, in mode ``kivi``.
        residual: Newest tokens that stay unquantised in mode ``kivi``.
        pairs: (bits of keys, bits of values) of every layer: 2, 4, 8, or 16 for unquantised.
        preset: Name in ``presets.yaml``; mode, group size and residual must be its own.
        k_bits: Bits of the keys of all layers.
        v_bits: Bits of the values of all layers.
        max_bits: Soft cap of the search on the mean bits.
        trials: Tables that the search tries.
        samples: Questions that a trial asks.
        sample_length: Tokens of such a question.
        sampler: Optimiser of the search.
        seed: Of the search.
        pruning: Search over surviving pairs and groups of layers; false is the paper's ablation,
            all nine pairs for every layer.
        error: What pruning and grouping go by: ``elementwise`` is the paper's error of the attention
            output; ``pooled`` sums over a head's channels before it divides, for models with
            channels near 0.
        control: ``random`` replaces the table by one of as many bits at random, ``uniform`` by the
            uniform one of the fewest bits that has no fewer.
        draw: Seed of the random control.
    """

    mode: Literal["per_token", "kivi"] = "per_token"
    group_size: int = 32
    residual: int = 32
    pairs: tuple[tuple[int, int], ...] | None = None
    preset: str | None = None
    k_bits: int | None = None
    v_bits: int | None = None
    max_bits: float = 4.0
    trials: int = 100
    samples: int = 20
    sample_length: int = 1024
    sampler: Literal["nsga2", "tpe"] = "nsga2"
    seed: int = 0
    pruning: bool = True
    error: Literal["elementwise", "pooled"] = "elementwise"
    control: Literal["none", "random", "uniform"] = "none"
    draw: int = 0

    def __post_init__(self) -> None:
        bits = (2, 4, 8, 16)
        one, residual = self.k_bits is not None, self.residual
        given = sum((self.pairs is not None, self.preset is not None, one))
        known = all(len(pair) == 2 and set(pair) <= set(bits) for pair in self.pairs or ())
        whole = self.group_size >= 1 and residual >= 1 and residual % self.group_size == 0
        controls, errors = ("none", "random", "uniform"), ("elementwise", "pooled")
        check_rules(
            ("mode", self.mode in ("per_token", "kivi"), "per_token or kivi", self.mode),
            ("group_size", self.group_size >= 1, "at least 1", self.group_size),
            ("residual", whole, f"a positive multiple of group_size {self.group_size}", residual),
            ("pairs", self.pairs != () and known, f"one pair of {bits} a layer", self.pairs),
            ("k_bits", self.k_bits in (None, *bits), f"one of {bits}", self.k_bits),
            ("v_bits", self.v_bits in (None, *bits), f"one of {bits}", self.v_bits),
            ("v_bits", one == (self.v_bits is not None), "given with k_bits", self.v_bits),
            ("preset", given <= 1, "given without pairs and k_bits, which do the same", given),
            *self._preset_rules(),
            ("max_bits", 2 <= self.max_bits <= 8, "in [2, 8]", self.max_bits),
            ("trials", self.trials >= 1, "at least 1", self.trials),
            ("samples", self.samples >= 1, "at least 1", self.samples),
            ("sample_length", self.sample_length >= 1, "at least 1", self.sample_length),
            ("sampler", self.sampler in ("nsga2", "tpe"), "nsga2 or tpe", self.sampler),
            ("error", self.error in errors, "elementwise or pooled", self.error),
            ("control", self.control in controls, f"one of {', '.join(controls)}", self.control),
            ("draw", self.draw >= 0, "at least 0", self.draw),
        )

    def _preset_rules(self) -> list[tuple[str, bool, str, object]]:
        from repro.methods.kvtuner.tables import presets

        if self.preset is None:
            return []
        if self.preset not in presets():
            rule = f"a published table; {near_matches(self.preset, presets())}"
            return [("preset", False, rule, self.preset)]
        wanted = presets()[self.preset]
        return [
            (
                name,
                own in (None, getattr(self, name)),
                f"{own} with this preset",
                getattr(self, name),
            )
            for name, own in (
                ("mode", wanted.mode),
                ("group_size", wanted.group_size),
                ("residual", wanted.residual),
            )
        ]

    @property
    def searched(self) -> bool:
        """Whether the table comes from calibration."""
        return self.pairs is None and self.preset is None and self.k_bits is None


@contextmanager
def apply(
    subject: Subject, config: KVTunerConfig, artifact: Artifact | None = None
) -> Iterator[Patch]:
    """Run ``subject`` with a table of bits inside the block; prefill attends to exact K and V.

    Args:
        subject: An LLM.
        config: Options.
        artifact: What ``calibrate`` made, where the table is searched.

    Raises:
        MissingResource: If the table is searched and there is no artifact, or one made in another
            mode or for another number of layers.
        UnsupportedCombination: If the table is for another number of layers, or groups do not fit
            the model's heads.
    """
    from repro.methods.kvtuner.cache import packed_cache, table_of

    with packed_cache(subject, config, table_of(subject, config, artifact)) as patch:
        yield patch


def calibrate(
    subject: Subject,
    config: KVTunerConfig,
    data: CalibrationData,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
    workdir: Path | None = None,
) -> Artifact:
    """Profile every layer, prune and group the choices, and search for the table.

    Args:
        subject: An LLM with a tokenizer.
        config: Options.
        data: Prompts of the sensitivity profile.
        progress: Gets prompts and trials done, and how many there are.
        workdir: Folder for what a killed search goes on from; None to keep nothing.

    Returns:
        Artifact with ``e_k``, ``e_v``, ``e_a`` ``[layers, 3]``, ``e_o`` and ``e_o_pooled``
        ``[layers, 3, 3]`` fp32 (bits 2, 4, 8), and survivors, groups, trials, the front and the table as metadata.
    """
    from repro.methods.kvtuner.calibrate import find_table

    return find_table(subject, config, data, progress=progress, workdir=workdir)


METHOD = Method(
    slug="kvtuner",
    title="KVTuner",
    arxiv="2502.04420",
    kind="kv_cache",
    config=KVTunerConfig,
    apply=apply,
    needs_artifact=lambda config: config.searched,
    calibrate=calibrate,
    calibration_data=CalibrationSpec(count=20, length=1024),
)
