"""H2O: keep the recent tokens and those that have received most attention so far.

Source: arXiv:2306.14048. Deviations from the paper and its code: ``README.md`` here.
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
class H2OConfig:
    """Options of H2O.

    Attributes:
        heavy_size: Older tokens that each KV head keeps, by the attention received.
        recent_size: Latest tokens that are always kept.
    """

    heavy_size: int = 512
    recent_size: int = 512

    def __post_init__(self) -> None:
        check_rules(
            ("heavy_size", self.heavy_size >= 0, "at least 0", self.heavy_size),
            ("recent_size", self.recent_size >= 1, "at least 1", self.recent_size),
        )


@contextmanager
def apply(subject: Subject, config: H2OConfig, artifact: Artifact | None = None) -> Iterator[Patch]:
    """Run ``subject`` with an H2O cache inside the block; prefill attention stays dense."""
    from repro.kv_cache import patched_kv_cache
    from repro.methods.h2o.cache import H2OLayer

    with patched_kv_cache(subject.model, lambda shape: H2OLayer(shape, config)) as patch:
        yield patch


METHOD = Method(
    slug="h2o",
    title="H2O",
    arxiv="2306.14048",
    kind="kv_cache",
    config=H2OConfig,
    apply=apply,
)
