"""``repro status`` and ``repro logs``: what a run tells while it runs, and after it was killed."""

import json
import subprocess
import sys
import time

import pytest

from repro import runner, status
from repro.errors import BadInput
from repro.store import RunStore


@pytest.fixture
def run(plugins, tmp_path, write_manifest):
    def call(**parts):
        parts = {"methods": "[dense]", **parts}
        path = write_manifest(**parts)
        return runner.run(
            path, profile="p", runs=tmp_path / "runs", executor="inline", device="cpu", quiet=True
        )

    return call


@pytest.fixture
def store(tmp_path):
    return RunStore(tmp_path / "runs")


def test_a_finished_run(run, store):
    run(measurements="[{noop: {tasks: [ok, crash]}}]")
    state = status.examine(store, *status.find(store, "toy"))
    assert (state["state"], state["total"]) == ("finished", 2)
    assert state["counts"] == {"crashed": 1, "ok": 1}
    assert list(state["failed"].items()) == [
        ("toy:a | dense | noop crash@128", state["failed"]["toy:a | dense | noop crash@128"])
    ]
    (worker,) = state["workers"].values()
    assert (worker["cells"], worker["items"]) == (2, 4)
    assert state["running"] == [] and state["left_seconds"] is None


def test_seen_from_outside_while_it_runs_and_after_it_was_killed(
    plugins, write_manifest, tmp_path, store
):
    path = write_manifest(
        methods="[dense]",
        measurements="[{noop: {lengths: [128, 256, 512], items: 40, pause: 0.2}}]",
    )
    command = [sys.executable, "-m", "repro", "run", path, "-p", "p", "--executor", "inline"]
    options = ["--device", "cpu", "--runs", store.root, "--no-report", "--quiet"]
    process = subprocess.Popen([*command, *options], env=plugins.environment, cwd=tmp_path)
    try:
        deadline = time.monotonic() + 60
        state = None
        while state is None or not (state["running"] and state["left_seconds"]):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.2)
            if store.runs():
                state = status.examine(store, "toy", "p")
        (cell,) = state["running"]
        assert state["state"] == "running"
        assert cell["worker"].endswith(f":{process.pid}")
        assert cell["total"] in (0, 40)
        assert state["counts"]["ok"] >= 1
    finally:
        process.kill()
        process.wait()
    live = status.path_of(store, "toy", "p", "cpu")
    body = json.loads(live.read_bytes())
    assert body["state"] == "running"
    live.write_text(json.dumps({**body, "updated": time.time() - 100}))
    state = status.examine(store, "toy", "p")
    assert (state["state"], state["running"], state["left_seconds"]) == ("stopped", [], None)
    assert state["counts"]["not_run"] >= 1
    assert 99 < state["silent_seconds"] < 200


def test_a_journal_that_cannot_be_read_or_written_costs_nothing(run, store, plugins, monkeypatch):
    def fail(path, data):
        raise status.MachineFault(f"{path}: no space")

    monkeypatch.setattr(status, "write_atomically", fail)
    assert run().counts == {"ok": 1}
    path = status.path_of(store, "toy", "p", "cpu")
    assert not path.exists()
    path.write_text("{torn")
    assert status.examine(store, "toy", "p")["counts"] == {"ok": 1}


def test_logs(run, store):
    run(measurements="[{noop: {tasks: [ok, crash]}}]")
    (crashed,) = status.logs(store, "toy", "p", "crash")
    assert crashed["status"] == "crashed" and "KeyError: 'a bug'" in crashed["log"]
    assert status.logs(store, "toy", "p", crashed["key"][:8]) == [crashed]
    assert len(status.logs(store, "toy", "p", "*noop*")) == 2
    (fine,) = status.logs(store, "toy", "p", "ok@")
    assert (fine["status"], fine["log"]) == ("ok", "")


def test_bad_names(run, store):
    with pytest.raises(BadInput, match="the run must be one run of .*, got toy; known: none"):
        status.find(store, "toy")
    run()
    with pytest.raises(BadInput, match="got toi.*did you mean toy/p"):
        status.find(store, "toi/p")
    with pytest.raises(BadInput, match="got zzz.*known: toy:a . dense . noop ok@128"):
        status.logs(store, "toy", "p", "zzz")
