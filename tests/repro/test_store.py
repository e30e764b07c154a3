import errno
import json
import os
import subprocess
import sys
import time

import pytest

from repro.errors import MachineFault, ReproError
from repro.store import (
    CellFolder,
    ItemFile,
    RunStore,
    environment_key,
    make_record,
    write_atomically,
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cell" / "items.jsonl"


def fill(path, number=5):
    with ItemFile(path) as items:
        items.put((f"k{i}", {"text": f"é{i}", "score": i / 3}) for i in range(number))


def test_items_are_read_back_exactly(path):
    fill(path)
    with ItemFile(path) as items:
        assert len(items) == 5
        assert items.get("k2") == {"text": "é2", "score": 2 / 3}
        assert items.get("k9") is None


def test_a_batch_is_on_disk_when_put_returns(path):
    with ItemFile(path) as items:
        items.put([("a", {"x": 1}), ("b", {"x": 2})])
        assert [json.loads(line)["key"] for line in path.read_bytes().splitlines()] == ["a", "b"]
        assert items.get("a") == {"x": 1}


def test_what_put_returns_is_what_a_resumed_run_reads(path):
    with ItemFile(path) as items:
        items.put([("a", {"pair": (1, 2), 3: "x"})])
        kept = items.get("a")
    with ItemFile(path) as items:
        assert items.get("a") == kept == {"pair": [1, 2], "3": "x"}


def test_every_torn_tail_is_repaired(path):
    fill(path, 2)
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first + 1, len(whole)):
        path.write_bytes(whole[:cut])
        path.with_name("items.jsonl.corrupt").unlink(missing_ok=True)
        warnings = []
        with ItemFile(path, warn=warnings.append) as items:
            assert items.get("k0") is not None
            assert items.get("k1") is None
            items.put([("k1", {"again": True})])
        assert len(warnings) == 1
        aside = path.with_name("items.jsonl.corrupt").read_bytes()
        assert aside.rstrip(b"\n") == whole[first:cut].rstrip(b"\n")
        with ItemFile(path) as items:
            assert len(items) == 2


def test_an_altered_line_is_redone_and_the_others_are_kept(path):
    fill(path)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b"0.3", b"0.4")  # still JSON, and wrong
    lines[3] = b"\x00\xff garbage\n"
    path.write_bytes(b"".join(lines))
    warnings = []
    with ItemFile(path, warn=warnings.append) as items:
        assert [items.get(f"k{i}") is not None for i in range(5)] == [True, False] * 2 + [True]
        items.put([("k1", {"score": 1}), ("k3", {"score": 3})])
    assert "2 unreadable lines set aside in items.jsonl.corrupt" in warnings[0]
    assert "/items.jsonl:2: " in warnings[0]
    assert path.with_name("items.jsonl.corrupt").read_bytes() == lines[1] + lines[3]
    with ItemFile(path) as items:
        assert len(items) == 5


def test_the_last_line_of_a_key_counts(path):
    with ItemFile(path) as items:
        items.put([("a", {"x": 1})])
        items.put([("a", {"x": 2})])
    with ItemFile(path) as items:
        assert items.get("a") == {"x": 2}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_failing_write_is_one_clear_error_and_loses_nothing(path, monkeypatch, code):
    fill(path)
    before = path.read_bytes()
    items = ItemFile(path)

    class Failing:
        """A stream whose flush fails after half of the batch reached the disk."""

        def __init__(self, stream):
            self._stream = stream
            self._held = b""

        def write(self, data):
            self._held = data

        def flush(self):
            os.write(self._stream.fileno(), self._held[: len(self._held) // 2])
            raise OSError(code, os.strerror(code))

        def __getattr__(self, name):
            return getattr(self._stream, name)

    items._stream = Failing(items._stream)
    with pytest.raises(MachineFault, match=os.strerror(code)) as caught:
        items.put([("new", {"x": 1}), ("newer", {"x": 2})])
    assert str(path) in str(caught.value)
    assert "--runs" in str(caught.value)
    assert items.get("new") is None
    assert path.read_bytes() == before
    items.put([("new", {"x": 1})])  # there is space again
    items.close()
    with ItemFile(path) as again:
        assert len(again) == 6


def test_failing_sync_is_a_clear_error(path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    with ItemFile(path) as items:
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(MachineFault, match="Input/output error"):
            items.put([("a", {"x": 1})])
        monkeypatch.undo()


def test_every_batch_is_synced_within_a_second(path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(time.monotonic()) or real(fd))
    monkeypatch.setattr("repro.store.FSYNC_SECONDS", 0.05)
    with ItemFile(path) as items:
        items.put([("a", {})])
        assert len(synced) == 1
        items.put([("b", {})])  # too soon for another sync: the timer does it
        deadline = time.monotonic() + 10
        while len(synced) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(synced) == 2


def test_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineFault, match="cannot be written"):
        ItemFile(tmp_path / "file" / "items.jsonl")
    with (
        pytest.raises(MachineFault, match="cannot be written"),
        RunStore(tmp_path / "file" / "runs").lock(),
    ):
        pass


def test_two_writers_of_one_cell(path):
    with ItemFile(path), pytest.raises(ReproError, match="another process is still writing"):
        ItemFile(path, wait_seconds=0.1)


def test_atomic_write_keeps_the_old_file_on_failure(tmp_path, monkeypatch):
    target = tmp_path / "file"
    write_atomically(target, b"old")

    def fail(source, destination):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(MachineFault, match="No space left"):
        write_atomically(target, b"new")
    assert target.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def record(key="aa", status="ok", **body):
    return make_record(key, {"label": "x"}, status, **body)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-20],
        lambda data: b"",
        lambda data: b"[]",
        lambda data: data.replace(b"0.5", b"0.6"),
        lambda data: b"\xff" + data,
    ],
)
def test_a_corrupt_record_is_set_aside(tmp_path, damage):
    folder = CellFolder(tmp_path)
    folder.write_record(record(metrics={"score": {"value": 0.5}}))
    assert folder.read_record()["metrics"]["score"]["value"] == 0.5
    bad = damage(folder.record_path.read_bytes())
    folder.record_path.write_bytes(bad)
    warnings = []
    assert folder.read_record(warn=warnings.append) is None
    assert "set aside as record.json.corrupt" in warnings[0]
    assert (tmp_path / "record.json.corrupt").read_bytes() == bad
    assert folder.read_record() is None


