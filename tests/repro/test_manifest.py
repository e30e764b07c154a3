import pytest

from repro import manifest
from repro.errors import BadInput


def faults_of(path):
    with pytest.raises(BadInput) as caught:
        manifest.load(path)
    return [str(fault) for fault in caught.value.faults]


def only_fault(path):
    faults = faults_of(path)
    assert len(faults) == 1, faults
    return faults[0]


def test_defaults_are_filled_in_and_dense_is_added(plugins, write_manifest):
    made = manifest.load(write_manifest())
    profile = made.profile("p")
    assert made.name == "toy"
    assert [entry.slug for entry in profile.methods] == ["dense", "fake"]
    assert profile.methods[1].config == {
        "stride": 16,
        "threshold": 0.9,
        "block_size": 128,
        "layers": [],
        "per_head": False,
        "share": 0.0,
    }
    assert profile.seeds == (0,)
    assert profile.dtype == "bfloat16"


def test_sweep_is_a_grid_and_other_lists_are_values(plugins, write_manifest):
    methods = "[{fake: {layers: [1, 2], sweep: {stride: [8, 16], threshold: [0.5, 0.9]}}}]"
    profile = manifest.load(write_manifest(methods=methods)).profile("p")
    points = [(entry.config["stride"], entry.config["threshold"]) for entry in profile.methods[1:]]
    assert points == [(8, 0.5), (8, 0.9), (16, 0.5), (16, 0.9)]
    assert all(entry.config["layers"] == [1, 2] for entry in profile.methods[1:])
    assert profile.methods[1].config_object.layers == (1, 2)
    # The label shows what was swept and what differs from the default, nothing else.
    assert set(profile.methods[1].shown) == {"stride", "threshold", "layers"}


def test_whole_number_is_taken_for_a_float(plugins, write_manifest):
    profile = manifest.load(write_manifest(methods="[{fake: {threshold: 1}}]")).profile("p")
    assert profile.methods[1].config["threshold"] == 1


