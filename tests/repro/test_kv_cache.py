"""The mechanism of KV-cache methods: with a cache that keeps everything it is the dense model."""

import copy

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from repro.attention_patch import dense_causal
from repro.errors import UnsupportedCombination
from repro.kv_cache import LayerCache, patched_kv_cache
from repro.testing import tiny_subject


class Everything(LayerCache):
    """Keeps all tokens and attends densely."""

    def __init__(self, shape):
        empty = torch.empty(1, shape.kv_heads, 0, shape.head_dim, dtype=shape.dtype)
        self.pairs = [(empty, empty)] * shape.batch
        self.ended = 0

    def fill(self, sequence, k, v):
        before = self.pairs[sequence]
        self.pairs[sequence] = tuple(
            torch.cat(pair, 2) for pair in zip(before, (k, v), strict=True)
        )

    def prefill(self, sequence, new):
        self.fill(sequence, new.k, new.v)
        return dense_causal(new.q, *self.pairs[sequence], new.scale)

    def decode(self, new):
        tokens = zip(new.q.split(1), new.k.split(1), new.v.split(1), strict=True)
        parts = [type(new)(q, k, v, new.scale) for q, k, v in tokens]
        return torch.cat([self.prefill(row, part) for row, part in enumerate(parts)])

    def end_prefill(self):
        self.ended += 1

    def observed(self):
        return 1, 4

    def tensors(self):
        return [tensor for pair in self.pairs for tensor in pair]


@pytest.fixture(scope="module")
def subject():
    return tiny_subject()


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def tokens(batch, length, seed=0):
    return torch.randint(0, 512, (batch, length), generator=torch.Generator().manual_seed(seed))


def generate(model, ids, mask=None, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    return model.generate(ids, **settings, **options)


def test_left_padded_batch_generates_what_dense_does(subject):
    ids = tokens(3, 20)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    mask[2, :19] = 0
    expected = generate(subject.model, ids, mask)
    with patched_kv_cache(subject.model, Everything) as patch:
        found = generate(subject.model, ids, mask, past_key_values=patch.make_cache())
    assert torch.equal(found, expected)


def test_batch_equals_singles(subject):
    ids = tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    with patched_kv_cache(subject.model, Everything) as patch:
        both = generate(subject.model, ids, mask, past_key_values=patch.make_cache())
        alone = generate(subject.model, ids[1:, 7:], past_key_values=patch.make_cache())
    assert torch.equal(both[1:, 7:], alone)


def test_chunks_equal_the_whole_and_the_prompt_ends_once(subject):
    ids = tokens(1, 20)
    expected = subject.model(ids).logits
    with patched_kv_cache(subject.model, Everything) as patch:
        cache = patch.make_cache(prompt_length=20)
        parts = []
        for begin, end in ((0, 8), (8, 9), (9, 20)):
            assert [layer.ended for layer in cache.held()] == [0] * len(cache.held())
            parts.append(subject.model(ids[:, begin:end], past_key_values=cache).logits)
        assert [layer.ended for layer in cache.held()] == [1, 1]
        subject.model(ids[:, :1], past_key_values=cache)
        assert [layer.ended for layer in cache.held()] == [1, 1]
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-5, rtol=1e-5)


