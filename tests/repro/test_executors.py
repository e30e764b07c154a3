import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from repro import executors, manifest, runner, store
from repro.budget import Allowance
from repro.errors import BadInput, MissingResource
from repro.executors import inline
from repro.plan import PlannedCell, make_plan
from repro.progress import Quiet
from repro.testing import comparable_records
from repro.worker import CellTimeout

pytestmark = pytest.mark.xdist_group("cluster")

METHODS = ("dense", "fake")


@pytest.fixture
def run(plugins, tmp_path, write_manifest):
    options = ("fresh", "budget", "only", "keep_going", "implied", "executor")

    def call(**parts):
        asked = {name: parts.pop(name) for name in options if name in parts}
        return runner.run(
            write_manifest(**parts),
            profile="p",
            runs=tmp_path / "runs",
            device="cpu",
            quiet=True,
            **{"executor": "inline", **asked},
        )

    return call


def statuses(outcome):
    return {
        record["cell"]["label"].split(" | ", 1)[1]: record["status"] for record in outcome.records
    }


def comparable(outcome):
    return comparable_records(outcome.records)


class TestInline:
    def test_second_run_reuses_every_record(self, run, plugins):
        first = run()
        assert first.counts == {"ok": 2}
        second = run()
        assert second.counts == {"cached": 2}
        assert comparable(first) == comparable(second)
        assert plugins.loads == 1

    def test_only_what_changed_runs_again(self, run, plugins):
        run()
        assert run(methods="[fake, {fake: {stride: 8}}]").counts == {"cached": 2, "ok": 1}

    def test_a_changed_line_of_a_method_reruns_that_method_alone(self, run, plugins):
        run()
        with (plugins.root / "methods/fake/__init__.py").open("a") as stream:
            stream.write("# a better idea\n")
        outcome = run()
        assert outcome.counts == {"cached": 1, "ok": 1}
        assert outcome.records[1]["cell"]["method"]["slug"] == "fake"

    def test_another_working_directory_changes_nothing(self, run, tmp_path, monkeypatch):
        first = run()
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        second = run()
        assert second.counts == {"cached": 2}
        assert comparable(first) == comparable(second)

    def test_fresh_computes_again(self, run):
        run()
        assert run(fresh=True).counts == {"ok": 2}

    def test_only_keeps_the_index_whole(self, run, tmp_path):
        from repro.store import RunStore

        assert run(only="dense").counts == {"ok": 1}
        found = [entry["status"] for entry in RunStore(tmp_path / "runs").records("toy", "p")]
        assert found == ["ok", "not_run"]

    def test_longer_cells_are_implied_after_an_oom_and_shorter_ones_run(self, run):
        parts = {"measurements": "[{noop: {tasks: [oom, ok], lengths: [128, 256, 512, 1024]}}]"}
        expected = {
            f"{method} | noop oom@{length}": status
            for method in ("dense", "fake")
            for length, status in ((128, "ok"), (256, "oom"), (512, "implied"), (1024, "implied"))
        }
        outcome = run(**parts)
        found = statuses(outcome)
        assert {label: found[label] for label in expected} == expected
        assert all(status == "ok" for label, status in found.items() if "noop ok" in label)
        # Without its machine a page would leave the hole out.
        assert all(record["environment"]["environment_id"] for record in outcome.records)
        # What was implied by a stored outcome is implied again, not run.
        again = run(**parts)
        assert comparable(again) == comparable(outcome)
        assert again.counts["implied"] == 4

    def test_no_implied_tries_the_longer_cells(self, run):
        parts = {"measurements": "[{noop: {tasks: [oom], lengths: [128, 256, 512]}}]"}
        assert run(**parts).counts == {"ok": 2, "oom": 2, "implied": 2}
        assert run(implied=False, **parts).counts == {"cached": 4, "oom": 2}

    def test_fail_fast_ends_with_the_first_failure_of_this_run(self, run):
        parts = {"measurements": "[{noop: {tasks: [nan, ok, crash, oom]}}]", "methods": "[dense]"}
        outcome = run(keep_going=False, **parts)
        assert (outcome.counts, outcome.exit_code) == ({"numerical": 1, "not_run": 3}, 1)
        message = outcome.records[1]["message"]
        assert message == "stopped by --fail-fast after toy:a | dense | noop nan@128: numerical"
        # What is settled does not end a run again; a crash is tried again, and does.
        again = run(keep_going=False, **parts)
        assert again.counts == {"cached": 1, "ok": 1, "crashed": 1, "not_run": 1}
        assert run(**parts).counts == {"cached": 2, "crashed": 1, "ok": 1}

    def test_failed_cells_are_tried_again_and_others_reused(self, run):
        parts = {"measurements": "[{noop: {tasks: [crash, ok, unsupported]}}]"}
        first = run(**parts)
        assert (first.counts, first.exit_code) == ({"crashed": 2, "ok": 2, "unsupported": 2}, 1)
        assert run(**parts).counts == {"crashed": 2, "cached": 4}

    def test_a_hanging_cell_times_out_and_the_others_run(self, run):
        # Long enough for a cell that does nothing, on a busy machine, too.
        outcome = run(measurements="[{noop: {tasks: [hang, ok]}}]", timeout_minutes="0.05")
        assert outcome.counts == {"timeout": 2, "ok": 2}
        assert "took longer than 3 s" in outcome.records[0]["message"]
        assert outcome.exit_code == 0

    def test_a_time_limit_that_is_lost_once_comes_again(self, monkeypatch):
        monkeypatch.setattr(inline, "AGAIN_SECONDS", 0.1)
        before = signal.getsignal(signal.SIGALRM)
        with pytest.raises(CellTimeout), inline._time_limit(0.05):
            with contextlib.suppress(CellTimeout):  # as what calls a destructor does
                time.sleep(60)
            time.sleep(60)
        assert signal.getsignal(signal.SIGALRM) is before
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)

    def test_the_time_of_a_cell_ends_before_its_record_is_written(self, run, monkeypatch):
        real = store.CellFolder.write_record

        def slow(folder, record):
            time.sleep(3.3)
            real(folder, record)

        monkeypatch.setattr(store.CellFolder, "write_record", slow)
        outcome = run(methods="[dense]", timeout_minutes="0.05")
        assert outcome.counts == {"ok": 1}

    def test_a_flood_of_output_is_cut_and_kept_from_the_user(self, run, tmp_path, capfd):
        outcome = run(measurements="[{noop: {tasks: [flood]}}]", methods="[dense]")
        assert outcome.counts == {"ok": 1}
        (kept,) = (tmp_path / "runs").rglob("output.txt")
        assert kept.stat().st_size < 140_000
        assert b" bytes left out ...\n" in kept.read_bytes()
        assert capfd.readouterr().out == ""

    def test_a_failure_says_how_much_memory_was_held_and_where_it_was(self, run):
        outcome = run(measurements="[{noop: {tasks: [crash]}}]", methods="[dense]")
        failure = outcome.records[0]["failure"]
        assert failure["peak_memory_bytes"] > 1e6
        assert failure["log_tail"][-1] == "KeyError: 'a bug'"

    def test_a_segmentation_fault_is_told_by_the_next_run_and_the_others_complete(
        self, run, plugins, write_manifest, tmp_path
    ):
        parts = {"measurements": "[{noop: {tasks: [ok, segfault, nan]}}]", "methods": "[dense]"}
        path = write_manifest(**parts)
        first = subprocess.run(
            command(path, tmp_path / "runs", "--executor", "inline"),
            env=plugins.environment,
            check=False,
            capture_output=True,
        )
        assert first.returncode == -signal.SIGSEGV
        outcome = run(**parts)
        assert outcome.counts == {"cached": 1, "crashed": 1, "numerical": 1}
        crashed = outcome.records[1]
        assert crashed["message"] == "Fatal Python error: Segmentation fault, in the last run"
        assert "ctypes" in next((tmp_path / "runs").rglob("log.txt")).read_text()

    def test_budget_runs_the_cheapest_comparisons_first(self, run, monkeypatch):
        parts = {"measurements": "[{noop: {lengths: [1024, 128], tasks: [ok, nan]}}]"}
        order = []
        real = executors.Session.settled_without_running

        def spy(session, planned):
            order.append(planned.label.split(" | ", 1)[1])
            return real(session, planned)

        left = iter([3.5] * 6 + [0.0] * 2)
        monkeypatch.setattr(executors.Session, "settled_without_running", spy)
        monkeypatch.setattr(Allowance, "left", lambda allowance: next(left))
        monkeypatch.setattr(executors.Session, "pace", lambda session: 1.0)
        outcome = run(budget="1h", **parts)
        cheap = [f"{method} | noop {task}@128" for task in ("ok", "nan") for method in METHODS]
        assert order[:4] == cheap
        found = statuses(outcome)
        assert [found[label] for label in cheap] == ["ok", "ok", "numerical", "numerical"]
        assert [status for label, status in found.items() if "@1024" in label] == ["not_run"] * 4
        messages = [record["message"] for record in outcome.records[-4:]]
        assert all("budget spent: needs about 8 s" in text for text in messages)
        monkeypatch.undo()

    def test_what_the_budget_left_out_runs_next_time(self, run):
        assert run(budget="0.000001s").counts == {"not_run": 2}
        assert run(budget="1h").counts == {"ok": 2}

    def test_pace_leaves_the_loading_out(self):
        session = executors.Session(None, (), None, {}, Quiet())
        assert session.pace() == 1.0
        cell = {"measurement": {"options": {}}}
        planned = PlannedCell(key="a", cell=cell, estimate_seconds=2.0)
        session.finish(planned, {"status": "ok", "seconds": 30.0, "load_seconds": 20.0})
        assert session.pace() == 5.0

    def test_ctrl_c_leaves_a_run_that_goes_on(self, run, tmp_path):
        parts = {"measurements": "[{noop: {tasks: [ok, interrupt]}}]"}
        with pytest.raises(KeyboardInterrupt):
            run(**parts)
        assert len(list((tmp_path / "runs").rglob("record.json"))) == 2
        lines = [path.read_bytes() for path in (tmp_path / "runs").rglob("items.jsonl")]
        assert len(lines) == 3
        with pytest.raises(KeyboardInterrupt):
            run(**parts)  # the folder's lock is free again

    def test_missing_weights(self, run):
        outcome = run(subjects="[toy:a, toy:absent]")
        assert outcome.counts == {"ok": 2, "not_run": 2}
        assert "fetch absent" in outcome.records[-1]["message"]
        with pytest.raises(MissingResource, match="fetch absent"):
            run(subjects="[toy:absent]")

    def test_missing_gpu(self, run):
        with pytest.raises(MissingResource, match="asks for 1 GPU; this machine has none"):
            run(resources="{gpus: 1}")

    def test_corrupt_record_and_items_are_redone_to_the_same(self, run, tmp_path, plugins):
        first = run()
        [record, _] = sorted((tmp_path / "runs").rglob("record.json"))
        record.write_bytes(record.read_bytes()[:100])
        items = record.with_name("items.jsonl")
        lines = items.read_bytes().splitlines(keepends=True)
        items.write_bytes(b"".join([lines[0], b"{torn\n", *lines[2:-1], lines[-1][:9]]))
        second = run()
        assert second.counts == {"cached": 1, "ok": 1}
        assert comparable(first) == comparable(second)
        assert (record.parent / "record.json.corrupt").exists()
        assert (record.parent / "items.jsonl.corrupt").exists()