BAD = {
    "unknown method": (
        {"methods": "[fakke]"},
        "profiles.p.methods[0] must be a method that exists, got fakke; did you mean fake? ",
    ),
    "unknown measurement": (
        {"measurements": "[nop]"},
        "profiles.p.measurements[0] must be a measurement that exists, got nop; did you mean noop",
    ),
    "unknown subject": (
        {"subjects": "[toy:z]"},
        "profiles.p.subjects[0] must be a known name, got toy:z; known: a, b",
    ),
    "unknown scheme": ({"subjects": "[tay:a]"}, "got tay:a; did you mean toy?"),
    "unknown option": (
        {"methods": "[{fake: {treshold: 0.5}}]"},
        "profiles.p.methods[0].treshold must be a known key, got treshold; did you mean threshold?",
    ),
    "unknown key": ({"mesurements": "[noop]"}, "got mesurements; did you mean measurements"),
    "text for a number": (
        {"methods": '[{fake: {stride: "8"}}]'},
        "profiles.p.methods[0].stride must be a whole number, got 8",
    ),
    "list without sweep": (
        {"methods": "[{fake: {stride: [8, 16]}}]"},
        "profiles.p.methods[0].stride must be a whole number, got [8,16]",
    ),
    "true for a number": (
        {"methods": "[{fake: {threshold: true}}]"},
        "profiles.p.methods[0].threshold must be a number, got True",
    ),
    "threshold over 1": (
        {"methods": "[{fake: {threshold: 1.5}}]"},
        "profiles.p.methods[0].threshold must be in [0, 1], got 1.5",
    ),
    "stride": (
        {"methods": "[{fake: {stride: 7}}]"},
        "profiles.p.methods[0].stride must be a divisor of block_size (128), got 7",
    ),
    "stride in a sweep": (
        {"methods": "[{fake: {sweep: {stride: [8, 7]}}}]"},
        "profiles.p.methods[0].sweep.stride[1] must be a divisor of block_size (128), got 7",
    ),
    "wrong type in a sweep": (
        {"methods": "[{fake: {sweep: {stride: [8, x]}}}]"},
        "profiles.p.methods[0].sweep.stride[1] must be a whole number, got x",
    ),
    "empty sweep": (
        {"methods": "[{fake: {sweep: {}}}]"},
        "profiles.p.methods[0].sweep must be a mapping of field -> list of values, not empty",
    ),
    "empty list in a sweep": (
        {"methods": "[{fake: {sweep: {stride: []}}}]"},
        "profiles.p.methods[0].sweep.stride must be a list of values, not empty, got []",
    ),
    "unknown field in a sweep": (
        {"methods": "[{fake: {sweep: {strid: [8]}}}]"},
        "profiles.p.methods[0].sweep.strid must be a known field, got strid; did you mean stride?",
    ),
    "swept and fixed": (
        {"methods": "[{fake: {stride: 8, sweep: {stride: [8]}}}]"},
        "must be given once; stride also stands outside of sweep, got stride",
    ),
    "length over the positions": (
        {"measurements": "[{noop: {lengths: [512, 2048]}}]"},
        (
            "profiles.p.measurements[0].lengths must be at most 1024 (the positions of toy:a), "
            "got 2048"
        ),
    ),
    "rule of a measurement": (
        {"measurements": "[{noop: {items: 0}}]"},
        "profiles.p.measurements[0].items must be at least 1, got 0",
    ),
    "duplicate method": (
        {"methods": "[{fake: {stride: 8}}, {fake: {sweep: {stride: [8, 16]}}}]"},
        (
            "profiles.p.methods[1] must be without a duplicate of profiles.p.methods[0], "
            "got fake stride=8 twice"
        ),
    ),
    "duplicate in a sweep": (
        {"methods": "[{fake: {sweep: {stride: [8, 8]}}}]"},
        "got fake stride=8 twice",
    ),
    "duplicate dense": ({"methods": "[dense, dense]"}, "got dense twice"),
    "duplicate measurement": (
        {"measurements": "[noop, {noop: {lengths: [128, 256]}}]"},
        "profiles.p.measurements[1] must be without a duplicate of a cell of",
    ),
    "duplicate subject": (
        {"subjects": "[toy:a, toy:a]"},
        "profiles.p.subjects[1] must be different from profiles.p.subjects[0], got toy:a",
    ),
    "duplicate seed": ({"seeds": "[1, 1]"}, "profiles.p.seeds[1] must be different from"),
    "no measurement": (
        {"measurements": "[]"},
        "profiles.p.measurements must be not empty, got []",
    ),
    "missing key": ({"measurements": None}, "profiles.p.measurements must be given, got nothing"),
    "two names in an entry": (
        {"methods": "[{fake: {}, dense: {}}]"},
        "must be a method: a name, or one name with its options",
    ),
    "two names in an entry with only": (
        {"methods": "[{fake: {}, dense: {only: {nop: {}}}}]"},
        "must be a method: a name, or one name with its options",
    ),
    "an empty entry": ({"methods": "[{}]"}, "must be a method: a name, or one name"),
    "options that are no mapping": (
        {"methods": "[{fake: 3}]"},
        "profiles.p.methods[0] must be a mapping of options, got 3",
    ),
    "not a number": (
        {"methods": "[{fake: {threshold: .nan}}]"},
        "must be a finite number, got nan",
    ),
    "gpus": (
        {"resources": "{gpus: 1.5}"},
        "profiles.p.resources.gpus must be a whole number, or a fraction below 1, got 1.5",
    ),
    "unknown dtype": ({"dtype": "int8"}, "profiles.p.dtype must be 'bfloat16', 'float16' or"),
    "accuracy of random weights": (
        {"measurements": "[paired]", "subjects": "[toy:untrained]"},
        "this one needs a trained subject",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_one_bad_value_is_one_fault_with_its_line(plugins, write_manifest, name):
    parts, expected = BAD[name]
    path = write_manifest(**parts)
    fault = only_fault(path)
    assert expected in fault
    place, _text = fault.split(": ", 1)
    line = int(place.removeprefix(f"{path}:"))
    # The line is that of the value; where something is missing, that of what lacks it.
    key = next(key for key in parts)
    if parts[key] is not None:
        assert f"{key}:" in path.read_text().splitlines()[line - 1]


def test_every_fault_comes_at_once(plugins, write_manifest):
    path = write_manifest(
        "paper: nobody\n"
        "profiles:\n"
        "  p:\n"
        "    subjects: [toy:z]\n"
        "    methods:\n"
        "      - fake: {threshold: 1.5}\n"
        "      - fake:\n"
        "          sweep:\n"
        "            stride: [8, 7]\n"
        "    measurements: [nop]\n"
        "  q:\n"
        "    subjects: [toy:a]\n"
        "    measurements: [noop]\n"
        "    seed: 3\n"
        "  r:\n"
        "    subjects: [toy:a]\n"
        "    timeout_minutes: .nan\n"
        "    measurements:\n"
        "      - ruler:\n"
        "          tasks: [vtt, cwx]\n"
        "          samples: 0\n"
        "      - latency:\n"
        "          blocks: 3\n"
        "          phases: [prefil]\n"
        "      - memory: {repeats: 0, batch: 0}\n"
        "      - perplexity: {documents: 1, lengths: [64, 64]}\n"
    )
    faults = faults_of(path)
    lines = sorted(int(fault.split(":")[1]) for fault in faults)
    assert lines == [1, 4, 6, 9, 10, 14, 17, 20, 20, 21, 23, 24, 25, 25, 26, 26]


FILES = {
    "two documents": (b"profiles: {}\n---\nprofiles: {}\n", "must be one document"),
    "not UTF-8": (b"profiles:\n  p: \xff\n", "must be UTF-8 text"),
    "tag": (b"profiles: !!python/object/apply:os.system [echo]\n", "without tags"),
    "key given twice": (b"profiles:\n  p: 1\n  p: 2\n", "must be given once, got p"),
    "syntax": (b"profiles: [\n", "must be valid YAML"),
    "empty": (b"", "must be a mapping, got an empty file"),
    "list": (b"- 1\n", "must be a mapping, got list"),
    "deep": (b"a: " + b"[" * 1000 + b"]" * 1000, "nested at most"),
}


@pytest.mark.parametrize("name", FILES)
def test_bad_file(tmp_path, name):
    data, expected = FILES[name]
    path = tmp_path / "bad.yaml"
    path.write_bytes(data)
    fault = only_fault(path)
    assert expected in fault
    assert fault.startswith(f"{path}:")


def test_yaml_bomb_is_refused_quickly(tmp_path):
    levels = [b"a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for level in range(1, 12):
        levels.append(b"a%d: &a%d [%s]" % (level, level, b", ".join([b"*a%d" % (level - 1)] * 9)))
    path = tmp_path / "bomb.yaml"
    path.write_bytes(b"\n".join(levels))
    assert "with all aliases expanded" in only_fault(path)


def test_path_is_a_folder_or_missing(tmp_path):
    assert "must be a file, got a folder" in only_fault(tmp_path)
    assert "must be a readable file, got No such file" in only_fault(tmp_path / "none.yaml")


def test_the_name_of_a_file_names_its_results(plugins, write_manifest):
    path = write_manifest()
    fine = path.rename(path.with_name("my-test.yaml"))
    assert manifest.load(fine).name == "my-test"
    fault = only_fault(fine.rename(path.with_name("my test.yaml")))
    assert "the name of the manifest must be a plain word" in fault and "got my test" in fault


def test_missing_weights_are_told_and_do_not_spoil_the_rest(plugins, write_manifest):
    made = manifest.load(write_manifest(subjects="[toy:a, toy:absent]"))
    assert "fetch absent" in made.missing["toy:absent"]
    assert list(made.infos) == ["toy:a"]


def test_unknown_profile_lists_near_matches(plugins, write_manifest):
    made = manifest.load(write_manifest())
    with pytest.raises(BadInput, match="--profile must be a known name, got q; known: p"):
        made.profile("q")


def test_resolved_manifest_is_plain_data(plugins, write_manifest):
    import json

    made = manifest.load(write_manifest(methods="[{fake: {sweep: {stride: [8, 16]}}}]"))
    again = json.loads(json.dumps(made.to_json()))
    assert [entry["slug"] for entry in again["profiles"]["p"]["methods"]] == ["dense"] + [
        "fake"
    ] * 2


def test_only_keeps_a_method_to_some_measurements_with_other_options(plugins, write_manifest):
    path = write_manifest(
        methods="[fake, {fake: {stride: 8, only: {noop: {items: 2, lengths: [256]}}}}]",
        measurements="[{noop: {items: 9, lengths: [128, 256]}}, paired]",
    )
    profile = manifest.load(path).profile("p")
    noop, paired = profile.measurements
    found = [
        [(cell["length"], cell["items"]) for cell in noop.cells_of(method)]
        for method in profile.methods
    ]
    assert found == [[(128, 9), (256, 9)], [(128, 9), (256, 9)], [(256, 2)]]
    assert [len(paired.cells_of(method)) for method in profile.methods] == [1, 1, 0]


def test_only_as_a_list_leaves_the_options_alone(plugins, write_manifest):
    path = write_manifest(
        methods="[{dense: {reruns: 1}}, {fake: {only: [noop]}}]", measurements="[noop, paired]"
    )
    profile = manifest.load(path).profile("p")
    fake = profile.methods[1]
    assert [len(entry.cells_of(fake)) for entry in profile.measurements] == [1, 0]


ONLY = {
    "[]": "methods[0].only must be measurements of this profile, not empty, got []",
    "[nop]": "methods[0].only.nop must be a measurement of this profile, got nop; did you mean",
    "{noop: 3}": "methods[0].only.noop must be a mapping of options, got 3",
    "{noop: {items: 0}}": "methods[0].only.noop.items must be at least 1, got 0",
    "{noop: {itms: 1}}": "methods[0].only.noop.itms must be a known key, got itms; did you mean",
    "{noop: {lengths: [4096]}}": "must be at most 1024 (the positions of toy:a), got 4096",
}


@pytest.mark.parametrize("only", ONLY)
def test_bad_only(plugins, write_manifest, only):
    assert ONLY[only] in only_fault(write_manifest(methods=f"[{{fake: {{only: {only}}}}}]"))


def test_several_broken_rules_of_one_config_are_several_faults(plugins, write_manifest):
    source = plugins.root / "methods" / "fake" / "__init__.py"
    text = source.read_text()
    start = text.index("        if not 0 <=")
    end = text.index("class FakePatch")
    source.write_text(
        text[:start]
        + '        raise ValueError("stride must be even; odd is bad, got 7; '
        + 'threshold must be in [0, 1], got 2")\n\n\n'
        + text[end:]
    )
    faults = faults_of(write_manifest(methods="[{fake: {stride: 7, threshold: 2}}]"))
    assert [fault.split("methods[0].")[1] for fault in faults] == [
        "stride must be even; odd is bad, got 7",
        "threshold must be in [0, 1], got 2",
    ]


def test_a_fault_hides_no_other_of_its_entry(plugins, write_manifest):
    methods = '[{fake: {stride: "8", threshold: 2}}, {fake: {threshold: 2, sweep: {stride: []}}}]'
    faults = faults_of(write_manifest(methods=methods))
    assert [fault.split(" must ")[0].split("methods")[1] for fault in faults] == [
        "[0].stride",
        "[0].threshold",
        "[1].sweep.stride",
        "[1].threshold",
    ]


def test_other_profiles_are_checked_without_asking_a_hub(plugins, write_manifest):
    source = plugins.root / "subjects" / "toy.py"
    source.write_text(
        source.read_text() + '\n\ndef is_remote(rest):\n    return rest == "absent"\n'
    )
    text = (
        "profiles:\n"
        "  p: {subjects: [toy:a], measurements: [noop]}\n"
        "  q: {subjects: [toy:b, toy:absent], measurements: [{noop: {lengths: [4096]}}]}\n"
    )
    path = write_manifest(text)
    with pytest.raises(BadInput, match="toy.yaml:3: .*the positions of toy:b") as caught:
        manifest.load(path, profile="p")
    assert len(caught.value.faults) == 1
    path = write_manifest(text.replace("4096", "128"))
    assert list(manifest.load(path, profile="p").missing) == []
    assert list(manifest.load(path, profile="q").missing) == ["toy:absent"]
