"""A tiny subject, method and measurement, as plugins that a run finds by scanning."""

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

MEASUREMENT = '''
"""A measurement that needs no model: the name of the task says how a cell behaves."""
import os
import time
from dataclasses import dataclass

from repro.measurements import Measurement


@dataclass(frozen=True, kw_only=True)
class Options:
    tasks: tuple[str, ...] = ("ok",)
    lengths: tuple[int, ...] = (128,)
    items: int = 4
    batch: int = 2
    pause: float = 0.0
    marker: str = ""

    def __post_init__(self):
        if self.items < 1:
            raise ValueError(f"items must be at least 1, got {self.items}")


def expand(options):
    return [
        {"task": task, "length": length, "items": options.items, "batch": options.batch,
         "pause": options.pause, "marker": options.marker}
        for task in options.tasks for length in options.lengths
    ]


def _misbehave(task, length, marker):
    if task == "oom" and length >= 256:
        raise MemoryError("no memory left")
    if task == "allocate":  # refused by the allocator itself
        import torch

        torch.empty(2**50, dtype=torch.uint8)
    if task == "crash":
        raise KeyError("a bug")
    if task == "unsupported":
        raise NotImplementedError("fake: sliding windows are not supported")
    if task == "exit":
        raise SystemExit("a library gave up")
    if task == "surrogate":
        raise ValueError("no such file: " + os.fsdecode(b"\\xff"))
    if task == "float":
        raise FloatingPointError("overflow")
    if task == "hang":
        while True:
            time.sleep(0.01)
    if task == "stuck":
        time.sleep(1e6)
    if task == "interrupt":
        raise KeyboardInterrupt
    if task == "segfault":
        import ctypes

        ctypes.string_at(0)
    if task == "busy":  # C code that never comes back and holds the interpreter
        sum(iter(int, 1))
    if task == "flood":
        for _ in range(2000):
            os.write(1, b"x" * 10_000)
    if task == "kill_once" and not os.path.exists(marker):
        open(marker, "w").close()
        os.kill(os.getpid(), 9)


def run(context):
    task, length = context.options["task"], context.options["length"]
    keys = [f"{task}-{length}-{i}" for i in range(context.options["items"])]
    scores = []
    batch = context.options["batch"]
    for start in range(0, len(keys), batch):
        part = keys[start : start + batch]
        if any(context.items.get(key) is None for key in part):
            time.sleep(context.options["pause"])
            context.items.put([(key, {"score": len(key) / 100, "seed": context.seed})
                               for key in part])
            if "TOY_STORED" in os.environ:  # one write: workers append side by side
                with open(os.environ["TOY_STORED"], "a") as stream:
                    print(context.subject.info.name, context.method is None, part, file=stream)
        if start:
            _misbehave(task, length, context.options["marker"])
        scores += [context.items.get(key)["score"] for key in part]
        context.progress(start + len(part), len(keys))
    with context.patch() as patch:
        stats = dict(patch.stats())
    value = float("nan") if task == "nan" else 100 * sum(scores) / len(scores)
    body = {"metrics": {"score": {"value": value, "unit": "%"}}, "patch": stats,
            "items": {"keys": keys, "scores": scores}}
    if task == "invalid":
        body.update(status="invalid", message="clocks drifted")
    if context.artifact is not None:
        body["explanation"] = dict(context.artifact.metadata)
    return body


MEASUREMENT = Measurement(
    name="noop", options=Options, expand=expand, run=run, libraries=("numpy",), item_count="items",
    estimate_seconds=lambda options, info: options["length"] / 128,
)
'''

PAIRED = '''
"""A measurement that itself compares with dense; random weights will do for the other one."""
from dataclasses import dataclass

from repro.measurements import Measurement


@dataclass(frozen=True, kw_only=True)
class Options:
    lengths: tuple[int, ...] = (128,)


MEASUREMENT = Measurement(
    name="paired", options=Options, expand=lambda o: [{"length": n} for n in o.lengths],
    run=lambda context: {"metrics": {}}, paired=True, needs_training=True,
)
'''

METHOD = '''
"""A method that does nothing but count."""
from contextlib import contextmanager
from dataclasses import dataclass

from repro.method import Artifact, CalibrationSpec, Method, Patch
from repro.kernels.fakekernel import VALUE


@dataclass(frozen=True, kw_only=True)
class Config:
    stride: int = 16
    threshold: float = 0.9
    block_size: int = 128
    layers: tuple[int, ...] = ()
    per_head: bool = False
    share: float = 0.0

    def __post_init__(self):
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must be in [0, 1], got {self.threshold}")
        if self.block_size % self.stride:
            raise ValueError(f"stride must be a divisor of block_size (128), got {self.stride}")


class FakePatch(Patch):
    def __init__(self, config):
        self.config = config

    def stats(self):
        return {"density": self.config.threshold, "fallback_share": self.config.share}


@contextmanager
def apply(subject, config, artifact=None):
    assert isinstance(config.layers, tuple)
    yield FakePatch(config)


def calibrate(subject, config, data, *, progress):
    import torch

    with open(subject.extra["calibrations"], "a") as stream:
        stream.write("x")
    return Artifact(tensors={"gates": torch.arange(4.0)}, metadata={"stride": config.stride})


METHOD = Method(
    slug="fake", title="Fake", arxiv="", kind="attention", config=Config, apply=apply,
    needs_artifact=lambda config: config.per_head, calibrate=calibrate, fallback_limit=0.25,
)
'''

