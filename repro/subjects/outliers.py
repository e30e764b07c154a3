"""``outliers:<subject>``: a subject whose keys have outlier channels, computing the same function.

In every KV head of every second layer some rotary pairs of key channels are multiplied by ``FACTOR`` and the
same channels of the queries of that head by its inverse. A pair is turned as a whole by the rotary
embedding, so the factor passes through it, and every score ``q k`` is what it was: only rounding
differs. What differs much is how a quantiser sees the keys: a few channels hold most of the range,
as in large language models, which no small model grows by itself. That not every layer has them
makes layers differ, which is what methods with a choice by layer live on.

The factor is a power of two, so that weights in bfloat16 are scaled without rounding.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

from repro import subjects
from repro.errors import UnsupportedCombination
from repro.rotary import turns_halves
from repro.subjects import Subject, SubjectInfo

FACTOR = 16.0  # of outlier channels of keys
PERIOD = 2  # one layer in so many has outliers, the last of each period
PAIRS = 2  # rotary pairs of each KV head
SEED = 0  # of the choice of pairs


def is_remote(rest: str) -> bool:
    """Tell whether describing the subject inside may ask a hub."""
    module, inner = subjects._scheme_module(rest)
    asks = getattr(module, "is_remote", None)
    return asks is not None and bool(asks(inner))


def describe(rest: str) -> SubjectInfo:
    """Describe the subject inside under this name; the settings are in the revision."""
    inner = subjects.describe(rest)
    if inner.kind != "llm":
        raise UnsupportedCombination(
            f"outliers:{rest}: the subject inside must be of kind llm, got {inner.kind}"
        )
    settings = f"{inner.revision}/{FACTOR}/{PERIOD}/{PAIRS}/{SEED}"
    revision = f"outliers-{hashlib.sha256(settings.encode()).hexdigest()[:12]}"
    return replace(inner, name=f"outliers:{rest}", revision=revision)


def load(rest: str, *, device: str = "auto", dtype: str = "auto") -> Subject:
    """Load the subject inside and give its keys outlier channels."""
    info = describe(rest)
    subject = subjects.load(rest, device=device, dtype=dtype)
    add_outliers(subject.model)
    return replace(subject, info=info)


def add_outliers(
    model: Any,
    *,
    factor: float = FACTOR,
    period: int = PERIOD,
    pairs: int = PAIRS,
    seed: int = SEED,
) -> None:
    """Scale rotary pairs of key channels up and those of the queries down, in place.

    Raises:
        UnsupportedCombination: If a layer is not rotary attention with ``q_proj`` and ``k_proj``
            whose outputs go to the scores as they are, or its rotary pairs are not the two halves
            of a head.
    """
    import torch

    if not turns_halves(model):
        raise UnsupportedCombination(
            f"outliers: the rotary embedding must turn both halves of a head together, got "
            f"{type(model).__name__}, which turns neighbours or a part of the head"
        )
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(seed)
    for layer in model.get_decoder().layers[period - 1 :: period]:
        attention: Any = getattr(layer, "self_attn", None)
        plain = attention is not None and hasattr(attention, "q_proj")
        if not plain or getattr(attention, "q_norm", None) is not None:
            raise UnsupportedCombination(
                f"outliers: attention must be rotary with plain q_proj and k_proj, got "
                f"{type(attention).__name__}"
            )
        half, kv_heads = attention.head_dim // 2, config.num_key_value_heads
        factors = torch.ones(kv_heads, 2 * half)
        for head in range(kv_heads):
            chosen = torch.randperm(half, generator=generator)[:pairs]
            factors[head, chosen] = factors[head, chosen + half] = factor
        queries = 1 / factors.repeat_interleave(config.num_attention_heads // kv_heads, dim=0)
        with torch.no_grad():
            for projection, scales in ((attention.k_proj, factors), (attention.q_proj, queries)):
                flat = scales.flatten().to(projection.weight)
                projection.weight.mul_(flat[:, None])
                if projection.bias is not None:
                    projection.bias.mul_(flat)
