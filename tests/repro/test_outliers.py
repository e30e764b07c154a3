"""Subjects with outlier channels in K: the same function, other keys."""

import pytest
import torch

from repro import subjects
from repro.attention_patch import patched_attention
from repro.errors import UnsupportedCombination
from repro.subjects import outliers
from repro.testing import tiny_subject, token_ids


def keys_and_logits(model, ids):
    found = []
    with torch.no_grad(), patched_attention(model, lambda call: found.append(call.k)):
        logits = model(ids).logits
    return found, logits


def test_logits_stay_and_keys_get_outliers():
    subject = tiny_subject(heads=4, kv_heads=2, head_dim=32)
    for layer in subject.model.model.layers:  # tiny models have no biases of their own
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            projection.bias = torch.nn.Parameter(torch.randn(projection.out_features))
    ids = token_ids(1, 120)
    keys, before = keys_and_logits(subject.model, ids)
    outliers.add_outliers(subject.model)
    scaled, after = keys_and_logits(subject.model, ids)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert torch.equal(scaled[0], keys[0])  # every second layer has them
    for old, new in zip(keys[1::2], scaled[1::2], strict=True):
        ratio = (new.norm(dim=2) / old.norm(dim=2))[0]  # [H_kv, D]
        high = ratio > (1 + outliers.FACTOR) / 2
        assert high.sum(dim=1).tolist() == [2 * outliers.PAIRS] * 2
        torch.testing.assert_close(ratio[high], torch.full_like(ratio[high], outliers.FACTOR))
        torch.testing.assert_close(ratio[~high], torch.ones_like(ratio[~high]))


def test_weights_in_bfloat16_are_scaled_without_rounding():
    subject = tiny_subject(dtype="bfloat16")
    before = subject.model.model.layers[1].self_attn.k_proj.weight.clone()
    outliers.add_outliers(subject.model)
    after = subject.model.model.layers[1].self_attn.k_proj.weight
    changed = after != before
    assert changed.any() and torch.equal(after[changed] / outliers.FACTOR, before[changed])


def test_the_retriever_with_outliers_is_another_subject_with_the_same_answers():
    inner, info = subjects.describe("zoo:retriever"), subjects.describe("outliers:zoo:retriever")
    assert info.name == "outliers:zoo:retriever" and info.revision != inner.revision
    assert (info.max_length, info.trained) == (inner.max_length, inner.trained)
    ids = token_ids(1, 200, vocabulary=1400)
    (plain, before), (scaled, after) = (
        keys_and_logits(subjects.load(name, device="cpu", dtype="float32").model, ids)
        for name in ("zoo:retriever", "outliers:zoo:retriever")
    )
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert scaled[1].abs().amax() > 4 * plain[1].abs().amax()


def test_the_inner_subject_says_what_is_wrong():
    with pytest.raises(ValueError, match="did you mean retriever"):
        subjects.describe("outliers:zoo:retreiver")
    with pytest.raises(ValueError, match="<scheme>:<name>"):
        subjects.describe("outliers:retriever")
    assert subjects.describe("outliers:hf:some/model", offline=True) is None


def test_attention_with_normalised_keys_is_refused():
    subject = tiny_subject()
    subject.model.model.layers[1].self_attn.q_norm = torch.nn.Identity()
    with pytest.raises(UnsupportedCombination, match="plain q_proj"):
        outliers.add_outliers(subject.model)


SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": 1,
}


@pytest.mark.parametrize(
    "name, options",
    [("StableLm", {"partial_rotary_factor": 0.5}), ("Cohere", {})],
    ids=["part of the head", "neighbours"],
)
def test_pairs_that_are_no_halves_of_a_head_are_refused(name, options):
    """They would give another function: the factors of q and k would not meet."""
    import transformers

    config = getattr(transformers, f"{name}Config")(**SHAPE, **options)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with pytest.raises(UnsupportedCombination, match="both halves of a head"):
        outliers.add_outliers(model)
