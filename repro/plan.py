"""The plan: every cell of a profile as resolved JSON with its key, grouped by subject.

A worker needs nothing but the plan: neither YAML nor pydantic.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from repro import measurements, registry
from repro.errors import BadInput, Fault
from repro.keys import SourceDigests, canonical_json, digest, library_versions
from repro.manifest import applies
from repro.measurements import Measurement
from repro.method import CONTROL_FIELDS, Method
from repro.profiles import Manifest, MeasurementEntry, MethodEntry, Profile
from repro.schema import default_values
from repro.subjects import SubjectInfo

KEY_SCHEMA = 1
LABEL_OPTIONS = ("task", "phase", "inputs", "protocol")  # always shown, by value alone
NOMINAL_GIB = 1e9  # bytes: a card of 80 GB has less than 80 GiB, and nobody means to leave it out
LOAD_SECONDS = 10.0  # imports of torch and transformers, and the weights


@dataclass(frozen=True, kw_only=True)
class PlannedCell:
    """One cell of the plan.

    Attributes:
        key: SHA-256 of everything the outcome depends on but the machine.
        cell: The resolved cell, JSON-able.
        artifact: What the calibration stage needs, None where there is none; ``id`` is its key.
        items: How many items it asks, 0 where it has none.
        estimate_seconds: Rough seconds on 2 CPU cores.
        stake: What a run with a budget tells its worker (``repro.early``), None elsewhere.
    """

    key: str
    cell: dict[str, Any]
    artifact: dict[str, Any] | None = None
    items: int = 0
    estimate_seconds: float = 0.0
    stake: dict[str, Any] | None = None

    @property
    def label(self) -> str:
        return self.cell["label"]

    def to_json(self) -> dict[str, Any]:
        return {
            "key": self.key,
            "cell": self.cell,
            "artifact": self.artifact,
            "items": self.items,
            "estimate_seconds": round(self.estimate_seconds, 1),
            **({} if self.stake is None else {"stake": self.stake}),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> PlannedCell:
        return cls(**data)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will do.

    Attributes:
        name: Name of the manifest; ``runs/<name>/<profile>/`` holds the index of the run.
        device: ``cpu`` or ``cuda``.
        manifest: The resolved manifest, kept with the records.
        missing: Subject (or resource) -> what has to be fetched first, and how.
        skipped: Combinations that mean nothing (a measurement of another kind of subject).
    """

    name: str
    profile: str
    device: str
    manifest: dict[str, Any]
    cells: tuple[PlannedCell, ...]
    resources: dict[str, Any] = field(default_factory=dict)
    timeout_seconds: float = 3600.0
    missing: dict[str, str] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()

    def groups(self, cells: Iterable[PlannedCell] | None = None) -> list[list[PlannedCell]]:
        """Return the cells by subject, in order: a subject loads once."""
        groups: dict[str, list[PlannedCell]] = {}
        for cell in self.cells if cells is None else cells:
            groups.setdefault(cell.cell["subject"], []).append(cell)
        return list(groups.values())

    def select(self, pattern: str | None) -> tuple[PlannedCell, ...]:
        """Return the cells whose label holds a text or matches a shell pattern; None keeps all.

        Raises:
            BadInput: If that keeps no cell.
        """
        if pattern is None:
            return self.cells
        kept = tuple(cell for cell in self.cells if matches(cell.label, pattern))
        if not kept:
            raise BadInput(Fault("--only", "the pattern", "found in a cell's label", pattern))
        return kept

    def gpus_of(self, planned: PlannedCell) -> float:
        """Return how many GPUs (a share of one included) a cell holds; 0 on the CPU.

        What needs its device alone, as timings do, holds a whole one.
        """
        if self.device == "cpu":
            return 0.0
        gpus = float(self.resources.get("gpus") or 1)
        alone = measurements.get(planned.cell["measurement"]["name"]).alone
        return max(gpus, 1.0) if alone else gpus

    def lack_of(self, environment: dict[str, Any]) -> str:
        """Return what a machine of the cluster lacks for the profile; empty if nothing."""
        wanted = self.resources.get("gpu_memory_gib" if self.device == "cuda" else "memory_gib", 0)
        have = environment.get("memory_bytes")
        if not wanted or have is None or have >= wanted * NOMINAL_GIB:
            return ""
        return f"the profile asks for {wanted:g} GiB of memory, it has {have / 2**30:.0f}"

    @property
    def estimate_seconds(self) -> float:
        loads = LOAD_SECONDS * len({cell.cell["subject"] for cell in self.cells})
        return loads + sum(cell.estimate_seconds for cell in self.cells)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "profile": self.profile,
            "device": self.device,
            "estimate_seconds": round(self.estimate_seconds, 1),
            "missing": self.missing,
            "skipped": list(self.skipped),
            "resources": self.resources,
            "cells": [cell.to_json() for cell in self.cells],
        }


