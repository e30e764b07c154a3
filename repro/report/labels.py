"""Short names of variants: the fields of a configuration that tell them apart, and no more."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from repro import evidence
from repro.evidence import Record, Variant
from repro.plan import short

CONTROL_NAMES = {"random": "at random"}


class Labels:
    """Names the variants of a set of records; the same set always gives the same names."""

    def __init__(self, records: Iterable[Record]):
        variants = dict.fromkeys(evidence.variant_of(record) for record in records)
        self.order: dict[Variant, int] = {}
        configs: dict[str, list[dict[str, Any]]] = {}
        for variant in variants:
            configs.setdefault(variant.slug, []).append(json.loads(variant.config))
        self._varying = {slug: _varying(found) for slug, found in configs.items()}
        self._common = {slug: _common(found) for slug, found in configs.items()}
        # Dense first, then the order of the plan, each control after its method.
        bases = dict.fromkeys(v.without_control() for v in variants)
        for base in sorted(bases, key=lambda v: not v.is_dense):
            for control in ("none", *sorted({v.control for v in variants} - {"none"})):
                variant = Variant(base.slug, base.config, control)
                if variant in variants:
                    self.order[variant] = len(self.order)

    def name(self, variant: Variant) -> str:
        """Return ``xattention stride=8`` or ``xattention stride=8, random blocks``."""
        config = json.loads(variant.config)
        words = [f"{key}={short(config.get(key))}" for key in self._varying[variant.slug]]
        text = " ".join([variant.slug, *words])
        if variant.control != "none":
            text += f", {CONTROL_NAMES.get(variant.control, variant.control)}"
        return text

    def methods(self) -> list[Variant]:
        """Return the methods themselves, without dense and controls."""
        return [v for v in self.order if not v.is_dense and v.control == "none"]

    def common(self) -> dict[str, dict[str, Any]]:
        """Return slug -> the fields that have one value in all records."""
        return {slug: fields for slug, fields in self._common.items() if fields}


def _varying(configs: list[dict[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for config in configs for name in config)
    return [name for name in names if len({json.dumps(c.get(name)) for c in configs}) > 1]


def _common(configs: list[dict[str, Any]]) -> dict[str, Any]:
    varying = set(_varying(configs))
    return {name: value for name, value in configs[0].items() if name not in varying}
