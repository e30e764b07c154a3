import pytest

from repro import doctor


@pytest.fixture
def findings(tmp_path):
    def by_name(runs=tmp_path / "runs"):
        return {finding["name"]: finding for finding in doctor.examine(runs)}

    return by_name


def test_it_leaves_nothing_behind(findings, tmp_path):
    assert findings()["run store"]["status"] == "ok"
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_says_what_for_and_how(findings, monkeypatch):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    found = findings()
    assert found["ray"]["remedy"] == "pip install 'repro[cluster]'"
    assert found["c++ compiler"]["status"] == "missing"
    for finding in found.values():
        if finding["status"] != "ok":
            assert finding["needed_for"]
            assert finding["remedy"]


def test_folder_that_cannot_be_written(findings, tmp_path):
    (tmp_path / "file").write_text("")
    found = findings(tmp_path / "file" / "runs")["run store"]
    assert found["status"] == "missing"
    assert "--runs" in found["remedy"]


def test_little_disk_and_memory_are_weak(findings, monkeypatch):
    monkeypatch.setattr(doctor, "LEAST_DISK_GIB", 1e9)
    monkeypatch.setattr(doctor, "LEAST_MEMORY_GIB", 1e9)
    found = findings()
    assert (found["disk"]["status"], found["memory"]["status"]) == ("weak", "weak")


def test_it_prints_one_line_per_finding(findings, capsys, tmp_path):
    found = doctor.examine(tmp_path)
    doctor.print_findings(found)
    assert len(capsys.readouterr().out.splitlines()) == len(found)