SUBJECT = '''
"""Subjects ``toy:<name>``: nothing is loaded but a counter."""
import os
from pathlib import Path

from repro.errors import BadInput, Fault, MissingResource
from repro.subjects import Subject, SubjectInfo


def known():
    return ["a", "b", "untrained", "absent"]


def describe(rest):
    if rest == "absent":
        raise MissingResource("toy:absent: weights are not here; fetch them with `fetch absent`")
    if rest not in known():
        raise BadInput(Fault("subjects", "a subject", "a known name", f"toy:{rest}", "known: a, b"))
    revision = os.environ.get("TOY_REVISION", "r1")
    return SubjectInfo(name=f"toy:{rest}", kind="llm", revision=revision, max_length=1024,
                       trained=rest != "untrained")


def load(rest, *, device, dtype):
    import torch

    counter = Path(os.environ["TOY_LOADS"])
    with counter.open("a") as stream:
        stream.write("x")
    return Subject(info=describe(rest), model=None, tokenizer=None, device=torch.device(device),
                   dtype=getattr(torch, dtype),
                   extra={"calibrations": str(counter.with_name("calibrations"))})
'''

# What a process outside of this one does to see the plugins (it is imported at its start).
SITE = """
import os
if os.environ.get("TOY_PLUGINS"):
    import repro.kernels, repro.measurements, repro.methods, repro.subjects
    for name in ("kernels", "measurements", "methods", "subjects"):
        package = getattr(repro, name)
        package.__path__ = [*package.__path__, os.path.join(os.environ["TOY_PLUGINS"], name)]
"""


class Plugins:
    """Where the plugins lie, and what they counted."""

    def __init__(self, root: Path):
        self.root = root

    @property
    def loads(self) -> int:
        return len((self.root / "loads").read_text())

    @property
    def calibrations(self) -> int:
        path = self.root / "calibrations"
        return len(path.read_text()) if path.exists() else 0

    @property
    def environment(self) -> dict[str, str]:
        """Environment of a subprocess that sees the plugins."""
        top = str(Path(__file__).parents[2])
        path = os.pathsep.join([str(self.root / "site"), top])
        return {**os.environ, "PYTHONPATH": path}


@contextmanager
def installed(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Plugins]:
    """Make ``toy:a``, ``toy:b``, the method ``fake`` and the measurement ``noop`` known."""
    files = {
        "measurements/noop.py": MEASUREMENT,
        "measurements/paired.py": PAIRED,
        "methods/fake/__init__.py": METHOD,
        "methods/fake/paper.yaml": (
            "paper: fake\ntitle: Fake\nclaims:\n"
            "  - {id: one, what: w, unit: x, model: m, source: s, needs: n, values: [{value: 1}]}\n"
        ),
        "kernels/fakekernel/__init__.py": "VALUE = 1\n",
        "kernels/fakekernel/bench.py": "SUITE = None\n",
        "subjects/toy.py": SUBJECT,
        "site/sitecustomize.py": SITE,
        "loads": "",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setenv("TOY_LOADS", str(root / "loads"))
    monkeypatch.setenv("TOY_PLUGINS", str(root))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    packages = [
        importlib.import_module(f"repro.{name}")
        for name in ("kernels", "measurements", "methods", "subjects")
    ]
    before = set(sys.modules)
    for package in packages:
        folder = str(root / package.__name__.rpartition(".")[2])
        monkeypatch.setattr(package, "__path__", [*package.__path__, folder])
    try:
        yield Plugins(root)
    finally:
        toys = ("noop", "paired", "fake", "fakekernel", "toy")
        for name in set(sys.modules) - before:
            if name.startswith("repro.") and name.split(".")[2:3] and name.split(".")[2] in toys:
                del sys.modules[name]


def manifest(**parts: str | None) -> str:
    """Return a manifest with one profile ``p``; the values replace the defaults."""
    values = {"subjects": "[toy:a]", "methods": "[fake]", "measurements": "[noop]", **parts}
    lines = [f"    {name}: {value}\n" for name, value in values.items() if value is not None]
    return "".join(["profiles:\n", "  p:\n", *lines])
