"""Which KV heads are retrieval heads: gates, their threshold, controls, order of the weights."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from repro.block_controls import seed_of
from repro.errors import MissingResource, UnsupportedCombination
from repro.method import Artifact
from repro.methods.duoattention import TRAINING, DuoAttentionConfig, needs_gates

GATES_FILE = "full_attention_heads.tsv"
SETTINGS_FILE = "config.json"
_WHERE = "duoattention"


@dataclass(frozen=True)
class Heads:
    """The split of a model's KV heads.

    Attributes:
        retrieval: For every layer and KV head, whether it is a retrieval head.
        margin: Smallest gate of a retrieval head less the largest of a streaming head, None where
            no gates were asked. Near 0 the order of the heads decided.
    """

    retrieval: tuple[tuple[bool, ...], ...]
    margin: float | None = None

    def facts(self) -> dict[str, Any]:
        """Return what records say of the split."""
        per_layer = [sum(layer) for layer in self.retrieval]
        return {"retrieval_heads": per_layer, "gate_margin": self.margin}


def choose_heads(model: Any, config: DuoAttentionConfig, artifact: Artifact | None) -> Heads:
    """Return the split of a model's heads under a configuration.

    Raises:
        MissingResource: If gates are needed and missing, of another shape, or trained otherwise.
    """
    shape = heads_shape(model)
    if not needs_gates(config):
        return split_heads(torch.zeros(shape), config)
    gates = read_pattern(config.pattern)[0] if config.pattern else _trained(config, artifact)
    if tuple(gates.shape) != shape:
        raise MissingResource(
            f"{_WHERE}: gates must be [layers, KV heads] = {list(shape)} for this model, got "
            f"{list(gates.shape)}"
        )
    return split_heads(gates, config)


def heads_shape(model: Any) -> tuple[int, int]:
    """Return (layers, KV heads) of a model."""
    settings = model.config.get_text_config()
    kv_heads = getattr(settings, "num_key_value_heads", None) or settings.num_attention_heads
    return settings.num_hidden_layers, kv_heads


def _trained(config: DuoAttentionConfig, artifact: Artifact | None) -> torch.Tensor:
    if artifact is None or "gates" not in artifact.tensors:
        raise MissingResource(
            f"{_WHERE}: gates must be trained first or given as pattern, got no artifact"
        )
    for name in TRAINING:
        wanted = getattr(config, name)
        if artifact.metadata.get(name, wanted) != wanted:
            raise MissingResource(
                f"{_WHERE}: gates must be trained with {name} {wanted}, got "
                f"{artifact.metadata[name]}"
            )
    return artifact.tensors["gates"]


def split_heads(gates: torch.Tensor, config: DuoAttentionConfig) -> Heads:
    """Binarise gates ``[layers, H_kv]`` at the quantile ``sparsity``, or as the control says.

    A head is a retrieval head if its gate reaches the quantile (linear interpolation) of the gates
    of all layers, clipped to [0, 1]. Among equal gates the earlier layer and head counts as larger.

    Source: arXiv:2410.10819, section 2.3, and the released code.
    """
    values = gates.double().clamp(0, 1).flatten().tolist()
    kept = retrieval_count(len(values), config.sparsity)
    order = sorted(range(len(values)), key=lambda head: (-values[head], head))
    if config.control == "inverted":
        order.reverse()
    elif config.control == "random":
        generator = torch.Generator().manual_seed(seed_of(_WHERE, config.draw))
        order = torch.randperm(len(values), generator=generator).tolist()
    chosen, rest = set(order[:kept]), order[kept:]
    margin = None
    if chosen and rest and config.control == "none":
        margin = min(values[head] for head in chosen) - max(values[head] for head in rest)
    layers, heads = gates.shape
    retrieval = tuple(
        tuple(layer * heads + head in chosen for head in range(heads)) for layer in range(layers)
    )
    return Heads(retrieval, margin)


def retrieval_count(heads: int, sparsity: float) -> int:
    """Return how many of ``heads`` different gates reach their quantile ``sparsity``."""
    if sparsity <= 0:
        return heads
    if sparsity >= 1:
        return 0
    # The product may come out a rounding error above a whole number.
    return heads - math.ceil(sparsity * (heads - 1) - 1e-9)


def read_pattern(path: str | Path) -> tuple[torch.Tensor, dict[str, Any]]:
    """Read published gates: a folder, or the table in it; settings lie beside, where there are any.

    Returns:
        Gates ``[layers, H_kv]`` fp32, clipped to [0, 1], and the settings.

    Raises:
        MissingResource: If the table is missing or no table of numbers.
    """
    table = Path(path).expanduser()
    if table.is_dir():
        table = table / GATES_FILE
    try:
        values = np.loadtxt(table, delimiter="\t", ndmin=2, dtype=np.float64)
    except OSError:
        raise MissingResource(
            f"{_WHERE}: pattern must be {GATES_FILE} or a folder that holds it, got {path}"
        ) from None
    except ValueError as error:
        raise MissingResource(
            f"{_WHERE}: pattern must be a table of numbers between tabs, got {table}: {error}"
        ) from None
    if not values.size or not np.isfinite(values).all():
        raise MissingResource(f"{_WHERE}: pattern must hold finite numbers, got {table}")
    beside = table.parent / SETTINGS_FILE
    settings = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    return torch.from_numpy(values).float().clamp(0, 1), settings


def write_pattern(folder: str | Path, gates: torch.Tensor, settings: dict[str, Any]) -> None:
    """Write gates ``[layers, H_kv]`` and settings in the form of the published patterns."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    np.savetxt(folder / GATES_FILE, gates.detach().double().cpu().numpy(), delimiter="\t")
    text = json.dumps(settings, indent=2, sort_keys=True)
    (folder / SETTINGS_FILE).write_text(text + "\n", encoding="utf-8")


