"""The patch: which table a configuration means for a model, and the caches of its layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from repro.errors import MissingResource, UnsupportedCombination
from repro.kv_cache import KVPatch, LayerShape, patched_kv_cache
from repro.kv_packed import PackedLayer, Packing
from repro.method import Artifact
from repro.methods.kvtuner import KVTunerConfig
from repro.methods.kvtuner.tables import (
    Pair,
    Table,
    average_bits,
    presets,
    random_table,
    uniform_table,
)

if TYPE_CHECKING:
    from repro.subjects import Subject


def packing_of(config: KVTunerConfig, pair: Pair) -> Packing:
    """Return how a layer of these bits is packed."""
    return Packing(
        k_bits=pair[0],
        v_bits=pair[1],
        mode=config.mode,
        group_size=config.group_size,
        residual=config.residual,
    )


@contextmanager
def packed_cache(
    subject: Subject, config: KVTunerConfig, table: Table, *, force_quantized: bool = False
) -> Iterator[KVPatch]:
    """Run ``subject`` with a table inside the block; restore it on exit, error or not.

    Args:
        subject: An LLM.
        config: Mode, group size and residual.
        table: A pair for every layer.
        force_quantized: Let the prefill, too, attend to what is read back (calibration).
    """
    packings = [packing_of(config, pair) for pair in table]

    def make_layer(shape: LayerShape) -> PackedLayer:
        return PackedLayer(shape, packings[shape.layer], force_quantized=force_quantized)

    settings = subject.model.config.get_text_config()
    head_dim = getattr(settings, "head_dim", None) or (
        settings.hidden_size // settings.num_attention_heads
    )
    stored = sum(packing.stored_bits(head_dim) for packing in packings) / len(packings)
    facts = {"bits": average_bits(table), "stored_bits": stored}
    with patched_kv_cache(subject.model, make_layer, facts=facts) as patch:
        yield patch


def table_of(subject: Subject, config: KVTunerConfig, artifact: Artifact | None) -> Table:
    """Return the pairs of a model's layers, those of the control if the configuration is one.

    Raises:
        MissingResource: If there is no artifact where one is needed, or it does not fit.
        UnsupportedCombination: If the table is for another number of layers.
    """
    layers = subject.model.config.get_text_config().num_hidden_layers
    table, source = _table_and_source(config, artifact, layers)
    if len(table) != layers:
        raise UnsupportedCombination(
            f"kvtuner: {source} must be for the {layers} layers of {subject.name}, got "
            f"{len(table)} pairs; a table belongs to one model"
        )
    if config.control == "random":
        return random_table(table, config.draw)
    return uniform_table(table) if config.control == "uniform" else table


def _table_and_source(
    config: KVTunerConfig, artifact: Artifact | None, layers: int
) -> tuple[Table, str]:
    if config.pairs is not None:
        return config.pairs, "pairs"
    if config.preset is not None:
        return presets()[config.preset].table, f"preset {config.preset}"
    if config.k_bits is not None and config.v_bits is not None:
        return ((config.k_bits, config.v_bits),) * layers, "k_bits"
    if artifact is None:
        raise MissingResource("kvtuner: a searched table needs an artifact of calibrate, got none")
    found = artifact.metadata
    wanted = ["mode", "group_size", "residual"] if config.mode == "kivi" else ["mode"]
    for name in wanted:
        if found[name] != getattr(config, name):
            raise MissingResource(
                f"kvtuner: the artifact must be made with {name} {getattr(config, name)}, got "
                f"{found[name]}; a found table is for one mode"
            )
    return tuple((int(k), int(v)) for k, v in found["table"]), "the artifact"
