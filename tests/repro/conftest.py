"""Fixtures of the tests of the core."""

import shutil
from pathlib import Path

import pytest

from tests.repro import toys


@pytest.fixture
def plugins(tmp_path, monkeypatch):
    """Make ``toy:a``, ``toy:b``, the method ``fake`` and the measurement ``noop`` known."""
    with toys.installed(tmp_path / "plugins", monkeypatch) as found:
        yield found


@pytest.fixture
def write_manifest(tmp_path):
    """Return a writer of a manifest with one profile ``p``; the values replace the defaults."""

    def write(text: str | None = None, **parts: str) -> Path:
        path = tmp_path / "toy.yaml"
        path.write_text(text if text is not None else toys.manifest(**parts))
        return path

    return write


@pytest.fixture
def copied_zoo(tmp_path, monkeypatch):
    """The folder of a copy of the retriever, which a test may damage; the zoo holds nothing else."""
    from repro import zoo

    folder = tmp_path / "zoo" / "retriever"
    shutil.copytree(zoo.zoo_path("retriever"), folder)
    monkeypatch.setattr(zoo, "_ROOT", folder.parent)
    return folder
