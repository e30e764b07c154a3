"""The report: same records same bytes, nothing blank, nothing lost, nothing half-written."""

import copy
import errno
import io
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from repro import report
from repro.claims import Paper, for_method
from repro.errors import BadInput, MachineFault
from repro.evidence import Evidence
from repro.report import console, files, kernels, page, tables
from repro.report.labels import Labels
from repro.report.testing import CONFIG, CPU, GPU, campaign, commit, record, scored, store, timed


def contents(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A results folder written once from a small campaign on two machines."""
    folder = tmp_path_factory.mktemp("results")
    commit(folder, campaign(items=40) + campaign(items=40, environment=GPU, profile="paper"))
    report.write(["xattention"], runs=folder / "none", results=folder)
    return folder


# Pure function of the records


def test_same_records_same_bytes(written, tmp_path):
    again = tmp_path / "again"
    commit(again, campaign(items=40) + campaign(items=40, environment=GPU, profile="paper"))
    report.write(["xattention"], runs=tmp_path / "none", results=again)
    assert contents(again) == contents(written)


def test_writing_again_changes_nothing(written):
    before = {p: p.stat().st_mtime_ns for p in written.rglob("*") if p.is_file()}
    report.write(runs=written / "none", results=written)
    assert {p: p.stat().st_mtime_ns for p in written.rglob("*") if p.is_file()} == before


def test_the_run_store_and_the_committed_records_give_the_same_page(tmp_path):
    found = campaign(items=20)
    store(tmp_path / "runs", found)
    report.write(["xattention"], runs=tmp_path / "runs", results=tmp_path / "results")
    first = contents(tmp_path / "results")
    report.write(["xattention"], runs=tmp_path / "none", results=tmp_path / "results")
    assert contents(tmp_path / "results") == first


def test_only_times_and_dates_may_differ_between_two_runs(tmp_path):
    one = campaign(items=20)
    two = copy.deepcopy(one)
    for other in two:
        other.update(created="2026-12-01T00:00:00+00:00", seconds=9.0)
    pages = [page.build(Paper("xattention", "X"), "embedded", found) for found in (one, two)]
    texts = [re.sub(r"measured \d{4}-\d\d-\d\d", "", p.markdown()) for p in pages]
    assert texts[0] == texts[1]
    bodies = [json.loads(p.json()) for p in pages]
    for body in bodies:
        for cell in body["cells"]:
            cell.pop("seconds")
    assert bodies[0] == bodies[1]


# What the page says


def rows_of(body, name, machine=0):
    return [
        row
        for section in body["machines"][machine]["sections"]
        for table in section["tables"]
        if table["name"].startswith(name)
        for row in table["rows"]
    ]


@pytest.fixture(scope="module")
def body(written):
    return json.loads((written / "xattention" / "embedded.json").read_bytes())


def test_the_summary_has_dense_method_and_pooled_controls(body):
    rows = rows_of(body, "ruler_summary")
    assert [(r["length"], r["control"]) for r in rows] == [
        (length, control)
        for length in (1024, 4096)
        for control in ("none", "none", "oracle", "random")
    ]
    dense, method, _, control = rows[4:]
    assert dense["density"] == 1.0 and "difference" not in dense
    assert (
        method["difference"]["low"] <= method["difference"]["value"] <= method["difference"]["high"]
    )
    assert control["difference"]["high"] < -20 < method["difference"]["low"]
    assert control["tasks"] == "4 x 40, 3 draws"  # ten draws would be one row, too


def test_scores_and_differences_are_those_of_the_items(body):
    found = campaign(items=40)
    cells = {}
    for one in found:
        name = one["cell"]["measurement"]["name"]
        options = one["cell"]["measurement"]["options"]
        config = one["cell"]["method"]["config"]
        if name == "ruler" and options["length"] == 4096 and not one["cell"].get("repeat"):
            key = config.get("control", "dense")
            cells.setdefault(key, []).append(np.mean(one["items"]["scores"]))
    row = rows_of(body, "ruler_summary")[5]
    assert row["score"]["value"] == pytest.approx(100 * np.mean(cells["none"]))
    expected = 100 * (np.mean(cells["none"]) - np.mean(cells["dense"]))
    assert row["difference"]["value"] == pytest.approx(expected)


def test_tasks_are_tested_by_mcnemar_or_bootstrap_and_corrected(body):
    rows = [r for r in rows_of(body, "ruler_by_task") if r["task"] == "vt"]
    assert rows and all(r["p"] <= r["p_holm"] <= 1 for r in rows)
    for row in rows:
        flips = row["flips"]
        if flips["lost"] + flips["gained"] == 0:
            assert row["p"] == 1.0
        assert row["sees"] >= 100 * 6 / 40
        assert row["random"]["value"] < row["dense"]["value"]


def test_a_control_with_fewer_items_still_pairs_with_dense():
    found = campaign(items=40, lengths=(1024,), draws=2)
    for one in found:
        if one["cell"]["method"]["config"].get("control") == "random":
            one["cell"]["measurement"]["options"]["samples"] = 12
            for name, column in one["items"].items():
                one["items"][name] = column[:12]
    made = page.build(Paper("x", "X"), "embedded", found, images=False)
    control = rows_of(json.loads(made.json()), "ruler_summary")[-1]
    assert control["tasks"] == "4 x 12, 2 draws"
    assert control["difference"]["n"] == 2 * 4 * 12
    assert rows_of(json.loads(made.json()), "ruler_selection")[0]["minus_random"]["n"] == 2 * 4 * 12


def test_the_noise_floor_is_dense_against_its_rerun(body):
    rows = rows_of(body, "ruler_noise_floor")
    assert [r["n"] for r in rows] == [160, 160]
    assert all(r["difference"]["value"] == 0 for r in rows)


def test_failures_are_rows_with_their_cause(body, written):
    (row,) = rows_of(body, "failures")
    assert row["status"] == "oom" and "3 GiB" in row["message"]
    timed_rows = [r for r in rows_of(body, "latency") if r["length"] == 32768]
    assert timed_rows[0]["status"].startswith("oom")
    text = (written / "xattention" / "embedded.md").read_text()
    assert "oom: out of memory: 3 GiB asked \\| of 2" in text


def test_a_failed_task_is_said_beside_the_mean():
    found = [r for r in campaign(items=20, lengths=(1024,))]
    broken = next(r for r in found if r.get("patch"))
    broken.update(status="timeout", items={}, metrics={})
    made = page.build(Paper("xattention", "X"), "embedded", found, images=False)
    rows = rows_of(json.loads(made.json()), "ruler_summary")
    assert rows[1]["tasks"] == "3 of 4 x 20: timeout"
    by_task = rows_of(json.loads(made.json()), "ruler_by_task")
    assert by_task[0]["status"] == "timeout" and "score" not in by_task[0]


def test_both_protocols_and_the_bounds_stand_side_by_side(body):
    rows = [r for r in rows_of(body, "latency") if r["length"] == 16384 and r["selection_share"]]
    assert {"fair", "paper"} <= {r["protocol"] for r in rows}
    assert rows[0]["amdahl_bound"] == pytest.approx(1 / (0.3 + 0.7 * 0.4))


def test_the_form_decides_not_the_name():
    found = campaign(items=20)
    for one in found:
        one["cell"]["measurement"]["name"] = {"ruler": "quiz", "latency": "clock"}.get(
            one["cell"]["measurement"]["name"], "other"
        )
        if one["cell"]["method"]["slug"] != "dense":
            one["cell"]["method"]["slug"] = "anything"
    made = page.build(Paper("anything", "X"), "embedded", found)
    text = made.markdown()
    assert "### quiz on zoo:retriever" in text and "### clock on zoo:retriever" in text
    assert len(made.machines[0].images) == 4


def test_every_markdown_table_is_rectangular(written):
    for path in written.rglob("*.md"):
        width = None
        for line in path.read_text().splitlines():
            if line.startswith("| "):
                cells = len(re.split(r"(?<!\\)\|", line))
                assert width in (None, cells), f"{path}: {line}"
                width = cells
            else:
                width = None


def test_text_of_records_cannot_break_the_page():
    nasty = "a | b\n# heading <script>"
    found = [timed(4096, 1.0, status="crashed", message=nasty), timed(8192, 1.0)]
    text = page.build(Paper("x", "X"), "embedded", found, images=False).markdown()
    assert "<script>" not in text and "\n# heading" not in text


def test_the_index_shows_every_page_and_the_matrix(written):
    text = (written / "README.md").read_text()
    for said in ("xattention/embedded.md", "xattention/paper.md", "nvidia-h100", "1.10x to 3.42x"):
        assert said in text
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (written / link).is_file(), link


def test_links_and_plots_of_a_page_exist_and_are_small(written):
    for name in ("embedded.md", "paper.md"):
        text = (written / "xattention" / name).read_text()
        for link in re.findall(r"\]\(([^)]+)\)", text):
            if not link.startswith("http"):
                target = written / "xattention" / link
                assert 0 < target.stat().st_size < 1_500_000, link
    images = list((written / "xattention" / "plots").iterdir())
    assert len(images) == 8
    for path in images:
        assert path.stat().st_size < 150_000
        assert b"matplotlib" not in path.read_bytes().lower()


def test_a_plot_that_no_page_shows_is_removed(tmp_path):
    commit(tmp_path, campaign(items=10))
    stray = tmp_path / "xattention" / "plots" / "old.png"
    stray.parent.mkdir(parents=True)
    stray.write_bytes(b"x")
    report.write(["xattention"], runs=tmp_path / "none", results=tmp_path)
    assert not stray.exists()


def test_proxies_stand_first_and_every_claim_of_the_paper_is_there(written, body):
    text = (written / "xattention" / "embedded.md").read_text()
    assert (
        text.index("## Proxy claims") < text.index("## CPU") < text.index("## The paper's claims")
    )
    ids = {row["id"] for row in body["verdicts"]}
    assert ids == {claim.id for claim in for_method("xattention").claims}
    for claim in for_method("xattention").claims:
        assert f"{claim.value:g}" in text
    assert all(line.startswith("| proxy: ") for line in _lines(text, "## Proxy claims"))


def _lines(text, heading):
    table = text[text.index(heading) :].split("\n\n")[2]
    return table.splitlines()[2:]


def test_labels_show_only_what_tells_variants_apart():
    found = [timed(4096, 1.0, config={**CONFIG, "stride": s, "control": "none"}) for s in (8, 16)]
    labels = Labels(found)
    assert [labels.name(v) for v in labels.methods()] == [
        "xattention stride=8",
        "xattention stride=16",
    ]
    assert dict(labels.common())["Every row of xattention"]["threshold"] == 0.9
    alone = Labels(found[:1])
    assert [alone.name(v) for v in alone.methods()] == ["xattention"]


def test_labels_leave_out_what_does_not_matter_to_a_variant():
    def variant(**given):
        config = {"bits": None, "cap": 4.0, "trials": 9, "pruned": True, "control": "none"} | given
        made = timed(4096, 1.0, config=config)
        told = " ".join(f"{name}={value}" for name, value in given.items())
        made["cell"]["label"] = f"zoo:a | xattention {told} | latency@4096"
        return made

    searched = {"trials": 5}
    labels = Labels(
        [
            variant(bits=8),
            variant(bits=4),
            variant(cap=4.0, **searched),
            variant(cap=3.0, **searched),
            variant(cap=4.0, pruned=False, **searched),
        ]
    )
    names = [labels.name(v) for v in labels.methods()]
    assert names == [
        "xattention bits=8",
        "xattention bits=4",
        "xattention cap=4",
        "xattention cap=3",
        "xattention cap=4 pruned=False",
    ]
    assert dict(labels.common())[", ".join(names[2:])] == searched
    few = Labels([variant(bits=8), variant(**searched)])
    names = [few.name(v) for v in few.methods()]
    assert names == ["xattention bits=8", "xattention trials=5"]


def test_more_seeds_are_more_cells_of_a_task():
    found = []
    for seed in (0, 1):
        for method, density in (("dense", None), ("xattention", 0.5)):
            one = scored("vt", 1024, [1.0, 0.0, 1.0], method=method, density=density)
            one["cell"]["seed"] = seed
            one["items"]["keys"] = [f"{seed}-{key}" for key in one["items"]["keys"]]
            found.append(one)
    made = page.build(Paper("x", "X"), "embedded", found, images=False)
    row = rows_of(json.loads(made.json()), "ruler_by_task")[0]
    assert row["items"] == 6 and row["flips"]["n"] == 6


# Verify and console


def test_verify_names_the_broken_proxy(tmp_path):
    commit(tmp_path, [timed(16384, 0.5)])
    rows = report.verify(["xattention"], runs=tmp_path / "none", results=tmp_path)
    broken = [row for row in rows if row["broken"]]
    assert [row["details"]["id"] for row in broken] == ["proxy_faster_attention@fair"]
    assert broken[0]["proxy"] and broken[0]["verdict"] == "not reproduced"
    assert {"method", "claim", "paper", "measured", "verdict", "reason"} <= set(rows[0])


def test_verify_without_records_says_not_run(tmp_path):
    rows = report.verify(["xattention"], runs=tmp_path / "none", results=tmp_path)
    assert {row["verdict"] for row in rows} == {"not run"}
    assert all(row["reason"].startswith("needs ") for row in rows)


def test_an_unknown_slug_lists_near_matches(tmp_path):
    for call in (report.write, report.verify):
        with pytest.raises(BadInput, match="did you mean xattention"):
            call(["xatention"], runs=tmp_path / "none", results=tmp_path)


def test_the_console_is_plain_without_a_terminal(written):
    stream = io.StringIO()
    report.console_table(
        "xattention", "embedded", runs=written / "none", results=written, stream=stream
    )
    text = stream.getvalue()
    assert "\x1b" not in text and "Mean over tasks" in text and "not run" in text
    assert max(map(len, text.splitlines())) < 220


def test_the_console_uses_rich_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    made = page.build(for_method("xattention"), "embedded", campaign(items=10), images=False)
    console.show(made, stream=stream)
    assert "Proxy claims" in stream.getvalue() and "┃" in stream.getvalue()


def test_an_empty_profile_prints_nothing(tmp_path):
    stream = io.StringIO()
    report.console_table("xattention", "embedded", runs=tmp_path, results=tmp_path, stream=stream)
    assert stream.getvalue() == ""


def test_committed_results_follow_from_the_committed_records(tmp_path):
    results = Path(__file__).parents[2] / "results"
    shutil.copytree(results, tmp_path / "results")
    pages = [path for path in (tmp_path / "results").rglob("*") if path.suffix in (".md", ".json")]
    before = {path: path.read_bytes() for path in pages}
    report.write(None, runs=tmp_path / "none", results=tmp_path / "results")
    changed = [path.name for path in pages if path.read_bytes() != before[path]]
    assert not changed, f"call `repro report` and commit: {changed}"


# Disk


@pytest.mark.parametrize("place", ["mkstemp", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_disk_leaves_the_old_results(tmp_path, monkeypatch, place, code):
    commit(tmp_path, campaign(items=10))
    report.write(["xattention"], runs=tmp_path / "none", results=tmp_path)
    commit(tmp_path, campaign(items=12))
    before = contents(tmp_path)

    def full(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.tempfile if place == "mkstemp" else files.os, place, full)
    text = rf"{os.strerror(code)}.*repro report"
    with pytest.raises(MachineFault, match=text) as caught:
        report.write(["xattention"], runs=tmp_path / "none", results=tmp_path)
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == before


def test_results_in_the_place_of_a_file_is_one_clear_line(tmp_path):
    store(tmp_path / "runs", [timed(4096, 1.0)])
    (tmp_path / "results").write_text("not a folder")
    with pytest.raises(MachineFault, match="cannot be written"):
        report.write(["xattention"], runs=tmp_path / "runs", results=tmp_path / "results")


def test_a_folder_is_tried_before_it_is_needed(tmp_path, monkeypatch):
    files.check_writable(tmp_path / "not" / "yet")
    assert list(tmp_path.iterdir()) == []

    def refuse(**kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
    with pytest.raises(MachineFault, match=r"Read-only file system; .*--no-report"):
        files.check_writable(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.undo()
    with pytest.raises(MachineFault, match="Not a directory"):
        files.check_writable(tmp_path / "file")


# Kernels


def bench_row(case, implementation, **changes):
    row = {
        "kernel": "scale",
        "case": case,
        "implementation": implementation,
        "baseline": "dense",
        "status": "ok",
        "message": "",
        "median_ms": 2.0,
        "environment_id": "cpu-test-2t",
        "environment": CPU,
        "created": "2026-11-21",
        "raw_ms": [1.0] * 50,
    }
    if implementation != "dense":
        row.update(speedup=2.0, speedup_low=1.9, speedup_high=2.1, ideal=4.0, fraction_of_ideal=0.5)
    return {**row, **changes}


def test_kernel_pages(tmp_path):
    folder = tmp_path / "kernels"
    (folder / "records").mkdir(parents=True)
    rows = [bench_row(c, i) for c in ("T=16384", "T=8192") for i in ("sparse", "dense")]
    rows.append(
        bench_row("T=8192", "flex", status="unsupported", message="no compiler", speedup=None)
    )
    rows.append(
        bench_row(
            "T=8192", "sparse", environment={**GPU}, environment_id="nvidia-h100", speedup=8.0
        )
    )
    (folder / "records" / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (made,) = kernels.pages(folder).values()
    text = made.decode()
    assert "## CPU: Test CPU" in text and "## CUDA: NVIDIA H100" in text
    assert (
        text.index("T=8192 | dense") < text.index("T=8192 | sparse") < text.index("T=16384 | dense")
    )
    assert "2.00x [1.90, 2.10] | 4.00x | 50.0 %" in text
    assert "unsupported; no compiler" in text


def test_a_broken_bench_row_is_named(tmp_path):
    (tmp_path / "records").mkdir(parents=True)
    (tmp_path / "records" / "x.jsonl").write_text('{"kernel": "a"}\n')
    with pytest.raises(BadInput, match=r"x.jsonl:1: the line must be a row of a bench"):
        kernels.pages(tmp_path)


# Formatters


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.01234, "0.0123"),
        (4.561, "4.56"),
        (78.9, "78.9"),
        (12345.6, "12346"),
        (-0.5, "-0.500"),
    ],
)
def test_number(value, text):
    assert tables.number(value) == text


def test_signed_zero_has_no_sign():
    assert tables.signed(-0.04) == "0.0" and tables.signed(0.04) == "0.0"
    assert tables.signed(-0.05) in ("-0.1", "0.0") and tables.signed(1.25) in ("+1.2", "+1.3")


def test_with_unit():
    assert tables.with_unit({"value": 3 * 2**20, "unit": "bytes"}) == "3.0 MiB"
    assert (
        tables.with_unit({"value": 2.0, "low": 1.5, "high": 2.5, "unit": "x"})
        == "2.00x [1.50, 2.50]"
    )
    assert tables.with_unit({"value": 12.34, "low": None, "high": None, "unit": "ms"}) == "12.3 ms"


def test_evidence_knows_a_control_by_its_configuration():
    found = Evidence(campaign(items=5))
    method = next(r for r in found.methods if r["items"]) if found.methods else None
    assert method is not None
    assert len(found.controls_of(method, "random")) == 3
    assert len(found.controls_of(method, "oracle")) == 1
    assert len(found.reruns()) == 8
    assert Path(report.__file__).exists()


def test_a_scalar_measurement_is_a_plain_table(body):
    rows = rows_of(body, "perplexity")
    assert [r["method"] for r in rows] == ["xattention", "dense"]
    assert rows[0]["perplexity"]["value"] == 12.34
    bare = page.build(
        Paper("x", "X"),
        "embedded",
        [record("speedometer", {"gear": g}, metrics={"v": {"value": 1.0}}) for g in (1, 2)],
    )
    assert "| xattention | 1 |" in bare.markdown()
