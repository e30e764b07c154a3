"""Synthetic records of the form that runs leave, for the tests of claims, verdicts and reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from repro.keys import digest
from repro.report import records
from repro.store import RunStore

TASKS = ("niah_single_1", "niah_multikey_1", "vt", "cwe")
CPU = {
    "environment_id": "cpu-test-2t",
    "device": "cpu",
    "device_name": "Test CPU",
    "cpu": "Test CPU",
    "threads": 2,
    "os": "Linux 6",
    "python": "3.11",
    "versions": {"torch": "2.13.0"},
    "git_commit": "0123456789abcdef",
    "git_dirty": False,
}
GPU = {**CPU, "environment_id": "nvidia-h100", "device": "cuda", "device_name": "NVIDIA H100"}
CONFIG = {"stride": 16, "threshold": 0.9, "per_head": False, "pattern": "antidiagonal"}


def record(
    measurement: str,
    options: dict[str, Any],
    *,
    method: str = "xattention",
    config: dict[str, Any] | None = None,
    subject: str = "zoo:retriever",
    profile: str = "embedded",
    repeat: int = 0,
    status: str = "ok",
    environment: dict[str, Any] | None = None,
    created: str = "2026-11-21T00:00:00+00:00",
    **body: Any,
) -> dict[str, Any]:
    """Build one record; ``body`` takes metrics, items, patch, explanation, message."""
    if config is None:
        config = {} if method == "dense" else {**CONFIG, "control": "none", "draw": 0}
    cell = {
        "paper": "xattention",
        "profile": profile,
        "subject": subject,
        "subject_revision": "r1",
        "device": (environment or CPU)["device"],
        "dtype": "bfloat16",
        "method": {"slug": method, "config": config},
        "measurement": {"name": measurement, "options": options},
        "seed": 0,
        **({"repeat": repeat} if repeat else {}),
    }
    words = [f"{name}={value}" for name, value in config.items() if name in ("stride", "control")]
    label = f"{subject} | {' '.join([method, *words])} | {measurement} {options}"
    return {
        "schema": 1,
        "key": digest(cell),
        "cell": {**cell, "label": label},
        "status": status,
        "message": "",
        "metrics": {},
        "environment": environment or CPU,
        "created": created,
        "seconds": 1.5,
        **body,
    }


def scored(
    task: str,
    length: int,
    scores: Any,
    *,
    density: float | None = None,
    **rest: Any,
) -> dict[str, Any]:
    """Build one accuracy record from per-item scores."""
    values = [float(value) for value in scores]
    options = {"task": task, "length": length, "samples": len(values)}
    n = len(values)
    items = {
        "keys": [f"{task}-{length}-{index}" for index in range(n)],
        "scores": values,
        "depth": [
            100 * (index + 0.5) / n if task.startswith("niah") else None for index in range(n)
        ],
        "new_tokens": [8] * n,
    }
    metrics = {"score": {"value": 100 * sum(values) / n, "low": None, "high": None, "n": n}}
    patch = {} if density is None else {"patch": {"density": density, "fallback_share": 0.0}}
    return record("ruler", options, items=items, metrics=metrics, **{**patch, **rest})


def timed(
    length: int,
    ratio: float,
    *,
    phase: str = "attention",
    protocol: str = "fair",
    density: float = 0.4,
    spread: float = 0.05,
    **rest: Any,
) -> dict[str, Any]:
    """Build one latency record."""
    options = {
        "phase": phase,
        "length": length,
        "batch": 1,
        "inputs": "captured",
        "protocol": protocol,
    }
    dense = length / 1000
    metrics = {
        "ratio": {
            "value": ratio,
            "low": ratio * (1 - spread),
            "high": ratio * (1 + spread),
            "n": 12,
            "unit": "x",
        },
        "dense_ms": {"value": dense, "low": dense * 0.9, "high": dense * 1.1, "unit": "ms"},
        "method_ms": {"value": dense / ratio, "low": 1.0, "high": 2.0, "unit": "ms"},
        "density": {"value": density, "unit": ""},
    }
    explanation = {
        "attention_share": 0.7,
        "amdahl_bound": 1 / (0.3 + 0.7 * density),
        "roofline_bound": 1 / density,
        "density": density,
        "selection_share": 0.1,
        "peak_tflops": 2.0,
        "notes": [],
    }
    body = {"metrics": metrics, "explanation": explanation}
    return record("latency", options, **{**body, **rest})


def campaign(
    *,
    items: int = 100,
    lengths: tuple[int, ...] = (1024, 4096),
    draws: int = 3,
    profile: str = "embedded",
    environment: dict[str, Any] | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Build what a small run leaves: dense twice, one method, its controls, latency, failures."""
    rng = np.random.default_rng(seed)
    shared: dict[str, Any] = {"profile": profile, "environment": environment}
    found = []
    for length in lengths:
        for task in TASKS:
            dense = (rng.random(items) < 0.97).astype(float)
            if task == "cwe":
                dense = rng.integers(5, 11, items) / 10
            found.append(scored(task, length, dense, method="dense", **shared))
            found.append(scored(task, length, dense, method="dense", repeat=1, **shared))
            method = np.where(rng.random(items) < 0.005, 1 - dense, dense)
            density = 0.42 + 0.02 * TASKS.index(task)
            found.append(scored(task, length, method, density=density, **shared))
            for control, count, keep in (("random", draws, 0.4), ("oracle", 1, 0.995)):
                for draw in range(count):
                    scores = np.where(rng.random(items) < keep, dense, 0.0)
                    config = {**CONFIG, "control": control, "draw": draw}
                    found.append(
                        scored(task, length, scores, density=density, config=config, **shared)
                    )
    for protocol, gain in (("fair", 1.0), ("paper", 1.9)):
        for length, ratio in ((4096, 1.1), (16384, 1.8)):
            found.append(timed(length, ratio * gain, protocol=protocol, **shared))
    found.append(timed(16384, 1.3, phase="prefill", **shared))
    failed = timed(32768, 1.0, phase="prefill", **shared)
    failed.update(status="oom", message="out of memory: 3 GiB asked | of 2", metrics={})
    failed.pop("explanation")
    found.append(failed)
    memory = {
        "prefill_peak_bytes": {"value": 3.0e8, "unit": "bytes"},
        "ratio": {"value": 1.02, "low": 1.01, "high": 1.03, "n": 3, "unit": "x"},
    }
    found.append(record("memory", {"length": 4096}, metrics=memory, **shared))
    perplexity = {"perplexity": {"value": 12.34, "low": 12.1, "high": 12.6, "n": 64, "unit": ""}}
    found.append(record("perplexity", {"length": 1024}, metrics=perplexity, **shared))
    found.append(
        record("perplexity", {"length": 1024}, method="dense", metrics=perplexity, **shared)
    )
    return found


def commit(folder: Path, found: list[dict[str, Any]]) -> None:
    """Leave records as committed ones of XAttention in a results folder."""
    target = folder / "xattention" / "records"
    target.mkdir(parents=True, exist_ok=True)
    for name, data in records.committed_files(records.merge(found)).items():
        (target / name).write_bytes(data)


def store(runs: Path, found: list[dict[str, Any]], profile: str = "embedded") -> None:
    """Leave records as a run of XAttention does in a run store."""
    kept = RunStore(runs)
    cells = []
    for one in found:
        cells.append({"key": one["key"], "cell": one["cell"]})
        if one["status"] != "not_run":
            kept.cell(one["key"], "here").write_record(one)
    plan = {"name": "xattention", "profile": profile, "device": "cpu", "cells": cells}
    kept.write_index(plan, {})
