"""Calibration: sensitivity of the layers, the pruned space, the search on questions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repro.errors import BadInput, Fault
from repro.figures import curve, heatmap
from repro.keys import digest
from repro.method import Artifact, CalibrationData
from repro.methods.kvtuner import KVTunerConfig
from repro.methods.kvtuner.cache import packed_cache, packing_of
from repro.methods.kvtuner.search import (
    Journal,
    Trial,
    front,
    pick,
    pruned_space,
    search,
    whole_space,
)
from repro.methods.kvtuner.sensitivity import GUARD, profile
from repro.methods.kvtuner.tables import DENSE, Table
from repro.questions import accuracy, questions

if TYPE_CHECKING:
    from repro.subjects import Subject

#: What a trial asks: retrieval, where a wrong score of one token is a wrong answer.
TASKS = ("niah_multikey_2", "niah_multivalue", "niah_single_2", "niah_multiquery", "niah_single_3")
#: Seed of the questions, apart from that of the prompts of the profile.
QUESTIONS_SEED = 7_500_000


def find_table(
    subject: Subject,
    config: KVTunerConfig,
    data: CalibrationData,
    *,
    progress: Callable[[int, int], None],
    workdir: Path | None = None,
) -> Artifact:
    """Find the table of a model; see ``calibrate``.

    Raises:
        BadInput: If there is no prompt, or no table tried is within the cap.
        UnsupportedCombination: If the subject has no tokenizer.
    """
    if not data:
        raise BadInput(Fault("kvtuner: calibrate", "data", "at least one prompt", "none"))
    total = len(data) + config.trials
    progress(0, total)
    errors = profile(
        subject.model,
        data,
        packing_of(config, DENSE),
        progress=lambda done: progress(done, total),
    )
    layers = errors.o.shape[0]
    searched = whole_space(layers)
    if config.pruning:
        pooled = config.error == "pooled"
        searched = pruned_space([errors.of_layer(n, pooled=pooled) for n in range(layers)])
    asked = questions(
        subject,
        tasks=TASKS,
        count=config.samples,
        length=config.sample_length,
        seed=QUESTIONS_SEED,
    )

    def score(table: Table) -> float:
        with packed_cache(subject, config, table, force_quantized=True) as patch:
            return accuracy(subject, asked, patch.make_cache)

    journal = _journal(subject, config, workdir)
    unquantized = 1 - journal.loss((DENSE,) * layers, lambda table: 1 - score(table))
    tried = search(
        searched,
        lambda table: unquantized - (1 - journal.loss(table, lambda t: 1 - score(t))),
        trials=config.trials,
        max_bits=config.max_bits,
        sampler=config.sampler,
        seed=config.seed,
        progress=lambda done: progress(len(data) + done, total),
    )
    chosen = pick(tried, config.max_bits)
    if chosen is None:
        raise BadInput(
            Fault(
                "kvtuner: calibrate",
                "trials",
                f"enough to find a table within max_bits {config.max_bits}",
                config.trials,
            )
        )
    metadata = {
        "subject": subject.name,
        "revision": subject.info.revision,
        "mode": config.mode,
        "group_size": config.group_size,
        "residual": config.residual,
        "table": chosen.table,
        "average_bits": chosen.bits,
        "accuracy": unquantized - chosen.loss,
        "accuracy_unquantized": unquantized,
        "bits": errors.bits,
        "guard": GUARD,
        "surviving": dict(zip(map(str, searched.groups), searched.choices, strict=True)),
        "groups": searched.groups,
        "trials": [(trial.table, trial.bits, trial.loss) for trial in tried],
        "front": [(trial.table, trial.bits, trial.loss) for trial in front(tried)],
        "sampler": config.sampler,
        "seed": config.seed,
        "figures": _figures(tried, chosen, unquantized),
    }
    return Artifact(tensors=errors.tensors(), metadata=metadata)


def _figures(tried: list[Trial], chosen: Trial, unquantized: float) -> list[dict[str, Any]]:
    def points(trials: Iterable[Trial]) -> list[tuple[float, float]]:
        return [(trial.bits, unquantized - trial.loss) for trial in trials]

    series = {"tried": points(tried), "front": points(front(tried)), "chosen": points([chosen])}
    series["not quantized"] = [(16.0, unquantized)]
    return [
        curve(
            "Search: accuracy on questions that never score",
            series,
            x="mean bits of keys and values",
            y="accuracy",
            joined=["front"],
        ),
        heatmap(
            "Bits chosen",
            [[float(bits) for bits in pair] for pair in zip(*chosen.table, strict=True)],
            row="0 keys, 1 values",
            column="layer",
            label="bits",
            limits=(2.0, 8.0),
        ),
    ]


def _journal(subject: Subject, config: KVTunerConfig, workdir: Path | None) -> Journal:
    """Return the losses known of this subject under these options of the questions."""
    device = f"{subject.device.type} {subject.dtype}"
    names = ("mode", "group_size", "residual", "samples", "sample_length")
    options = [getattr(config, name) for name in names]
    identity = digest([subject.name, subject.info.revision, device, TASKS, *options])
    return Journal(None if workdir is None else workdir / "losses.jsonl", identity)
