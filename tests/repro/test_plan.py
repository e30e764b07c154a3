import json
from types import SimpleNamespace

import pytest

from repro import manifest
from repro.errors import BadInput
from repro.plan import PlannedCell, make_plan


def plan_of(path, **options):
    return make_plan(manifest.load(path), "p", device="cpu", **options)


def keys_of(made):
    return {cell.label: cell.key for cell in made.cells}


def test_cells_are_resolved_and_labelled(plugins, write_manifest):
    made = plan_of(write_manifest(methods="[dense, {fake: {stride: 8}}]"))
    assert [cell.label for cell in made.cells] == [
        "toy:a | dense | noop ok@128",
        "toy:a | fake stride=8 | noop ok@128",
    ]
    cell = made.cells[1].cell
    assert (cell["paper"], cell["profile"], cell["seed"]) == ("toy", "p", 0)
    assert (cell["subject_revision"], cell["device"], cell["dtype"]) == ("r1", "cpu", "bfloat16")
    assert cell["method"]["config"]["threshold"] == 0.9
    assert json.loads(json.dumps(made.cells[1].to_json()))["cell"] == cell
    assert PlannedCell.from_json(made.cells[1].to_json()) == made.cells[1]


def test_labels_and_keys_are_unique(plugins, write_manifest):
    made = plan_of(
        write_manifest(
            subjects="[toy:a, toy:b]",
            methods="[{dense: {reruns: 1}}, {fake: {sweep: {stride: [8, 16], share: [0, 0.5]}}}]",
            measurements="[{noop: {tasks: [ok, nan], lengths: [128, 256]}}, {noop: {items: 9}}]",
            seeds="[0, 1]",
        )
    )
    assert len(made.cells) == 2 * (2 + 4) * (4 + 1) * 2
    assert len({cell.key for cell in made.cells}) == len(made.cells)
    assert len({cell.label for cell in made.cells}) == len(made.cells)


def test_short_cells_come_first_and_groups_hold_one_subject(plugins, write_manifest):
    path = write_manifest(
        subjects="[toy:a, toy:b]", measurements="[{noop: {lengths: [512, 128, 256]}}]"
    )
    made = plan_of(path)
    groups = made.groups()
    assert [{cell.cell["subject"] for cell in group} for group in groups] == [{"toy:a"}, {"toy:b"}]
    lengths = [cell.cell["measurement"]["options"]["length"] for cell in groups[0]]
    assert lengths == sorted(lengths)


def test_paired_measurement_has_no_dense_cell_and_skips_untrained_subjects(plugins, write_manifest):
    path = write_manifest(subjects="[toy:a, toy:untrained]", measurements="[paired, noop]")
    made = plan_of(path)
    paired = [cell for cell in made.cells if cell.cell["measurement"]["name"] == "paired"]
    assert [(cell.cell["subject"], cell.cell["method"]["slug"]) for cell in paired] == [
        ("toy:a", "fake")
    ]
    assert made.skipped == ("paired on toy:untrained (llm)",)


def test_profiles_share_the_keys_of_equal_cells(plugins, write_manifest):
    text = (
        "profiles:\n"
        "  p: {subjects: [toy:a], methods: [fake], measurements: [noop]}\n"
        "  q: {subjects: [toy:a], methods: [fake], measurements: [{noop: {lengths: [128, 256]}}]}\n"
    )
    checked = manifest.load(write_manifest(text))
    small, large = (
        {cell.key for cell in make_plan(checked, name, device="cpu").cells} for name in "pq"
    )
    assert small < large


def test_a_changed_line_of_a_method_reruns_its_cells_and_no_other(plugins, write_manifest):
    path = write_manifest()
    before = keys_of(plan_of(path))
    source = plugins.root / "methods" / "fake" / "__init__.py"
    source.write_text(source.read_text() + "\n# changed\n")
    after = keys_of(plan_of(path))
    changed = {label for label in before if before[label] != after[label]}
    assert changed == {"toy:a | fake | noop ok@128"}


@pytest.mark.parametrize("file", ["measurements/noop.py"])
def test_a_changed_measurement_reruns_dense_too(plugins, write_manifest, file):
    path = write_manifest(measurements="[noop, paired]")
    before = keys_of(plan_of(path))
    source = plugins.root / file
    source.write_text(source.read_text() + "\n# changed\n")
    after = keys_of(plan_of(path))
    changed = {label for label in before if before[label] != after[label]}
    assert changed == {label for label in before if "noop" in label}
    assert len(changed) == 2


def test_key_depends_on_everything_that_matters(plugins, write_manifest, monkeypatch):
    def key(**parts):
        return plan_of(write_manifest(**parts)).cells[-1].key

    base = key()
    assert key() == base
    keys = {
        base,
        key(dtype="float32"),
        key(seeds="[1]"),
        key(methods="[{fake: {stride: 8}}]"),
        key(measurements="[{noop: {items: 5}}]"),
        key(subjects="[toy:b]"),
    }
    monkeypatch.setenv("TOY_REVISION", "r2")
    keys.add(key())
    monkeypatch.setattr("repro.plan.library_versions", lambda names: {"numpy": "0"})
    keys.add(key())
    assert len(keys) == 8
    monkeypatch.undo()


def test_paper_and_profile_are_not_part_of_the_key(plugins, write_manifest):
    base = plan_of(write_manifest()).cells[0].key
    text = write_manifest().read_text().replace("  p:", "  other:")
    checked = manifest.load(write_manifest(text))
    assert make_plan(checked, "other", device="cpu").cells[0].key == base


