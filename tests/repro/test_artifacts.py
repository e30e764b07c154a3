from concurrent.futures import ThreadPoolExecutor

import pytest

from repro.artifacts import ArtifactStore
from repro.errors import MachineFault, MissingResource
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


@pytest.fixture
def url(tmp_path):
    return f"file://{tmp_path}/shared"


def test_a_url_holds_the_same_files(tmp_path, url):
    calls = []
    made = ArtifactStore(url).get_or_make("aa", make(calls))
    read = ArtifactStore(tmp_path / "shared").get_or_make("aa", make(calls))
    assert calls == [1] and torch.equal(made.tensors["t"], read.tensors["t"])
    [path] = (tmp_path / "shared").glob("content/*/artifact.json")
    path.write_bytes(b"{torn")
    warnings = []
    ArtifactStore(url, warn=warnings.append).get_or_make("aa", make(calls))
    assert (len(calls), len(warnings)) == (2, 1)


def test_a_url_without_its_package_or_that_cannot_be_written(tmp_path, url):
    with pytest.raises(MissingResource, match="artifacts: nosuch://x cannot be opened"):
        ArtifactStore("nosuch://x")
    (tmp_path / "shared").write_text("")
    with pytest.raises(MachineFault):
        ArtifactStore(url).get_or_make("aa", make([]))


@pytest.mark.parametrize("place", ["folder", "url"])
def test_two_writers_at_once_leave_one_whole_artifact(tmp_path, url, place):
    root = url if place == "url" else str(tmp_path / "shared")
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(ArtifactStore(root).get_or_make, "aa", make([])) for _ in range(8)]
        found = [call.result() for call in calls]
    assert all(torch.equal(a.tensors["t"], found[0].tensors["t"]) for a in found)
    assert len(list((tmp_path / "shared" / "content").iterdir())) == 1
    warnings = []
    assert ArtifactStore(root, warn=warnings.append).get("aa") is not None and warnings == []
