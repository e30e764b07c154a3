"""The cluster files under ``deploy/``: their schema, and that they start what this version has."""

import json
import re
from pathlib import Path

import pytest
import yaml

from repro import manifest

DEPLOY = Path(__file__).parents[2] / "deploy"
PINS = dict(
    line.split("==")
    for line in (DEPLOY.parent / "constraints.txt").read_text().splitlines()
    if "==" in line and not line.startswith("#")
)


def load(name):
    return yaml.safe_load((DEPLOY / name).read_text())


def test_launcher_file_follows_rays_schema():
    ray = pytest.importorskip("ray")
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    config = load("ray-cluster.yaml")
    jsonschema.validate(config, schema)
    assert config["head_node_type"] in config["available_node_types"]
    assert any("GPU" in kind["resources"] for kind in config["available_node_types"].values())


def test_launcher_keeps_the_job_server_on_localhost():
    (start,) = [c for c in load("ray-cluster.yaml")["head_start_ray_commands"] if "--head" in c]
    assert "--dashboard-host=127.0.0.1" in start


def test_pinned_versions_are_those_tried_together():
    text = "".join(path.read_text() for path in DEPLOY.iterdir())
    for name in ("torch", "ray"):
        found = re.findall(rf"{name}(?:\[\w+\])?==([\d.]+)", text)
        assert found and set(found) == {PINS[name].split("+")[0]}
    assert load("kuberay-rayjob.yaml")["spec"]["rayClusterSpec"]["rayVersion"] == PINS["ray"]


def test_rayjob_has_what_kuberay_asks_for():
    job = load("kuberay-rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"])
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {"name", "image", "resources"} <= set(container)
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            requests, limits = (container["resources"][kind] for kind in ("requests", "limits"))
            assert requests.get("nvidia.com/gpu") == limits.get("nvidia.com/gpu")
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_rayjob_runs_a_manifest_that_is_here():
    words = load("kuberay-rayjob.yaml")["spec"]["entrypoint"].split()
    assert words[:4] == ["python", "-m", "repro", "run"]
    path, profile = DEPLOY.parent / words[4], words[words.index("--profile") + 1]
    assert profile in manifest.load(path).profiles
