"""Quantise-and-append: laws of the rule, the three implementations to the bit, pages untouched."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repro import kernel_compile
from repro.kernels.kv_quantize import append, append_reference, quantize, quantize_reference
from repro.kernels.kv_quantize.kernel import append_triton, quantize_triton
from repro.kernels.paged_attention import Format, Pages
from repro.kernels.paged_attention.pages import dequantize, pack, unpack

# Of the interpreter, where padding or a bad group is not finite.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

QUANTIZE = {"cpu": quantize, "triton": quantize_triton}
APPEND = {"cpu": append, "triton": append_triton}
FORMATS = [
    Format(bits=bits, axis=axis, group_size=size)
    for bits in (2, 4, 8)
    for axis in ("token", "channel")
    for size in (None, 4)
]
PAGED = [Format(), Format(bits=4, group_size=8), Format(bits=2, axis="channel", group_size=4)]


def values(*shape, dtype=torch.float32, seed=0):
    """Draw Gaussian values with a channel of outliers and groups of equal values."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    x[..., 1] *= 30
    x[..., :4, :4] = 0.3
    return x.to(dtype)


def read_back(x, format, dtype=torch.float32):
    """Return (codes, scale, minimum, values) of quantised ``x``; the last three of its shape."""
    packed, scale, minimum = quantize(x, format)
    dim = -1 if format.axis == "token" else -2
    size = format.group_size or x.shape[dim]
    scale, minimum = (s.to(dtype).repeat_interleave(size, dim) for s in (scale, minimum))
    codes = unpack(packed, format.bits)
    return codes, scale, minimum, codes.to(dtype) * scale + minimum


def make_pages(format, *, page_size=8, heads=2, dim=16, n_pages=9, dtype=torch.float32):
    """Return pages full of noise, which shows what a call has written."""
    pages = Pages.allocate(n_pages, heads, page_size, dim, dtype=dtype, format=format)
    for number, tensor in enumerate((pages.data, pages.scale, pages.minimum)):
        if tensor is not None:
            noise = torch.randint(
                1, 200, tensor.shape, generator=torch.Generator().manual_seed(number)
            )
            tensor.copy_(noise)
    return pages


def copy_of(pages):
    return replace(
        pages,
        data=pages.data.clone(),
        scale=None if pages.scale is None else pages.scale.clone(),
        minimum=None if pages.minimum is None else pages.minimum.clone(),
    )


def tensors(pages):
    return [t for t in (pages.data, pages.scale, pages.minimum) if t is not None]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


def int32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


TABLE = torch.tensor([[7, 2, 5], [0, 8, 3]], dtype=torch.int32)


