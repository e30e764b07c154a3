import subprocess
import sys

import pytest

from repro import registry
from repro.errors import BadInput, ReproError


def test_methods_are_found_by_scanning(plugins):
    assert "fake" in registry.slugs()
    assert registry.get("fake").title == "Fake"
    assert registry.methods()["fake"] is registry.get("fake")


def test_unknown_method_lists_near_matches(plugins):
    with pytest.raises(BadInput, match="did you mean fake"):
        registry.get("fakee")


def test_folder_without_module_is_no_method(plugins):
    (plugins.root / "methods" / "empty").mkdir()
    assert "empty" not in registry.slugs()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import nothing_of_that_name", "cannot be imported: ModuleNotFoundError"),
        ("METHOD = 3", "must offer METHOD"),
        ("from repro.methods.fake import METHOD", "METHOD.slug must be 'broken', got 'fake'"),
    ],
)
def test_broken_method_is_named_and_spoils_only_itself(plugins, text, expected):
    folder = plugins.root / "methods" / "broken"
    folder.mkdir()
    (folder / "__init__.py").write_text(text)
    try:
        with pytest.raises(ReproError, match="method broken") as caught:
            registry.get("broken")
        assert expected in str(caught.value)
        assert registry.get("fake").slug == "fake"
    finally:
        sys.modules.pop("repro.methods.broken", None)


def entry_point(folder, slug, target):
    info = folder / f"third_{slug}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: third_{slug}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[repro.methods]\n{slug} = {target}\n")


@pytest.mark.parametrize("target", ["third_party_toy", "third_party_toy:METHOD"])
def test_third_parties_add_methods_by_entry_point(plugins, tmp_path, monkeypatch, target):
    folder = tmp_path / "site-packages"
    entry_point(folder, "third", target)
    source = (plugins.root / "methods" / "fake" / "__init__.py").read_text()
    (folder / "third_party_toy.py").write_text(source.replace('slug="fake"', 'slug="third"'))
    monkeypatch.syspath_prepend(str(folder))
    try:
        assert registry.get("third").slug == "third"
    finally:
        sys.modules.pop("third_party_toy", None)


@pytest.mark.parametrize("slug", ["fake", "dense"])
def test_slug_that_is_taken_is_refused(plugins, tmp_path, monkeypatch, slug):
    folder = tmp_path / "site-packages"
    entry_point(folder, slug, "third_party_toy")
    monkeypatch.syspath_prepend(str(folder))
    with pytest.raises(BadInput, match=f"must be unique; .* has it too, got {slug}"):
        registry.slugs()


def test_looking_up_names_imports_no_method_and_nothing_heavy(plugins):
    code = (
        "import sys; from repro import cli, manifest, plan, registry, store, runner; "
        "assert 'fake' in registry.slugs(); "
        "heavy = {'torch', 'ray', 'transformers', 'triton', 'repro.methods.fake'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, env=plugins.environment, check=False
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
