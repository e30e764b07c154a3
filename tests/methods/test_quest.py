"""Quest: bounds of pages, which are read, and the laws of its cache."""

import itertools

import pytest
import torch

from repro.kv_cache import LayerShape, NewTokens
from repro.kv_testing import (
    LAWS,
    check_equals_dense,
    check_quality_is_lost_in_decode_alone,
    generate,
    prompts,
)
from repro.methods.quest import METHOD, QuestConfig
from repro.methods.quest.cache import QuestLayer, page_bounds
from repro.testing import qkv, tiny_subject

TIGHT = QuestConfig(budget=12, page_size=4, dense_layers=0)


@pytest.fixture(scope="module")
def subject():
    return tiny_subject()


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law, subject):
    assert law(METHOD, subject, TIGHT) == []


@pytest.mark.parametrize(
    "config",
    [QuestConfig(budget=64, page_size=4, dense_layers=0), QuestConfig(budget=8, dense_layers=2)],
    ids=["budget covers", "dense layers"],
)
def test_reading_everything_is_dense(subject, config):
    assert check_equals_dense(METHOD, subject, config, prompts(2, 40)) == []


def test_prefill_is_dense_and_decode_is_not(subject):
    assert check_quality_is_lost_in_decode_alone(METHOD, subject, TIGHT) == []


@pytest.mark.parametrize(
    ("budget", "page_size", "pages"), [(1024, 16, 64), (100, 16, 6), (8, 16, 3), (12, 4, 3)]
)
def test_a_budget_is_whole_pages_and_at_least_three(budget, page_size, pages):
    assert QuestConfig(budget=budget, page_size=page_size).pages == pages


def top_pages(q, k, count):
    """The pages of four tokens that query heads ``[n_rep, D]`` read of the keys ``[T, D]``."""
    bounds = []
    for part in k.split(4):
        low, high = part.amin(0), part.amax(0)
        bounds.append(max(float(torch.maximum(own * low, own * high).sum()) for own in q))
    bounds[-1] = torch.inf  # the page in progress
    return sorted(range(len(bounds)), key=lambda page: -bounds[page])[:count]


def test_decode_attends_to_the_top_pages_alone():
    """Per KV head; sequences of other lengths are beside it."""
    lengths = (43, 22)
    q, k, v = qkv(batch=2, heads=4, kv_heads=2, queries=60, head_dim=16)
    layer = QuestLayer(LayerShape(0, 2, 4, 2, 16, torch.float32, torch.device("cpu")), TIGHT)
    for row, length in enumerate(lengths):
        prompt = (x[row : row + 1, :, :length] for x in (q, k, v))
        layer.prefill(row, NewTokens(*prompt, 0.25))
    layer.end_prefill()
    for step in range(10):
        now = [length + step for length in lengths]
        out = layer.decode(NewTokens(*(x[range(2), :, now][:, :, None] for x in (q, k, v)), 0.25))
        for (row, place), head in itertools.product(enumerate(now), range(4)):
            heads, keys = slice(head // 2 * 2, head // 2 * 2 + 2), k[row, head // 2, : place + 1]
            pages = top_pages(q[row, heads, place], keys, 3)
            read = [token for token in range(place + 1) if token // 4 in pages]
            weights = (keys[read] @ q[row, head, place] * 0.25).softmax(0)
            torch.testing.assert_close(out[row, head, 0], weights @ v[row, head // 2, read])


def test_no_key_of_a_page_is_above_its_bound():
    random = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 1, 16, generator=random)
    k = torch.randn(2, 2, 6, 8, 16, generator=random)
    bounds = page_bounds(q, k.amin(3), k.amax(3))
    products = torch.einsum("bgrd,bgptd->bgrpt", q[:, :, 0].unflatten(1, (2, 2)), k).flatten(1, 2)
    assert (products.amax(-1) <= bounds + 1e-5).all()
    alone = page_bounds(q, k[:, :, :, 0], k[:, :, :, 0])  # a page of one key: its own product
    torch.testing.assert_close(alone, products[..., 0])


def test_bounds_follow_the_pages(subject):
    with METHOD.apply(subject, TIGHT, None) as patch:
        cache = patch.make_cache()
        generate(subject, prompts(1, 21), cache=cache, new_tokens=9)
        for layer in cache.held():
            tokens = layer.store.lengths[0]
            keys = layer.store.keys(0, 0, tokens)[0]
            for page in range(-(-tokens // 4)):
                part = keys[:, 4 * page : 4 * page + 4]
                assert torch.equal(layer._low[0, :, page], part.amin(1))
                assert torch.equal(layer._high[0, :, page], part.amax(1))


def test_a_needle_and_the_page_in_progress_are_read(subject):
    """Of ten pages the one of the largest key, the newest and one more."""
    with METHOD.apply(subject, TIGHT, None) as patch:
        cache = patch.make_cache()
        k = 0.1 * torch.randn(1, 2, 40, 32, generator=torch.Generator().manual_seed(0))
        k[0, :, 22] = 5.0
        cache.fill(0, k, torch.zeros_like(k))
        layer = cache.held()[0]
        selected = layer._selected(torch.ones(1, 4, 1, 32), torch.tensor([9]))
    assert selected.shape == (1, 2, 3)
    for pages in selected[0].tolist():
        assert {5, 9} <= set(pages) and len(set(pages)) == 3


def test_density_counts_the_tokens_read(subject):
    with METHOD.apply(subject, TIGHT, None) as patch:
        generate(subject, prompts(1, 41), cache=patch.make_cache(), new_tokens=2)
        stats = patch.stats()
    # 42 tokens are eleven pages, the last of two tokens.
    assert stats["decode_density"] == pytest.approx((2 * 4 + 2) / 42)


@pytest.mark.parametrize(("name", "least"), [("budget", 1), ("page_size", 1), ("dense_layers", 0)])
def test_bad_option_is_named(name, least):
    with pytest.raises(ValueError, match=f"{name} must be at least {least}, got {least - 1}"):
        QuestConfig(**{name: least - 1})
