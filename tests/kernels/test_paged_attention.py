"""Paged decode attention: Triton kernels (interpreted) and CPU path against the definition."""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F

from repro import attention_products, kernel_compile
from repro.kernels.paged_attention import (
    Format,
    Pages,
    bench,
    cpu,
    merge_attention,
    paged_attention,
    paged_attention_reference,
)
from repro.kernels.paged_attention.kernel import choose_splits, paged_attention_triton
from repro.kernels.paged_attention.pages import dequantize, pack, unpack

PLAIN = Format()


@dataclass(frozen=True)
class Shape:
    """One problem; ``selected`` is how many pages a KV head attends to, None all."""

    lengths: tuple[int, ...] = (37,)
    kv_heads: int = 2
    n_rep: int = 2
    dim: int = 32
    page_size: int = 8
    k: Format = PLAIN
    v: Format = PLAIN
    selected: int | None = None

    def __str__(self) -> str:
        formats = "-".join(f"{f.bits}{f.axis[0]}" for f in (self.k, self.v))
        shape = f"H{self.kv_heads}x{self.n_rep}-D{self.dim}-page{self.page_size}"
        return f"T{'.'.join(map(str, self.lengths))}-{shape}-{formats}-selected{self.selected}"


SHAPES = [
    Shape(),
    Shape(lengths=(0, 1, 8, 9, 130), kv_heads=1, n_rep=4),
    Shape(lengths=(64, 33), n_rep=1, dim=80, page_size=16),
    Shape(lengths=(100,), kv_heads=3, n_rep=7, dim=128, page_size=24),
    Shape(lengths=(65, 0, 200), dim=64, page_size=16, selected=4),
    Shape(lengths=(41, 1), selected=6, page_size=5, n_rep=17),
    Shape(
        lengths=(150, 64, 3),
        dim=64,
        page_size=64,
        selected=2,
        k=Format(bits=4, axis="channel", group_size=32),
        v=Format(bits=2, axis="token", group_size=32),
    ),
    # Groups that no byte's values divide, and whole heads and pages.
    Shape(dim=24, k=Format(bits=2, group_size=6), v=Format(bits=4, group_size=3)),
    Shape(k=Format(bits=8, axis="channel"), v=Format(bits=8)),
]
PAIRS = [
    Shape(
        lengths=(21, 5),
        dim=16,
        k=Format(bits=k_bits, axis=k_axis, group_size=4),
        v=Format(bits=v_bits, axis=v_axis, group_size=4),
    )
    for k_bits, v_bits in itertools.product((2, 4, 8, 16), repeat=2)
    for k_axis, v_axis in (("channel", "token"), ("token", "channel"))
]


@dataclass(frozen=True)
class Inputs:
    q: torch.Tensor
    k: Pages
    v: Pages
    page_table: torch.Tensor
    lengths: torch.Tensor
    selected: torch.Tensor | None = None

    def attend(self, call=paged_attention, **options):
        options = {"selected": self.selected} | options
        if call is paged_attention:
            options["return_lse"] = True
        return call(self.q, self.k, self.v, self.page_table, self.lengths, **options)