def make_plan(
    manifest: Manifest,
    profile: str = "embedded",
    *,
    device: str = "auto",
    cluster: bool = False,
    items: int | None = None,
) -> Plan:
    """Return the plan of one profile.

    Args:
        manifest: A checked manifest.
        profile: Name of the profile.
        device: ``cpu``, ``cuda`` or ``auto`` (CUDA where there is a device).
        cluster: A Ray cluster is to run it, whose head may lack what its workers have: ``auto``
            is then CUDA where the profile asks for GPUs.
        items: Most items a cell (option ``Measurement.item_count``), the first ones.

    Raises:
        BadInput: If the profile or the device is unknown.
    """
    chosen = manifest.profile(profile)
    if cluster and device != "cpu" and (device == "cuda" or chosen.resources.get("gpus")):
        return _Planner(manifest, chosen, "cuda", items).plan()
    return _Planner(manifest, chosen, resolve_device(device), items).plan()


def resolve_device(device: str) -> str:
    """Return ``cpu`` or ``cuda``; torch is imported only where a GPU's device file exists."""
    if device not in ("auto", "cpu", "cuda"):
        raise BadInput(Fault("--device", "the device", "auto, cpu or cuda", device))
    if device == "cpu":
        return device
    present = Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()
    if present and os.environ.get("CUDA_VISIBLE_DEVICES", "all") not in ("", "-1"):
        import torch

        present = torch.cuda.is_available()
    else:
        present = False
    if device == "cuda" and not present:
        raise BadInput(Fault("--device", "the device", "present", "cuda, and there is none"))
    return "cuda" if present else "cpu"


