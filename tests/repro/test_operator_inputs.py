"""Operator inputs: what is planted is there, what is captured is what the layer saw."""

import math

import pytest
import torch

from repro.operator_inputs import (
    Structure,
    attention_modules,
    capture,
    gaussian,
    spread_layers,
    structured,
    wrapped_attention,
)
from repro.testing import tiny_subject, token_ids

SHAPES = [
    pytest.param((1, 4, 2, 2048, 64), 0.4, id="2048"),
    pytest.param((1, 2, 2, 4096, 128), 0.3, id="4096-wide"),
    pytest.param((1, 4, 1, 4096 + 37, 64), 0.25, id="ragged"),
]


def block_mass(item, block=128):
    """Exact causal attention mass of each block, [H, N, N], rows add up to 1."""
    q, k = item.q.float(), item.k.float()
    n_rep = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(n_rep, 1).transpose(-1, -2) / math.sqrt(q.shape[-1])
    tokens = q.shape[2]
    scores = scores.masked_fill(~torch.ones(tokens, tokens, dtype=torch.bool).tril(), -torch.inf)
    mass = scores.softmax(-1)[0]
    pad = -tokens % block
    mass = torch.nn.functional.pad(mass, (0, pad, 0, pad))
    n_blocks = (tokens + pad) // block
    cells = mass.view(-1, n_blocks, block, n_blocks, block).sum(4).sum(2)
    return cells / cells.sum(-1, keepdim=True)


@pytest.mark.parametrize(("shape", "density"), SHAPES)
def test_planted_blocks_hold_the_mass(shape, density):
    item = structured(shape, Structure(density=density), seed=3, dtype=torch.float32, device="cpu")
    mass = (block_mass(item) * item.planted).sum(-1)
    assert mass.mean() > 0.9
    visible = item.planted.shape[-1] * (item.planted.shape[-1] + 1) / 2
    achieved = float(item.planted.sum()) / (shape[1] * visible)
    assert achieved == pytest.approx(item.facts["planted_density"], abs=1e-4)
    assert achieved == pytest.approx(density, rel=0.15)


def test_every_pattern_is_there():
    item = structured((1, 4, 2, 4096, 64), seed=0, dtype=torch.float32, device="cpu")
    mass = block_mass(item)
    n_blocks = mass.shape[-1]
    even = 1 / torch.arange(1, n_blocks + 1)
    late = slice(n_blocks // 2, None)
    assert mass[:, late, 0].mean() > 5 * even[late].mean()  # sink
    assert mass.diagonal(dim1=1, dim2=2)[:, late].mean() > 3 * even[late].mean()  # band


def test_hot_blocks_differ_between_query_heads():
    item = structured(
        (1, 4, 1, 4096, 64), Structure(density=0.4), seed=0, dtype=torch.float32, device="cpu"
    )
    assert not torch.equal(item.planted[0], item.planted[1])


def test_seed_fixes_structured_inputs_and_dtype_only_rounds():
    arguments = ((1, 2, 1, 512, 32), Structure(density=0.5))
    one = structured(*arguments, seed=1, dtype=torch.float32, device="cpu")
    two = structured(*arguments, seed=1, dtype=torch.bfloat16, device="cpu")
    assert torch.equal(one.q.bfloat16(), two.q) and torch.equal(one.planted, two.planted)
    other = structured(*arguments, seed=2, dtype=torch.float32, device="cpu")
    assert not torch.equal(one.q, other.q)


def test_structure_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="density must be in"):
        Structure(density=0.0)
    with pytest.raises(ValueError, match="head dimension must be at least 16"):
        structured((1, 1, 1, 256, 8), seed=0, dtype=torch.float32, device="cpu")


def test_gaussian_inputs_have_the_asked_shape():
    item = gaussian((2, 4, 2, 100, 16), seed=5, dtype=torch.bfloat16, device="cpu", layer=3)
    assert item.q.shape == (2, 4, 100, 16) and item.k.shape == item.v.shape == (2, 2, 100, 16)
    assert (item.kind, item.layer, item.q.dtype) == ("gaussian", 3, torch.bfloat16)
    assert abs(float(item.q.float().mean())) < 0.1


def test_capture_takes_the_asked_layers_and_changes_nothing():
    subject, ids = tiny_subject(layers=3), token_ids(1, 130)
    before = subject.model(ids).logits
    config = subject.model.config.to_dict()
    items = capture(subject, ids, [0, 2], source="random ids")
    assert [item.layer for item in items] == [0, 2]
    assert items[0].q.shape == (1, 4, 130, 32) and items[0].k.shape == (1, 2, 130, 32)
    assert items[0].facts["prompt"] == "random ids"
    assert torch.equal(subject.model(ids).logits, before)
    assert subject.model.config.to_dict() == config


def test_the_attention_function_comes_back_after_an_error():
    subject, ids = tiny_subject(), token_ids(1, 20)
    before = subject.model(ids).logits

    def broken(inner):
        def raises(*arguments, **options):
            raise RuntimeError("stop")

        return raises

    with (
        pytest.raises(RuntimeError, match="stop"),
        wrapped_attention(subject.model, "repro_broken", broken),
    ):
        subject.model(ids)
    assert torch.equal(subject.model(ids).logits, before)


def test_modules_come_by_layer():
    modules = attention_modules(tiny_subject(layers=3).model)
    assert [module.layer_idx for module in modules] == [0, 1, 2]


@pytest.mark.parametrize(
    ("layers", "count", "expected"), [(32, 3, [8, 16, 23]), (4, 3, [1, 2]), (2, 3, [0, 1])]
)
def test_layers_are_spread_over_the_depth(layers, count, expected):
    found = spread_layers(layers, count)
    assert len(found) <= count and all(0 <= layer < layers for layer in found)
    assert found == pytest.approx(expected, abs=1)
