"""Tables of bits, one pair (key bits, value bits) a layer: published ones, controls, averages."""

from __future__ import annotations

import functools
import importlib.resources
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import yaml

Pair = tuple[int, int]
Table = tuple[Pair, ...]

BITS = (2, 4, 8)
PAIRS: tuple[Pair, ...] = tuple((k, v) for k in BITS for v in BITS)
#: Of equal bits the one that the paper's uniform baselines take.
UNIFORM: tuple[Pair, ...] = ((2, 2), (4, 2), (4, 4), (8, 4), (8, 8))
DENSE: Pair = (16, 16)


@dataclass(frozen=True)
class Preset:
    """A published table; ``group_size`` and ``residual`` are None in mode ``per_token``."""

    name: str
    model: str
    mode: str
    group_size: int | None
    residual: int | None
    bits: float
    table: Table


@functools.cache
def presets() -> Mapping[str, Preset]:
    """Return the published tables by name."""
    return {
        name: Preset(
            name=name,
            model=entry["model"],
            mode=entry["mode"],
            group_size=entry.get("group_size"),
            residual=entry.get("residual"),
            bits=float(entry["bits"]),
            table=tuple((int(pair[0]), int(pair[1])) for pair in entry["pairs"].split()),
        )
        for name, entry in _file()["presets"].items()
    }


@functools.cache
def published_groups() -> Mapping[str, tuple[tuple[int, ...], ...]]:
    """Return the groups of layers that the authors searched with, by model and mode."""
    found = _file()["groups"].items()
    return {name: tuple(tuple(group) for group in groups) for name, groups in found}


@functools.cache
def _file() -> Mapping[str, Mapping[str, Mapping]]:
    text = importlib.resources.files(__package__).joinpath("presets.yaml").read_text("utf-8")
    return yaml.safe_load(text)


def average_bits(table: Sequence[Pair]) -> float:
    """Return the mean of all bits of a table, scales and minima not counted: f_m of the paper."""
    return sum(k + v for k, v in table) / (2 * len(table))


def uniform_table(table: Table) -> Table:
    """Return the uniform table of the fewest bits that has no fewer than ``table``."""
    wanted = sum(k + v for k, v in table)
    fitting = (pair for pair in UNIFORM if len(table) * sum(pair) >= wanted)
    return (next(fitting, DENSE),) * len(table)


def random_table(table: Table, draw: int) -> Table:
    """Return a table of exactly as many bits, uniform among all those of the nine pairs.

    Layers that ``table`` leaves unquantised stay so.
    """
    free = [layer for layer, pair in enumerate(table) if max(pair) < 16]
    left = sum(sum(table[layer]) for layer in free)
    ways = _ways(len(free), left)
    generator = random.Random(f"kvtuner/{draw}")
    drawn = dict(enumerate(table))
    for place, layer in enumerate(free, start=1):
        rest = ways[len(free) - place]
        weights = [rest.get(left - sum(pair), 0) for pair in PAIRS]
        drawn[layer] = generator.choices(PAIRS, weights)[0]
        left -= sum(drawn[layer])
    return tuple(drawn[layer] for layer in range(len(table)))


def _ways(layers: int, most: int) -> list[dict[int, int]]:
    """Return, for 0 layers and more, sum of bits -> how many tables have it."""
    ways: list[dict[int, int]] = [{0: 1}]
    for _ in range(layers):
        counts: dict[int, int] = {}
        for total, count in ways[-1].items():
            for pair in PAIRS:
                if total + sum(pair) <= most:
                    counts[total + sum(pair)] = counts.get(total + sum(pair), 0) + count
        ways.append(counts)
    return ways


def preset_yaml(name: str, metadata: Mapping) -> str:
    """Return what a calibration found as an entry of ``presets.yaml``.

    Args:
        name: Of the entry.
        metadata: Of the artifact.
    """
    kept = ("mode", "group_size", "residual", "revision")
    pairs = " ".join(f"{k}{v}" for k, v in metadata["table"])
    entry = {
        "model": metadata["subject"],
        **{field: metadata[field] for field in kept},
        "bits": metadata["average_bits"],
        "pairs": pairs,
    }
    return yaml.safe_dump({name: entry}, sort_keys=False)