def test_artifact_identity(plugins, write_manifest):
    made = plan_of(write_manifest(methods="[{fake: {per_head: true}}, fake]"))
    artifacts = [cell.artifact for cell in made.cells]
    assert [artifact is not None for artifact in artifacts] == [False, True, False]
    source = plugins.root / "methods" / "fake" / "__init__.py"
    source.write_text(source.read_text() + "\n")
    again = plan_of(write_manifest(methods="[{fake: {per_head: true}}, fake]"))
    assert again.cells[1].artifact["id"] != artifacts[1]["id"]


def test_a_control_takes_the_artifact_of_its_method(plugins, write_manifest):
    source = plugins.root / "methods" / "fake" / "__init__.py"
    fields = 'per_head: bool = False\n    control: str = "none"\n    draw: int = 0'
    source.write_text(source.read_text().replace("per_head: bool = False", fields))
    methods = "[{fake: {per_head: true}}, {fake: {per_head: true, control: random, draw: 3}}]"
    cells = plan_of(write_manifest(methods=methods)).cells[1:]
    assert cells[0].artifact["id"] == cells[1].artifact["id"] and cells[0].key != cells[1].key
    assert cells[1].cell["method"]["config"]["draw"] == 3
    other = "[{fake: {per_head: true}}, {fake: {per_head: true, draw: 3}}]"
    cells = plan_of(write_manifest(methods=other)).cells[1:]
    assert cells[0].artifact["id"] != cells[1].artifact["id"]


def test_select(plugins, write_manifest):
    made = plan_of(write_manifest(measurements="[{noop: {lengths: [128, 256]}}]"))
    assert [cell.label for cell in made.select("fake")] == [
        "toy:a | fake | noop ok@128",
        "toy:a | fake | noop ok@256",
    ]
    assert [cell.label for cell in made.select("*dense*@256")] == ["toy:a | dense | noop ok@256"]
    with pytest.raises(BadInput, match="--only"):
        made.select("nothing of the kind")


def test_missing_is_told(plugins, write_manifest):
    path = write_manifest(
        subjects="[toy:a, toy:absent]", resources="{gpus: 8, gpu_memory_gib: 80, memory_gib: 1e6}"
    )
    made = plan_of(path)
    assert "fetch absent" in made.missing["toy:absent"]
    assert "asks for 8 GPUs with 80 GiB; this machine has none" in made.missing["gpu"]
    assert "asks for 1e+06 GiB of memory" in made.missing["memory"]
    assert len(made.cells) == 4


@pytest.mark.parametrize(
    ("resources", "device", "expected"),
    [("{gpus: 1}", "auto", "cuda"), ("{}", "cuda", "cuda"), ("{gpus: 1}", "cpu", "cpu")],
)
def test_a_cluster_may_have_what_this_machine_lacks(
    plugins, write_manifest, monkeypatch, resources, device, expected
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    checked = manifest.load(write_manifest(resources=resources))
    plan = make_plan(checked, "p", device=device, cluster=True)
    assert plan.device == expected
    assert {cell.cell["device"] for cell in plan.cells} == {expected}
    if device == "cuda":
        with pytest.raises(BadInput, match="cuda, and there is none"):
            make_plan(checked, "p", device=device)


@pytest.mark.parametrize("gib", [40, 74.5, 80])
def test_a_gpu_must_be_large_enough(plugins, write_manifest, monkeypatch, gib):
    import torch

    card = SimpleNamespace(total_memory=int(gib * 2**30))
    monkeypatch.setattr("repro.plan.resolve_device", lambda device: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    path = write_manifest(resources="{gpus: 1, gpu_memory_gib: 80}")
    missing = make_plan(manifest.load(path), "p", device="cuda").missing
    # A card that is sold as one of 80 GB holds 74.5 GiB at least.
    assert ("the largest here has 40" in missing.get("gpu", "")) == (gib == 40)


def test_unknown_device(plugins, write_manifest):
    with pytest.raises(BadInput, match="must be auto, cpu or cuda, got tpu"):
        make_plan(manifest.load(write_manifest()), "p", device="tpu")


def test_estimate(plugins, write_manifest):
    made = plan_of(write_manifest(measurements="[{noop: {lengths: [128, 256]}}]"))
    assert made.estimate_seconds == pytest.approx(10 + 2 * (1 + 2))


@pytest.mark.parametrize(
    ("methods", "measurements", "labels"),
    [
        pytest.param(
            "[fake, {fake: {stride: 8, only: {noop: {items: 2}}}}]",
            "[{noop: {lengths: [128, 256]}}, paired]",
            [
                "dense | noop ok@128 items=4",
                "fake | noop ok@128 items=4",
                "fake stride=8 | noop ok@128 items=2",
                "dense | noop ok@256 items=4",
                "fake | noop ok@256 items=4",
                "fake stride=8 | noop ok@256 items=2",
                "fake | paired@128",
            ],
            id="a method has its own cells and no dense ones",
        ),
        pytest.param(
            "[{dense: {reruns: 1, only: {noop: {lengths: [256], items: 2}}}}, fake]",
            "[{noop: {lengths: [128, 256]}}]",
            [
                "dense | noop ok@128 items=4",
                "fake | noop ok@128 items=4",
                "dense | noop ok@256 items=4",
                "fake | noop ok@256 items=4",
                "dense rerun 1 | noop ok@256 items=2",
            ],
            id="dense limits its reruns and not the baseline",
        ),
    ],
)
def test_only_restricts(methods, measurements, labels, plugins, write_manifest):
    made = plan_of(write_manifest(methods=methods, measurements=measurements))
    assert [cell.label for cell in made.cells] == [f"toy:a | {label}" for label in labels]
