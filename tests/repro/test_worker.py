import json

import pytest

from repro import manifest
from repro.errors import MachineFault, MissingResource, UnsupportedCombination
from repro.plan import make_plan
from repro.store import CellLocked, RunStore
from repro.worker import CellTimeout, Worker, classify


@pytest.fixture
def run_cells(plugins, write_manifest, tmp_path):
    """Run the cells of a manifest one after another; return their records by label."""

    def run(**parts):
        made = make_plan(manifest.load(write_manifest(**parts)), "p", device="cpu")
        worker = Worker(RunStore(tmp_path / "runs"))
        return {cell.label: worker.run(cell, lambda done, total: None) for cell in made.cells}

    return run


def test_record_of_a_cell(run_cells, plugins):
    records = run_cells()
    record = records["toy:a | fake | noop ok@128"]
    assert record["status"] == "ok"
    assert record["metrics"]["score"]["unit"] == "%"
    assert record["patch"] == {"density": 0.9, "fallback_share": 0.0}
    assert record["environment"]["device"] == "cpu"
    assert record["seconds"] >= 0
    assert record["created"].endswith("+00:00")
    assert plugins.loads == 1  # both cells share the loaded subject


@pytest.mark.parametrize(
    ("task", "status", "message"),
    [
        ("allocate", "oom", "[enforce fail at alloc_cpu.cpp"),
        ("crash", "crashed", "KeyError: 'a bug'"),
        ("exit", "crashed", "SystemExit: a library gave up"),
        ("surrogate", "crashed", "ValueError: no such file: \\udcff"),
        ("unsupported", "unsupported", "fake: sliding windows are not supported"),
        ("float", "numerical", "overflow"),
        ("nan", "numerical", "metric score is nan"),
        ("invalid", "invalid", "clocks drifted"),
    ],
)
def test_outcomes_are_typed_and_other_cells_go_on(run_cells, task, status, message):
    records = run_cells(measurements=f"[{{noop: {{tasks: [{task}, ok]}}}}]")
    record = records[f"toy:a | dense | noop {task}@128"]
    assert record["status"] == status
    assert record["message"].startswith(message)
    assert records["toy:a | dense | noop ok@128"]["status"] == "ok"
    json.dumps(record, allow_nan=True)


def test_traceback_goes_to_a_file(run_cells, tmp_path):
    records = run_cells(measurements="[{noop: {tasks: [crash]}}]", methods="[dense]")
    [record] = records.values()
    [log] = (tmp_path / "runs").rglob("log.txt")
    assert str(log) in record["message"]
    assert "KeyError: 'a bug'" in log.read_text()
    assert "\n" not in record["message"]


def test_the_model_is_loaded_anew_after_a_crash(run_cells, plugins):
    run_cells(measurements="[{noop: {tasks: [crash, ok]}}]", methods="[dense]")
    assert plugins.loads == 2


def test_too_many_fallbacks_make_a_cell_invalid(run_cells):
    records = run_cells(methods="[{fake: {sweep: {share: [0.25, 0.26]}}}]")
    statuses = [record["status"] for record in records.values()]
    assert statuses == ["ok", "ok", "invalid"]
    message = list(records.values())[2]["message"]
    assert message == "26.0% of the attention calls fell back to dense; fake allows 25.0%"


def test_calibration_is_made_once(run_cells, plugins):
    records = run_cells(
        methods="[{fake: {per_head: true}}]",
        measurements="[{noop: {lengths: [128, 256]}}]",
    )
    assert plugins.calibrations == 1
    explained = [record.get("explanation") for record in records.values()]
    assert explained == [None, {"stride": 16}] * 2


def test_a_calibration_that_takes_a_folder_finds_it_again(run_cells, plugins):
    source = plugins.root / "methods" / "fake" / "__init__.py"
    lines = (
        "import torch",
        "known = workdir.exists()",
        "workdir.mkdir(parents=True, exist_ok=True)",
        "if not known:",
        '    raise RuntimeError("killed")',
        "",
    )
    text = source.read_text().replace("*, progress):", "*, progress, workdir):")
    source.write_text(text.replace("import torch\n", "\n    ".join(lines)))
    for status in ("crashed", "ok"):
        records = run_cells(methods="[{fake: {per_head: true}}]")
        assert [r["status"] for name, r in records.items() if "fake" in name] == [status]


def test_failing_calibration_is_tried_once(run_cells, plugins):
    source = plugins.root / "methods" / "fake" / "__init__.py"
    text = source.read_text().replace(
        '        stream.write("x")\n',
        '        stream.write("x")\n    raise ValueError("no data")\n',
    )
    source.write_text(text)
    records = run_cells(
        methods="[{fake: {per_head: true}}]", measurements="[{noop: {lengths: [128, 256]}}]"
    )
    assert plugins.calibrations == 1
    messages = [record["message"] for record in records.values() if record["status"] == "crashed"]
    assert len(messages) == 2
    assert all("ValueError: no data (in the calibration stage)" in text for text in messages)


def test_changed_weights_are_refused(run_cells, plugins, monkeypatch):
    source = plugins.root / "subjects" / "toy.py"
    text = source.read_text().replace("info=describe(rest)", "info=_altered(rest)")
    text += (
        "\n\ndef _altered(rest):\n"
        "    import dataclasses\n"
        '    return dataclasses.replace(describe(rest), revision="r9")\n'
    )
    source.write_text(text)
    record = next(iter(run_cells().values()))
    assert record["status"] == "not_run"
    assert record["message"].startswith("toy:a: revision must be r1, got r9")


def test_full_disk_ends_the_run(run_cells, monkeypatch):
    def fail(path, data):
        raise MachineFault(f"{path}: cannot be written: No space left on device")

    monkeypatch.setattr("repro.store.write_atomically", fail)
    with pytest.raises(MachineFault, match="No space left"):
        run_cells()


class OutOfMemoryError(RuntimeError):
    """Named as torch's own."""


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError(), "oom"),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "oom"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"), "oom"),
        (RuntimeError("shape '[2]' is invalid"), "crashed"),
        (CellTimeout("took longer than 5 s"), "timeout"),
        (UnsupportedCombination("no"), "unsupported"),
        (MissingResource("fetch it"), "not_run"),
        (ValueError(""), "crashed"),
        (CellLocked("runs/x: another process is still writing this cell"), "infra"),
    ],
)
def test_classify(error, status):
    assert classify(error)[0] == status
    assert classify(error)[1]


def test_a_crash_keeps_no_memory_alive(run_cells, plugins):
    import gc
    import weakref

    import repro.worker

    seen = []
    real = repro.worker.subjects.load

    def load(*args, **kwargs):
        subject = real(*args, **kwargs)
        seen.append(weakref.ref(subject))
        return subject

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repro.worker.subjects, "load", load)
        run_cells(measurements="[{noop: {tasks: [crash]}}]", methods="[dense]")
        gc.collect()
    assert [reference() for reference in seen] == [None]
