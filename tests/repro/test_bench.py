"""The bench runner on a kernel made up here: tables, checks, records; no assertion on times."""

import io
import json
import textwrap

import pytest
from rich.console import Console

from repro import bench, kernels
from repro.bench import _table
from repro.errors import BadInput, MachineFault

FAKE = '''
"""A made-up kernel: doubles a tensor in three ways, one of them wrong, one broken."""
import torch
from repro.bench.suite import Case, Suite

def inputs(case, device, seed):
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(case.params["n"], generator=generator, device=device)

def broken(x):
    raise RuntimeError("no such instruction")

SUITE = Suite(
    kernel="fake",
    cases=lambda device, quick: [Case(name=f"n={n}", params={"n": n, "dtype": "float32"})
                                 for n in ([64] if quick else [64, 128])],
    make_inputs=inputs,
    implementations=lambda case, device: {
        "fast": lambda x: x * 2, "wrong": lambda x: x * 3, "broken": broken,
        "dense": lambda x: x + x, "free": lambda x: x * 5},
    baseline="dense",
    flops=lambda case, name: float(case.params["n"]),
    bytes_moved=lambda case, name: 8.0 * case.params["n"],
    ideal_speedup=lambda case, name: 4.0,
    reference=lambda case, x: 2 * x,
    compare=lambda case, name: None if name == "free" else 1e-6,
    bar=lambda case, name, fraction, speedups: f"bar of {name} over {sorted(speedups)}",
)
'''


@pytest.fixture
def fake_kernel(tmp_path, monkeypatch):
    folder = tmp_path / "kernels_here" / "fake"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "bench.py").write_text(textwrap.dedent(FAKE))
    monkeypatch.setattr(kernels, "__path__", [str(folder.parent)])
    monkeypatch.delitem(__import__("sys").modules, "repro.kernels.fake", raising=False)
    monkeypatch.delitem(__import__("sys").modules, "repro.kernels.fake.bench", raising=False)
    return "fake"


@pytest.fixture
def quick_settings(monkeypatch):
    from repro.bench import _run
    from repro.timing import Settings

    monkeypatch.setattr(_run, "settings", lambda quick, n_arms: Settings(min_seconds=0.02))


@pytest.fixture
def results(fake_kernel, quick_settings):
    return bench.run(["fake"], device="cpu", quick=True)


def by_name(results):
    return {row["implementation"]: row for row in results["rows"]}


def test_every_implementation_gets_a_row(results):
    rows = by_name(results)
    assert set(rows) == {"dense", "fast", "wrong", "broken", "free"}
    assert rows["broken"]["status"] == "crashed"
    assert "no such instruction" in rows["broken"]["message"]
    assert rows["wrong"]["status"] == "invalid"
    assert "output check failed: off by" in rows["wrong"]["message"]
    assert rows["free"]["median_ms"] > 0


def test_numbers_follow_from_time_and_costs(results):
    row = by_name(results)["fast"]
    assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
    assert row["fraction_of_ideal"] == pytest.approx(row["speedup"] / 4)
    assert row["gbytes_per_s"] == pytest.approx(8 * 64 / row["median_ms"] / 1e6)
    assert row["bar"] == "bar of fast over ['dense', 'free']"
    assert row["blocks"] >= 10 and len(row["raw_ms"]) >= 10
    assert "speedup" not in by_name(results)["dense"]


def test_a_missing_gpu_is_said_in_a_row(fake_kernel, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    screen = io.StringIO()
    results = bench.run(["fake"], device="cuda", console=Console(file=screen, width=200))
    assert [row["status"] for row in results["rows"]] == ["not_run", "not_run"]
    assert "not run: needs a CUDA device" in screen.getvalue()
    assert "\x1b" not in screen.getvalue()


def test_table_at_a_terminal(results):
    screen = io.StringIO()
    console = Console(file=screen, width=200, force_terminal=True)
    # On a busy machine the timing may be stamped as drifting; the table is what is tested.
    rows = [row | {"status": "ok"} if "speedup" in row else row for row in results["rows"]]
    _table.show("fake on cpu", rows, console)
    assert "fake on cpu" in screen.getvalue() and "geometric mean" in screen.getvalue()


def test_records_merge_and_not_run_rows_erase_nothing(results, tmp_path):
    path = bench.write_records(results, tmp_path)
    lines = path.read_text().splitlines()
    assert len(lines) == 5
    changed = [row | {"median_ms": 1.0} for row in results["rows"][:1]]
    skipped = [row | {"status": "not_run"} for row in results["rows"][1:]]
    bench.write_records(results | {"rows": changed + skipped}, tmp_path)
    rows = {row["implementation"]: row for row in map(json.loads, path.read_text().splitlines())}
    assert len(rows) == 5
    assert rows[changed[0]["implementation"]]["median_ms"] == 1.0
    assert all(row["environment"]["environment_id"] == path.stem for row in rows.values())


def test_nothing_measured_writes_nothing(results, tmp_path):
    empty = results | {"rows": [row | {"status": "not_run"} for row in results["rows"]]}
    assert bench.write_records(empty, tmp_path / "none") is None
    assert not (tmp_path / "none").exists()


def test_a_folder_that_cannot_be_written_is_one_clear_error(results, tmp_path):
    (tmp_path / "records").write_text("a file in the way")
    with pytest.raises(MachineFault, match="cannot write"):
        bench.write_records(results, tmp_path)


def test_a_corrupt_record_is_named_by_line(results, tmp_path):
    path = bench.write_records(results, tmp_path)
    path.write_text(path.read_text() + '{"torn": ')
    with pytest.raises(BadInput, match=r"\.jsonl:6"):
        bench.write_records(results, tmp_path)


def test_unknown_names_and_devices_come_at_once(fake_kernel):
    with pytest.raises(BadInput) as caught:
        bench.run(["fakee", "zzz"], device="tpu")
    assert len(caught.value.faults) == 3
    assert "did you mean fake?" in str(caught.value)


def test_names_hold_kernels_and_own_benches(fake_kernel):
    assert "fake" in bench.names() and "suite" not in bench.names()
    assert not any(name.startswith("_") for name in bench.names())
