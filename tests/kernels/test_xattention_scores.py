"""Antidiagonal scores: Triton and CPU paths against the reference, and laws of the estimate."""

import itertools
import math

import pytest
import torch

from repro import kernel_compile
from repro.kernels.xattention_scores import xattention_scores
from repro.kernels.xattention_scores.api import pairing
from repro.kernels.xattention_scores.cpu import xattention_scores_cpu
from repro.kernels.xattention_scores.kernel import xattention_scores_triton
from repro.kernels.xattention_scores.reference import xattention_scores_reference
from repro.testing import qkv

IMPLEMENTATIONS = {"cpu": xattention_scores_cpu, "triton": xattention_scores_triton}

# name: (qkv arguments, stride, block_size, causal)
SHAPES = {
    "one token": ({"queries": 1}, 4, 16, True),
    "multiple": ({"queries": 64, "heads": 1}, 4, 16, True),
    "plus one": ({"queries": 65}, 4, 16, True),
    "odd width": ({"queries": 70, "head_dim": 24}, 8, 32, True),
    "grouped, batch": ({"queries": 49, "heads": 4, "kv_heads": 2, "batch": 2}, 8, 16, True),
    "chunked": ({"queries": 32, "keys": 96}, 4, 16, True),
    "chunked, odd offset": ({"queries": 33, "keys": 102}, 8, 32, True),
    "non-causal": ({"queries": 50}, 4, 16, False),
    "cross": ({"queries": 40, "keys": 70}, 4, 16, False),
    "stride one": ({"queries": 40}, 1, 16, True),
    "several tiles": ({"queries": 140, "heads": 1}, 1, 16, True),
    "whole block": ({"queries": 70}, 16, 16, True),
    "width in two parts": ({"queries": 40, "heads": 1, "head_dim": 80}, 4, 16, True),
}


def options_of(q, k, stride, block_size, causal, padding=None, pattern="antidiagonal"):
    real_q = None
    if padding is not None and (causal or q.shape[2] == k.shape[2]):
        real_q = padding[:, k.shape[2] - q.shape[2] :]
    return {
        "order": pairing(pattern, stride),
        "block_size": block_size,
        "causal": causal,
        "scale": q.shape[3] ** -0.5,
        "real_q": real_q,
        "real_k": padding,
    }


def left_padding(batch, tokens, seed=3):
    """Draw left padding; the first row of several has none."""
    counts = torch.randint(
        0, tokens // 2 + 1, (batch,), generator=torch.Generator().manual_seed(seed)
    )
    counts[0] = 0 if batch > 1 else tokens // 3
    return torch.arange(tokens) >= counts[:, None]