class _Planner:
    def __init__(
        self, manifest: Manifest, profile: Profile, device: str, items: int | None
    ) -> None:
        self.items = items
        self.manifest = manifest
        self.profile = profile
        self.device = device
        self.digests = SourceDigests()
        self.methods: dict[str, Method] = {
            entry.slug: registry.get(entry.slug)
            for entry in profile.methods
            if entry.slug != registry.DENSE
        }
        self.measurements: dict[str, Measurement] = {
            entry.name: measurements.get(entry.name) for entry in profile.measurements
        }
        self.sources = registry.sources()
        self.libraries = {
            name: library_versions(measurement.libraries)
            for name, measurement in self.measurements.items()
        }
        self.telling = {name: _telling_options(profile, name) for name in self.measurements}
        self.skipped: list[str] = []

    def plan(self) -> Plan:
        # Two entries of a measurement may be narrowed by ``only`` to the same cell.
        cells = tuple({cell.key: cell for cell in self._cells()}.values())
        names = self.profile.subjects
        missing = {name: self.manifest.missing[name] for name in names if self._is_missing(name)}
        missing.update(_missing_resources(self.profile.resources, self.device))
        return Plan(
            name=self.manifest.name,
            profile=self.profile.name,
            device=self.device,
            manifest=self.manifest.to_json(),
            cells=cells,
            resources=dict(self.profile.resources),
            timeout_seconds=60.0 * self.profile.timeout_minutes,
            missing=missing,
            skipped=tuple(dict.fromkeys(self.skipped)),
        )

    def _info(self, subject: str) -> SubjectInfo:
        """Return what is known of a subject; a missing one is planned all the same."""
        if subject in self.manifest.infos:
            return self.manifest.infos[subject]
        if not self._is_missing(subject):
            raise ValueError(f"make_plan: load the manifest with profile={self.profile.name!r}")
        return SubjectInfo(name=subject, kind="unknown", revision="missing", max_length=0)

    def _is_missing(self, subject: str) -> bool:
        return subject in self.manifest.missing

    def _cells(self) -> Iterator[PlannedCell]:
        for subject in self.profile.subjects:
            info = self._info(subject)
            for entry in self.profile.measurements:
                measurement = self.measurements[entry.name]
                known = not self._is_missing(subject)
                if known and not applies(measurement, info):
                    self.skipped.append(f"{entry.name} on {subject} ({info.kind})")
                    continue
                paired = measurement.paired
                for options, runs in _cells_in_order(entry, self.profile.methods):
                    for seed in self.profile.seeds:
                        for method, repeat in runs:
                            # A paired measurement runs dense itself.
                            if not (paired and method.slug == registry.DENSE):
                                yield self._cell(info, method, entry, options, seed, repeat)

    def _cell(
        self,
        info: SubjectInfo,
        entry: MethodEntry,
        measured: MeasurementEntry,
        options: dict[str, Any],
        seed: int,
        repeat: int,
    ) -> PlannedCell:
        measurement = self.measurements[measured.name]
        items = int(options.get(measurement.item_count) or 0)
        if self.items and items > self.items:
            items = self.items
            options = {**options, measurement.item_count: items}
        identity: dict[str, Any] = {
            "subject": info.name,
            "subject_revision": info.revision,
            "device": self.device,
            "dtype": self.profile.dtype,
            "method": {"slug": entry.slug, "config": entry.config},
            "measurement": {"name": measured.name, "options": options},
            "seed": seed,
        }
        if repeat:
            identity["repeat"] = repeat
        artifact = self._artifact(info, entry)
        sources = [self.digests.of(f"repro.measurements.{measured.name}")]
        if entry.slug != registry.DENSE:
            sources.append(self._method_digest(entry.slug))
        key = digest(
            {
                "schema": KEY_SCHEMA,
                "cell": identity,
                "sources": sources,
                "libraries": self.libraries[measured.name],
                "artifact": artifact["id"] if artifact else None,
            }
        )
        telling = self.telling[measured.name]
        label = _label(info, entry, measured.name, options, seed, repeat, telling)
        cell = {
            "paper": self.manifest.name,
            "profile": self.profile.name,
            **identity,
            "label": label,
        }
        return PlannedCell(
            key=key,
            cell=cell,
            artifact=artifact,
            items=items,
            estimate_seconds=float(measurement.estimate_seconds(options, info)),
        )

    def _method_digest(self, slug: str) -> str:
        return self.digests.of(self.sources[slug].module)

    def _artifact(self, info: SubjectInfo, entry: MethodEntry) -> dict[str, Any] | None:
        """Return what ``calibrate`` needs, with the identity of its outcome as ``id``."""
        method = self.methods.get(entry.slug)
        if method is None or not method.needs_artifact(entry.config_object):
            return None
        # A control takes the outcome of the method itself: only what it is used for differs.
        config = {**entry.config}
        if config.get("control", "none") != "none":
            own = default_values(method.config)
            config |= {name: own[name] for name in CONTROL_FIELDS if name in own}
        spec = method.calibration_data
        data = {"count": spec.count, "length": spec.length, "seed": spec.seed} if spec else {}
        if method.calibration_fields is not None:
            config = {name: config[name] for name in method.calibration_fields}
        identity = {
            "subject": info.name,
            "subject_revision": info.revision,
            "device": self.device,
            "dtype": self.profile.dtype,
            "method": {"slug": entry.slug, "config": config},
            "data": data,
            "sources": [
                self._method_digest(entry.slug),
                self.digests.of("repro.calibration") if spec else "",
            ],
        }
        return {"id": digest(identity), "data": data, "identity": identity}


