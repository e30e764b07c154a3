"""Factories that the tests of all parts share: a tiny subject, q/k/v, a manual clock."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repro.subjects import Subject

if TYPE_CHECKING:
    import torch


def tiny_subject(
    *,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    vocabulary: int = 512,
    positions: int = 32768,
    dtype: str = "float32",
    device: str = "cpu",
    seed: int = 0,
) -> Subject:
    """Build a random tiny Llama with grouped-query attention, in evaluation mode.

    Args:
        layers: Decoder layers.
        heads: Query heads.
        kv_heads: Key/value heads, a divisor of ``heads``.
        head_dim: Width of a head.
        vocabulary: Token ids run from 0 to this.
        positions: Positions that the model accepts.
        dtype: float32 by default, so that tests compare exactly.
        device: ``cpu`` or ``cuda``.
        seed: Of the weights.

    Returns:
        A subject without tokenizer, ``trained`` False.
    """
    from dataclasses import replace

    from repro.subjects import random

    config = random.ARCHITECTURES["tiny"] | {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_size": heads * head_dim,
        "intermediate_size": 2 * heads * head_dim,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
    }
    info = replace(random.describe("tiny"), max_length=positions, parameters=None)
    return random.build(config, info, device=device, dtype=dtype, seed=seed)


def byte_tokenizer() -> Any:
    """Build a tokenizer of 256 bytes and three special tokens; any text survives it unchanged."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special.values(), *letters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **special
    )


def qkv(
    *,
    batch: int = 1,
    heads: int = 4,
    kv_heads: int | None = None,
    queries: int = 256,
    keys: int | None = None,
    head_dim: int = 64,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
    requires_grad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw Gaussian q ``[B, H, Tq, D]`` and k, v ``[B, H_kv, Tk, D]``, float32 unless told.

    The draw is made in float32 on the CPU, so that one seed means the same numbers everywhere.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    keys = queries if keys is None else keys
    kv_heads = heads if kv_heads is None else kv_heads
    shapes = [(batch, heads, queries, head_dim)] + 2 * [(batch, kv_heads, keys, head_dim)]
    tensors = [
        torch.randn(shape, generator=generator)
        .to(device=device, dtype=dtype or torch.float32)
        .requires_grad_(requires_grad)
        for shape in shapes
    ]
    return tensors[0], tensors[1], tensors[2]


def token_ids(
    batch: int, length: int, *, vocabulary: int = 512, seed: int = 0, device: str = "cpu"
) -> torch.Tensor:
    """Draw token ids ``[B, T]`` int64."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (batch, length), generator=generator).to(device)


class MemoryItems:
    """An ``ItemStore`` in memory."""

    def __init__(self) -> None:
        self.values: dict[str, dict[str, Any]] = {}
        self.batches = 0

    def get(self, key: str) -> dict[str, Any] | None:
        return self.values.get(key)

    def put(self, batch: Iterable[tuple[str, dict[str, Any]]]) -> None:
        self.batches += 1
        self.values.update(batch)


def comparable_records(records: Iterable[dict[str, Any]]) -> str:
    """Return records as text, without timings, memory, dates and the state of the machine."""
    changing = ("seconds", "load_seconds", "created", "environment", "failure")
    kept = [{k: v for k, v in record.items() if k not in changing} for record in records]
    for record in kept:
        if "patch" in record:
            timed = "selection_seconds"
            record["patch"] = {k: v for k, v in record["patch"].items() if k != timed}
    return json.dumps(kept, sort_keys=True)


def cell_context(
    subject: Subject,
    options: dict[str, Any],
    *,
    method: Any = None,
    config: Any = None,
    artifact: Any = None,
    seed: int = 0,
    cache: Path = Path("runs") / "cache",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Any:
    """Build the ``CellContext`` of one cell with its items in memory."""
    from repro.measurements import CellContext

    return CellContext(
        subject=subject,
        method=method,
        config=config,
        artifact=artifact,
        options=options,
        seed=seed,
        items=MemoryItems(),
        cache=cache,
        progress=progress,
    )
