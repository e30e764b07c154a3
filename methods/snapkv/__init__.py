"""SnapKV: keep the prompt tokens that its last queries attend to, once, at the end of prefill.

Source: arXiv:2404.14469. Deviations from the paper and its code: ``README.md`` here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from repro.errors import check_rules
from repro.method import Artifact, Method, Patch

if TYPE_CHECKING:
    from repro.subjects import Subject


@dataclass(frozen=True, kw_only=True)
class SnapKVConfig:
    """Options of SnapKV.

    Attributes:
        capacity: Prompt tokens that each KV head keeps, the window included.
        window_size: Last tokens of the prompt, whose queries vote and which are always kept.
        kernel_size: Neighbours over which the votes are pooled, odd.
        pooling: ``avg`` divides by ``kernel_size`` at the ends, too.
        group_reduce: How the query heads of a KV head are joined, before the pooling.
    """

    capacity: int = 1024
    window_size: int = 32
    kernel_size: int = 7
    pooling: Literal["avg", "max"] = "max"
    group_reduce: Literal["mean", "max", "sum"] = "mean"

    def __post_init__(self) -> None:
        window, kernel = self.window_size, self.kernel_size
        check_rules(
            ("window_size", window >= 1, "at least 1", window),
            ("capacity", self.capacity > window, f"above window_size {window}", self.capacity),
            ("kernel_size", kernel >= 1 and kernel % 2 == 1, "odd and at least 1", kernel),
            ("pooling", self.pooling in ("avg", "max"), "avg or max", self.pooling),
            (
                "group_reduce",
                self.group_reduce in ("mean", "max", "sum"),
                "mean, max or sum",
                self.group_reduce,
            ),
        )


@contextmanager
def apply(
    subject: Subject, config: SnapKVConfig, artifact: Artifact | None = None
) -> Iterator[Patch]:
    """Run ``subject`` with a SnapKV cache inside the block."""
    from repro.kv_cache import patched_kv_cache
    from repro.methods.snapkv.cache import SnapKVLayer

    with patched_kv_cache(subject.model, lambda shape: SnapKVLayer(shape, config)) as patch:
        yield patch


METHOD = Method(
    slug="snapkv",
    title="SnapKV",
    arxiv="2404.14469",
    kind="kv_cache",
    config=SnapKVConfig,
    apply=apply,
)