def _cells_in_order(
    entry: MeasurementEntry, methods: Iterable[MethodEntry]
) -> list[tuple[dict[str, Any], list[tuple[MethodEntry, int]]]]:
    """Return the cells of a measurement with the methods that run them, and which repeat it is.

    Short cells come first: after one that ran out of memory the longer ones are implied.
    """
    found: dict[str, tuple[dict[str, Any], list[tuple[MethodEntry, int]]]] = {}
    for method in methods:
        for repeat in range(method.reruns + 1):
            for options in entry.cells_of(method, repeat):
                runs = found.setdefault(canonical_json(options), (options, []))[1]
                runs.append((method, repeat))
    return sorted(found.values(), key=lambda pair: pair[0].get("length") or 0)


def matches(label: str, pattern: str) -> bool:
    return pattern in label or fnmatch.fnmatchcase(label, pattern)


def _label(
    info: SubjectInfo,
    entry: MethodEntry,
    measured: str,
    options: dict[str, Any],
    seed: int,
    repeat: int,
    telling: set[str],
) -> str:
    """Return ``zoo:retriever | xattention stride=16 | ruler niah_single_1@4096``."""
    method = " ".join(
        [entry.slug, *(f"{name}={short(entry.config[name])}" for name in entry.shown)]
    )
    if repeat:
        method += f" rerun {repeat}"
    words = [str(options[name]) for name in LABEL_OPTIONS if options.get(name)]
    text = " ".join([measured, *words])
    if options.get("length"):
        text += f"@{options['length']}"
    others = sorted(telling - {*LABEL_OPTIONS, "length"})
    text += "".join(f" {name}={short(options.get(name))}" for name in others)
    if seed:
        text += f" seed={seed}"
    return f"{info.name} | {method} | {text}"


def options_in(label: str) -> set[str]:
    """Return the names of the method's options that a cell's label shows."""
    words = label.split(" | ")[1].split() if label.count(" | ") == 2 else []
    return {word.partition("=")[0] for word in words if "=" in word}


def _telling_options(profile: Profile, measurement: str) -> set[str]:
    """Return the options that a label needs to tell the cells of one measurement apart."""
    cells = [
        cell
        for entry in profile.measurements
        if entry.name == measurement
        for cell in (*entry.cells, *chain.from_iterable(entry.restricted.values()))
    ]

    def told_apart(names: set[str]) -> int:
        return len({canonical_json({name: cell.get(name) for name in names}) for cell in cells})

    everything = {name for cell in cells for name in cell}
    telling = {*LABEL_OPTIONS, "length"}
    for name in sorted(everything - telling):
        if told_apart(telling | {name}) > told_apart(telling):
            telling.add(name)
    return telling


def short(value: Any) -> str:
    """Return an option's value as labels show it."""
    return f"{value:g}" if isinstance(value, float) else str(value).replace(" ", "")


def _missing_resources(resources: dict[str, Any], device: str) -> dict[str, str]:
    """Return what this machine lacks for a profile; a cluster may have it."""
    missing = {}
    gpus, memory = resources.get("gpus", 0), resources.get("gpu_memory_gib", 0)
    if gpus and device != "cuda":
        size = f" with {memory:g} GiB" if memory else ""
        missing["gpu"] = (
            f"the profile asks for {gpus:g} GPU{'s' if gpus > 1 else ''}{size}; this machine has none"
            ": run it on one, or join a cluster with --address"
        )
    elif gpus and memory:
        import torch

        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        have = max((gpu.total_memory for gpu in found), default=0)
        if have < memory * NOMINAL_GIB:
            largest = f"{have / 2**30:.0f}"
            missing["gpu"] = (
                f"the profile asks for a GPU with {memory:g} GiB; the largest here has {largest}"
                ": run it on a larger one, or join a cluster with --address"
            )
    wanted = resources.get("memory_gib", 0)
    if wanted:
        import psutil

        have = psutil.virtual_memory().total
        if have < wanted * NOMINAL_GIB:
            missing["memory"] = (
                f"the profile asks for {wanted:g} GiB of memory; here are {have / 2**30:.0f}"
            )
    return missing
