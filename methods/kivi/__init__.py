"""KIVI: keys of few bits per channel, values per token, the newest tokens as they are.

Source: arXiv:2402.02750. Deviations from the paper and its code: ``README.md`` here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from repro.errors import check_rules
from repro.method import Artifact, Method, Patch

if TYPE_CHECKING:
    from repro.subjects import Subject


@dataclass(frozen=True, kw_only=True)
class KIVIConfig:
    """Options of KIVI.

    Attributes:
        bits: Of keys and values: 2, 4 or 8; 16 keeps them as they are.
        group_size: Tokens of a group of keys, channels of a group of values.
        residual: Newest tokens that stay unquantised, a multiple of ``group_size``.
    """

    bits: int = 2
    group_size: int = 32
    residual: int = 128

    def __post_init__(self) -> None:
        size, residual = self.group_size, self.residual
        whole = size >= 1 and residual >= size and residual % size == 0
        check_rules(
            ("bits", self.bits in (2, 4, 8, 16), "2, 4, 8 or 16", self.bits),
            ("group_size", size >= 1, "at least 1", size),
            ("residual", whole, f"a positive multiple of group_size {size}", residual),
        )


@contextmanager
def apply(
    subject: Subject, config: KIVIConfig, artifact: Artifact | None = None
) -> Iterator[Patch]:
    """Run ``subject`` with a KIVI cache inside the block; prefill attends to exact K and V."""
    from repro.kv_cache import patched_kv_cache
    from repro.kv_packed import PackedLayer, Packing

    packing = Packing(
        k_bits=config.bits,
        v_bits=config.bits,
        mode="kivi",
        group_size=config.group_size,
        residual=config.residual,
    )
    with patched_kv_cache(subject.model, lambda shape: PackedLayer(shape, packing)) as patch:
        yield patch


METHOD = Method(
    slug="kivi",
    title="KIVI",
    arxiv="2402.02750",
    kind="kv_cache",
    config=KIVIConfig,
    apply=apply,
)
