"""KIVI: the patch of a model, and that it is packed KIVI layers of equal bits."""

import pytest
import torch

from repro.kv_packed import Packing
from repro.kv_testing import (
    LAWS,
    check_equals_dense,
    check_quality_is_lost_in_decode_alone,
    prompts,
)
from repro.methods import kvtuner
from repro.methods.kivi import METHOD, KIVIConfig
from repro.testing import tiny_subject, token_ids

SMALL = {"group_size": 8, "residual": 16}


@pytest.fixture(scope="module")
def subject():
    return tiny_subject(layers=2, head_dim=32)


def steps(subject, ids, patch=None):
    """Logits of a prompt of all but three tokens, and of these one by one."""
    cache = patch.make_cache() if patch else None
    outs = []
    with torch.no_grad():
        for part in (ids[:, :-3], *ids[:, -3:].split(1, dim=1)):
            out = subject.model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            outs.append(out.logits)
    return torch.cat(outs, dim=1)


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law, bits, subject):
    assert law(METHOD, subject, KIVIConfig(bits=bits, **SMALL)) == []


def test_prefill_is_dense_and_decode_is_not(subject):
    config = KIVIConfig(bits=2, **SMALL)
    assert check_quality_is_lost_in_decode_alone(METHOD, subject, config) == []


@pytest.mark.parametrize("config", [KIVIConfig(bits=2, residual=64), KIVIConfig(bits=16)], ids=str)
def test_a_residual_or_bits_for_everything_are_dense(subject, config):
    assert check_equals_dense(METHOD, subject, config, prompts(2, 40)) == []


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_is_the_uniform_table_of_kvtuner_to_the_bit(subject, bits):
    ids = token_ids(2, 60)
    config = kvtuner.KVTunerConfig(mode="kivi", k_bits=bits, v_bits=bits, **SMALL)
    with METHOD.apply(subject, KIVIConfig(bits=bits, **SMALL), None) as patch:
        ours, ours_held = steps(subject, ids, patch), patch.stats()["kv_bytes"]
    with kvtuner.METHOD.apply(subject, config, None) as patch:
        theirs, theirs_held = steps(subject, ids, patch), patch.stats()["kv_bytes"]
    assert torch.equal(ours, theirs) and ours_held == theirs_held


def test_sixteen_bits_are_dense_and_two_are_not(subject):
    ids = token_ids(1, 60)
    dense = steps(subject, ids)
    for bits in (16, 2):
        with METHOD.apply(subject, KIVIConfig(bits=bits, **SMALL), None) as patch:
            out = steps(subject, ids, patch)
        torch.testing.assert_close(out[:, :-3], dense[:, :-3], rtol=1e-4, atol=1e-5)
        assert torch.allclose(out, dense, rtol=1e-3, atol=1e-4) == (bits == 16)


def test_a_prompt_within_the_residual_is_dense(subject):
    ids = token_ids(1, 15)
    with METHOD.apply(subject, KIVIConfig(bits=2, **SMALL), None) as patch:
        out = steps(subject, ids, patch)
        assert patch.stats()["seen_tokens"] == 15
    torch.testing.assert_close(out, steps(subject, ids), rtol=1e-4, atol=1e-5)


def test_everything_is_restored_also_after_an_exception(subject):
    ids = token_ids(1, 40)
    before, config = steps(subject, ids), subject.model.config.to_dict()
    with pytest.raises(RuntimeError), METHOD.apply(subject, KIVIConfig(**SMALL), None):
        raise RuntimeError
    assert torch.equal(steps(subject, ids), before)
    assert subject.model.config.to_dict() == config


def test_fewer_bits_hold_fewer_bytes(subject):
    ids, held = token_ids(1, 1024), []
    for bits in (2, 4, 8, 16):
        with METHOD.apply(subject, KIVIConfig(bits=bits), None) as patch:
            steps(subject, ids, patch)
            held.append(patch.stats()["kv_bytes"])
    assert held == sorted(held)
    assert held[0] < 0.5 * held[3]


def test_default_groups_and_residual_are_the_papers():
    config = KIVIConfig()
    packing = Packing(k_bits=2, v_bits=2, mode="kivi")
    assert (config.group_size, config.residual) == (packing.group_size, packing.residual)
    assert (config.group_size, config.residual) == (32, 128)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"bits": 3}, "bits must be 2, 4, 8 or 16, got 3"),
        ({"group_size": 0}, "group_size must be at least 1, got 0"),
        ({"residual": 100}, "residual must be a positive multiple of group_size 32, got 100"),
    ],
)
def test_broken_rules_are_named(options, text):
    with pytest.raises(ValueError, match=text):
        KIVIConfig(**options)