def make_inputs(shape: Shape, dtype=torch.float32, seed=0) -> Inputs:
    """Scatter the pages of each sequence over a pool of more; spare values are large or any code."""
    random = torch.Generator().manual_seed(seed)
    counts = [-(-length // shape.page_size) for length in shape.lengths]
    n_pages, width = sum(counts) + 3, max(counts) + 2
    table = torch.full((len(counts), width), -1, dtype=torch.int32)
    order = torch.randperm(n_pages, generator=random).int()
    for row, count, start in zip(table, counts, itertools.accumulate([0, *counts]), strict=False):
        row[:count] = order[start : start + count]
    used = torch.zeros(n_pages, shape.page_size, dtype=torch.bool)
    for row, count, length in zip(table, counts, shape.lengths, strict=True):
        flags = torch.arange(count * shape.page_size) < length
        used[row[:count].long()] = flags.view(count, shape.page_size)
    pages = []
    for form in (shape.k, shape.v):
        size = (n_pages, shape.kv_heads, shape.page_size, shape.dim)
        made = Pages.allocate(*size, dtype=dtype, format=form)
        if form.quantized:
            made.data.random_(generator=random)
            made.scale.uniform_(0, 2 / 2**form.bits, generator=random)
            made.minimum.uniform_(-1.5, 0, generator=random)
        else:
            spare = 1e30 if dtype != torch.float16 else 6e4
            values = torch.randn(size, generator=random)
            made.data.copy_(values.where(used[:, None, :, None], torch.tensor(spare)))
        pages.append(made)
    heads = shape.kv_heads * shape.n_rep
    q = 2 * torch.randn(len(counts), heads, shape.dim, generator=random)
    selected = None
    if shape.selected is not None:
        draws = torch.rand(len(counts), shape.kv_heads, width + 1, generator=random).argsort(-1)
        # Logical pages at and beyond the end among them; one more stands for a pad.
        selected = draws.masked_fill(draws == width, -1)[..., : shape.selected].int()
    lengths = torch.tensor(shape.lengths, dtype=torch.int32)
    return Inputs(q.to(dtype), *pages, table, lengths, selected)


def triton_of(splits):
    def call(q, *arguments, scale=None, **options):
        scale = q.shape[2] ** -0.5 if scale is None else scale
        return paged_attention_triton(q, *arguments, scale=scale, splits=splits, **options)

    return call


def eager(x: Inputs) -> torch.Tensor:
    """Attend in the dtype of the inputs, as eager code would; packed pages are dequantised."""
    return x.attend(paged_attention_reference, compute_dtype=x.q.dtype)


def faults(x: Inputs, found) -> list[str]:
    """Return what is wrong, or nothing: the error (2-norm) against the fp64 definition must be at
    most twice that of eager code in the dtype."""
    out, lse = found
    # A query in fp64 keeps the output in fp64.
    exact, exact_lse = replace_q(x, torch.float64).attend(
        paged_attention_reference, compute_dtype=torch.float64
    )
    wrong = [] if out.dtype == x.q.dtype and lse.dtype == torch.float32 else ["dtype"]
    rough, rough_lse = eager(x)
    # One rounding is always allowed: eager code can be exact by luck.
    limit = 2 * (rough.double() - exact).norm() + torch.finfo(out.dtype).eps * exact.norm()
    error = (out.double() - exact).norm()
    wrong += [] if error <= limit else [f"output: error {error:.3g} above {limit:.3g}"]
    seen = exact_lse.isfinite()
    if not torch.equal(lse.isfinite(), seen) or (lse[~seen] != -torch.inf).any():
        return [*wrong, "log-sum-exp: not finite where it should be, or the other way"]
    if (out[~seen] != 0).any():
        wrong.append("output: not 0 where nothing is attended")
    if seen.any():
        limit = 2 * (rough_lse.double() - exact_lse)[seen].abs().max() + 1e-5
        error = (lse.double() - exact_lse)[seen].abs().max()
        wrong += [] if error <= limit else [f"log-sum-exp: error {error:.3g} above {limit:.3g}"]
    return wrong


def replace_q(x: Inputs, dtype) -> Inputs:
    return replace(x, q=x.q.to(dtype))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_matches_reference(shape, splits, nan_filled_empty):
    x = make_inputs(shape)
    assert faults(x, x.attend(triton_of(splits))) == []


# The interpreter multiplies the bit patterns of bf16 in tl.dot, so bf16 runs on the CPU path only.
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[6]], ids=str)
def test_triton_matches_reference_in_half_precision(shape, nan_filled_empty):
    x = make_inputs(shape, torch.float16)
    assert faults(x, x.attend(triton_of(2))) == []


@pytest.mark.parametrize("shape", PAIRS, ids=str)
def test_triton_matches_reference_in_every_format(shape, nan_filled_empty):
    x = make_inputs(shape)
    assert faults(x, x.attend(triton_of(2))) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES + PAIRS, ids=str)
def test_cpu_matches_reference(shape, dtype, nan_filled_empty):
    x = make_inputs(shape, dtype)
    assert faults(x, x.attend()) == []


