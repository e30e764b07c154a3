import pytest

from repro.keys import SourceDigests, canonical_json, digest, jsonable, library_versions, unit_of


def test_canonical_json_does_not_depend_on_the_order_of_keys():
    assert canonical_json({"b": 1, "a": [1, 2]}) == '{"a":[1,2],"b":1}'
    assert digest({"b": 1, "a": 2}) == digest({"a": 2, "b": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    with pytest.raises(ValueError):
        canonical_json(float("nan"))


def test_jsonable():
    np = pytest.importorskip("numpy")
    value = {"t": (1, 2), "n": np.float32(0.5), "a": np.arange(3), "x": float("inf"), 3: {2, 1}}
    assert jsonable(value) == {"t": [1, 2], "n": 0.5, "a": [0, 1, 2], "x": None, "3": [1, 2]}


def test_library_versions():
    versions = library_versions(["pytest", "no-such-distribution"])
    assert versions["pytest"] == pytest.__version__
    assert versions["no-such-distribution"] == "absent"


def test_unit_of():
    assert unit_of("repro.kernels.scan.api") == "repro.kernels.scan"
    assert unit_of("repro.attention_patch") == "repro.attention_patch"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A third-party package of modules that import one another in every way."""
    import sys

    files = {
        "__init__.py": "from . import one\n",
        "one.py": "def lazy():\n    from toypackage.two import x\n",
        "two.py": "import json\nx = 1\n",
        "hidden.py": "y = 1\n",
        "typed.py": (
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import toypackage.hidden\n"
        ),
        "data.json": "{}",
        "README.md": "text",
        "__pycache__/one.pyc": "",
    }
    for name, text in files.items():
        path = tmp_path / "toypackage" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("toypackage", None)
    return tmp_path / "toypackage"


def test_imports_are_followed_without_importing(package):
    import sys

    digests = SourceDigests()
    assert "toypackage.two" in digests.closure("toypackage.one")
    assert "toypackage.hidden" not in digests.closure("toypackage.typed")
    assert "toypackage" not in sys.modules


@pytest.mark.parametrize(
    ("changed", "matters"),
    [("two.py", True), ("data.json", True), ("README.md", False), ("__pycache__/one.pyc", False)],
)
def test_digest_of_a_package(package, changed, matters):
    before = SourceDigests().of("toypackage")
    path = package / changed
    path.write_text(path.read_text() + "\n")
    assert (SourceDigests().of("toypackage") != before) == matters


def test_a_method_takes_its_kernels_along_but_not_their_benches(plugins):
    closure = SourceDigests().closure("repro.methods.fake")
    assert closure == ["repro.kernels.fakekernel", "repro.methods.fake"]
    before = SourceDigests().of("repro.methods.fake")
    bench = plugins.root / "kernels" / "fakekernel" / "bench.py"
    bench.write_text("SUITE = 1\n")
    claims = plugins.root / "methods" / "fake" / "paper.yaml"
    claims.write_text("claims: []\n")
    assert SourceDigests().of("repro.methods.fake") == before
    (plugins.root / "kernels" / "fakekernel" / "__init__.py").write_text("VALUE = 2\n")
    assert SourceDigests().of("repro.methods.fake") != before
