"""The machine a record was made on: hardware, versions, source state, and the state of the clocks.

Importing this module imports neither torch nor Ray.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

#: Distributions whose versions go into every record.
LIBRARIES = ("torch", "triton", "transformers", "lm-eval", "ray", "numpy", "safetensors")

#: ``nvidia-smi`` field -> name in ``device_state``. Throttle reasons are a bit mask in hexadecimal.
_SMI_FIELDS = {
    "clocks.sm": "sm_clock_mhz",
    "clocks.mem": "memory_clock_mhz",
    "power.draw": "power_watt",
    "temperature.gpu": "temperature_celsius",
    "clocks_throttle_reasons.active": "throttle_reasons",
}

#: Bits of NVML's throttle mask that mean a fault of cooling or supply: hardware slowdown, thermal
#: slowdown by software or hardware, power brake. The power cap (0x4) is normal under full load.
_THROTTLE_BITS = 0x8 | 0x20 | 0x40 | 0x80


def usable_cpus() -> int:
    """Return how many CPUs this process may use: affinity, cut to the control group's quota."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        count = os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return count


def set_threads(count: int | None = None) -> int:
    """Fix the number of threads that torch computes with, the same in every executor.

    Args:
        count: Threads; None takes ``REPRO_THREADS`` where set, else every usable CPU.

    Returns:
        The number that is now in force.
    """
    if count is None:
        asked = os.environ.get("REPRO_THREADS", "")
        count = int(asked) if asked.isdecimal() and int(asked) > 0 else usable_cpus()
    os.environ["OMP_NUM_THREADS"] = str(count)
    import torch

    if torch.get_num_threads() != count:
        torch.set_num_threads(count)
    return count


def peak_memory(device: str) -> int:
    """Return the most bytes that this process ever held: of the GPU's allocator, else resident."""
    if device != "cpu":
        import torch

        return int(torch.cuda.max_memory_allocated())
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def capture(device: str | None = None) -> dict[str, Any]:
    """Describe this machine and this checkout, JSON-able.

    Args:
        device: ``cpu`` or ``cuda[:n]``; None takes CUDA where there is a device.

    Returns:
        ``environment_id`` (short slug such as ``cpu-amd-epyc-2t`` or ``nvidia-h100``), ``device``,
        ``device_name``, ``cpu``, ``threads``, ``memory_bytes``, ``os``, ``python``, ``versions``,
        ``git_commit``, ``git_dirty`` (both None outside a checkout).
    """
    import torch

    device_type = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    cpu, threads = cpu_name(), torch.get_num_threads()
    memory: int | None
    if device_type == "cuda":
        name = torch.cuda.get_device_name(device)
        memory = torch.cuda.get_device_properties(device or 0).total_memory
        identity = _slug(name)
    else:
        name, memory = cpu, _memory_bytes()
        identity = f"cpu-{_slug(cpu)}-{threads}t"
    commit, dirty = _git_state()
    return {
        "environment_id": identity,
        "device": device_type,
        "device_name": name,
        "cpu": cpu,
        "threads": threads,
        "memory_bytes": memory,
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions(),
        "git_commit": commit,
        "git_dirty": dirty,
    }


def versions(names: tuple[str, ...] = LIBRARIES) -> dict[str, str]:
    """Return the versions of the installed distributions among ``names``."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def cpu_name() -> str:
    """Return the CPU's model name, without trademark signs and clock rate."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    name = match.group(1) if match else platform.processor() or platform.machine() or "unknown"
    name = re.sub(r"\((R|TM|C)\)", "", name, flags=re.IGNORECASE)
    return " ".join(re.sub(r"\bCPU\b|\bProcessor\b|@.*$", " ", name).split()) or "unknown"


def device_state(device_type: str) -> dict[str, Any]:
    """Return clocks, power, temperature and throttling of this process's GPU, or the CPU's load.

    What the machine does not tell is left out; the call never fails.
    """
    return _gpu_state() if device_type == "cuda" else _cpu_state()


def is_throttled(state: dict[str, Any]) -> bool:
    """Return True if a GPU's state shows a thermal or hardware slowdown."""
    return bool(int(state.get("throttle_reasons", 0)) & _THROTTLE_BITS)


def _gpu_id() -> str:
    """Return what nvidia-smi calls the GPU that torch uses: it also counts those hidden from us."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return "0"
    return f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"


def _gpu_state() -> dict[str, Any]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    query = [
        tool,
        f"--id={_gpu_id()}",
        f"--query-gpu={','.join(_SMI_FIELDS)}",
        "--format=csv,noheader,nounits",
    ]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return _parse_smi(done.stdout)


def _parse_smi(line: str) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for name, text in zip(_SMI_FIELDS.values(), line.strip().split(","), strict=False):
        try:
            value = text.strip()
            state[name] = int(value, 16) if value.startswith("0x") else float(value)
        except ValueError:  # "[N/A]" and the like
            continue
    return state


def _cpu_state() -> dict[str, Any]:
    state: dict[str, Any] = {}
    try:
        state["load_1min"] = os.getloadavg()[0]
        clocks = re.findall(
            r"^cpu MHz\s*:\s*([\d.]+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE
        )
        if clocks:
            state["cpu_clock_mhz"] = sum(map(float, clocks)) / len(clocks)
    except (OSError, AttributeError):
        pass
    return state


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _slug(name: str) -> str:
    """Return lower-case words joined by hyphens, the form and memory size of a GPU dropped."""
    name = re.sub(r"\b(\d+GB|HBM\d\w*|PCIe|SXM\d*|NVL|\d+-Core)\b", " ", name, flags=re.IGNORECASE)
    return "-".join(re.findall(r"[a-z0-9]+", name.lower())) or "unknown"


@functools.cache
def _git_state() -> tuple[str | None, bool | None]:
    """Return (commit, dirty) of the checkout this package lies in; Nones in an installed wheel."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None, None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()

    try:
        # Written tables are an outcome of the run, so they do not make its source dirty.
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")
        return git("rev-parse", "HEAD"), bool(changed)
    except (OSError, subprocess.SubprocessError):
        return None, None