@pytest.mark.parametrize("shape", SHAPES[:7], ids=str)
@pytest.mark.parametrize("products", [True, False], ids=["products", "flash"])
def test_both_ways_on_the_cpu_match_reference(products, shape, monkeypatch):
    """Which one runs is the machine's matter."""
    monkeypatch.setattr(attention_products, "are_faster", lambda dtype: products)
    x = make_inputs(shape, torch.bfloat16)
    assert faults(x, x.attend()) == []


@pytest.mark.parametrize("shape", SHAPES[:7], ids=str)
def test_small_chunks_match_reference(shape, monkeypatch):
    """Several chunks a row, several rows a call, also cut apart."""
    monkeypatch.setattr(cpu, "_CHUNK_TOKENS", 2 * shape.page_size)
    monkeypatch.setattr(cpu, "_CALL_TOKENS", 5 * shape.page_size)
    x = make_inputs(shape)
    assert faults(x, x.attend()) == []


@pytest.mark.parametrize("call", [paged_attention, triton_of(2)], ids=["cpu", "triton"])
def test_pages_of_another_dtype_than_q(call, nan_filled_empty):
    x = replace_q(make_inputs(Shape(v=Format(bits=8))), torch.float16)
    out, lse = x.attend(call)
    expected, expected_lse = x.attend(paged_attention_reference)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out, expected, atol=0, rtol=2e-3)
    torch.testing.assert_close(lse, expected_lse)


CALLS = {"reference": paged_attention_reference, "cpu": paged_attention, "triton": triton_of(2)}


@pytest.fixture(params=CALLS)
def call(request):
    return CALLS[request.param]


PACKED = Shape(
    lengths=(37, 0, 64), k=Format(bits=4, axis="channel"), v=Format(bits=2, group_size=8)
)
BOTH = pytest.mark.parametrize("shape", [replace(PACKED, k=PLAIN, v=PLAIN), PACKED], ids=str)


