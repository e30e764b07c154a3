"""Short names of variants: the fields of a configuration that tell them apart, and no more."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from repro import evidence
from repro.evidence import Record, Variant
from repro.plan import options_in, short

CONTROL_NAMES = {"random": "at random"}


class Labels:
    """Names the variants of a set of records; the same set always gives the same names."""

    def __init__(self, records: Iterable[Record]):
        self._configs: dict[Variant, dict[str, Any]] = {}
        shown: dict[Variant, set[str]] = {}
        for record in records:
            variant = evidence.variant_of(record)
            config = self._configs.setdefault(variant, json.loads(variant.config))
            label = str(record["cell"].get("label", ""))
            shown.setdefault(variant, set()).update(options_in(label) if label else config)
        self.order: dict[Variant, int] = {}
        # Dense first, then the order of the plan, each control after its method.
        bases = dict.fromkeys(v.without_control() for v in self._configs)
        for base in sorted(bases, key=lambda v: not v.is_dense):
            for control in ("none", *sorted({v.control for v in self._configs} - {"none"})):
                variant = Variant(base.slug, base.config, control)
                if variant in self._configs:
                    self.order[variant] = len(self.order)
        self._words: dict[Variant, list[str]] = {}
        self._rest: dict[Variant, list[str]] = {}
        for slug in {variant.slug for variant in self.order}:
            of_slug = {variant: shown[variant] for variant in self.order if variant.slug == slug}
            varying = _varying([self._configs[variant] for variant in of_slug])
            if _told(varying, of_slug, self._configs)[0] < len(of_slug):  # labels say too little
                of_slug = {variant: set(varying) for variant in of_slug}
            telling = _telling(varying, of_slug, self._configs)
            for variant, names in of_slug.items():
                self._words[variant] = [name for name in telling if name in names]
                self._rest[variant] = [
                    name for name in varying if name in names and name not in telling
                ]

    def name(self, variant: Variant) -> str:
        """Return ``xattention stride=8`` or ``xattention stride=8, random blocks``."""
        config = self._configs[variant]
        words = [f"{key}={short(config.get(key))}" for key in self._words[variant]]
        text = " ".join([variant.slug, *words])
        if variant.control != "none":
            text += f", {CONTROL_NAMES.get(variant.control, variant.control)}"
        return text

    def methods(self) -> list[Variant]:
        """Return the methods themselves, without dense and controls."""
        return [v for v in self.order if not v.is_dense and v.control == "none"]

    def common(self) -> list[tuple[str, dict[str, Any]]]:
        """Return what names leave out: fields of all rows of a slug, then fields of some rows."""
        found = []
        for slug in dict.fromkeys(variant.slug for variant in self.order):
            configs = [c for variant, c in self._configs.items() if variant.slug == slug]
            varying = _varying(configs)
            fields = {k: v for k, v in configs[0].items() if k not in varying}
            found.append((f"Every row of {slug}", fields))
        together: dict[str, list[str]] = {}
        for variant in self.methods():
            fields = {name: self._configs[variant].get(name) for name in self._rest[variant]}
            together.setdefault(json.dumps(fields), []).append(self.name(variant))
        found += [(", ".join(names), json.loads(fields)) for fields, names in together.items()]
        return [(rows, fields) for rows, fields in found if fields]


def _varying(configs: list[dict[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for config in configs for name in config)
    return [name for name in names if len({json.dumps(c.get(name)) for c in configs}) > 1]


def _telling(
    varying: list[str],
    shown: Mapping[Variant, set[str]],
    configs: Mapping[Variant, Mapping[str, Any]],
) -> list[str]:
    """Return fields that are enough to tell variants apart, the first ones where there is a choice.

    None is left without any, since a bare slug would read as all of them.
    """
    telling = varying
    for name in reversed(varying):
        fewer = [other for other in telling if other != name]
        if _told(fewer, shown, configs) == _told(telling, shown, configs):
            telling = fewer
    return telling


def _told(
    names: list[str],
    shown: Mapping[Variant, set[str]],
    configs: Mapping[Variant, Mapping[str, Any]],
) -> tuple[int, int]:
    """Return how many variants these fields tell apart, and how many they leave without any."""
    words = [
        (v.control, {n: configs[v].get(n) for n in names if n in own}) for v, own in shown.items()
    ]
    return len({json.dumps(each) for each in words}), sum(not fields for _, fields in words)
