"""Subjects by scheme: torch-free description, loading, and one clear line for what lacks."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from repro import subjects
from repro.errors import BadInput, MissingResource
from repro.subjects import hf, random
from repro.testing import tiny_subject, token_ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model and tokenizer saved as files."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("saved") / "model"
    tiny_subject().model.save_pretrained(path)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(path)
    return path


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_describing_imports_no_torch(folder):
    code = (
        "import sys; from repro import subjects\n"
        f"for name in ('random:tiny', 'hf:{folder}'): subjects.describe(name)\n"
        "sys.exit('torch' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("retriever", "must be <scheme>:<name>"),
        ("zooo:retriever", "did you mean zoo?"),
        ("random:", "must be <scheme>:<name>"),
        ("random:meta-llama/Llama-3.1-80B", "did you mean meta-llama/Llama-3.1-8B"),
        ("zoo:retreiver", "did you mean retriever?"),
        ("hf:./no/such/folder", "an existing folder"),
        ("hf:two words", "<org>/<name>"),
    ],
)
def test_unknown_names_are_bad_input(name, text):
    with pytest.raises(BadInput, match="must be") as caught:
        subjects.describe(name)
    assert text in str(caught.value)


@pytest.mark.parametrize("name", ["device", "dtype"])
def test_unknown_device_and_dtype_are_bad_input(name):
    with pytest.raises(BadInput, match=f"{name} must be"):
        subjects.load("random:tiny", **{name: "tpu9"})


def test_a_device_that_is_not_there_says_so(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(MissingResource, match="device cuda is not on this machine"):
        subjects.load("random:tiny", device="cuda")


# random:


def test_random_weights_are_seeded_and_untrained():
    one, two = (subjects.load("random:tiny", device="cpu") for _ in range(2))
    assert not one.info.trained and one.tokenizer is None
    assert one.dtype == torch.bfloat16 and one.model.config._attn_implementation == "sdpa"
    assert not one.model.training
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(a, b) and not a.requires_grad


def test_loading_random_weights_leaves_the_generator_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    subjects.load("random:tiny", device="cpu")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("name", random.known())
def test_every_architecture_builds_with_the_count_it_states(name):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = dict(random.ARCHITECTURES[name])
    real = AutoConfig.for_model(config.pop("model_type"), **config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(real)
    counted = sum(parameter.numel() for parameter in model.parameters())
    # The formula leaves out biases and norms of heads.
    assert random.describe(name).parameters == pytest.approx(counted, rel=1e-3)
    assert subjects.describe(f"random:{name}").max_length == real.max_position_embeddings


def test_a_config_file_is_an_architecture(copied):
    info = subjects.describe(f"random:{copied}/config.json")
    assert info.max_length == 32768 and not info.trained
    loaded = subjects.load(f"random:{copied}/config.json", device="cpu", dtype="float32")
    assert loaded.model(token_ids(1, 5)).logits.shape == (1, 5, 512)


def test_a_broken_config_file_is_bad_input(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(BadInput, match="valid JSON"):
        subjects.describe(f"random:{path}")
    path.write_text('{"model_type": "no_such_model", "max_position_embeddings": 8}')
    with pytest.raises(BadInput, match="one transformers can build"):
        subjects.load(f"random:{path}", device="cpu")


# hf:


def test_a_folder_loads_offline_with_the_saved_weights(folder):
    loaded = subjects.load(f"hf:{folder}", device="cpu", dtype="float32")
    ids = token_ids(1, 20)
    assert torch.equal(loaded.model(ids).logits, tiny_subject().model(ids).logits)
    assert loaded.info.trained and loaded.info.max_length == 32768
    assert loaded.tokenizer("a b").input_ids == [1, 2]
    assert loaded.info.parameters == sum(p.numel() for p in loaded.model.parameters())


def test_revision_follows_the_content_and_not_the_card(copied):
    before = hf.describe(str(copied)).revision
    (copied / "README.md").write_text("a card")
    assert hf.describe(str(copied)).revision == before
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert hf.describe(str(copied)).revision != before


@pytest.mark.parametrize(
    ("removed", "text"),
    [
        ("model.safetensors", "only safetensors are loaded"),
        ("tokenizer.json", "no tokenizer"),
        ("config.json", "cannot read"),
    ],
)
def test_what_a_folder_lacks_is_named(copied, removed, text):
    (copied / removed).unlink()
    with pytest.raises(MissingResource, match=text):
        subjects.describe(f"hf:{copied}")


def test_a_damaged_weight_file_is_one_line(copied):
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(MissingResource, match="cannot load") as caught:
        subjects.load(f"hf:{copied}", device="cpu")
    assert "\n" not in str(caught.value)


def test_weights_that_lack_are_never_made_up(copied):
    from safetensors.torch import load_file, save_file

    tensors = load_file(copied / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MissingResource, match="no weights for 1 tensors"):
        subjects.load(f"hf:{copied}", device="cpu")


def test_an_unreachable_hub_says_what_to_fetch(monkeypatch, tmp_path):
    def unreachable():
        raise OSError("no route")

    monkeypatch.setattr(hf, "_reach_hub", unreachable)
    with pytest.raises(MissingResource) as caught:
        subjects.describe("hf:no-such-org/no-such-model")
    assert "hf download no-such-org/no-such-model" in str(caught.value)
    assert "hf:./<folder>" in str(caught.value)


# zoo:


def test_a_changed_zoo_file_is_one_clear_message(copied_zoo):
    assert subjects.load("zoo:retriever", device="cpu").name == "zoo:retriever"
    with (copied_zoo / "tokenizer.json").open("a") as stream:
        stream.write(" ")
    with pytest.raises(MissingResource, match="tokenizer.json must be SHA-256"):
        subjects.load("zoo:retriever", device="cpu")


def test_an_untrained_zoo_model_says_how_to_train_it(copied, monkeypatch):
    from repro import zoo

    (copied / "model.safetensors").unlink()
    monkeypatch.setattr(zoo, "zoo_path", lambda name: copied)
    with pytest.raises(MissingResource, match="repro zoo train retriever"):
        subjects.describe("zoo:retriever")
    (copied / "config.json").unlink()
    with pytest.raises(MissingResource, match="repro zoo train retriever"):
        subjects.describe("zoo:retriever")
