"""``zoo:<name>``: models that were trained here and are shipped with the package."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from repro.errors import MissingResource
from repro.subjects import Subject, SubjectInfo, _llm


def known() -> list[str]:
    """Return the names of the zoo."""
    zoo = _zoo()
    return sorted(zoo.names())


def describe(rest: str) -> SubjectInfo:
    """Describe a zoo model from its files; no torch."""
    folder = _folder(rest)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise MissingResource(
            f"zoo:{rest}: no weights in {folder}; make them with `repro zoo train {rest}`"
        )
    config = _llm.read_config(folder / "config.json", f"zoo:{rest}")
    return SubjectInfo(
        name=f"zoo:{rest}",
        kind="llm",
        revision=_llm.content_hash(folder),
        max_length=_llm.max_length(config, f"zoo:{rest}"),
        parameters=_llm.safetensors_size(weights),
    )


def load(rest: str, *, device: str = "auto", dtype: str = "auto") -> Subject:
    """Load a zoo model after its files have passed their checksums."""
    info = describe(rest)
    _zoo().verify(rest)
    return _llm.load_llm(info, str(_folder(rest)), device=device, dtype=dtype)


def _zoo() -> Any:
    return importlib.import_module("repro.zoo")


def _folder(name: str) -> Path:
    return Path(_zoo().zoo_path(name))