def test_without_a_cache_a_call_stands_alone(subject):
    ids = tokens(2, 12)
    expected = subject.model(ids).logits
    with patched_kv_cache(subject.model, Everything):
        found = subject.model(ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fails", [False, True])
def test_leaves_the_model_as_it_was(subject, fails):
    ids = tokens(1, 9)
    expected, settings = subject.model(ids).logits, subject.model.config.to_dict()
    try:
        with patched_kv_cache(subject.model, Everything) as patch:
            subject.model(ids, past_key_values=patch.make_cache())
            assert not fails
    except AssertionError:
        assert fails
    assert torch.equal(subject.model(ids).logits, expected)
    assert subject.model.config.to_dict() == settings


def test_bytes_are_those_of_the_tensors(subject):
    with patched_kv_cache(subject.model, Everything) as patch:
        assert patch.stats() == {"kv_bytes": 0, "seen_tokens": 0, "decode_density": None}
        subject.model(tokens(2, 10), past_key_values=patch.make_cache())
        stats = patch.stats()
        assert stats["kv_bytes"] == 2 * 4 * 2 * 2 * 2 * 10 * 32  # k and v, bytes, layers, ...
        assert stats["seen_tokens"] == 10 and stats["decode_density"] == 0.25
        patch.reset()
        assert patch.stats()["kv_bytes"] == 0


def test_a_filled_cache_decodes_like_a_prefilled_one(subject):
    ids = tokens(1, 10)
    with patched_kv_cache(subject.model, Everything) as patch:
        prefilled = patch.make_cache()
        subject.model(ids, past_key_values=prefilled)
        filled = patch.make_cache()
        for index, layer in enumerate(prefilled.held()):
            filled.fill(index, *layer.pairs[0])
        found, expected = (
            subject.model(ids[:, :1], past_key_values=cache).logits for cache in (filled, prefilled)
        )
    assert torch.equal(found, expected)


def test_a_copy_goes_its_own_way_under_any_later_patch(subject):
    ids = tokens(1, 10)
    with patched_kv_cache(subject.model, Everything) as patch:
        cache = patch.make_cache()
        subject.model(ids, past_key_values=cache)
    with patched_kv_cache(subject.model, Everything):
        twin = copy.deepcopy(cache)
        found = subject.model(ids[:, :1], past_key_values=twin).logits
        assert (cache.get_seq_length(), twin.get_seq_length()) == (10, 11)
        assert torch.equal(found, subject.model(ids[:, :1], past_key_values=cache).logits)


def other_batch(model, patch):
    cache = patch.make_cache()
    model(tokens(2, 5), past_key_values=cache)
    model(tokens(3, 1), past_key_values=cache)


def two_tokens_after_the_prompt(model, patch):
    cache = patch.make_cache()
    model(tokens(1, 5), past_key_values=cache)
    model(tokens(1, 2), past_key_values=cache)


def another_cache(model, patch):
    past = model(tokens(1, 5), use_cache=True).past_key_values
    model(tokens(1, 1), past_key_values=past)


def right_padding(model, patch):
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    model(tokens(2, 4), attention_mask=mask, past_key_values=patch.make_cache())


def own_mask(model, patch):
    mask = torch.zeros(1, 1, 4, 4)
    model(tokens(1, 4), attention_mask=mask, past_key_values=patch.make_cache())


def keys_changed_behind_the_cache(model, patch):
    """What models with latent attention do: the cache gets other keys than the attention."""
    cache = patch.make_cache()
    for length in (5, 1):
        k = torch.zeros(1, 2, length, 16)
        k, v = cache.update(k, k, 0)
        attend(model, k + 1, v)


def values_of_another_width(model, patch):
    k = torch.zeros(1, 2, 5, 16)
    attend(model, k, k[..., :8])


def heads_of_an_odd_size(model, patch):
    k = torch.zeros(1, 2, 5, 12)
    attend(model, k, k)


def attend(model, k, v):
    q = torch.zeros(1, 4, *k.shape[2:])
    attention = ALL_ATTENTION_FUNCTIONS[model.config._attn_implementation]
    return attention(model.model.layers[0].self_attn, q, k, v, None)


def other_batch_in_the_prompt(model, patch):
    cache = patch.make_cache(prompt_length=9)
    model(tokens(2, 5), past_key_values=cache)
    model(tokens(1, 4), past_key_values=cache)


def other_batch_filled(model, patch):
    cache = patch.make_cache()
    for batch in (2, 3):
        cache.fill(0, *(torch.zeros(batch, 2, 5, 32) for _ in range(2)))


def other_batch_generated(model, patch):
    cache = patch.make_cache()
    generate(model, tokens(2, 5), past_key_values=cache)
    generate(model, tokens(3, 12), past_key_values=cache)


def shorter_prompt_generated(model, patch):
    cache = patch.make_cache()
    generate(model, tokens(1, 12), past_key_values=cache)
    generate(model, tokens(1, 5), past_key_values=cache)


def fewer_tokens(model, patch):
    cache = patch.make_cache()
    model(tokens(1, 5), past_key_values=cache)
    cache.crop(3)


def short_mask(model, patch):
    cache = patch.make_cache()
    model(tokens(1, 5), past_key_values=cache)
    model(tokens(1, 1), attention_mask=torch.ones(1, 3).long(), past_key_values=cache)


def beams(model, patch):
    patch.make_cache().reorder_cache(torch.tensor([0]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (other_batch, "the batch must be the 2 sequences that the cache holds, got 3"),
        (other_batch_in_the_prompt, "must be the 2 sequences that the cache holds, got 1"),
        (other_batch_filled, "must be the 2 sequences that the cache holds, got 3"),
        (other_batch_generated, "must be the 2 sequences that the cache holds, got 3"),
        (fewer_tokens, "tokens cannot be taken back"),
        (short_mask, "must cover the 6 tokens so far, got 3"),
        (two_tokens_after_the_prompt, "must come one by one, got 2; make the cache with"),
        (another_cache, "must be run with the cache of the patch"),
        (right_padding, "padding must lie on the left"),
        (own_mask, "causality with padding"),
        (keys_changed_behind_the_cache, "as the cache returned them"),
        (values_of_another_width, r"of the shape of keys, got \[1, 2, 5, 8\] and"),
        (heads_of_an_odd_size, "head_dim must be a multiple of 8 up to 256, got 12"),
        (shorter_prompt_generated, "a pass must bring new tokens, got none"),
        (beams, "beam search"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_no_method_defines_is_refused(subject, call, message):
    with (
        patched_kv_cache(subject.model, Everything) as patch,
        pytest.raises(UnsupportedCombination, match=message),
    ):
        call(subject.model, patch)