@pytest.mark.parametrize("padded", [False, True], ids=["real", "padded"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_matches_reference(name, shape, padded, nan_filled_empty):
    arguments, stride, block_size, causal = SHAPES[shape]
    q, k, _ = qkv(**({"heads": 2, "head_dim": 16} | arguments))
    # Later keys weigh more, so that the running maximum of a row has to rise from tile to tile.
    q, k = q * 3, k * torch.linspace(0.3, 2, k.shape[2])[:, None]
    padding = left_padding(k.shape[0], k.shape[2]) if padded else None
    options = options_of(q, k, stride, block_size, causal, padding)
    expected = xattention_scores_reference(q, k, **options)
    actual = IMPLEMENTATIONS[name](q, k, **options)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_bf16_error_is_that_of_eager():
    # Of the CPU path alone: the interpreter of Triton cannot multiply bf16.
    q, k, _ = qkv(queries=160, head_dim=32, dtype=torch.bfloat16)
    options = options_of(q, k, 8, 32, True)
    expected = xattention_scores_reference(q, k, **options)
    # The same eager code, its scores rounded to bf16 as a bf16 matmul leaves them.
    groups = q.unflatten(2, (-1, 8))[:, :, :, options["order"]].flatten(3)
    scores = (groups @ k.unflatten(2, (-1, 8)).flatten(3).mT).float() * (options["scale"] / 8)
    hidden = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1)
    eager = torch.softmax(scores.masked_fill(hidden, -math.inf), dim=-1)
    eager = eager.unflatten(3, (-1, 4)).unflatten(2, (-1, 4)).sum((3, 5))
    actual = xattention_scores_cpu(q, k, **options)
    assert (actual - expected).abs().max() <= 2 * (eager - expected).abs().max()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_takes_views(name):
    q, k, _ = qkv(queries=48, heads=2, head_dim=16)
    options = options_of(q, k, 4, 16, True)
    expected = IMPLEMENTATIONS[name](q, k, **options)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    assert torch.equal(IMPLEMENTATIONS[name](*views, **options), expected)


@pytest.mark.parametrize("pattern", ["antidiagonal", "diagonal", "random"])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_patterns_match_reference(name, pattern):
    q, k, _ = qkv(queries=64, heads=1, head_dim=16)
    options = options_of(q, k, 8, 16, True, pattern=pattern)
    expected = xattention_scores_reference(q, k, **options)
    torch.testing.assert_close(
        IMPLEMENTATIONS[name](q, k, **options), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("pattern", ["antidiagonal", "diagonal"])
def test_scores_are_sums_over_antidiagonals(pattern):
    # A block of one group makes a cell the softmax of one score.
    q, k, _ = qkv(queries=96, heads=1, head_dim=8)
    q = 4 * q  # else the softmax is too flat to tell two sums apart
    mass = xattention_scores(q, k, stride=16, block_size=16, causal=False, pattern=pattern)
    sums = torch.zeros(6, 6)
    for i, j, step in itertools.product(range(6), range(6), range(16)):
        row = 15 - step if pattern == "antidiagonal" else step
        sums[i, j] += q[0, 0, 16 * i + row] @ k[0, 0, 16 * j + step]
    expected = torch.softmax(sums * 8**-0.5 / 16, -1)
    torch.testing.assert_close(mass[0, 0], expected, rtol=1e-4, atol=1e-6)
    assert expected.std() > 0.02


@pytest.mark.parametrize("causal", [True, False])
def test_stride_one_is_exact_block_mass(causal):
    q, k, _ = qkv(queries=80, head_dim=16)
    scores = (q @ k.mT) * 16**-0.5
    if causal:
        scores = scores.masked_fill(torch.ones(80, 80, dtype=torch.bool).triu(1), -math.inf)
    exact = torch.softmax(scores, -1).unflatten(3, (-1, 16)).unflatten(2, (-1, 16)).sum((3, 5))
    mass = xattention_scores(q, k, stride=1, block_size=16, causal=causal)
    torch.testing.assert_close(mass, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_sum_to_their_groups(dtype):
    q, k, _ = qkv(queries=128 + 19, dtype=dtype)
    sums = xattention_scores(q, k, stride=8, block_size=64).sum(-1)
    expected = torch.tensor([8.0, 8.0, 3.0]).expand_as(sums)
    torch.testing.assert_close(sums, expected, rtol=1e-2, atol=0)


def test_equal_keys_spread_mass_evenly():
    q, k, _ = qkv(queries=128, head_dim=16)
    k = k[:, :, :1].expand_as(k)
    mass = xattention_scores(q, k, stride=8, block_size=32)
    # Group i sees i + 1 groups, each with 1 / (i + 1).
    seen = torch.arange(1, 17).double()
    rows = torch.where(seen[None, :] <= seen[:, None], 1 / seen[:, None], 0.0)
    expected = rows.unflatten(1, (-1, 4)).unflatten(0, (-1, 4)).sum((1, 3)).float()
    torch.testing.assert_close(mass, expected.expand_as(mass), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stride", [4, 16])
def test_independent_of_chunk_size(stride):
    q, k, _ = qkv(queries=512, head_dim=16)
    whole = xattention_scores(q, k, stride=stride, chunk_size=512)
    for chunk_size in (128, 256, None):
        parts = xattention_scores(q, k, stride=stride, chunk_size=chunk_size)
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


def test_prefill_in_chunks_gives_rows_of_the_whole():
    q, k, _ = qkv(queries=192, head_dim=16)
    whole = xattention_scores(q, k, stride=8, block_size=32)
    second = xattention_scores(q[:, :, 64:128], k[:, :, :128], stride=8, block_size=32)
    torch.testing.assert_close(second, whole[:, :, 2:4, :4], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_padding_changes_nothing_for_real_blocks(name, causal):
    q, k, _ = qkv(queries=96, heads=2, head_dim=16)
    alone = IMPLEMENTATIONS[name](q, k, **options_of(q, k, 8, 32, causal))
    junk, junk_k, _ = qkv(queries=64, heads=2, head_dim=16, seed=9)
    real = torch.arange(160)[None] < 96
    for side in ("right", "left"):
        parts = (q, junk * 5) if side == "right" else (junk * 5, q)
        padded_q = torch.cat(parts, 2)
        padded_k = torch.cat((k, junk_k * 5) if side == "right" else (junk_k * 5, k), 2)
        mask = real if side == "right" else real.flip(1)
        options = options_of(padded_q, padded_k, 8, 32, causal, mask)
        mass = IMPLEMENTATIONS[name](padded_q, padded_k, **options)
        inner = mass[:, :, :3, :3] if side == "right" else mass[:, :, 2:, 2:]
        torch.testing.assert_close(inner, alone, rtol=1e-4, atol=1e-5)
        assert mass.sum() == pytest.approx(inner.sum().item(), rel=1e-5)


def test_appended_tokens_leave_earlier_rows_alone():
    q, k, _ = qkv(queries=128, head_dim=16)
    short = xattention_scores(q[:, :, :96], k[:, :, :96], stride=8, block_size=32)
    longer = xattention_scores(q, k, stride=8, block_size=32)
    torch.testing.assert_close(longer[:, :, :3, :3], short, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 3}, "stride must divide"),
        ({"stride": 0}, "stride must divide"),
        ({"stride": 8, "block_size": 48}, "block_size must be"),
        ({"stride": 8, "pattern": "slash"}, "pattern must be"),
        ({"stride": 8, "scale": float("inf")}, "scale must be"),
        ({"stride": 8, "key_padding_mask": torch.ones(1, 3)}, "key_padding_mask must be"),
    ],
)
def test_bad_options_are_named(options, message):
    q, k, _ = qkv(queries=32)
    with pytest.raises(ValueError, match=message):
        xattention_scores(q, k, **options)


def test_bad_tensors_are_named():
    q, k, _ = qkv(queries=32)
    for bad_q, bad_k, message in (
        (q[0], k, "q must be"),
        (q.double(), k.double(), "q must be"),
        (q, k[:, :3], "H must be a multiple"),
        (q, k.bfloat16(), "share dtype"),
        (q, k[..., :8], "agree in B and D"),
        (q, k[:, :, :8], "Tq must be at most Tk"),
    ):
        with pytest.raises(ValueError, match=message):
            xattention_scores(bad_q, bad_k, stride=8)


def test_compiles_for_gpus_without_one():
    reports = kernel_compile.check("repro.kernels.xattention_scores.compile_check")
    assert {report.capability for report in reports} == {80, 90, 100}
    for report in reports:
        assert report.shared_bytes <= kernel_compile.SHARED_LIMIT[report.capability], report
        assert report.spill_bytes == 0, report