@BOTH
def test_equals_dense_attention_on_contiguous_values(shape, call):
    x = make_inputs(shape)
    out, _ = x.attend(call)
    for row, length in enumerate(shape.lengths):
        if length == 0:
            continue
        numbers = x.page_table[row, : -(-length // shape.page_size)].long()
        k, v = (
            dequantize(pages, numbers).transpose(0, 1).flatten(1, 2)[None, :, :length]
            for pages in (x.k, x.v)
        )
        dense = F.scaled_dot_product_attention(x.q[row, None, :, None], k, v, enable_gqa=True)
        torch.testing.assert_close(out[row], dense[0, :, 0], atol=1e-5, rtol=1e-5)


@BOTH
def test_all_pages_selected_in_any_order_equal_none(shape, call):
    x = make_inputs(shape)
    width = x.page_table.shape[1]
    order = torch.rand(len(shape.lengths), shape.kv_heads, width).argsort(-1).int()
    everything = replace(x, selected=order).attend(call)
    torch.testing.assert_close(everything, x.attend(call), atol=1e-5, rtol=1e-5)


@BOTH
def test_halves_merge_to_the_whole(shape, call):
    x = make_inputs(shape)
    even = torch.arange(0, x.page_table.shape[1], 2, dtype=torch.int32)
    halves = [
        replace(x, selected=part.expand(len(shape.lengths), shape.kv_heads, -1)).attend(call)
        for part in (even, even[:-1] + 1)
    ]
    merged = merge_attention(*zip(*halves, strict=True))
    torch.testing.assert_close(merged, x.attend(call), atol=1e-5, rtol=1e-5)


@BOTH
def test_the_place_of_a_page_does_not_matter(shape, call):
    x = make_inputs(shape)
    order = torch.randperm(x.k.n_pages, generator=torch.Generator().manual_seed(1))
    place = order.argsort()

    def moved(pages):
        tensors = (pages.data, pages.scale, pages.minimum)
        data, scale, minimum = (None if t is None else t[order] for t in tensors)
        return Pages(data, pages.format, scale, minimum)

    table = place[x.page_table.clamp(min=0).long()].int().masked_fill(x.page_table < 0, -1)
    assert torch.equal(table < 0, x.page_table < 0) and not torch.equal(table, x.page_table)
    there = replace(x, k=moved(x.k), v=moved(x.v), page_table=table).attend(call)
    assert all(map(torch.equal, there, x.attend(call)))


@BOTH
def test_what_no_sequence_holds_does_not_matter(shape, call):
    x = make_inputs(shape)
    before = x.attend(call)
    used = torch.zeros(x.k.n_pages, shape.page_size, dtype=torch.bool)
    for row, length in zip(x.page_table, shape.lengths, strict=True):
        for token in range(length):
            used[row[token // shape.page_size], token % shape.page_size] = True
    for pages in (x.k, x.v):
        spare = ~used[:, None, :, None].expand_as(pages.data)
        pages.data[spare] = 255 if pages.format.quantized else torch.nan
    assert all(map(torch.equal, x.attend(call), before))


def test_nothing_attended_gives_zero(call, nan_filled_empty):
    x = make_inputs(Shape(lengths=(0, 9, 9), selected=3))
    x.selected[1], x.selected[2] = -1, torch.tensor([-1, 3, 2], dtype=torch.int32)
    out, lse = x.attend(call)
    assert (out == 0).all() and (lse == -torch.inf).all()


@BOTH
def test_batch_equals_singles(shape, call):
    x = make_inputs(replace(shape, selected=4))
    out, lse = x.attend(call)
    for row in range(len(shape.lengths)):
        one = slice(row, row + 1)
        single = Inputs(
            x.q[one], x.k, x.v, x.page_table[one], x.lengths[one], x.selected[one]
        ).attend(call)
        torch.testing.assert_close(single, (out[one], lse[one]), atol=1e-6, rtol=1e-6)


def test_packed_pages_equal_their_dequantised_values(call):
    x = make_inputs(PACKED)
    plain = replace(x, k=Pages(dequantize(x.k), PLAIN), v=Pages(dequantize(x.v), PLAIN))
    torch.testing.assert_close(x.attend(call), plain.attend(call), atol=1e-5, rtol=1e-5)


def test_scale_is_applied(call):
    x = make_inputs(Shape())
    scaled = x.attend(call, scale=0.5)
    by_hand = replace(x, q=x.q * 0.5 * 32**0.5).attend(call)
    torch.testing.assert_close(scaled, by_hand, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_pack_undoes_unpack(bits):
    packed = torch.arange(256, dtype=torch.uint8).view(4, 64)
    assert torch.equal(pack(unpack(packed, bits), bits), packed)


def test_number_of_threads_changes_neither_result_nor_setting():
    x = make_inputs(Shape(lengths=(700, 300), kv_heads=4, page_size=16))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3, 2):
            torch.set_num_threads(threads)
            results.append(x.attend())
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-6, rtol=1e-6)


def test_a_query_without_kv_in_one_part_takes_the_other():
    out, lse = torch.randn(2, 3, 8), torch.randn(2, 3)
    nothing = torch.full((2, 3), -torch.inf)
    merged = merge_attention([torch.full_like(out, torch.nan), out], [nothing, lse])
    torch.testing.assert_close(merged, (out, lse))
    zero, none = merge_attention([out, out], [nothing, nothing])
    assert (zero == 0).all() and torch.equal(none, nothing)


@pytest.mark.parametrize(
    ("outs", "lses", "message"),
    [([], [], "at least one"), ([1, 1], [1], "equally many"), ([1, 2], [1, 1], r"must all be")],
)
def test_bad_parts_are_named(outs, lses, message):
    with pytest.raises(ValueError, match=f"merge_attention: .*{message}"):
        merge_attention([torch.zeros(n, 8) for n in outs], [torch.zeros(n) for n in lses])


def test_splits_fill_the_gpu_and_do_not_outnumber_the_tokens():
    assert choose_splits(131072, 8, 132) == 66
    assert choose_splits(131072, 16 * 8, 132) == 5
    assert choose_splits(100, 1, 132) == 1
    assert choose_splits(1 << 20, 1, 132) == 128


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_bench_compares_with_the_definition(share):
    params = bench.parameters(tokens=512, batch=2, share=share, bits=4)
    case = bench.Case(name="small", params=params)
    inputs = bench.make_inputs(case, torch.device("cpu"), 0)
    calls = bench.implementations(case, torch.device("cpu"))
    error = (calls["paged_attention"](inputs).float() - bench.SUITE.reference(case, inputs)).abs()
    assert error.max() <= bench.SUITE.compare(case, "paged_attention")
    assert ("paged_attention_all" in calls) == (share < 1)


GOOD = make_inputs(Shape(lengths=(20, 9), dim=16))
PACKED_16 = Pages.allocate(8, 2, 8, 16, dtype=torch.float32, format=Format(bits=4))
LIST = torch.zeros(2, 2, 3, dtype=torch.int32) - 1
BAD_ARGUMENTS = {
    "q must be [n_seq, H, D]": {"q": GOOD.q[0]},
    "D a multiple of 8": {"q": GOOD.q[..., :12]},
    "up to 256": {"q": torch.zeros(2, 4, 264)},
    "q must be float16, bfloat16 or float32": {"q": GOOD.q.double()},
    "H_kv dividing 3": {"q": GOOD.q[:, :3]},
    "k must hold [n_pages, H_kv, page_size, D]": {"q": GOOD.q[..., :8]},
    "v must hold [n_pages, H_kv, page_size, D]": {"v": Pages(GOOD.v.data[:, :, :4], PLAIN)},
    "k must hold uint8 with 4 bits": {"k": Pages(GOOD.k.data[..., :8], Format(bits=4))},
    "must be float16, bfloat16 or float32, got torch.float64": {
        "v": Pages(GOOD.v.data.double(), PLAIN)
    },
    "v must be contiguous": {"v": Pages(GOOD.v.data.mT.contiguous().mT, PLAIN)},
    "page_table must be [2, n_pages_max]": {"page_table": GOOD.page_table[:1]},
    "page_table must be int32": {"page_table": GOOD.page_table.long()},
    "lengths must be [2]": {"lengths": GOOD.lengths[:1]},
    "lengths must be int32": {"lengths": GOOD.lengths.long()},
    "lengths must lie in [0, 40]": {"lengths": torch.tensor([41, 0], dtype=torch.int32)},
    "got -1 to 0": {"lengths": torch.tensor([-1, 0], dtype=torch.int32)},
    "page_table must name pages in [0, 7]": {"lengths": torch.tensor([25, 0], dtype=torch.int32)},
    "selected must be [2, 2, n_selected]": {"selected": LIST[:, :1]},
    "selected must be int32": {"selected": LIST.long()},
    "selected must be -1 or more, got -2": {"selected": LIST - 1},
    "selected must name a page at most once a KV head, got page 0 twice": {"selected": LIST + 1},
    "scale must be finite, got nan": {"scale": float("nan")},
}


@pytest.mark.parametrize("message", BAD_ARGUMENTS)
def test_bad_argument_is_named(message):
    names = ("q", "k", "v", "page_table", "lengths")
    arguments = {name: getattr(GOOD, name) for name in names} | BAD_ARGUMENTS[message]
    of_types = any(name in message for name in ("int32", "float16", "uint8"))
    with pytest.raises(TypeError if of_types else ValueError) as caught:
        paged_attention(**arguments)
    assert str(caught.value).startswith("paged_attention: ")
    assert message in str(caught.value)


def test_gradients_are_refused():
    with pytest.raises(NotImplementedError, match="under torch.no_grad"):
        replace(GOOD, q=GOOD.q.clone().requires_grad_()).attend()


def test_kernels_compile_for_gpus_that_are_not_here():
    reports = kernel_compile.check("repro.kernels.paged_attention.compile_check")
    assert {report.capability for report in reports} == {80, 90, 100}
    for report in reports:
        assert report.shared_bytes <= kernel_compile.SHARED_LIMIT[report.capability], report
        assert report.spill_bytes == 0, report
