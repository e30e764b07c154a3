"""Any part of a run is killed at a random point, on a cluster of several raylets; then it resumes.

What is resumed must be what an undisturbed run gives, and no item is computed again once it is
stored. Two rounds of each run with the other tests, all ten by ``make test-chaos``.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from repro import runner
from repro.testing import comparable_records
from tests.repro import toys
from tests.repro.ray_cluster import Cluster, wait_for

pytest.importorskip("ray")
pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="processes are killed by signal"),
    pytest.mark.xdist_group("cluster"),
]

ROUNDS = [
    pytest.param(seed, marks=[] if seed < 2 else pytest.mark.chaos, id=f"round{seed}")
    for seed in range(10)
]
BATCHES = 32
MANIFEST = toys.manifest(
    subjects="[toy:a, toy:b]",
    measurements="[{noop: {lengths: [128, 256], items: 8, batch: 2, pause: 0.15}}]",
)
OPTIONS = {"profile": "p", "executor": "inline", "device": "cpu", "quiet": True}


class Place:
    """A cluster that every round uses again, and what an undisturbed run gives."""

    def __init__(self, folder, monkeypatch, environment):
        self.folder = folder
        self.stored = folder / "stored"
        self.stored.touch()
        self.manifest = folder / "toy.yaml"
        self.manifest.write_text(MANIFEST)
        self.undisturbed = runner.run(self.manifest, runs=folder / "undisturbed", **OPTIONS)
        monkeypatch.setenv("TOY_STORED", str(self.stored))
        self.cluster = Cluster(3, {**environment, "TOY_STORED": str(self.stored)})


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chaos")
    with (
        pytest.MonkeyPatch.context() as monkeypatch,
        toys.installed(folder / "plugins", monkeypatch) as plugins,
    ):
        made = Place(folder, monkeypatch, plugins.environment)
        try:
            yield made
        finally:
            made.cluster.stop()


class Run:
    """One run on the cluster, in a store of its own; ``apart`` hides that from the workers."""

    def __init__(self, place, runs, manifest=None, *, apart=False):
        self.place, self.runs = place, runs
        inherited = ()
        if apart:  # a path that means something in the driver's process alone
            inherited = (os.open(runs.parent, os.O_RDONLY | os.O_DIRECTORY),)
            runs = f"/proc/self/fd/{inherited[0]}/{runs.name}"
        self.before = self.place.stored.stat().st_size
        place.cluster.repair()
        command = [sys.executable, "-m", "repro", "run", str(manifest or place.manifest)]
        command += ["--profile", "p", "--quiet", "--no-report", "--runs", str(runs)]
        command += ["--executor", "ray", "--device", "cpu", "--address", place.cluster.address]
        self.driver = subprocess.Popen(
            command,
            env=place.cluster.environment,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=inherited,
        )
        for descriptor in inherited:
            os.close(descriptor)

    def stored(self):
        """Return a line per batch that was stored."""
        with self.place.stored.open() as stream:
            stream.seek(self.before)
            return stream.read().splitlines()

    def close(self):
        if self.driver.poll() is None:
            self.driver.kill()
            self.driver.wait()

    def wait_for_batches(self, count):
        wait_for(lambda: len(self.stored()) >= count, self.driver)

    def workers(self):
        cluster = self.place.cluster
        return [pid for node in cluster.nodes for pid in cluster.processes(node, "ray::Cells")]

    def end(self):
        """Return the driver's exit code and what it said."""
        _, errors = self.driver.communicate(timeout=120)
        return self.driver.returncode, errors

    def check_resumes(self):
        resumed = runner.run(self.place.manifest, runs=self.runs, **OPTIONS)
        assert comparable_records(resumed.records) == comparable_records(
            self.place.undisturbed.records
        )
        assert items_of(self.runs) == items_of(self.place.folder / "undisturbed")

    def check_nothing_twice(self):
        counts = Counter(self.stored())
        # A batch whose process died between storing and telling is not told.
        assert BATCHES - 1 <= len(counts) <= BATCHES
        assert [batch for batch, count in counts.items() if count > 1] == []


@pytest.fixture
def run(place, tmp_path):
    made = Run(place, tmp_path / "runs")
    yield made
    made.close()


