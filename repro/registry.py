"""Which methods exist: folders under ``methods/`` and entry points of the group ``repro.methods``.

Looking up a name imports nothing; only a method that is asked for is imported.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from dataclasses import dataclass, is_dataclass
from typing import Any

from repro.errors import BadInput, Fault, ReproError, near_matches
from repro.method import Method

ENTRY_POINT_GROUP = "repro.methods"
DENSE = "dense"  # the cell without a method; no folder may take this name


@dataclass(frozen=True)
class Source:
    """Where a method comes from: its module, and the attribute of an entry point if there is one."""

    slug: str
    module: str
    attribute: str = ""


def sources() -> dict[str, Source]:
    """Return slug -> where it comes from, without importing any method.

    Raises:
        BadInput: If two sources offer the same slug, or one is called ``dense``.
    """
    package = importlib.import_module("repro.methods")
    found: dict[str, Source] = {}
    faults = []
    candidates = [
        Source(module.name, f"{package.__name__}.{module.name}")
        for module in pkgutil.iter_modules(package.__path__)
        if not module.name.startswith("_")
    ]
    candidates += [
        Source(entry.name, entry.module, entry.attr or "")
        for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    ]
    for source in candidates:
        known = found.get(source.slug)
        if known == source:  # the same distribution seen through two entries of sys.path
            continue
        if known is not None or source.slug == DENSE:
            other = known.module if known else "the built-in dense cell"
            faults.append(
                Fault(source.module, "a method's slug", f"unique; {other} has it too", source.slug)
            )
            continue
        found[source.slug] = source
    if faults:
        raise BadInput(faults)
    return dict(sorted(found.items()))


def slugs() -> list[str]:
    """Return every slug, sorted, without importing any method."""
    return list(sources())


def get(slug: str) -> Method:
    """Return a method by slug.

    Raises:
        BadInput: If there is none of that name; lists near matches.
        ReproError: If its module cannot be imported or offers no valid ``METHOD``.
    """
    known = sources()
    if slug not in known:
        raise BadInput(
            Fault("methods", "a method", "a known slug", slug, near_matches(slug, known))
        )
    return _load(known[slug])


def methods() -> dict[str, Method]:
    """Return slug -> method, all of them imported."""
    return {slug: _load(source) for slug, source in sources().items()}


def _load(source: Source) -> Method:
    try:
        value: Any = importlib.import_module(source.module)
        for part in filter(None, source.attribute.split(".")):
            value = getattr(value, part)
    except ReproError:
        raise
    except Exception as error:  # a plugin may fail in any way; the user needs to know which one
        raise ReproError(
            f"method {source.slug}: {source.module} cannot be imported: "
            f"{type(error).__name__}: {error}"
        ) from error
    method = value if isinstance(value, Method) else getattr(value, "METHOD", None)
    if not isinstance(method, Method):
        raise ReproError(f"method {source.slug}: {source.module} must offer METHOD, a Method")
    if method.slug != source.slug:
        raise ReproError(
            f"method {source.slug}: METHOD.slug must be {source.slug!r}, got {method.slug!r}"
        )
    if not is_dataclass(method.config):
        raise ReproError(f"method {source.slug}: METHOD.config must be a dataclass")
    return method
