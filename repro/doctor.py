"""What this machine can run, and what to install for the rest."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from repro.keys import library_versions

Finding = dict[str, Any]
LEAST_DISK_GIB = 2.0
LEAST_MEMORY_GIB = 4.0


def examine(runs: Path = Path("runs")) -> list[Finding]:
    """Return one finding per thing that some command needs.

    Each has ``name``, ``status`` (``ok``, ``missing``, ``weak``), ``found`` and, where it is not
    ok, ``needed_for`` and ``remedy``.
    """
    checks: list[Callable[[], Finding]] = [
        _python,
        _torch,
        _gpu,
        _triton,
        _compiler,
        lambda: _library("transformers", "every LLM subject", "pip install transformers"),
        lambda: _library("lm-eval", "ruler", "pip install lm-eval", module="lm_eval"),
        lambda: _library("ray", "--executor ray", "pip install 'repro[cluster]'"),
        lambda: _library("nltk", "ruler with source: hub", "pip install 'repro[ruler-hub]'"),
        _threads,
        _memory,
        lambda: _disk(runs),
        lambda: _writable(runs),
        *_zoo_checks(),
        _hub,
    ]
    return [check() for check in checks]


def print_findings(found: list[Finding]) -> None:
    """Print the findings, and what to do about those that are not ok."""
    marks = {"ok": "ok     ", "missing": "missing", "weak": "weak   "}
    width = max(len(finding["name"]) for finding in found)
    for finding in found:
        line = f"{marks[finding['status']]}  {finding['name']:<{width}}  {finding['found']}"
        if finding["status"] != "ok":
            line += f"  -> for {finding['needed_for']}: {finding['remedy']}"
        print(line)


def _ok(name: str, found: str) -> Finding:
    return {"name": name, "status": "ok", "found": found, "needed_for": "", "remedy": ""}


def _lacks(name: str, found: str, needed_for: str, remedy: str, status: str = "missing") -> Finding:
    return {
        "name": name,
        "status": status,
        "found": found,
        "needed_for": needed_for,
        "remedy": remedy,
    }


def _python() -> Finding:
    return _ok("python", platform.python_version())


def _library(name: str, needed_for: str, remedy: str, *, module: str | None = None) -> Finding:
    if importlib.util.find_spec(module or name) is None:
        return _lacks(name, "not installed", needed_for, remedy)
    return _ok(name, library_versions([name])[name])


def _torch() -> Finding:
    try:
        import torch
    except ImportError as error:
        return _lacks("torch", str(error), "everything that computes", "pip install torch")
    kind = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return _ok("torch", f"{torch.__version__} ({kind})")


def _gpu() -> Finding:
    needed_for = "--device cuda and the profiles of papers"
    try:
        import torch
    except ImportError:
        return _lacks("gpu", "unknown without torch", needed_for, "pip install torch")
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        properties = torch.cuda.get_device_properties(0)
        memory = properties.total_memory / 2**30
        return _ok("gpu", f"{count} x {properties.name}, {memory:.0f} GiB")
    if shutil.which("nvidia-smi"):
        remedy = "install a CUDA build of torch that fits the driver"
        return _lacks("gpu", "a driver, and torch sees no device", needed_for, remedy)
    return _lacks("gpu", "none", needed_for, "run on a machine with a GPU, or join a Ray cluster")


def _triton() -> Finding:
    finding = _library("triton", "Triton kernels and their tests", "pip install triton")
    if finding["status"] == "ok" and os.environ.get("TRITON_INTERPRET") == "1":
        finding["found"] += " (interpreter)"
    return finding


def _compiler() -> Finding:
    for name in (os.environ.get("CXX") or "c++", "g++", "clang++"):
        path = shutil.which(name)
        if path:
            return _ok("c++ compiler", path)
    needed_for = "compiled FlexAttention, a row of the attention bench"
    return _lacks("c++ compiler", "none", needed_for, "install g++ (package build-essential)")


def _threads() -> Finding:
    from repro.environment import usable_cpus

    count = usable_cpus()
    asked = os.environ.get("REPRO_THREADS")
    return _ok("threads", f"{count} usable CPUs" + (f", REPRO_THREADS={asked}" if asked else ""))


def _memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    total, free = memory.total / 2**30, memory.available / 2**30
    found = f"{total:.0f} GiB, {free:.0f} GiB free"
    if free >= LEAST_MEMORY_GIB:
        return _ok("memory", found)
    remedy = f"have {LEAST_MEMORY_GIB:g} GiB free"
    return _lacks("memory", found, "the embedded profile", remedy, "weak")


def _disk(runs: Path) -> Finding:
    place = runs.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free / 2**30
    found = f"{free:.0f} GiB free for {runs}"
    if free >= LEAST_DISK_GIB:
        return _ok("disk", found)
    remedy = f"have {LEAST_DISK_GIB:g} GiB free, or choose another folder with --runs"
    return _lacks("disk", found, "storing runs", remedy, "weak")


def _writable(runs: Path) -> Finding:
    from repro.errors import ReproError
    from repro.store import write_atomically

    probe = runs / ".doctor"
    made = not runs.exists()
    try:
        write_atomically(probe, b"")
        probe.unlink()
        if made:
            runs.rmdir()
    except ReproError as error:
        remedy = "choose another folder with --runs"
        return _lacks("run store", str(error).split(";")[0], "storing runs", remedy)
    return _ok("run store", f"{runs} can be written")


def _zoo_checks() -> list[Callable[[], Finding]]:
    from repro import zoo

    return [lambda name=name: _zoo_model(name) for name in zoo.names()]  # type: ignore[misc]


def _zoo_model(name: str) -> Finding:
    from repro import zoo
    from repro.errors import ReproError

    try:
        zoo.verify(name)
    except ReproError as error:
        text, _, remedy = str(error).partition("; ")
        return _lacks(f"zoo:{name}", text, "the embedded profiles", remedy or text)
    return _ok(f"zoo:{name}", "files match their checksums")


def _hub() -> Finding:
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        found = "HF_HUB_OFFLINE=1"
        return _lacks("model hub", found, "hf: subjects by hub name", "unset it", "weak")
    signed = "a token is set" if os.environ.get("HF_TOKEN") else "no HF_TOKEN: open models only"
    return _ok("model hub", signed)
