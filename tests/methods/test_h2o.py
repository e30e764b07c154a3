"""H2O: attention received, who is evicted, and the laws of its cache."""

import itertools

import pytest
import torch

from repro.kv_testing import (
    LAWS,
    check_equals_dense,
    check_quality_is_lost_in_decode_alone,
    generate,
    prompts,
)
from repro.methods.h2o import METHOD, H2OConfig, cache
from repro.methods.h2o.cache import received_attention
from repro.testing import qkv, tiny_subject

TIGHT = H2OConfig(heavy_size=6, recent_size=5)


@pytest.fixture(scope="module")
def subject():
    return tiny_subject()


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law, subject):
    assert law(METHOD, subject, TIGHT) == []


def test_prefill_is_dense_and_decode_is_not(subject):
    assert check_quality_is_lost_in_decode_alone(METHOD, subject, TIGHT) == []


@pytest.mark.parametrize("heavy", [0, 26])
def test_slots_for_everything_are_dense(subject, heavy):
    config = H2OConfig(heavy_size=heavy, recent_size=52 - heavy)
    assert check_equals_dense(METHOD, subject, config, prompts(2, 40)) == []


def test_received_attention_is_the_column_sum(monkeypatch):
    monkeypatch.setattr(cache, "_QUERIES", 7)
    random = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 20, 8, generator=random)
    k = torch.randn(1, 2, 33, 8, generator=random)
    scores = q[0] @ k[0].repeat_interleave(2, 0).mT * 0.5
    hidden = torch.ones(20, 33, dtype=torch.bool).triu(14)
    expected = scores.masked_fill(hidden, -torch.inf).softmax(-1).sum(1).unflatten(0, (2, 2)).sum(1)
    torch.testing.assert_close(received_attention(q, k, 0.5), expected)


def played(q, k, v, prompt, config):
    """The rule by hand for one KV head: yields the positions of every step, and outputs.

    ``q`` is ``[n_rep, T, D]``, ``k`` and ``v`` are ``[T, D]``.
    """
    score = {}
    weights = (q[:, :prompt] @ k[:prompt].T).masked_fill(
        torch.ones(prompt, prompt, dtype=torch.bool).triu(1), -torch.inf
    )
    for position, total in enumerate(weights.softmax(-1).sum((0, 1))):
        score[position] = float(total)

    def evict(now):
        older = sorted(position for position in score if position < now - config.recent_size)
        older.sort(key=lambda position: -score[position])
        for position in older[config.heavy_size :]:
            del score[position]

    evict(prompt)
    for now in range(prompt, len(k)):
        score[now] = 0.0
        places = sorted(score)
        weights = (q[:, now] @ k[places].T).softmax(-1)
        for position, weight in zip(places, weights.sum(0), strict=True):
            score[position] += float(weight)
        yield places, weights @ v[places]
        evict(now + 1)


@pytest.mark.parametrize("cuts", [(0, 20), (0, 3, 19, 20)], ids=str)
def test_evicts_as_by_hand(cuts):
    """Per KV head, whose query heads add up; sequences of other lengths are beside it."""
    q, k, v = qkv(batch=2, heads=4, kv_heads=2, queries=40, head_dim=8, seed=3)
    shape = cache.LayerShape(0, 2, 4, 2, 8, torch.float32, torch.device("cpu"))
    layer, prompts = cache.H2OLayer(shape, TIGHT), (20, 7)

    def new(row, begin, end):
        return cache.NewTokens(*(x[row : row + 1, :, begin:end] for x in (q, k, v)), 1.0)

    for begin, end in itertools.pairwise(cuts):
        layer.prefill(0, new(0, begin, end))
    layer.prefill(1, new(1, 0, prompts[1]))
    layer.end_prefill()
    games = [
        [
            played(q[row, 2 * head : 2 * head + 2], k[row, head], v[row, head], prompt, TIGHT)
            for head in range(2)
        ]
        for row, prompt in enumerate(prompts)
    ]
    for step in range(20):
        now = [prompt + step for prompt in prompts]
        before = layer._position.clone()
        parts = [new(row, place, place + 1) for row, place in enumerate(now)]
        out = layer.decode(
            cache.NewTokens(*(torch.cat([getattr(x, n) for x in parts]) for n in "qkv"), 1.0)
        )
        for row, head in itertools.product(range(2), range(2)):
            places, expected = next(games[row][head])
            held = before[row, head]
            assert sorted(held[held >= 0].tolist() + [now[row]]) == places
            torch.testing.assert_close(out[row, 2 * head : 2 * head + 2, 0], expected)


def test_holds_a_constant_number_of_tokens(subject):
    sizes = []
    with METHOD.apply(subject, TIGHT, None) as patch:
        for length in (20, 60):
            generate(subject, prompts(1, length), cache=patch.make_cache())
            sizes.append(patch.stats()["kv_bytes"])
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heavy_size": -1}, "heavy_size must be at least 0, got -1"),
        ({"recent_size": 0}, "recent_size must be at least 1, got 0"),
    ],
    ids=["heavy", "recent"],
)
def test_bad_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        H2OConfig(**options)
