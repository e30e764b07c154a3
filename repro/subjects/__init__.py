"""Subjects: the models under test. A scheme (``zoo:``, ``hf:``, ``random:``) is a module here.

A scheme module offers ``describe(rest) -> SubjectInfo`` (no torch import, raises BadInput or
MissingResource) and ``load(rest, device=..., dtype=...) -> Subject``; optionally ``known() ->
list[str]`` for near matches, and ``is_remote(rest) -> bool`` if describing may ask a hub. Adding a
scheme adds a module and edits no file.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, overload

from repro.errors import BadInput, Fault, near_matches

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class SubjectInfo:
    """What the plan must know of a subject before anything loads.

    Attributes:
        name: Full name, e.g. ``zoo:retriever``.
        kind: ``llm``, ``video``, ``image`` or ``vit``.
        revision: Content hash or hub revision; part of every cell key.
        max_length: Positions that the model accepts.
        trained: False for ``random:`` (latency and memory only, accuracy is refused).
        parameters: Number of parameters where known.
    """

    name: str
    kind: str
    revision: str
    max_length: int
    trained: bool = True
    parameters: int | None = None

    def prefill_seconds(self, length: int) -> float:
        """Return rough seconds that two CPU cores need for a prefill of ``length`` tokens.

        It grows with parameters and, through attention, with the square of the length. Fitted to
        the retriever (4 M parameters, bfloat16), and taken for it where the size is not known.
        """
        size = (self.parameters or 4_000_000) / 4e6
        return length * (5e-5 * size + 2.5e-8 * length * max(1.0, size) ** 0.6)


@dataclass
class Subject:
    """A loaded model under test, in evaluation mode.

    ``model`` is the transformers (or diffusers) model on ``device`` in ``dtype``; ``tokenizer``
    is its own tokenizer, None for a ``random:`` subject.
    """

    info: SubjectInfo
    model: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.info.name


def schemes() -> dict[str, str]:
    """Return scheme name -> module name, found by scanning this folder."""
    return {
        module.name: f"{__name__}.{module.name}"
        for module in pkgutil.iter_modules(__path__)
        if not module.name.startswith("_")
    }


def _scheme_module(name: str) -> tuple[Any, str]:
    scheme, separator, rest = name.partition(":")
    known = schemes()
    if not separator or scheme not in known or not rest:
        raise BadInput(
            Fault(
                "subjects",
                "a subject",
                "<scheme>:<name>",
                name,
                near_matches(scheme, known),
            )
        )
    return importlib.import_module(known[scheme]), rest


@overload
def describe(name: str) -> SubjectInfo: ...
@overload
def describe(name: str, *, offline: bool) -> SubjectInfo | None: ...
def describe(name: str, *, offline: bool = False) -> SubjectInfo | None:
    """Describe a subject without loading weights or importing torch.

    Args:
        name: Full name, ``<scheme>:<rest>``.
        offline: Return None instead of asking a hub.

    Raises:
        BadInput: If the scheme or the name is unknown.
        MissingResource: If its files have to be fetched first; the text says how.
    """
    module, rest = _scheme_module(name)
    is_remote = getattr(module, "is_remote", None)
    if offline and is_remote is not None and is_remote(rest):
        return None
    return module.describe(rest)


def load(name: str, *, device: str = "auto", dtype: str = "auto") -> Subject:
    """Load a subject. ``device`` auto: CUDA if there is one; ``dtype`` auto: bfloat16.

    Raises:
        BadInput: If the scheme or the name is unknown.
        MissingResource: If its files have to be fetched first, or a checksum differs.
    """
    module, rest = _scheme_module(name)
    return module.load(rest, device=device, dtype=dtype)
