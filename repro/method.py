"""The contract of a method plugin: what ``methods/<slug>/__init__.py`` offers as ``METHOD``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from repro.subjects import Subject

#: Fields of a configuration that make a control of the method, not another method.
CONTROL_FIELDS = ("control", "draw")


class Patch:
    """What ``apply`` yields; the measurements ask it, every hook is optional.

    ``stats()`` returns JSON-able values under these names where they apply: ``density`` (mean of
    computed / computable blocks in [0, 1]), ``density_per_layer`` (list), ``density_per_head``
    (list of lists, layer by query head), ``fallback_share`` (share of attention calls, the decode
    steps that the method leaves dense by definition not counted, that ran dense), ``dense_calls``,
    ``sparse_calls``, ``selection_seconds``, ``kv_bytes`` (of all tensors that the method's cache
    holds now, tables and buffers included), ``kv_tokens`` (that it holds of a sequence now, mean
    over layers and KV heads), ``seen_tokens`` (that the cache has taken in, padding counted),
    ``decode_density`` (tokens read by decode steps over tokens seen), ``weight_bytes``.
    """

    #: Name of a vLLM attention backend, where the method has one.
    vllm_backend: str | None = None

    def stats(self) -> dict[str, Any]:
        """Return what was observed since the last ``reset``."""
        return {}

    def reset(self) -> None:
        """Forget the state of the last sample and the observations."""

    def make_cache(self) -> Any | None:
        """Return the ``Cache`` that ``generate`` is to use, or None for the model's own.

        Each call gives a fresh one, which ``stats`` then counts. It may offer ``fill(layer_index,
        k, v)``, which stores k, v ``[B, H_kv, T, D]`` of an empty layer as a prefill would: the
        measurement ``kv_cache`` finds the longest context with it.
        """
        return None

    def wrap_optimizer(self, optimizer: Any) -> Any:
        """Return the optimizer that training is to use."""
        return optimizer


@dataclass(frozen=True)
class Artifact:
    """What a calibration or training stage leaves: tensors and JSON-able metadata.

    The artifact store writes it as safetensors + JSON under the SHA-256 of its content.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Method:
    """One paper's plugin (or a baseline, which has the same form).

    Attributes:
        slug: Folder name under ``methods/``, a Python identifier.
        title: Short name of the paper's method.
        arxiv: arXiv id, or "" for a baseline without a paper.
        kind: ``attention``, ``kv_cache``, ``linear``, ``training``, ``tokens`` or ``pipeline``.
        config: Frozen dataclass of standard-library types; validates itself in ``__post_init__``
            by raising ValueError with the text ``<field> must be <rule>, got <value>``.
        apply: ``apply(subject, config, artifact=None)``, a context manager that yields a ``Patch``
            and always undoes itself, bit for bit.
        needs_artifact: Whether this config needs ``calibrate`` first.
        calibrate: ``calibrate(subject, config, data, *, progress) -> Artifact``; ``data`` is a
            sequence of token-id tensors ``[1, T]`` int64 that never score. One that takes
            ``workdir``, too, gets a folder of its own, the same after a kill, to go on from.
        calibration_fields: Fields of the config that the artifact depends on, None for all:
            configs that differ elsewhere share it.
        fallback_limit: A cell whose ``fallback_share`` exceeds this is ``invalid``.
    """

    slug: str
    title: str
    arxiv: str
    kind: str
    config: type
    apply: Callable[[Subject, Any, Artifact | None], AbstractContextManager[Patch]]
    needs_artifact: Callable[[Any], bool] = lambda config: False
    calibrate: Callable[..., Artifact] | None = None
    calibration_data: CalibrationSpec | None = None
    calibration_fields: tuple[str, ...] | None = None
    fallback_limit: float = 0.0


@dataclass(frozen=True, kw_only=True)
class CalibrationSpec:
    """How many prompts of which length (tokens) ``calibrate`` wants."""

    count: int = 8
    length: int = 1024
    seed: int = 7_000_000


CalibrationData = Sequence["torch.Tensor"]
