"""Quest: at every decode step, read only the pages whose keys may score highest.

Source: arXiv:2406.10774. Deviations from the paper and its code: ``README.md`` here.
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
class QuestConfig:
    """Options of Quest.

    Attributes:
        budget: Tokens that a decode step reads, at least three pages.
        page_size: Tokens of a page.
        dense_layers: First layers that read everything.
    """

    budget: int = 1024
    page_size: int = 16
    dense_layers: int = 2

    def __post_init__(self) -> None:
        check_rules(
            ("page_size", self.page_size >= 1, "at least 1", self.page_size),
            ("budget", self.budget >= 1, "at least 1", self.budget),
            ("dense_layers", self.dense_layers >= 0, "at least 0", self.dense_layers),
        )

    @property
    def pages(self) -> int:
        """Pages that a decode step reads."""
        return max(3, self.budget // self.page_size)


@contextmanager
def apply(
    subject: Subject, config: QuestConfig, artifact: Artifact | None = None
) -> Iterator[Patch]:
    """Run the decode of ``subject`` with Quest inside the block; prefill stays dense."""
    from repro.kv_cache import patched_kv_cache
    from repro.methods.quest.cache import QuestLayer

    with patched_kv_cache(subject.model, lambda shape: QuestLayer(shape, config)) as patch:
        yield patch


METHOD = Method(
    slug="quest",
    title="Quest",
    arxiv="2406.10774",
    kind="kv_cache",
    config=QuestConfig,
    apply=apply,
)
