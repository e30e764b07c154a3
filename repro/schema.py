"""Schemas from dataclasses: strict types, extra keys forbidden, what is wrong in plain words.

Methods and measurements declare their options as frozen dataclasses of the standard library; the
pydantic models that check a manifest are made from these.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, create_model

STRICT = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


def model_of(kind: type) -> type[BaseModel]:
    """Return the pydantic model of a frozen dataclass: strict types, extra keys forbidden."""
    hints = typing.get_type_hints(kind)
    fields: dict[str, Any] = {}
    for entry in dataclasses.fields(kind):
        required = (
            entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        )
        # Defaults are the dataclass's own affair: only what the file gives is passed on.
        fields[entry.name] = (hints[entry.name], ... if required else None)
    return create_model(kind.__name__, __config__=STRICT, **fields)


def default_values(kind: type) -> dict[str, Any]:
    """Return the fields of a dataclass that have a default, with it."""
    defaults: dict[str, Any] = {}
    for entry in dataclasses.fields(kind):
        if entry.default_factory is not dataclasses.MISSING:
            defaults[entry.name] = entry.default_factory()
        elif entry.default is not dataclasses.MISSING:
            defaults[entry.name] = entry.default
    return defaults


def changed_fields(config: Any) -> set[str]:
    """Return the fields of a dataclass that differ from their defaults, or have none."""
    defaults = default_values(type(config))
    names = {entry.name for entry in dataclasses.fields(config)}
    return {n for n in names if n not in defaults or getattr(config, n) != defaults[n]}


_RULES = {
    "missing": "given",
    "extra_forbidden": "a known key",
    "too_short": "not empty",
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}


def rule_of(problem: Mapping[str, Any]) -> str:
    """Return what a value must be, from an error of pydantic."""
    known = _RULES.get(problem["type"])
    if known:
        return known
    text = str(problem["msg"])
    for prefix in ("Value error, ", "Assertion failed, ", "Input should be ", "a valid "):
        text = text.removeprefix(prefix)
    return text[:1].lower() + text[1:]
