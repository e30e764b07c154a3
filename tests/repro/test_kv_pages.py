"""The growing pool of pages that sequences share."""

import pytest
import torch

from repro.attention_patch import dense_causal
from repro.errors import MissingResource
from repro.kernels.paged_attention import Format
from repro.kv_cache import LayerShape
from repro.kv_pages import PagedStore

SHAPE = LayerShape(0, 2, 4, 2, 32, torch.float32, torch.device("cpu"))


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(lengths=(37, 5), **options):
    """Return a store of two sequences that grew in turns, and what they were given."""
    store = PagedStore(SHAPE, page_size=8, **options)
    pairs = [
        [drawn(1, 2, n, 32, seed=7 * row + i) for i in range(2)] for row, n in enumerate(lengths)
    ]
    for begin in range(0, max(lengths), 16):
        for row, (k, v) in enumerate(pairs):
            part = slice(begin, min(begin + 16, lengths[row]))
            if begin < lengths[row]:
                store.append(k[:, :, part], v[:, :, part], row)
    return store, pairs


def test_reads_back_what_was_stored():
    store, pairs = filled()
    assert store.lengths == [37, 5]
    for row, (k, v) in enumerate(pairs):
        for begin, end in ((0, k.shape[2]), (3, 5), (4, 4), (min(9, k.shape[2]), k.shape[2])):
            assert torch.equal(store.keys(row, begin, end), k[:, :, begin:end])
            assert torch.equal(store.values(row, begin, end), v[:, :, begin:end])


def test_attends_over_what_is_held():
    store, pairs = filled()
    q, new_k, new_v = drawn(2, 4, 1, 32, seed=20), drawn(2, 2, 1, 32, seed=21), drawn(2, 2, 1, 32)
    store.append(new_k, new_v)
    out, _ = store.attend(q, 0.3)
    for row, (k, v) in enumerate(pairs):
        k, v = torch.cat([k, new_k[row : row + 1]], 2), torch.cat([v, new_v[row : row + 1]], 2)
        expected = dense_causal(q[row : row + 1], k, v, 0.3)
        torch.testing.assert_close(out[row : row + 1], expected, atol=1e-5, rtol=1e-5)


def test_values_may_lag_behind_keys():
    store, _ = filled()
    k = drawn(1, 2, 9, 32, seed=30)
    store.append(k, None, 0)
    assert store.lengths == [37, 5] and store.k_lengths == [46, 5]
    assert torch.equal(store.keys(0, 37, 46), k)
    out, lse = store.attend(drawn(2, 4, 1, 32, seed=20), 0.3)
    again, _ = filled()
    expected, expected_lse = again.attend(drawn(2, 4, 1, 32, seed=20), 0.3)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


def test_values_of_one_row_alone_may_lag_behind():
    store = PagedStore(SHAPE, page_size=8)
    store.append(drawn(1, 2, 16, 32, seed=1), None, 0)
    v = drawn(2, 2, 9, 32, seed=2)
    store.append(None, v)
    assert store.v_lengths == [9, 9]
    for row in range(2):
        assert torch.equal(store.values(row, 0, 9), v[row : row + 1])


def test_what_is_held_stays_near_what_is_used():
    store = PagedStore(SHAPE, page_size=8, k_format=Format(bits=4, group_size=32))
    for step in range(300):
        store.append(drawn(2, 2, 1, 32, seed=step), drawn(2, 2, 1, 32, seed=step))
    used = sum(-(-length // 8) for length in store.lengths)
    assert used <= store.k.n_pages == store.v.n_pages <= used * 33 / 32 + 2
    tokens = store.k.n_pages * 8
    bytes_held = store.k.nbytes + store.v.nbytes
    # Codes, one scale and one minimum a token and head; plain values. Two heads.
    assert bytes_held == tokens * 2 * (32 * 4 // 8 + 2 * 4) + tokens * 2 * 32 * 4


def test_a_context_over_the_pool_is_told_and_nothing_is_lost():
    store, pairs = filled(max_tokens=56)
    with pytest.raises(MissingResource, match="must fit in the pool of 56 tokens, got 53 for one"):
        store.append(drawn(1, 2, 16, 32), drawn(1, 2, 16, 32), 0)
    assert store.lengths == [37, 5]
    assert torch.equal(store.keys(0, 0, 37), pairs[0][0])
    store.append(drawn(1, 2, 3, 32), drawn(1, 2, 3, 32), 0)  # the rest of its last page