@pytest.mark.parametrize("name", QUANTIZE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_equals_reference_to_the_bit(name, dtype, format, nan_filled_empty):
    shape = (2, 12, 24) if format.group_size else (2, 3, 5, 40)
    x = values(*shape, dtype=dtype).transpose(0, 1).contiguous().transpose(0, 1)
    actual = QUANTIZE[name](x, format)
    for part, expected in zip(actual, quantize_reference(x, format), strict=True):
        assert part.dtype == expected.dtype and torch.equal(part, expected)


# The interpreter does not round to bf16 as a GPU does, so bf16 runs on the CPU path only.
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    bits=st.sampled_from([2, 4, 8]),
    axis=st.sampled_from(["token", "channel"]),
    size=st.integers(1, 6),
    groups=st.integers(1, 4),
    other=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_cpu_equals_reference_on_any_shape(bits, axis, size, groups, other, dtype):
    tokens, dim = (other, 4 * size * groups) if axis == "token" else (size * groups, 4 * other)
    x = values(2, tokens, dim, dtype=dtype, seed=other)
    format = Format(bits=bits, axis=axis, group_size=size)
    for part, expected in zip(quantize(x, format), quantize_reference(x, format), strict=True):
        assert torch.equal(part, expected)


@pytest.mark.parametrize("axis", ["token", "channel"])
def test_pieces_equal_the_whole(axis, monkeypatch):
    from repro.kernels.kv_quantize import cpu

    x, format = values(3, 24, 16), Format(bits=4, axis=axis, group_size=8)
    whole = quantize(x, format)
    monkeypatch.setattr(cpu, "_PIECE", 300)
    for part, expected in zip(quantize(x, format), whole, strict=True):
        assert torch.equal(part, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_error_is_at_most_half_a_step(format, dtype):
    x = values(2, 16, 24, dtype=dtype).double()
    _, scale, minimum, found = read_back(x.to(dtype), format, torch.float64)
    # A scale rounded down leaves the maximum above the last step.
    last = minimum + scale * (2**format.bits - 1)
    limit = torch.maximum(scale / 2, x - last) * (1 + 1e-6)
    assert ((x - found).abs() <= limit + 1e-6 * x.abs()).all()
    dim = -1 if format.axis == "token" else -2
    grouped = [t.unflatten(dim, (-1, format.group_size or t.shape[dim])) for t in (x, found, scale)]
    (low, high), (found_low, found_high) = ((t.amin(dim), t.amax(dim)) for t in grouped[:2])
    assert torch.equal(low, found_low)
    eps = torch.finfo(dtype).eps
    # At worst the rounded scale makes the maximum's code one less.
    steps = 1.0 if eps * 2**format.bits > 0.5 else eps * 2**format.bits
    assert ((high - found_high).abs() <= steps * grouped[2].amax(dim) + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_values_read_back_get_the_same_codes(format, dtype):
    codes, *_, found = read_back(values(2, 16, 24, dtype=dtype), format)
    assert torch.equal(read_back(found, format)[0], codes)


def test_halves_go_to_even():
    x = torch.tensor([[0.0, 0.5, 1.5, 2.5, 3.5, 13.5, 14.5, 15.0]])
    expected = torch.tensor([[0, 0, 2, 2, 4, 14, 14, 15]], dtype=torch.uint8)
    for implementation in (quantize, quantize_triton, quantize_reference):
        codes = unpack(implementation(x, Format(bits=4))[0], 4)
        assert torch.equal(codes, expected)


@pytest.mark.parametrize("value", [0.0, -0.3, 6e4, 6e-8])
@pytest.mark.parametrize("name", QUANTIZE)
def test_equal_values_are_exact(name, value):
    x = torch.full((4, 8), value, dtype=torch.float16)
    for axis in ("token", "channel"):
        packed, scale, minimum = QUANTIZE[name](x, Format(bits=2, axis=axis))
        assert (packed == 0).all() and (scale == 1).all() and (minimum == x[0, 0]).all()


def test_a_range_below_the_least_scale_is_stored_as_none():
    x = torch.tensor([[0.0, 2**-24] * 4], dtype=torch.float16)
    packed, scale, _ = quantize(x, Format(bits=8))
    assert (packed == 0).all() and (scale == 1).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_code_survives_packing(bits):
    codes = torch.tensor(list(itertools.product(range(2**bits), repeat=max(1, 4 // bits))))
    codes = codes.repeat(1, 8 // bits).to(torch.uint8)
    assert torch.equal(unpack(pack(codes, bits), bits), codes)
    # As values between 0 and the last code, each is its own code.
    x = torch.cat(
        [codes, torch.full((len(codes), 8), 0), torch.full((len(codes), 8), 2**bits - 1)], 1
    )
    for implementation in (quantize, quantize_triton):
        packed, scale, minimum = implementation(x.float(), Format(bits=bits))
        assert torch.equal(unpack(packed, bits), x.to(torch.uint8))
        assert (scale == 1).all() and (minimum == 0).all()


@pytest.mark.parametrize("name", QUANTIZE)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_in_its_group(name, wrong):
    x = values(8, 16)
    spoilt = x.clone()
    spoilt[2, 5] = wrong
    format = Format(bits=2, axis="channel", group_size=4)
    for part, expected in zip(QUANTIZE[name](spoilt, format), quantize(x, format), strict=True):
        others = torch.ones_like(part, dtype=torch.bool)
        if part.dtype == torch.uint8:  # of byte 1 only the code of channel 5 is lost
            others[:4, 1] = False
            keep = 0b11110011
            assert torch.equal(part[:4, 1] & keep, expected[:4, 1] & keep)
        else:
            others[0, 5] = False
        assert torch.equal(part[others], expected[others])


@pytest.mark.parametrize("name", APPEND)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("format", PAGED, ids=str)
def test_append_equals_reference_and_leaves_the_rest(name, dtype, format):
    x = values(2, 12, 2, 16, dtype=dtype).transpose(1, 2)  # [2, 2, 12, 16]
    before = make_pages(format, dtype=dtype)
    lengths, counts = int32(4, 12), int32(12, 8)
    actual, expected = copy_of(before), copy_of(before)
    APPEND[name](x, actual, TABLE, lengths, counts)
    append_reference(x, expected, TABLE, lengths, counts)
    assert equal(actual, expected)
    written = torch.zeros(9, 8, dtype=torch.bool)
    for table, length, count in zip(TABLE, (4, 12), (12, 8), strict=True):
        for position in range(length, length + count):
            written[table[position // 8], position % 8] = True
    for new, old in zip(tensors(actual), tensors(before), strict=True):
        slots = written.view(9, new.shape[2], -1)[..., 0]
        same = (new == old).all(dim=-1).all(dim=1)  # [n_pages, slots]
        assert same[~slots].all() and not same[slots].any()


@pytest.mark.parametrize("name", APPEND)
@pytest.mark.parametrize("format", PAGED, ids=str)
def test_whole_equals_parts(name, format):
    x = values(2, 2, 24, 16)
    whole, parts = (make_pages(format) for _ in range(2))
    APPEND[name](x, whole, TABLE, int32(0, 0))
    step = 4 if format.axis == "channel" else 3
    for start in range(0, 24, step):
        APPEND[name](x[:, :, start : start + step], parts, TABLE, int32(start, start))
    assert equal(whole, parts)
    if format.bits == 16:
        found = dequantize(whole, TABLE[1]).transpose(0, 1).flatten(1, 2)
        assert torch.equal(found, x[1])


@pytest.mark.parametrize("name", APPEND)
@pytest.mark.parametrize("format", PAGED, ids=str)
def test_left_padded_batch_equals_singles(name, format):
    counts = int32(4, 20)
    x = values(2, 2, 22, 16)
    x[0, :, :18] = float("nan")  # padding is not looked at
    batch, singles = (make_pages(format) for _ in range(2))
    APPEND[name](x, batch, TABLE, int32(8, 4), counts)
    for i, (length, count) in enumerate(((8, 4), (4, 20))):
        alone = x[i : i + 1, :, 22 - count :]
        APPEND[name](alone, singles, TABLE[i : i + 1], int32(length))
    assert equal(batch, singles)


@pytest.mark.parametrize("name", APPEND)
def test_page_order_is_the_tables(name):
    x, format = values(1, 2, 24, 16), Format(bits=4)
    one, other = make_pages(format), make_pages(format)
    APPEND[name](x, one, torch.tensor([[0, 1, 2]], dtype=torch.int32), int32(0))
    APPEND[name](x, other, torch.tensor([[6, 1, 4]], dtype=torch.int32), int32(0))
    assert torch.equal(dequantize(one, int32(0, 1, 2)), dequantize(other, int32(6, 1, 4)))


@pytest.mark.parametrize("name", QUANTIZE)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_channels_may_lie_apart(name, bits):
    x = values(2, 24, 16).mT
    format = Format(bits=bits)
    for part, expected in zip(
        QUANTIZE[name](x, format), quantize_reference(x, format), strict=True
    ):
        assert torch.equal(part, expected)


def test_triton_writes_nothing_outside_the_pool():
    pages = make_pages(Format(bits=4))
    before = copy_of(pages)
    append_triton(values(2, 2, 8, 16), pages, TABLE, int32(24, 200))  # over the table
    append_triton(values(1, 2, 8, 16), pages, int32(9, -1)[None], int32(0))
    append_triton(values(2, 2, 8, 16), pages, TABLE, int32(-8, -200))
    append_triton(values(2, 2, 8, 16), pages, TABLE, int32(0, 0), int32(0, 0))
    assert equal(pages, before)


def test_no_new_token_writes_nothing():
    for format in PAGED:
        pages = make_pages(format)
        before = copy_of(pages)
        append(values(2, 2, 3, 16), pages, TABLE, int32(0, 24), int32(0, 0))
        assert equal(pages, before)


@pytest.mark.parametrize(
    ("x", "format", "message"),
    [
        (torch.zeros(8), Format(bits=4), "x must be"),
        (torch.zeros(0, 8), Format(bits=4), "x must be"),
        (torch.zeros(4, 8, dtype=torch.int32), Format(bits=4), "x must be"),
        (torch.zeros(4, 8), Format(), "less than 16 bits"),
        (torch.zeros(4, 7), Format(bits=4), "whole bytes"),
        (torch.zeros(4, 8), Format(bits=4, group_size=3), "divide D=8"),
        (torch.zeros(4, 8), Format(bits=4, axis="channel", group_size=3), "divide T=4"),
    ],
)
def test_bad_values_are_named(x, format, message):
    with pytest.raises(ValueError, match=f"quantize: .*{message}"):
        quantize(x, format)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(2, 3, 4, 16)}, "x must be"),
        ({"x": torch.zeros(2, 2, 4, 16).half()}, "x must be"),
        ({"page_table": TABLE.long()}, "page_table must be"),
        ({"page_table": TABLE[:1]}, "page_table must be"),
        ({"lengths": int32(0)}, "lengths must be"),
        ({"counts": torch.zeros(2)}, "counts must be"),
        ({"lengths": int32(0, -4)}, "lengths must be"),
        ({"counts": int32(0, 8)}, "counts must be"),
        ({"lengths": int32(0, 24)}, "context over the paged pool"),
        ({"lengths": int32(0, 2)}, "lengths must be multiples"),
        ({"counts": int32(2, 4)}, "counts must be multiples"),
        ({"page_table": int32(0, 1, 2, 9, 1, 2).view(2, 3)}, "pages 0 to 8 of the paged pool"),
        ({"page_table": int32(-1, 1, 2, 0, 1, 2).view(2, 3)}, "pages 0 to 8 of the paged pool"),
    ],
)
def test_bad_input_is_named_and_writes_nothing(arguments, message):
    pages = make_pages(Format(bits=4, axis="channel", group_size=4))
    before = copy_of(pages)
    good = {"x": torch.zeros(2, 2, 4, 16), "page_table": TABLE, "lengths": int32(0, 0)}
    with pytest.raises(ValueError, match=f"append: .*{message}"):
        append(pages=pages, **(good | arguments))
    assert equal(pages, before)


def test_triton_refuses_groups_that_share_a_byte():
    with pytest.raises(NotImplementedError, match="whole bytes of 2 bits"):
        quantize_triton(torch.zeros(1, 8), Format(bits=2, group_size=2))


def test_entries_that_no_token_needs_may_be_anything():
    pages = make_pages(Format(bits=4))
    append(values(1, 2, 8, 16), pages, int32(3, -1, 99)[None], int32(0))
    with pytest.raises(ValueError, match="paged pool"):
        append(values(1, 2, 9, 16), pages, int32(3, -1, 99)[None], int32(0))


def test_compiles_for_gpus_without_one():
    reports = kernel_compile.check("repro.kernels.kv_quantize.compile_check")
    assert {report.capability for report in reports} == {80, 90, 100}
    assert all(report.spill_bytes == 0 for report in reports)
