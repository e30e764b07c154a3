import json
import os
import signal
import subprocess
import sys

import pytest

from repro import cli


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Run the command line in this process; return (exit code, standard output, errors)."""
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["repro", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, captured.err

    yield run
    signal.signal(signal.SIGTERM, handler)


RUN = ("--profile", "p", "--executor", "inline", "--device", "cpu", "--no-report")


def test_methods(call, plugins):
    code, out, _ = call("methods", "--json")
    rows = {row["slug"]: row for row in json.loads(out)}
    assert code == 0
    assert {"slug", "title", "arxiv", "kind", "claims"} <= set(rows["fake"])
    assert rows["fake"]["claims"] == 1
    assert "fake" in call("methods")[1]


def test_one_method(call, plugins):
    code, out, _ = call("methods", "fake", "--json")
    detail = json.loads(out)
    assert code == 0
    assert {"name": "stride", "type": "int", "default": 16} in detail["options"]
    (claim,) = detail["claim_list"]
    assert (claim["id"], claim["value"], claim["needs"]) == ("one", 1, "n")
    code, out, _ = call("methods", "fake")
    assert (code, "stride" in out) == (0, True)


def test_unknown_method(call, plugins):
    code, out, err = call("methods", "fakee")
    assert (code, out) == (2, "")
    assert err.startswith("error: methods: a method must be a known slug, got fakee; did you mean")


def test_plan(call, plugins, write_manifest):
    path = write_manifest(subjects="[toy:a, toy:absent]", resources="{gpus: 1}")
    code, out, _ = call("plan", path, "--profile", "p", "--device", "cpu", "--json")
    listing = json.loads(out)
    assert code == 0
    assert len(listing["cells"]) == 4
    assert listing["done"] == 0
    assert set(listing["missing"]) == {"toy:absent", "gpu"}
    code, out, _ = call("plan", path, "--profile", "p", "--device", "cpu")
    assert code == 0
    assert "toy:a | fake | noop ok@128" in out
    assert "missing toy:absent: toy:absent: weights are not here; fetch them" in out


def test_bad_manifest_has_exit_code_2_and_no_traceback(call, plugins, write_manifest):
    path = write_manifest(subjects="[toy:z]", methods="[{fake: {threshold: 2}}]")
    for command in ("plan", "run"):
        code, out, err = call(command, path, "--profile", "p")
        assert (code, out) == (2, "")
        assert err.splitlines()[0].startswith(f"error: {path}:3: ")
        assert f"{path}:4: profiles.p.methods[0].threshold must be in [0, 1], got 2" in err
        assert "Traceback" not in err


def test_run_twice(call, plugins, write_manifest):
    path = write_manifest()
    code, out, err = call("run", path, *RUN)
    assert (code, out) == (0, "cells: 0 reused, 2 ok\n")
    assert "[1/2] toy:a | dense | noop ok@128: score" in err
    code, out, err = call("run", path, *RUN)
    assert (code, out, err) == (0, "cells: 2 reused\n", "reused 2 of 2 cells\n")


def test_results_that_cannot_be_written_are_told_before_the_run(
    call, plugins, write_manifest, tmp_path
):
    place = tmp_path / "results"
    place.write_text("")
    words = [word for word in RUN if word != "--no-report"]
    code, out, err = call("run", write_manifest(), *words, "--results", str(place))
    assert (code, out) == (1, "") and len(err.splitlines()) == 1
    assert f"error: {place}: cannot be written: Not a directory" in err


def test_run_as_json_prints_nothing_else(call, plugins, write_manifest):
    code, out, err = call("run", write_manifest(), *RUN, "--json")
    summary = json.loads(out)
    assert (code, err) == (0, "")
    assert [record["status"] for record in summary["records"]] == ["ok", "ok"]
    assert summary["counts"] == {"ok": 2}


def test_quiet_run(call, plugins, write_manifest):
    assert call("run", write_manifest(), *RUN, "--quiet") == (0, "", "")


def test_crashed_cell_has_exit_code_1_and_one_line(call, plugins, write_manifest):
    path = write_manifest(measurements="[{noop: {tasks: [crash, ok]}}]", methods="[dense]")
    code, _, err = call("run", path, *RUN)
    assert code == 1
    [line] = [line for line in err.splitlines() if "crash@128" in line]
    assert "crashed: KeyError: 'a bug' (traceback: " in line
    assert "Traceback" not in err


def test_missing_weights(call, plugins, write_manifest):
    code, _, err = call("run", write_manifest(subjects="[toy:absent]"), *RUN)
    assert code == 2
    assert "fetch them with `fetch absent`" in err
    assert "Traceback" not in err


def test_changed_weights_are_one_clear_error(call, plugins, write_manifest):
    source = plugins.root / "subjects" / "toy.py"
    text = source.read_text().replace(
        "    import torch\n",
        '    raise MissingResource("toy:a: weights differ from their checksum")\n',
    )
    source.write_text(text)
    code, _, err = call("run", write_manifest(), *RUN)
    assert code == 2
    assert err.count("error:") == 1
    assert "toy:a: weights differ from their checksum" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("option", ["--runs"])
def test_folder_that_cannot_be_written(call, plugins, write_manifest, tmp_path, option):
    (tmp_path / "file").write_text("")
    code, _, err = call("run", write_manifest(), *RUN, option, tmp_path / "file" / "runs")
    assert code == 1
    assert err.startswith(f"error: {tmp_path}/file/runs: cannot be written: Not a directory; ")
    assert err.count("\n") == 1


def test_second_driver_is_told_of_the_first(call, plugins, write_manifest, tmp_path):
    from repro.store import RunStore

    with RunStore(tmp_path / "runs").lock():
        code, _, err = call("run", write_manifest(), *RUN)
    assert code == 1
    assert "is running in this folder" in err


def test_ctrl_c_says_how_to_go_on(call, plugins, write_manifest):
    path = write_manifest(measurements="[{noop: {tasks: [ok, interrupt]}}]")
    code, _, err = call("run", path, *RUN, "--fresh")
    assert code == 130
    expected = f"Go on with: repro run {path} --profile p --executor inline --device cpu"
    assert expected in err
    assert "--fresh" not in err  # going on must not begin anew


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--executor", "rya"), "--executor: the executor must be a known name, got rya"),
        (("--budget", "soon"), "--budget: the budget must be a duration above 0"),
        (("--only", "nothing"), "--only: the pattern must be found in a cell's label, got nothing"),
        (("--profile", "q"), "--profile must be a known name, got q; known: p"),
        (("--device", "tpu"), "--device: the device must be auto, cpu or cuda, got tpu"),
    ],
)
def test_bad_options(call, plugins, write_manifest, arguments, expected):
    code, _, err = call("run", write_manifest(), *RUN, *arguments)
    assert code == 2
    assert expected in err


def test_doctor(call):
    code, out, _ = call("doctor", "--json")
    findings = {finding["name"]: finding for finding in json.loads(out)}
    assert code == 0
    assert {"torch", "gpu", "triton", "c++ compiler", "ray", "disk", "memory"} <= set(findings)
    for finding in findings.values():
        assert finding["status"] in ("ok", "missing", "weak")
        assert (finding["status"] == "ok") != bool(finding["remedy"])


def test_zoo_verify_unknown_name(call):
    code, _, err = call("zoo", "verify", "nobody")
    assert code == 2
    assert "must be a known name, got nobody" in err


def test_zoo_verify_changed_checksum(call, copied_zoo):
    with (copied_zoo / "config.json").open("a") as stream:
        stream.write(" ")
    code, out, _ = call("zoo", "verify", "--json")
    assert code == 1
    assert [row["status"] for row in json.loads(out)] == ["differs"]


def test_verify_exit_code(call, monkeypatch):
    from repro import report

    row = {"method": "m", "claim": "c", "paper": "", "measured": "", "verdict": "", "reason": ""}
    for broken, expected in ((False, 0), (True, 1)):
        monkeypatch.setattr(report, "verify", lambda *a, b=broken, **k: [{**row, "broken": b}])
        assert call("verify")[0] == expected


def test_help_loads_nothing_heavy():
    code = (
        "import sys; sys.argv = ['repro', 'methods', '--help']\n"
        "from repro import cli\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'ray', 'transformers', 'triton', 'yaml', 'numpy'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "[]"


@pytest.mark.skipif(os.name != "posix", reason="a pipe that nobody reads ends otherwise there")
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_reader_that_leaves_is_no_failure(options):
    command = [sys.executable, "-m", "repro", "methods", "xattention", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert (process.stderr.read(), process.wait(timeout=60)) == (b"", 0)
    process.stderr.close()


class TestProgress:
    def test_live_bars(self, plugins, write_manifest):
        from repro import manifest
        from repro.plan import make_plan
        from repro.progress import Live

        made = make_plan(manifest.load(write_manifest()), "p", device="cpu")
        first, second = made.cells
        with Live(2, made.estimate_seconds) as live:
            live.finished(first, {"status": "ok"}, cached=True)
            live.started(second, "host:1")
            live.started(second, "host:2")  # the first worker died
            live.progress_of(second)(1, 4)
            task = next(task for task in live._bars.tasks if task.description == second.label)
            assert (task.completed, task.total) == (1, 4)
            assert task.fields["left"].endswith(" left")
            record = {"status": "oom", "message": "no memory", "seconds": 1.0}
            live.finished(second, record, cached=False)
            assert live._bars.tasks[0].completed == 2
            assert len(live._bars.tasks) == 1

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [(8.25, "8.2 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (4800, "1 h 20 min")],
    )
    def test_durations(self, seconds, text):
        from repro.progress import duration

        assert duration(seconds) == text

    def test_line_of_a_record(self, plugins, write_manifest):
        from repro import manifest
        from repro.plan import make_plan
        from repro.progress import line_of

        [cell, _] = make_plan(manifest.load(write_manifest()), "p", device="cpu").cells
        record = {
            "status": "ok",
            "seconds": 2.0,
            "metrics": {
                "score": {"value": 93.04, "unit": "%"},
                "ratio": {"value": 1.5, "unit": "x"},
            },
        }
        assert line_of(cell, record) == f"{cell.label}: score 93.04%, ratio 1.5x (2.0 s)"