def test_which_outcomes_are_final(tmp_path):
    store = RunStore(tmp_path)
    final = {}
    for status in ("ok", "oom", "unsupported", "invalid", "crashed", "infra", "not_run"):
        store.cell("ab", status).write_record(record("ab", status))
        final[status] = store.finished("ab", status) is not None
    assert [status for status, value in final.items() if value] == [
        "ok",
        "oom",
        "unsupported",
        "invalid",
    ]


def test_forget_keeps_the_old_files(tmp_path):
    folder = CellFolder(tmp_path)
    folder.write_record(record())
    with folder.items() as items:
        items.put([("a", {})])
    folder.forget()
    assert folder.read_record() is None
    with folder.items() as items:
        assert len(items) == 0
    assert (tmp_path / "record.json.previous").exists()
    assert (tmp_path / "items.jsonl.previous").exists()


def plan_json(keys, profile="p"):
    cells = [{"key": key, "cell": {"label": key, "profile": profile}} for key in keys]
    return {"name": "toy", "profile": profile, "device": "cpu", "cells": cells}


def test_records_of_a_run_in_order_with_what_is_missing(tmp_path):
    store = RunStore(tmp_path)
    store.write_index(plan_json(["cc", "aa", "bb"]), {"path": "x"})
    store.cell("aa", "cpu-1").write_record(record("aa"))
    store.cell("cc", "cpu-1").write_record(record("cc"))
    store.cell("cc", "gpu-2").write_record(record("cc", "oom"))
    found = [(entry["key"], entry["status"]) for entry in store.records("toy", "p")]
    assert found == [("cc", "ok"), ("cc", "oom"), ("aa", "ok"), ("bb", "not_run")]
    assert all(entry["cell"]["profile"] == "p" for entry in store.records("toy", "p"))
    assert store.done(["cc", "aa", "bb"]) == {"cc", "aa"}
    store.cell("bb", "cpu-1").write_record(record("bb", "crashed"))
    assert "bb" not in store.done(["bb"])
    assert store.runs() == [("toy", "p")]
    assert store.records("toy", "q") == []


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        (("infra", "ok"), ["ok"]),  # the driver of a cluster that could start no worker at first
        (("crashed", "ok"), ["crashed", "ok"]),
        (("not_run", "infra"), ["infra"]),
        (("not_run", "not_run"), ["not_run"]),
    ],
)
def test_what_a_machine_could_not_try_is_no_outcome_beside_one(tmp_path, statuses, expected):
    store = RunStore(tmp_path)
    plan = {"name": "n", "profile": "p", "device": "cpu", "cells": [{"key": "ab", "cell": {}}]}
    store.write_index(plan, {})
    for machine, status in zip("ab", statuses, strict=True):
        store.cell("ab", machine).write_record(make_record("ab", {}, status))
    assert [record["status"] for record in store.records("n", "p")] == expected


def test_unreadable_index_is_told(tmp_path):
    warnings = []
    store = RunStore(tmp_path, warn=warnings.append)
    store.write_index(plan_json(["aa"]), {})
    (tmp_path / "toy" / "p" / "cpu.json").write_text("{")
    assert store.records("toy", "p") == []
    assert "run the manifest again" in warnings[0]


def test_one_driver_at_a_time(tmp_path):
    store = RunStore(tmp_path)
    held = f"process {os.getpid()} on .* is running"
    with store.lock(), pytest.raises(ReproError, match=held), RunStore(tmp_path).lock():
        pass
    with store.lock():
        pass


def test_the_lock_of_a_killed_driver_is_free(tmp_path):
    code = (
        "import os, sys; from repro.store import RunStore\n"
        f"with RunStore({str(tmp_path)!r}).lock():\n"
        "    os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -9
    with RunStore(tmp_path).lock():
        pass


def test_environment_key_tells_machines_and_libraries_apart():
    base = {"environment_id": "cpu-x-2t", "device_name": "x", "threads": 2, "versions": {}}
    keys = {
        environment_key(base),
        environment_key({**base, "threads": 4}),
        environment_key({**base, "versions": {"torch": "9"}}),
    }
    assert len(keys) == 3
    assert all(key.startswith("cpu-x-2t-") for key in keys)
    assert environment_key({**base, "git_commit": "abc"}) == environment_key(base)
