import pytest

from repro.artifacts import ArtifactStore
from repro.errors import MachineFault
from repro.method import Artifact

torch = pytest.importorskip("torch")


def make(calls, value=1.0):
    def build():
        calls.append(1)
        transposed = torch.arange(6.0).reshape(2, 3).t()
        return Artifact(
            tensors={"gates": torch.full((4,), value, dtype=torch.bfloat16), "t": transposed},
            metadata={"stride": (8, 16)},
        )

    return build


def test_made_once_and_read_back_exactly(tmp_path):
    calls = []
    first = ArtifactStore(tmp_path).get_or_make("aa", make(calls))
    second = ArtifactStore(tmp_path).get_or_make("aa", make(calls))
    assert calls == [1]
    for artifact in (first, second):
        assert artifact.metadata == {"stride": [8, 16]}
        assert artifact.tensors["gates"].dtype == torch.bfloat16
        assert torch.equal(artifact.tensors["t"], torch.arange(6.0).reshape(2, 3).t())


def test_equal_content_is_stored_once(tmp_path):
    store = ArtifactStore(tmp_path)
    store.get_or_make("aa", make([]))
    store.get_or_make("bb", make([]))
    store.get_or_make("cc", make([], 2.0))
    assert len(list((tmp_path / "content").iterdir())) == 2


@pytest.mark.parametrize("file", ["content/*/artifact.safetensors", "keys/aa.json"])
def test_altered_artifact_is_made_again(tmp_path, file):
    calls, warnings = [], []
    store = ArtifactStore(tmp_path, warn=warnings.append)
    store.get_or_make("aa", make(calls))
    [path] = tmp_path.glob(file)
    path.write_bytes(path.read_bytes()[:-1])
    store.get_or_make("aa", make(calls))
    assert (len(calls), len(warnings)) == (2, 1)
    store.get_or_make("aa", make(calls))
    assert len(calls) == 2


def test_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineFault):
        ArtifactStore(tmp_path / "file").get_or_make("aa", make([]))