@contextmanager
def reordered(model: Any, retrieval: Sequence[Sequence[bool]]) -> Iterator[None]:
    """Put the retrieval heads of every layer first inside the block.

    Rows of the projections to q, k and v, their biases and the columns of the output projection
    move together, so that the outcome of the model stays; they are moved back on exit.
    """
    attentions = [_checked_attention(model, layer) for layer in range(len(retrieval))]
    with ExitStack() as undo:
        for attention, chosen in zip(attentions, retrieval, strict=True):
            order = torch.tensor(sorted(range(len(chosen)), key=lambda head: not chosen[head]))
            _permute(attention, order)
            undo.callback(_permute, attention, order.argsort())
        yield


def _checked_attention(model: Any, layer: int) -> Any:
    """Return the attention module of a layer.

    Raises:
        UnsupportedCombination: If its projections cannot be reordered by heads.
    """
    module = getattr(model.get_decoder().layers[layer], "self_attn", None)
    parts = [getattr(module, f"{name}_proj", None) for name in "qkvo"]
    if module is None or not all(type(part) is torch.nn.Linear for part in parts):
        raise UnsupportedCombination(
            f"{_WHERE}: every layer must have linear q_proj, k_proj, v_proj and o_proj under "
            f"self_attn, got {type(module).__name__}"
        )
    for name in ("q_norm", "k_norm"):
        norm = getattr(module, name, None)
        sizes = [weight.numel() for weight in norm.parameters()] if norm is not None else []
        if any(size != module.head_dim for size in sizes):
            raise UnsupportedCombination(
                f"{_WHERE}: {name} must be one vector for all heads, got {sizes} weights for heads "
                f"of {module.head_dim}"
            )
    return module


@torch.no_grad()
def _permute(attention: Any, order: torch.Tensor) -> None:
    """Move whole KV heads, with their query heads, to a new order, in place."""
    if torch.equal(order, torch.arange(len(order))):
        return
    weight = attention.k_proj.weight
    order = order.to(weight.device)

    def rows(size: int) -> torch.Tensor:
        block = size // len(order)
        within = torch.arange(block, device=weight.device)
        return (order[:, None] * block + within).flatten()

    for part in (attention.q_proj, attention.k_proj, attention.v_proj):
        for tensor in (part.weight, part.bias):
            if tensor is not None:
                tensor.copy_(tensor[rows(tensor.shape[0])])
    out = attention.o_proj.weight
    out.copy_(out[:, rows(out.shape[1])])
