"""Controls keep as many blocks as the method, the forced ones among them."""

import math

import pytest
import torch

from repro.block_controls import (
    exact_block_mass,
    keep_highest,
    oracle_blocks,
    random_blocks,
    seed_of,
)
from repro.testing import qkv

N = 10
COMPUTABLE = torch.ones(N, N, dtype=torch.bool).tril()
FORCED = torch.eye(N, dtype=torch.bool) | (torch.arange(N) == 0)


def method_mask(seed=0, heads=3):
    draw = torch.rand(1, heads, N, N, generator=torch.Generator().manual_seed(seed))
    return ((draw < 0.4) | FORCED) & COMPUTABLE


def test_random_keeps_counts_and_forced():
    mask = method_mask()
    control = random_blocks(mask, forced=FORCED, computable=COMPUTABLE, seed=1)
    assert torch.equal(control.sum(-1), mask.sum(-1))
    assert not (control & ~COMPUTABLE).any()
    assert (control | ~(FORCED & COMPUTABLE)).all()
    assert not torch.equal(control, mask)


def test_random_is_fixed_by_seed():
    mask = method_mask()
    limits = {"forced": FORCED, "computable": COMPUTABLE}
    first, again, other = (random_blocks(mask, **limits, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_random_is_uniform_over_free_blocks():
    mask = torch.zeros(1, 1, 1, N, dtype=torch.bool)
    mask[..., :4] = True
    forced = torch.zeros(1, N, dtype=torch.bool)
    forced[0, 0] = True
    free = torch.ones(1, N, dtype=torch.bool)
    hits = torch.zeros(N)
    for seed in range(600):
        hits += random_blocks(mask, forced=forced, computable=free, seed=seed)[0, 0, 0]
    assert hits[0] == 600
    # 3 of 9 others: mean 200, standard deviation 11.5.
    assert (hits[1:] - 200).abs().max() < 5 * 11.5


def test_full_mask_stays_full():
    full = COMPUTABLE.expand(1, 2, N, N)
    control = random_blocks(full, forced=FORCED, computable=COMPUTABLE, seed=0)
    assert torch.equal(control, full)


def test_forced_blocks_survive_a_smaller_count():
    none = torch.zeros(1, 1, N, N, dtype=torch.bool)
    kept = keep_highest(torch.zeros(1, 1, N, N), none, forced=FORCED, computable=COMPUTABLE)
    assert torch.equal(kept[0, 0], FORCED & COMPUTABLE)


def test_equal_priorities_keep_the_lower_block():
    mask = torch.tensor([True, True, False, False])[None, None, None]
    free = torch.ones(1, 4, dtype=torch.bool)
    kept = keep_highest(torch.zeros(1, 1, 1, 4), mask, forced=~free, computable=free)
    assert kept.flatten().tolist() == [True, True, False, False]


@pytest.mark.parametrize("tokens_q", [160, 64])
def test_oracle_collects_the_most_exact_mass(tokens_q):
    q, k, _ = qkv(queries=tokens_q, keys=160, heads=4, kv_heads=2, head_dim=16)
    q = q * 2
    limits = {
        "forced": FORCED[-tokens_q // 16 :],
        "computable": COMPUTABLE[-tokens_q // 16 :],
    }
    mask = method_mask(heads=4)[:, :, -tokens_q // 16 :]
    oracle = oracle_blocks(mask, q, k, **limits, scale=0.25, block_size=16)
    assert torch.equal(oracle.sum(-1), mask.sum(-1))
    mass = exact_block_mass(q, k, scale=0.25, block_size=16)
    for seed in range(5):
        other = random_blocks(mask, **limits, seed=seed)
        collected = [(mass * kept).sum(-1) for kept in (oracle, other)]
        assert (collected[0] >= collected[1] - 1e-4).all()


def test_exact_mass_is_that_of_dense_attention():
    q, k, _ = qkv(queries=48, heads=2, head_dim=16)
    scores = (q @ k.mT * 0.25).masked_fill(torch.ones(48, 48).triu(1).bool(), -math.inf)
    expected = torch.softmax(scores, -1).unflatten(3, (-1, 16)).unflatten(2, (-1, 16)).sum((3, 5))
    actual = exact_block_mass(q, k, scale=0.25, block_size=16)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_seed_depends_on_every_part():
    seeds = {seed_of(*parts) for parts in ((0, 1, 2), (0, 2, 1), (1, 1, 2), (0, 1), (0, 12))}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)
