"""The records of a report: merged, stale ones dropped, committed ones whole."""

import json

import pytest

from repro import report
from repro.claims import Paper, for_method
from repro.errors import BadInput
from repro.evidence import Evidence
from repro.report import page, records
from repro.report.testing import CONFIG, CPU, GPU, campaign, commit, scored, store, timed


def test_a_cpu_report_keeps_the_rows_of_a_gpu(tmp_path):
    commit(tmp_path, campaign(items=10, environment=GPU))
    store(tmp_path / "runs", campaign(items=10, seed=1))
    report.write(["xattention"], runs=tmp_path / "runs", results=tmp_path)
    names = {p.name for p in (tmp_path / "xattention" / "records").iterdir()}
    assert names == {"cpu-test-2t.jsonl", "nvidia-h100.jsonl"}
    text = (tmp_path / "xattention" / "embedded.md").read_text()
    assert "## CPU: Test CPU" in text and "## CUDA: NVIDIA H100" in text


def test_cells_that_no_machine_ran_stand_last():
    planned = {**timed(8192, 1.0, status="not_run"), "environment": None}
    made = page.build(Paper("x", "X"), "embedded", [planned, timed(4096, 1.0)], images=False)
    assert [machine.name for machine in made.machines] == ["cpu-test-2t", ""]
    assert "not_run" in made.markdown()


def test_the_newest_record_of_a_cell_wins_wherever_it_lies():
    old = timed(4096, 1.0, created="2026-01-01")
    new = timed(4096, 2.0, created="2026-01-02")
    for order in ([old, new], [new, old]):
        (kept,) = records.merge(order)
        assert kept["metrics"]["ratio"]["value"] == 2.0


def test_a_retrained_subject_voids_all_older_rows_on_that_machine():
    old = [timed(length, 1.0, created="2026-01-01") for length in (4096, 8192)]
    new = timed(4096, 2.0, created="2026-01-02")
    new["cell"]["subject_revision"] = "r2"
    elsewhere = timed(8192, 1.0, created="2026-01-01", environment=GPU)
    assert records.merge([*old, new, elsewhere]) == [new, elsewhere]


def test_a_new_field_of_the_configuration_voids_rows_without_it():
    old = timed(8192, 1.0, created="2026-01-01")
    new = timed(
        4096, 2.0, config={**CONFIG, "control": "none", "draw": 0, "more": 1}, created="2026-01-02"
    )
    assert records.merge([old, new]) == [new]


def test_a_planned_cell_disappears_when_a_machine_has_run_it():
    ran = timed(4096, 1.0)
    planned = {**timed(4096, 1.0, status="not_run"), "environment": None}
    other = {**timed(8192, 1.0, status="not_run"), "environment": None}
    assert records.merge([planned, ran, other]) == [ran, other]


def test_cells_that_the_manifest_no_longer_has_go_when_a_machine_runs_again(tmp_path):
    before = campaign(items=10) + campaign(items=10, environment=GPU)
    commit(tmp_path, before)
    now = campaign(items=20)  # other cells: the number of items is one of their options
    store(tmp_path / "runs", now)
    found = records.gather("xattention", runs=tmp_path / "runs", results=tmp_path)
    here = [r for r in found if r["environment"]["environment_id"] == CPU["environment_id"]]
    assert {r["key"] for r in here} == {r["key"] for r in now}
    assert len(found) - len(here) == len(campaign(items=10))
    # A run of some cells keeps the others, as long as they are planned.
    part = [{**r, "status": "not_run", "environment": None} for r in before[1:] if r in before[:8]]
    commit(tmp_path / "part", before)
    store(tmp_path / "some", [campaign(items=10)[0], *part])
    kept = records.gather("xattention", runs=tmp_path / "some", results=tmp_path / "part")
    assert {r["key"] for r in before[:8]} <= {r["key"] for r in kept}


def test_draws_of_a_control_with_fewer_items_are_left_out():
    cells = campaign(items=20, draws=3)
    for one in cells:
        if one["cell"]["method"]["config"].get("draw") == 2:
            for name, column in one["items"].items():
                one["items"][name] = column[:5]
    made = page.build(for_method("xattention"), "embedded", cells, images=False)
    assert "minus random" in made.markdown()
    method = next(r for r in cells if r["cell"]["method"]["config"].get("control") == "none")
    assert Evidence(cells).control_scores([method], "random").shape == (2, 20)


def test_committed_records_come_back_whole(tmp_path):
    found = records.merge(campaign(items=15))
    commit(tmp_path, found)
    assert list(records.read_committed(tmp_path / "xattention" / "records")) == found
    size = sum(p.stat().st_size for p in tmp_path.rglob("*.jsonl"))
    assert size < 0.7 * len(json.dumps(found))


@pytest.mark.parametrize("line", ["{torn", "[]", '{"cell": {}}', '{"key": 1}'])
def test_a_broken_committed_line_is_named(tmp_path, line):
    commit(tmp_path, [timed(4096, 1.0)])
    path = tmp_path / "xattention" / "records" / "cpu-test-2t.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(BadInput, match=rf"{path.name}:3: the line must be a record"):
        report.write(["xattention"], runs=tmp_path / "none", results=tmp_path)


def test_a_cell_that_ended_early_does_not_displace_the_whole_one():
    whole = scored("vt", 4096, [1.0, 0.0])
    part = {"asked": 1, "of": 2, "keys": whole["items"]["keys"], "scores": [1.0, None]}
    kept = {name: value for name, value in whole.items() if name != "items"}
    cut = {**kept, "settled": part | {"verdicts": {}}, "created": "2026-12-01T00:00:00+00:00"}
    for found in ([whole, cut], [cut, whole]):
        assert records.merge(found) == [whole]
    # Of other sources it is another cell in the same place, and the newer one counts.
    assert records.merge([whole, {**cut, "key": "other"}]) == [{**cut, "key": "other"}]
