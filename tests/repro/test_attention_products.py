"""Attention by matrix products: what the rounding of scores must not touch."""

import pytest
import torch

from repro import attention_products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_needle_keeps_its_weight(dtype):
    """One key of 64 has nearly all of the mass, in one of two rows."""
    q = torch.full((2, 16, 4), 8.0, dtype=dtype)
    k = 0.1 * torch.randn(2, 64, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    k[1, 37] = 8.0
    v = torch.zeros(2, 64, 4, dtype=dtype)
    v[1, 37] = 3.0
    out, lse = attention_products.attend(q, k, v, 1.0)
    torch.testing.assert_close(lse[1], torch.full((16,), 256.0))
    torch.testing.assert_close(out[1], torch.full((16, 4), 3.0, dtype=dtype))
    expected = (q[0].float() @ k[0].float().T).logsumexp(-1)
    torch.testing.assert_close(lse[0], expected, atol=0.01, rtol=0)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (4, 3), (4, 700), (128, 300)])
def test_error_is_at_most_twice_that_of_eager_code(queries, keys):
    random = torch.Generator().manual_seed(queries)
    q, k, v = (torch.randn(3, n, 64, generator=random).bfloat16() for n in (queries, keys, keys))
    exact = torch.softmax(q.double() @ k.double().mT / 8, -1) @ v.double()
    eager = torch.softmax(q @ k.mT / 8, -1) @ v
    out, _ = attention_products.attend(q, k, v, 0.125)
    limit = 2 * (eager.double() - exact).norm() + torch.finfo(q.dtype).eps * exact.norm()
    assert (out.double() - exact).norm() <= limit


@pytest.mark.parametrize("shift", [-300.0, 0.0, 80.0])
@pytest.mark.parametrize("spread", [1.0, 12.0])
def test_large_scores_are_rounded_near_the_largest(shift, spread):
    """A score that is common to all keys, or peaks among them, costs no accuracy."""
    random = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, n, 64, generator=random).bfloat16() for n in (32, 900, 900))
    q[..., 0], k[..., 0] = 16.0, shift / 2
    exact = torch.softmax((spread / 8) * (q.double() @ k.double().mT), -1) @ v.double()
    out, lse = attention_products.attend(q, k, v, spread / 8)
    error = (out.double() - exact).norm() / exact.norm()
    assert error < 0.012
    expected = ((spread / 8) * (q.double() @ k.double().mT)).logsumexp(-1)
    # Half a step of bf16 for a score 4 below the largest.
    torch.testing.assert_close(lse.double(), expected, atol=2.0**-6, rtol=2.0**-17)


def test_pieces_equal_the_whole(monkeypatch):
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 16, generator=random) for n in (4, 200, 200))
    whole = attention_products.attend(q, k, v, 0.25)
    monkeypatch.setattr(attention_products, "_SCORE_KEYS", 48)
    for found, expected in zip(attention_products.attend(q, k, v, 0.25), whole, strict=True):
        torch.testing.assert_close(found, expected)
