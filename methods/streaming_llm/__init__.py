"""StreamingLLM: attention sinks and a window of recent tokens, for every head.

Source: arXiv:2309.17453. Deviations from the paper and its code: ``README.md`` here.
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
class StreamingLLMConfig:
    """Options of StreamingLLM.

    Attributes:
        sink_size: First tokens that stay.
        recent_size: Latest tokens that stay, the query's own included.
        reindex: Count positions inside the cache, as the paper does; else keep the true ones, as
            papers do that take the pattern for some heads.
    """

    sink_size: int = 4
    recent_size: int = 1020
    reindex: bool = True

    def __post_init__(self) -> None:
        check_rules(
            ("sink_size", self.sink_size >= 0, "at least 0", self.sink_size),
            ("recent_size", self.recent_size >= 1, "at least 1", self.recent_size),
        )


@contextmanager
def apply(
    subject: Subject, config: StreamingLLMConfig, artifact: Artifact | None = None
) -> Iterator[Patch]:
    """Run ``subject`` with a cache of constant size inside the block, prefill included."""
    from repro.kv_cache import patched_kv_cache
    from repro.methods.streaming_llm.cache import StreamingLayer, frequencies

    rotation = frequencies(subject.model) if config.reindex else None
    with patched_kv_cache(
        subject.model, lambda shape: StreamingLayer(shape, config, rotation)
    ) as patch:
        yield patch


METHOD = Method(
    slug="streaming_llm",
    title="StreamingLLM",
    arxiv="2309.17453",
    kind="kv_cache",
    config=StreamingLLMConfig,
    apply=apply,
)
