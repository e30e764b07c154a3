"""The layout rules: one import path, no stray packages, light imports, a wheel that works."""

import importlib
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import repro
import repro.kernels
import repro.methods

ROOT = Path(__file__).parents[2]
TOP_LEVEL = {"repro", "methods", "kernels", "manifests", "tests", "results", "deploy"}
# Imported by nothing at the top of the package: start-up of the command line stays quick.
HEAVY = ["torch", "triton", "ray", "transformers", "lm_eval", "matplotlib", "scipy"]


def run_python(code: str, *, cwd: Path = ROOT, path: str = "") -> str:
    """Run ``code`` in a fresh interpreter and return its standard output."""
    command = [sys.executable, "-c", code]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": path, "HOME": str(cwd)}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def tracked_files() -> list[str]:
    done = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip("not a git checkout")
    return done.stdout.splitlines()


@pytest.mark.parametrize("folder", ["kernels", "methods", "tests"])
def test_no_package_at_the_root(folder):
    # A root package named "kernels" would shadow the Hugging Face package of that name.
    assert not (ROOT / folder / "__init__.py").exists()


def test_top_level_folders_are_fixed():
    folders = {name.split("/")[0] for name in tracked_files() if "/" in name}
    assert {name for name in folders if not name.startswith(".")} <= TOP_LEVEL


def test_every_method_and_kernel_imports_under_repro():
    for package in (repro.methods, repro.kernels):
        for module in pkgutil.iter_modules(package.__path__):
            assert module.name.isidentifier()
            importlib.import_module(f"{package.__name__}.{module.name}")


@pytest.mark.parametrize(
    "module", ["repro", "repro.cli", "repro.manifest", "repro.plan", "repro.methods.xattention"]
)
def test_imports_are_light(module):
    code = (
        f"import {module}, sys, json; print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    )
    assert json.loads(run_python(code)) == []


def named_methods(text: str) -> set[str]:
    """Return the methods that a source names by their module."""
    return set(re.findall(r"repro\.methods(?:\.| import )([a-z]\w*)", text))


def test_methods_never_import_one_another():
    assert named_methods("from repro.methods.a import x\nfrom repro.methods import b") == {"a", "b"}
    for slug in (module.name for module in pkgutil.iter_modules(repro.methods.__path__)):
        for source in (ROOT / "methods" / slug).rglob("*.py"):
            others = named_methods(source.read_text(encoding="utf-8")) - {slug}
            assert not others, f"{source.name} names {others}"


def test_core_names_no_method():
    for source in (ROOT / "repro").rglob("*.py"):
        if any(source.is_relative_to(ROOT / "repro" / link) for link in ("methods", "kernels")):
            continue
        named = named_methods(source.read_text(encoding="utf-8"))
        assert not named, f"{source} names {named}"


def test_no_file_of_python_code_is_past_600_lines():
    for name in tracked_files():
        path = ROOT / name
        if name.endswith(".py") and path.is_file() and not path.is_symlink():
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 600, name


def test_wheel_carries_methods_kernels_and_zoo(tmp_path):
    """Build the wheel from the tracked files, unpack it elsewhere and import a method from it."""
    source = tmp_path / "source"
    for name in tracked_files():
        origin, target = ROOT / name, source / name
        if not origin.is_symlink() and not origin.is_file():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if origin.is_symlink():
            target.symlink_to(origin.readlink())
        else:
            target.write_bytes(origin.read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", str(tmp_path / "dist"), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    site = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), str(site)], check=True)
    code = (
        "import repro.methods.xattention as x, repro.zoo, repro; from pathlib import Path\n"
        "assert (repro.zoo.zoo_path('retriever') / 'model.safetensors').is_file()\n"
        "assert (Path(x.__file__).parent / 'paper.yaml').is_file()\n"
        "print(x.__file__)"
    )
    assert run_python(code, cwd=tmp_path, path=str(site)).startswith(str(site))