def test_unknown_executor(run, plugins):
    with pytest.raises(BadInput, match="--executor: .* got rya; did you mean ray"):
        run(executor="rya")


def test_auto_takes_ray_only_where_it_schedules_something(plugins, write_manifest):
    pytest.importorskip("ray")
    one = make_plan(manifest.load(write_manifest()), "p", device="cpu")
    two = make_plan(manifest.load(write_manifest(subjects="[toy:a, toy:b]")), "p", device="cpu")
    assert executors.choose(one, address=None) == "inline"
    assert executors.choose(one, address="auto") == "ray"
    assert executors.choose(two, address=None) == "ray"


def wait_for(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def command(path, runs, *more):
    base = [sys.executable, "-m", "repro", "run", str(path), "--profile", "p", "--no-report"]
    return [*base, "--runs", str(runs), "--device", "cpu", *more]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_driver_resumes_to_the_same_records(
    plugins, write_manifest, tmp_path, run, number
):
    parts = {"measurements": "[{noop: {lengths: [128, 256], items: 12, pause: 0.05}}]"}
    path = write_manifest(**parts)
    process = subprocess.Popen(
        command(path, tmp_path / "killed", "--executor", "inline"),
        env=plugins.environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    killed = tmp_path / "killed"
    wait_for(lambda: len(list(killed.rglob("record.json"))) >= 2)
    wait_for(lambda: len(list(killed.rglob("items.jsonl"))) >= 3)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -9
    else:
        assert process.returncode == 130
        assert "Go on with: repro run" in errors
        assert "Traceback" not in errors
    assert len(list(killed.rglob("record.json"))) < 4
    resumed = runner.run(path, profile="p", runs=killed, executor="inline", device="cpu")
    assert resumed.counts["cached"] >= 2
    undisturbed = run(**parts)
    assert comparable(resumed) == comparable(undisturbed)
    assert items_of(killed) == items_of(tmp_path / "runs")


@pytest.mark.skipif(os.name != "posix", reason="the limit is of POSIX")
def test_a_full_disk_is_one_line_and_the_run_goes_on_later(plugins, write_manifest, tmp_path, run):
    import resource

    def limit():  # of every file's size: bites for root too
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    parts = {"measurements": "[{noop: {items: 400}}]"}
    path, full = write_manifest(**parts), tmp_path / "full"
    done = subprocess.run(
        command(path, full, "--executor", "inline", "--quiet"),
        env=plugins.environment,
        preexec_fn=limit,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "items.jsonl: cannot be written: File too large; free space or choose" in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("error:") == 1
    (kept,) = full.rglob("items.jsonl")
    stored = kept.read_bytes()
    assert 10_000 < len(stored) <= 20_000 and stored.endswith(b"\n")
    resumed = runner.run(path, profile="p", runs=full, executor="inline", device="cpu")
    assert comparable(resumed) == comparable(run(**parts))
    assert kept.read_bytes().startswith(stored)
    assert items_of(full) == items_of(tmp_path / "runs")


def test_a_clock_that_goes_back_changes_nothing(run, tmp_path, monkeypatch):
    from datetime import timedelta

    from repro import status

    run(only="dense")

    class Yesterday(store.datetime):
        @classmethod
        def now(cls, zone=None):
            return super().now(zone) - timedelta(days=1)

    real = time.time
    monkeypatch.setattr(store, "datetime", Yesterday)
    monkeypatch.setattr(time, "time", lambda: real() - 86_400)
    second = run()
    assert second.counts == {"cached": 1, "ok": 1}
    first, later = second.records
    assert later["created"] < first["created"]
    assert 0 <= later["seconds"] < 60
    found = status.examine(store.RunStore(tmp_path / "runs"), "toy", "p")
    assert (found["state"], found["counts"]) == ("finished", {"ok": 2})
    assert found["silent_seconds"] is None or found["silent_seconds"] >= 0
    monkeypatch.undo()


def items_of(runs):
    return {path.relative_to(runs): path.read_bytes() for path in runs.rglob("items.jsonl")}


@pytest.mark.skipif(os.name != "posix", reason="processes are killed by signal")
class TestRay:
    """One local cluster for all: its start costs seconds."""

    def test_dead_actor_hung_cell_and_crash_spoil_nothing_else(
        self, plugins, write_manifest, tmp_path, monkeypatch
    ):
        pytest.importorskip("ray")
        monkeypatch.setenv("PYTHONPATH", plugins.environment["PYTHONPATH"])
        marker = tmp_path / "marker"
        tasks = "kill_once, stuck, busy, segfault, crash, oom, nan, flood, ok"
        path = write_manifest(
            methods="[dense]",
            measurements=f"[{{noop: {{tasks: [{tasks}], marker: {marker}}}}}]",
            timeout_minutes="0.1",
        )
        outcome = runner.run(
            path, profile="p", runs=tmp_path / "runs", executor="ray", device="cpu", quiet=True
        )
        assert statuses(outcome) == {
            "dense | noop kill_once@128": "ok",
            "dense | noop stuck@128": "timeout",
            "dense | noop busy@128": "timeout",
            "dense | noop segfault@128": "crashed",
            "dense | noop crash@128": "crashed",
            "dense | noop oom@128": "ok",
            "dense | noop nan@128": "numerical",
            "dense | noop flood@128": "ok",
            "dense | noop ok@128": "ok",
        }
        assert marker.exists()
        import ray

        assert not ray.is_initialized()
        # The inline executor finds what Ray left, and computes the same.
        inline = runner.run(
            write_manifest(
                methods="[dense]",
                measurements=f"[{{noop: {{tasks: [ok, kill_once], marker: {marker}}}}}]",
            ),
            profile="p",
            runs=tmp_path / "runs",
            executor="inline",
            device="cpu",
        )
        assert inline.counts == {"cached": 2}

    def test_workers_that_do_not_see_the_drivers_disk_send_their_files(
        self, plugins, write_manifest, tmp_path, monkeypatch, run
    ):
        pytest.importorskip("ray")
        from repro.executors import _pool

        monkeypatch.setenv("PYTHONPATH", plugins.environment["PYTHONPATH"])
        monkeypatch.setattr(_pool, "_token", lambda session: "")
        with tempfile.TemporaryDirectory(dir="/tmp") as own:
            monkeypatch.setenv("TMPDIR", own)
            parts = {"measurements": "[{noop: {tasks: [ok, crash, flood], lengths: [128, 256]}}]"}
            sent = runner.run(
                write_manifest(**parts),
                profile="p",
                runs=tmp_path / "sent",
                executor="ray",
                device="cpu",
                quiet=True,
            )
            assert list(Path(own).glob("repro-*")) == []
        assert sent.counts == {"ok": 8, "crashed": 4}
        here = run(**parts)
        assert [record["status"] for record in sent.records] == [
            record["status"] for record in here.records
        ]
        assert items_of(tmp_path / "sent") == items_of(tmp_path / "runs")
        for name, count in (("log.txt", 4), ("output.txt", 4)):
            assert len(list((tmp_path / "sent").rglob(name))) == count
        # What came from elsewhere is reused here.
        again = runner.run(
            write_manifest(measurements="[{noop: {lengths: [128, 256]}}]"),
            profile="p",
            runs=tmp_path / "sent",
            executor="inline",
            device="cpu",
        )
        assert again.counts == {"cached": 4}

    # SIGKILL ends a driver in test_chaos.py, too.
    @pytest.mark.parametrize(
        "number",
        [
            signal.SIGINT,
            pytest.param(signal.SIGTERM, marks=pytest.mark.chaos),
            pytest.param(signal.SIGKILL, marks=pytest.mark.chaos),
        ],
    )
    def test_a_stopped_driver_resumes(self, plugins, write_manifest, tmp_path, run, number):
        pytest.importorskip("ray")
        parts = {
            "subjects": "[toy:a, toy:b]",
            "methods": "[dense]",
            "measurements": "[{noop: {lengths: [128, 256], items: 12, pause: 0.2}}]",
        }
        path = write_manifest(**parts)
        stopped = tmp_path / "stopped"
        process = subprocess.Popen(
            command(path, stopped, "--executor", "ray"),
            env=plugins.environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for(lambda: len(list(stopped.rglob("record.json"))) >= 1)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        if number != signal.SIGKILL:
            assert process.returncode == 130
            assert "Go on with: repro run" in errors and "Traceback" not in errors
        resumed = runner.run(path, profile="p", runs=stopped, executor="inline", device="cpu")
        assert resumed.counts["cached"] >= 1
        assert comparable(resumed) == comparable(run(**parts))
        assert items_of(stopped) == items_of(tmp_path / "runs")
