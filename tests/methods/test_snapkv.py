"""SnapKV: which tokens of a prompt stay, and the laws of its cache."""

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
from repro.methods.snapkv import METHOD, SnapKVConfig
from repro.methods.snapkv.cache import SnapKVLayer, kept_tokens
from repro.testing import qkv, tiny_subject

TIGHT = SnapKVConfig(capacity=16, window_size=4, kernel_size=3)


@pytest.fixture(scope="module")
def subject():
    return tiny_subject()


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law, subject):
    assert law(METHOD, subject, TIGHT) == []


def test_prefill_is_dense_and_decode_is_not(subject):
    assert check_quality_is_lost_in_decode_alone(METHOD, subject, TIGHT) == []


def test_a_prompt_within_the_capacity_is_kept_whole(subject):
    config = SnapKVConfig(capacity=40, window_size=4)
    assert check_equals_dense(METHOD, subject, config, prompts(2, 40)) == []


def definition(q, k, config):
    """The rule token by token; ``q`` ``[H, W, D]``, ``k`` ``[H_kv, T, D]``, fp64."""
    heads, window, _ = q.shape
    tokens, n_rep = k.shape[1], heads // k.shape[0]
    kept = []
    for kv_head in range(k.shape[0]):
        votes = []
        for head in range(kv_head * n_rep, (kv_head + 1) * n_rep):
            vote = torch.zeros(tokens - window, dtype=torch.float64)
            for row in range(window):
                visible = tokens - window + row + 1
                scores = k[kv_head, :visible] @ q[head, row] * q.shape[-1] ** -0.5
                vote += scores.softmax(0)[: tokens - window]
            votes.append(vote)
        votes = torch.stack(votes)
        joined = {"mean": votes.mean(0), "sum": votes.sum(0), "max": votes.amax(0)}
        joined, half = joined[config.group_reduce], config.kernel_size // 2
        pooled = []
        for place in range(len(joined)):
            near = joined[max(0, place - half) : place + half + 1]
            pooled.append(near.max() if config.pooling == "max" else near.sum())
        order = sorted(range(len(pooled)), key=lambda place: -float(pooled[place]))
        kept.append(sorted(order[: config.capacity - window]))
    return kept


@pytest.mark.parametrize("pooling", ["avg", "max"])
@pytest.mark.parametrize("group_reduce", ["mean", "max", "sum"])
def test_keeps_what_the_definition_keeps(pooling, group_reduce):
    config = SnapKVConfig(
        capacity=12, window_size=4, kernel_size=1, pooling=pooling, group_reduce=group_reduce
    )
    if pooling == "avg":
        config = SnapKVConfig(
            capacity=12, window_size=4, kernel_size=5, pooling="avg", group_reduce=group_reduce
        )
    random = torch.Generator().manual_seed(0)
    q = 3 * torch.randn(4, 4, 16, generator=random, dtype=torch.float64)
    k = torch.randn(2, 60, 16, generator=random, dtype=torch.float64)
    found = kept_tokens(q[None].float(), k[None].float(), 16**-0.5, config)
    assert found.tolist() == definition(q, k, config)


@pytest.mark.parametrize("cuts", [(0, 50), (0, 20, 48, 50)], ids=str)
def test_decode_attends_to_what_is_kept_the_window_and_new_tokens(cuts):
    config = SnapKVConfig(capacity=12, window_size=4, kernel_size=1)
    q, k, v = qkv(batch=2, heads=4, kv_heads=2, queries=60, head_dim=16)
    layer = SnapKVLayer(LayerShape(0, 2, 4, 2, 16, torch.float32, torch.device("cpu")), config)

    def new(rows, begin, end):
        return NewTokens(*(x[rows, :, begin:end] for x in (q, k, v)), 16**-0.5)

    for row in range(2):
        for begin, end in itertools.pairwise(cuts):
            layer.prefill(row, new(slice(row, row + 1), begin, end))
    layer.end_prefill()
    kept = [definition(q[row, :, 46:50], k[row, :, :50], config) for row in range(2)]
    for now in range(50, 60):
        out = layer.decode(new(slice(None), now, now + 1))
        for row, head in itertools.product(range(2), range(4)):
            places = [*kept[row][head // 2], *range(46, now + 1)]
            keys, values = (x[row, head // 2, places] for x in (k, v))
            weights = (keys @ q[row, head, now] / 4).softmax(0)
            torch.testing.assert_close(out[row, head, 0], weights @ values)


def test_max_pooling_keeps_the_neighbours_of_a_peak():
    config = SnapKVConfig(capacity=9, window_size=4, kernel_size=5, pooling="max")
    k = torch.zeros(1, 1, 44, 8)
    k[0, 0, 20, 0] = 20.0
    q = torch.zeros(1, 1, 4, 8)
    q[..., 0] = 20.0
    assert kept_tokens(q, k, 1.0, config).tolist() == [[18, 19, 20, 21, 22]]


def test_held_tokens_and_bytes(subject):
    with METHOD.apply(subject, TIGHT, None) as patch:
        cache = patch.make_cache()
        generate(subject, prompts(2, 40), cache=cache, new_tokens=5)
        stats = patch.stats()
        for layer in cache.held():
            assert layer.store.lengths == [16 + 4] * 2  # the last token is never fed
    read = sum(16 + step for step in range(1, 5))
    seen = sum(40 + step for step in range(1, 5))
    assert stats["decode_density"] == pytest.approx(read / seen)
    # K and V of 2 layers, 2 sequences, 2 heads, one page of 64 tokens each (fp32), and the table.
    pages = 2 * 2 * 2 * 2 * 64 * 32 * 4
    assert pages <= stats["kv_bytes"] < 1.05 * pages + 2 * 64


def test_a_filled_cache_holds_what_a_prefilled_one_holds(subject):
    held = []
    with METHOD.apply(subject, TIGHT, None) as patch, torch.no_grad():
        subject.model(prompts(1, 200), past_key_values=patch.make_cache())
        held.append(patch.stats()["kv_bytes"])
        cache, (k, v) = patch.make_cache(), torch.randn(2, 1, 2, 200, 32)
        for layer in range(2):
            cache.fill(layer, k, v)
        held.append(patch.stats()["kv_bytes"])
    assert [layer.store.lengths for layer in cache.held()] == [[16], [16]]
    assert held[0] == held[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 32}, "capacity must be above window_size 32, got 32"),
        ({"window_size": 0}, "window_size must be at least 1, got 0"),
        ({"kernel_size": 4}, "kernel_size must be odd and at least 1, got 4"),
        ({"pooling": "min"}, "pooling must be avg or max, got min"),
        ({"group_reduce": "any"}, "group_reduce must be mean, max or sum, got any"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        SnapKVConfig(**options)
