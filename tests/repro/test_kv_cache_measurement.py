"""KV-cache cells: bytes against arithmetic, dense and method apart, the longest context that fits."""

import contextlib

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import DynamicCache

from repro import measurements
from repro.errors import UnsupportedCombination
from repro.measurements import kv_cache
from repro.measurements.kv_cache import PAGE, KvCacheOptions, longest, tensor_bytes
from repro.method import Method, Patch
from repro.testing import cell_context, tiny_subject

LAYERS, KV_HEADS, HEAD_DIM = 2, 2, 32
# Bytes of a token of the tiny subject in float32: keys and values of all layers.
TOKEN = 2 * 4 * LAYERS * KV_HEADS * HEAD_DIM


class Halving(DynamicCache):
    """Keeps the newer half of what a prefill stores; decoded tokens all stay."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if key_states.shape[2] > 1:
            self.fill(layer_idx, key_states, value_states)
            return key_states, value_states
        return super().update(key_states, value_states, layer_idx)

    def fill(self, layer_index, k, v):
        n = k.shape[2] // 2
        super().update(k[:, :, n:].clone(), v[:, :, n:].clone(), layer_index)


class Recent(DynamicCache):
    """Keeps the newest 128 tokens."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        k, v = super().update(key_states, value_states, layer_idx)
        layer = self.layers[layer_idx]
        layer.keys, layer.values = k[:, :, -128:].clone(), v[:, :, -128:].clone()
        return k, v

    def fill(self, layer_index, k, v):
        self.update(k, v, layer_index)


class NoFill(DynamicCache):
    pass


class Caching(Patch):
    def __init__(self, kind, told):
        self.kind, self.told, self.cache = kind, told, None

    def reset(self):
        self.cache = None

    def make_cache(self):
        self.cache = self.kind()
        return self.cache

    def stats(self):
        if not self.told:
            return {"density": 1.0}
        return {"kv_bytes": tensor_bytes(self.cache), "kv_tokens": self.cache.get_seq_length()}


def method(kind=None, *, told=True):
    patch = Patch() if kind is None else Caching(kind, told)
    return Method(
        slug="toy",
        title="",
        arxiv="",
        kind="kv_cache",
        config=object,
        apply=lambda *arguments: contextlib.nullcontext(patch),
    )


@pytest.fixture(scope="module")
def subject():
    return tiny_subject(layers=LAYERS, kv_heads=KV_HEADS, head_dim=HEAD_DIM)


def run(subject, using, progress=lambda done, total: None, **options):
    given = {"lengths": (256,), **options}
    (values,) = kv_cache.expand(KvCacheOptions(**given))
    return kv_cache.run(cell_context(subject, values, method=using, progress=progress))


def value(body, name):
    return body["metrics"][name]["value"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("batch", "new_tokens"), [(1, 8), (3, 0)])
def test_dense_is_two_tensors_a_layer(dtype, batch, new_tokens):
    made = tiny_subject(layers=3, kv_heads=2, head_dim=32, dtype=dtype)
    body = run(made, method(), batch=batch, new_tokens=new_tokens)
    size = torch.empty(0, dtype=made.dtype).element_size()
    tokens = 256 + new_tokens
    expected = 2 * size * 3 * 2 * 32 * tokens * batch
    assert value(body, "dense_kv_bytes") == expected
    # A method without a cache of its own leaves the model's.
    assert value(body, "kv_bytes") == expected and value(body, "ratio") == 1
    assert value(body, "kv_bytes_per_token") == 2 * size * 3 * 2 * 32
    assert "kv_tokens" not in body["metrics"] and "max_context_tokens" not in body["metrics"]


def test_a_cache_that_keeps_half(subject):
    body = run(subject, method(Halving), new_tokens=0)
    assert value(body, "kv_bytes") == 128 * TOKEN
    assert value(body, "ratio") == 2
    assert value(body, "kv_tokens") == 128
    # Decoded tokens come on top.
    body = run(subject, method(Halving), new_tokens=8)
    assert value(body, "kv_bytes") == (128 + 8) * TOKEN
    assert value(body, "dense_kv_bytes") == (256 + 8) * TOKEN
    assert body["patch"]["kv_bytes"] == (128 + 8) * TOKEN


