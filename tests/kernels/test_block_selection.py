"""Block selection: the three implementations agree to the bit; laws of the minimal set."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repro import kernel_compile
from repro.kernels.block_selection import causal_blocks, diagonal_blocks, select_blocks
from repro.kernels.block_selection.api import MASS_UNITS
from repro.kernels.block_selection.cpu import select_blocks_cpu
from repro.kernels.block_selection.kernel import select_blocks_triton
from repro.kernels.block_selection.reference import select_blocks_reference

IMPLEMENTATIONS = {"cpu": select_blocks_cpu, "triton": select_blocks_triton}


def random_mass(shape, seed=0, ties=False):
    """Draw masses; with ties they take few distinct values, zero among them."""
    generator = torch.Generator().manual_seed(seed)
    mass = torch.rand(shape, generator=generator)
    return (mass * 4).floor() / 4 if ties else mass**4


def inputs(shape, seed, ties, causal=True, offset=0):
    mass = (random_mass(shape, seed, ties).double() * MASS_UNITS).long()
    grid = {"query_offset": offset, "block_size": 16}
    computable = causal_blocks(*shape[2:], causal=causal, **grid)[None, None]
    forced = computable & diagonal_blocks(*shape[2:], **grid)
    forced = forced | (computable & (torch.arange(shape[3]) == 0))
    forced = forced if causal else torch.zeros_like(forced)
    return mass, *(x.expand(shape[0], -1, -1, -1) for x in (forced, computable))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "tied"])
@pytest.mark.parametrize(
    ("shape", "causal", "offset"),
    [
        ((1, 2, 1, 1), True, 0),
        ((1, 2, 5, 5), True, 0),
        ((2, 2, 3, 9), True, 6 * 16),
        ((1, 2, 3, 9), True, 6 * 16 - 5),
        ((1, 1, 3, 33), False, 0),
    ],
)
def test_equals_reference(name, ties, shape, causal, offset):
    for seed, share in enumerate((0.0, 0.5, 0.9, 1.0)):
        mass, forced, computable = inputs(shape, seed, ties, causal, offset)
        threshold = torch.full((shape[1],), share, dtype=torch.float64)
        options = {"forced": forced, "computable": computable}
        expected = select_blocks_reference(mass, threshold, **options)
        assert torch.equal(IMPLEMENTATIONS[name](mass, threshold, **options), expected)


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    share=st.sampled_from([0.0, 0.2, 0.5, 0.75, 0.9, 1.0]),
)
def test_triton_equals_reference_on_ties(values, share):
    mass = torch.tensor(values)[None, None, None]
    everything = torch.ones(1, 1, 1, len(values), dtype=torch.bool)
    forced = torch.zeros_like(everything)
    forced[..., -1] = len(values) % 2 == 0
    threshold = torch.tensor([share], dtype=torch.float64)
    options = {"forced": forced, "computable": everything}
    expected = select_blocks_reference(mass, threshold, **options)
    for implementation in IMPLEMENTATIONS.values():
        assert torch.equal(implementation(mass, threshold, **options), expected)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_minimal_set_reaches_threshold(causal, share):
    mass = random_mass((1, 2, 12, 12))
    kept = select_blocks(mass, share, causal=causal, block_size=16)
    allowed = causal_blocks(12, 12, causal=causal, block_size=16)
    mass = torch.where(allowed, mass, 0.0).double()
    need = share * mass.sum(-1)
    collected = torch.where(kept, mass, 0.0).sum(-1)
    assert (collected >= need - 1e-9).all()
    assert not (kept & ~allowed).any()
    forced = torch.zeros(12, 12, dtype=torch.bool)
    if causal:
        forced = torch.eye(12, dtype=torch.bool) | (torch.arange(12) == 0)
    optional = torch.where(kept & ~forced, mass, torch.inf).amin(-1)
    some = optional.isfinite()
    assert some.any()
    assert (collected - optional < need)[some].all()


def test_grows_with_threshold():
    mass = random_mass((1, 2, 12, 12), ties=True)
    kept = [select_blocks(mass, share / 20, block_size=16) for share in range(21)]
    for smaller, larger in itertools.pairwise(kept):
        assert not (smaller & ~larger).any()


def test_forced_blocks_alone_at_threshold_zero():
    kept = select_blocks(random_mass((1, 1, 9, 9)), 0.0, block_size=16)
    expected = torch.eye(9, dtype=torch.bool) | (torch.arange(9) == 0).expand(9, 9)
    assert torch.equal(kept[0, 0], expected)
    bare = select_blocks(
        random_mass((1, 1, 9, 9)), 0.0, block_size=16, keep_sink=False, keep_recent=False
    )
    assert not bare.any()


def test_everything_at_threshold_one_also_without_mass():
    kept = select_blocks(torch.zeros(1, 1, 6, 6), 1.0, block_size=16)
    assert torch.equal(kept[0, 0], causal_blocks(6, 6, block_size=16))


def test_head_threshold_equals_scalar():
    mass = random_mass((1, 3, 10, 10))
    shares = torch.tensor([0.0, 0.5, 0.95])
    together = select_blocks(mass, shares, block_size=16)
    for head, share in enumerate(shares.double()):
        alone = select_blocks(mass[:, head : head + 1], share.item(), block_size=16)
        assert torch.equal(together[:, head : head + 1], alone)


def test_stable_order_keeps_lower_block():
    mass = torch.tensor([0.1, 0.3, 0.3, 0.3])[None, None, None]
    kept = select_blocks(mass, 0.5, causal=False)
    assert kept.flatten().tolist() == [False, True, True, False]


def test_left_padding_moves_the_sink():
    real = torch.tensor([[False, False, True, True, True], [True] * 5])
    kept = select_blocks(random_mass((2, 1, 5, 5)), 0.0, block_size=16, real_blocks=real)
    assert kept[0, 0, 4].tolist() == [False, False, True, False, True]
    assert kept[1, 0, 4].tolist() == [True, False, False, False, True]


def test_offset_within_a_block_forces_both_diagonals():
    kept = select_blocks(
        torch.zeros(1, 1, 2, 6), 0.0, query_offset=3 * 16 + 5, block_size=16, keep_sink=False
    )
    assert kept[0, 0].tolist() == [
        [False, False, False, True, True, False],
        [False, False, False, False, True, True],
    ]


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.8])
def test_quirk_written_out_row_by_row(threshold):
    mass = random_mass((1, 1, 8, 8))
    kept = select_blocks(mass, threshold, block_size=16, quirk_rows=8)[0, 0]
    for row in range(8):
        shares = mass[0, 0, row, : row + 1].double().tolist()
        need = threshold * sum(shares)
        order = sorted(range(row), key=lambda j: -shares[j])
        expected = {0, row}
        before = [0.0]  # what is held before each block of the order, one place late
        held = shares[row]
        for block in order:
            if before[-1] < need:
                expected.add(block)
            before.append(held)
            held += shares[block]
        assert set(kept[row].nonzero().flatten().tolist()) == expected, row


def test_quirk_keeps_at_most_two_blocks_more():
    mass = random_mass((1, 4, 16, 16))
    clean = select_blocks(mass, 0.6, block_size=16)
    quirk = select_blocks(mass, 0.6, block_size=16, quirk_rows=8)
    more = quirk.sum(-1) - clean.sum(-1)
    assert (more[:, :, 8:] == 0).all() and torch.equal(clean[:, :, 8:], quirk[:, :, 8:])
    assert more.min() >= 0 and 1 <= more.max() <= 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mass": torch.zeros(2, 3)}, "mass must be"),
        ({"threshold": -0.1}, "threshold must be"),
        ({"threshold": float("nan")}, "threshold must be"),
        ({"threshold": torch.zeros(3)}, "threshold must be"),
        ({"real_blocks": torch.ones(1, 3, dtype=torch.bool)}, "real_blocks must be"),
    ],
)
def test_bad_input_is_named(arguments, message):
    good = {"mass": torch.zeros(1, 2, 4, 4), "threshold": 0.5}
    with pytest.raises(ValueError, match=message):
        select_blocks(**(good | arguments))


def test_compiles_for_gpus_without_one():
    reports = kernel_compile.check("repro.kernels.block_selection.compile_check")
    assert {report.capability for report in reports} == {80, 90, 100}
    assert all(report.spill_bytes == 0 for report in reports)