@pytest.mark.parametrize("seed", ROUNDS)
@pytest.mark.parametrize("victim", ["worker", "raylet", "driver", "head"])
def test_a_killed_part_costs_nothing_that_was_stored(run, victim, seed):
    rng = random.Random(f"{victim}/{seed}")
    cluster = run.place.cluster
    run.wait_for_batches(rng.randint(1, BATCHES // 2))
    time.sleep(rng.uniform(0, 0.2))
    if victim == "driver":
        run.driver.kill()
        run.end()
    elif victim == "head":
        kill(cluster.processes(cluster.nodes[0], "gcs_server"))
        code, errors = run.end()
        # The workers go on for a while without it, and may come to the end.
        assert code == 0 or "the head of the Ray cluster" in errors, errors
    else:
        kill(
            cluster.processes(rng.choice(cluster.nodes[1:]), "raylet")
            if victim == "raylet"
            else [rng.choice(run.workers())]
        )
        code, errors = run.end()
        assert code == 0, errors
    run.check_resumes()
    run.check_nothing_twice()


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs the paths of Linux")
@pytest.mark.parametrize("seed", ROUNDS[2:])
@pytest.mark.parametrize("victim", ["worker", "driver"])
def test_a_part_is_killed_while_workers_send_their_files(place, tmp_path, victim, seed):
    rng = random.Random(f"apart/{victim}/{seed}")
    run = Run(place, tmp_path / "runs", apart=True)
    try:
        run.wait_for_batches(rng.randint(1, BATCHES // 2))
        kill([run.driver.pid] if victim == "driver" else [rng.choice(run.workers())])
        code, errors = run.end()
    finally:
        run.close()
    assert code == (-signal.SIGKILL if victim == "driver" else 0), errors
    run.check_resumes()


@pytest.mark.chaos
def test_the_end_of_the_head_is_told(place, tmp_path):
    manifest = tmp_path / "stuck.yaml"
    manifest.write_text(toys.manifest(measurements="[{noop: {tasks: [stuck]}}]"))
    run = Run(place, tmp_path / "runs", manifest)
    try:
        run.wait_for_batches(1)
        kill(place.cluster.processes(place.cluster.nodes[0], "gcs_server"))
        code, errors = run.end()
    finally:
        run.close()
    assert code == 1
    assert "error: the head of the Ray cluster (" in errors
    assert "what is finished is kept. Start the cluster again" in errors
    assert "Traceback" not in errors


RETRIEVER = """
profiles:
  p:
    subjects: [zoo:retriever]
    methods: [dense, xattention: {threshold: 0.9}]
    measurements: [ruler: {tasks: [niah_multikey_1, vt], lengths: [1024], samples: 8}]
"""


@pytest.mark.chaos
@pytest.mark.parametrize("victim", ["worker", "raylet", "driver"])
def test_the_real_retriever_resumes_to_the_same_tables(place, tmp_path, victim):
    manifest = tmp_path / "retriever.yaml"
    manifest.write_text(RETRIEVER)
    run = Run(place, tmp_path / "runs", manifest)
    answered = lambda: sum(map(len, answers_in(run.runs).values()))
    try:
        wait_for(lambda: answered() >= 12, run.driver)
        assert answered() < 28, "too late to disturb it"
        if victim == "driver":
            run.driver.kill()
        else:
            # The raylet that runs cells, if one but the first does: the driver lives on that.
            busy = [n for n in place.cluster.nodes[1:] if place.cluster.processes(n, "ray::Cells")]
            nodes = busy if victim == "raylet" else place.cluster.nodes
            name = "raylet" if victim == "raylet" else "ray::Cells"
            kill([pid for node in nodes for pid in place.cluster.processes(node, name)][:1])
        code, errors = run.end()
        assert code == (-signal.SIGKILL if victim == "driver" else 0), errors
    finally:
        run.close()
    kept = answers_in(run.runs)
    resumed = runner.run(manifest, runs=run.runs, **OPTIONS)
    undisturbed = runner.run(manifest, runs=tmp_path / "undisturbed", **OPTIONS)
    assert comparable_records(resumed.records) == comparable_records(undisturbed.records)
    assert answers_in(run.runs) == answers_in(tmp_path / "undisturbed")
    assert all(answers_in(run.runs)[path][: len(lines)] == lines for path, lines in kept.items())


def answers_in(runs):
    """Return cell -> its stored answers in order; what a batch says of itself holds timings."""
    return {
        path.relative_to(runs): [
            line for line in path.read_bytes().splitlines() if b'"key":"batch/' not in line
        ]
        for path in runs.rglob("items.jsonl")
    }


def kill(pids):
    assert pids
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def items_of(runs):
    return {path.relative_to(runs): path.read_bytes() for path in runs.rglob("items.jsonl")}