@pytest.mark.parametrize("batch", [1, 2])
def test_the_longest_context_agrees_with_arithmetic(subject, batch):
    told = []
    body = run(
        subject,
        method(Halving),
        memory_mib=3,
        batch=batch,
        progress=lambda *at: told.append(at),
    )
    tokens = 3 * 2**20 // (TOKEN * batch)
    assert value(body, "dense_max_context_tokens") == tokens // PAGE * PAGE
    assert value(body, "max_context_tokens") == 2 * tokens // PAGE * PAGE
    assert body["message"] == "" and "absent" not in body["raw"]
    assert told == [(done, 4) for done in (1, 2, 3, 4)]


def test_without_a_cache_of_its_own_the_longest_context_is_dense(subject):
    body = run(subject, method(), memory_mib=1)
    assert value(body, "max_context_tokens") == value(body, "dense_max_context_tokens") == 1024


@pytest.mark.parametrize(
    ("kind", "reason"), [(Recent, "constant size"), (NoFill, "offers no fill")]
)
def test_no_longest_context_is_told_with_the_reason(subject, kind, reason):
    body = run(subject, method(kind), memory_mib=1)
    assert body["metrics"]["max_context_tokens"] is None
    assert reason in body["raw"]["absent"]["max_context_tokens"]
    assert reason in body["message"]
    assert value(body, "dense_max_context_tokens") == 1024


def test_layers_do_not_share_what_they_are_filled_with(subject):
    seen = []

    class Keeping(Halving):
        def fill(self, layer_index, k, v):
            seen.append((self, k, v))
            super().fill(layer_index, k, v)

    run(subject, method(Keeping), memory_mib=1)
    filled = [entry for entry in seen if entry[0] is seen[-1][0]]
    assert len(filled) == LAYERS
    assert len({tensor.data_ptr() for _, k, v in filled for tensor in (k, v)}) == 2 * LAYERS
    for _, k, v in filled:
        assert k.is_contiguous() and k.shape == v.shape == (1, KV_HEADS, k.shape[2], HEAD_DIM)


@given(st.integers(0, 3000), st.integers(1, 64), st.integers(0, 500), st.integers(1, 70))
@example(8, 1, 0, 70)  # just the memory, found while growing
@example(12, 1, 0, 70)  # and by bisection
def test_the_search_is_the_definition(memory, per_token, base, most_pages):
    asked = []

    def held(tokens):
        asked.append(tokens)
        return base + per_token * tokens

    found, reason = longest(held, memory * PAGE, most_pages)
    fitting = [
        pages
        for pages in range(most_pages + 1)
        if not pages or base + per_token * pages * PAGE <= memory * PAGE
    ]
    if fitting[-1] == most_pages:
        assert found is None and "still fit" in reason
    else:
        assert (found, reason) == (fitting[-1] * PAGE, "")
    assert len(asked) == len(set(asked)) and max(asked) <= most_pages * PAGE


def test_the_model_is_left_as_it_was(subject):
    ids = torch.arange(32)[None]
    before = subject.model(ids).logits
    run(subject, method(Halving), memory_mib=1)
    assert torch.equal(subject.model(ids).logits, before)


def test_unsupported(subject):
    with pytest.raises(UnsupportedCombination, match="exceed the 32768 positions"):
        run(subject, method(), lengths=(32768,))
    with pytest.raises(UnsupportedCombination, match="of toy must tell kv_bytes.*got density"):
        run(subject, method(Halving, told=False))


@pytest.mark.parametrize(
    "change",
    [{"lengths": ()}, {"lengths": (8,)}, {"batch": 0}, {"new_tokens": -1}, {"memory_mib": 0}],
)
def test_options_validate_themselves(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))} must be"):
        KvCacheOptions(**change)


def test_registered():
    found = measurements.get("kv_cache")
    assert found.paired and not found.alone and not found.needs_training
