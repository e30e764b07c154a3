"""What a record says of its machine."""

import json
import subprocess
import sys

import pytest
import torch

from repro import environment

SMI = "1980, 2619, 512.33, 61, 0x0000000000000004\n"


def test_capture_is_json_and_names_the_machine():
    found = json.loads(json.dumps(environment.capture("cpu")))
    assert found["environment_id"] == (
        f"cpu-{environment._slug(found['cpu'])}-{torch.get_num_threads()}t"
    )
    assert found["device"] == "cpu" and found["memory_bytes"] > 0
    assert found["versions"]["torch"] == torch.__version__
    assert set(found) >= {"device_name", "threads", "os", "python", "git_commit", "git_dirty"}


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H100 80GB HBM3", "nvidia-h100"),
        ("NVIDIA A100-SXM4-40GB", "nvidia-a100"),
        ("NVIDIA H200", "nvidia-h200"),
        ("AMD EPYC 7763 64-Core", "amd-epyc-7763"),
        ("", "unknown"),
    ],
)
def test_slugs_are_short_and_readable(name, slug):
    assert environment._slug(name) == slug


def test_import_loads_no_torch():
    code = "import repro.environment, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_threads_can_be_fixed_and_follow_the_variable(monkeypatch):
    before = torch.get_num_threads()
    try:
        assert environment.set_threads(1) == torch.get_num_threads() == 1
        monkeypatch.setenv("REPRO_THREADS", "2")
        assert environment.set_threads() == torch.get_num_threads() == 2
        monkeypatch.delenv("REPRO_THREADS")
        assert environment.set_threads() == environment.usable_cpus()
    finally:
        environment.set_threads(before)


def test_gpu_state_is_read_from_the_tool():
    state = environment._parse_smi(SMI)
    assert state["sm_clock_mhz"] == 1980.0 and state["power_watt"] == 512.33
    assert state["throttle_reasons"] == 4
    assert not environment.is_throttled(state)
    assert environment.is_throttled(environment._parse_smi(SMI.replace("004", "040")))


def test_unknown_fields_of_the_tool_are_left_out():
    assert environment._parse_smi("[N/A], 2619, [N/A], 61, [N/A]") == {
        "memory_clock_mhz": 2619.0,
        "temperature_celsius": 61.0,
    }


def test_a_machine_without_the_tool_tells_nothing(monkeypatch):
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)
    assert environment.device_state("cuda") == {}


def test_cpu_state_holds_the_load():
    assert environment.device_state("cpu").get("load_1min", 0.0) >= 0.0


def test_absent_distributions_are_left_out():
    assert environment.versions(("torch", "no-such-distribution")) == {
        "torch": environment.versions()["torch"]
    }
