"""Streaming attention: the Triton kernel (interpreted) and the CPU path against the definition."""

import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from repro import kernel_compile
from repro.kernels.streaming_attention import (
    bench,
    cpu,
    streaming_attention,
    streaming_attention_reference,
)
from repro.kernels.streaming_attention.kernel import forward as forward_triton
from repro.testing import qkv


@dataclass(frozen=True)
class Shape:
    """One problem."""

    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    tokens_q: int = 40
    tokens_k: int = 40
    dim: int = 16
    sink: int = 4
    window: int | None = 9

    def __str__(self) -> str:
        shape = f"B{self.batch}-H{self.heads}:{self.kv_heads}-T{self.tokens_q}:{self.tokens_k}"
        return f"{shape}-D{self.dim}-sink{self.sink}-window{self.window}"

    @property
    def sizes(self) -> dict[str, int | None]:
        return {"sink_size": self.sink, "window_size": self.window}


SHAPES = [
    Shape(tokens_q=1, tokens_k=1, sink=0, window=1),
    Shape(tokens_q=1, tokens_k=150, sink=64, window=17),
    Shape(tokens_q=130, tokens_k=130),
    Shape(tokens_q=129, tokens_k=129, sink=0, window=1, dim=24),
    Shape(tokens_q=200, tokens_k=200, sink=70, window=33, heads=4, kv_heads=2, batch=2),
    Shape(tokens_q=100, tokens_k=333, sink=0, window=80, heads=4, kv_heads=1),
    Shape(tokens_q=66, tokens_k=99, sink=20, window=40, dim=40),
    Shape(tokens_q=90, tokens_k=90, sink=200, window=5),
    Shape(tokens_q=90, tokens_k=120, sink=3, window=500),
    Shape(tokens_q=90, tokens_k=120, sink=0, window=None),
    Shape(tokens_q=300, tokens_k=301, sink=1, window=128),
]


def inputs(shape: Shape, dtype=torch.float32, seed=0):
    """Draw q, k, v as strided views ``[B, T, H, D]`` transposed, as models make them."""
    drawn = qkv(
        batch=shape.batch,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        queries=shape.tokens_q,
        keys=shape.tokens_k,
        head_dim=shape.dim,
        seed=seed,
    )
    return tuple(x.to(dtype).transpose(1, 2).contiguous().transpose(1, 2) for x in drawn)


def triton(q, k, v, *, sink_size, window_size):
    tokens = k.shape[2]
    window = tokens if window_size is None else min(tokens, window_size)
    return forward_triton(q, k, v, min(tokens, sink_size), window, q.shape[3] ** -0.5)


def public(q, k, v, **sizes):
    return streaming_attention(q, k, v, return_lse=True, **sizes)


def faults(run, shape: Shape, dtype) -> list[str]:
    """Compare with fp64: the error is at most twice that of eager code in the dtype."""
    q, k, v = inputs(shape, dtype)
    out, lse = run(q, k, v, **shape.sizes)
    exact, exact_lse = streaming_attention_reference(
        q.double(), k.double(), v.double(), **shape.sizes
    )
    eager, eager_lse = streaming_attention_reference(q, k, v, compute_dtype=dtype, **shape.sizes)
    found = []
    if (out.dtype, lse.dtype, out.shape) != (dtype, torch.float32, q.shape):
        found.append(f"{out.dtype}, {lse.dtype}, {out.shape}")
    if not (out.isfinite().all() and lse.isfinite().all()):
        found.append("not finite")
    # One rounding is always allowed: eager code can be exact by luck.
    limit = 2 * (eager.double() - exact).norm() + torch.finfo(dtype).eps * exact.norm()
    if not (out.double() - exact).norm() <= limit:
        found.append(f"output: {(out.double() - exact).norm():.3g} above {limit:.3g}")
    worst = 2 * float((eager_lse.double() - exact_lse).abs().max()) + 1e-5
    if not (lse.double() - exact_lse).abs().max() <= worst:
        found.append(f"lse: {(lse.double() - exact_lse).abs().max():.3g} above {worst:.3g}")
    return found


# The interpreter multiplies the bit patterns of bf16 in tl.dot, so bf16 runs on the CPU path only.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_matches_reference(shape, dtype, nan_filled_empty):
    assert faults(triton, shape, dtype) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cpu_matches_reference(shape, dtype, nan_filled_empty):
    assert faults(public, shape, dtype) == []


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    n_rep=st.integers(1, 2),
    tokens_q=st.integers(1, 200),
    earlier=st.integers(0, 200),
    sink=st.integers(0, 90),
    window=st.integers(1, 150),
    seed=st.integers(0, 9),
)
def test_cpu_matches_reference_on_any_shape(
    batch, kv_heads, n_rep, tokens_q, earlier, sink, window, seed
):
    shape = Shape(batch, n_rep * kv_heads, kv_heads, tokens_q, tokens_q + earlier, 16, sink, window)
    q, k, v = inputs(shape, seed=seed)
    expected = streaming_attention_reference(q, k, v, **shape.sizes)
    for actual, wanted in zip(public(q, k, v, **shape.sizes), expected, strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=1e-5)


def test_many_calls_equal_one(monkeypatch):
    shape = Shape(tokens_q=600, tokens_k=700, sink=5, window=40, batch=2)
    q, k, v = inputs(shape)
    whole = public(q, k, v, **shape.sizes)
    monkeypatch.setattr(cpu, "_COPY_BYTES", 1)
    monkeypatch.setattr(cpu, "_BLOCKS", (16, 16))
    for actual, wanted in zip(public(q, k, v, **shape.sizes), whole, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("run", [public, triton])
@pytest.mark.parametrize("sink", [0, 7])
@pytest.mark.parametrize("window", [100, 1000, None])
def test_a_window_over_everything_is_dense_causal_attention(run, sink, window):
    q, k, v = inputs(Shape(tokens_q=100, tokens_k=100))
    out, _ = run(q, k, v, sink_size=sink, window_size=window)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("run", [public, triton])
def test_a_window_of_one_without_sinks_returns_the_own_value(run):
    q, k, v = inputs(Shape(tokens_q=100, tokens_k=130))
    out, lse = run(q, k, v, sink_size=0, window_size=1)
    torch.testing.assert_close(out, v[:, :, 30:], atol=1e-6, rtol=0)
    scores = (q * k[:, :, 30:]).sum(-1) * q.shape[3] ** -0.5
    torch.testing.assert_close(lse, scores, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("run", [public, triton])
def test_chunks_equal_the_whole(run):
    shape = Shape(tokens_q=260, tokens_k=260, sink=11, window=37, heads=4)
    q, k, v = inputs(shape)
    whole = run(q, k, v, **shape.sizes)
    ends = [0, 20, 148, 149, 260]  # within the first tokens, long, of one token, the rest
    chunks = [
        run(q[:, :, start:end], k[:, :, :end], v[:, :, :end], **shape.sizes)
        for start, end in itertools.pairwise(ends)
    ]
    for actual, wanted in zip(zip(*chunks, strict=True), whole, strict=True):
        torch.testing.assert_close(torch.cat(actual, dim=2), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("run", [public, triton])
def test_hidden_keys_are_not_looked_at(run):
    """Keys between sinks and windows hold NaN, those of a wholly skipped middle above all."""
    shape = Shape(tokens_q=20, tokens_k=400, sink=4, window=30)
    q, k, v = inputs(shape)
    expected = run(q, k, v, **shape.sizes)
    for x in (k, v):
        x[:, :, 4 : 380 - 29] = float("nan")
    for actual, wanted in zip(run(q, k, v, **shape.sizes), expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("run", [public, triton])
def test_a_step_further_changes_exactly_the_keys_at_the_edge(run):
    """Value j is the unit vector of token j: the output shows who sees whom."""
    tokens, sink, window = 70, 3, 6
    q, k, _ = inputs(Shape(tokens_q=tokens, tokens_k=tokens))
    v = torch.eye(tokens)[None, None].expand(1, 2, -1, -1)
    wide = [F.pad(x, (0, tokens - x.shape[3])) for x in (q, k)]
    out, _ = run(*wide, v.contiguous(), sink_size=sink, window_size=window)
    row, key = torch.arange(tokens)[:, None], torch.arange(tokens)
    seen = (key <= row) & ((key < sink) | (key > row - window))
    assert torch.equal(out[0, 0] > 0, seen) and torch.equal(out[0, 1] > 0, seen)


def test_batch_equals_singles():
    shape = Shape(batch=3, tokens_q=150, tokens_k=170, heads=4)
    q, k, v = inputs(shape)
    whole = streaming_attention(q, k, v, **shape.sizes)
    for i in range(3):
        single = streaming_attention(*(x[i : i + 1] for x in (q, k, v)), **shape.sizes)
        torch.testing.assert_close(whole[i : i + 1], single, atol=1e-6, rtol=1e-5)


def test_scale_is_applied_and_other_layouts_are_read():
    shape = Shape(tokens_q=90, tokens_k=90, dim=24)
    q, k, v = inputs(shape)
    expected, _ = streaming_attention_reference(q, k, v, scale=0.7, **shape.sizes)
    turned = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v))
    out = streaming_attention(*turned, scale=0.7, **shape.sizes)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


GOOD = {**dict(zip("qkv", qkv(queries=8, head_dim=16), strict=True)), "sink_size": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q": torch.zeros(4, 8, 16)}, "q must be"),
        ({"q": torch.zeros(1, 4, 8, 300)}, "q must be"),
        ({"q": torch.zeros(1, 4, 8, 16, dtype=torch.float64)}, "q must be"),
        ({"q": torch.zeros(1, 4, 9, 16)}, "k must be"),
        ({"q": torch.zeros(1, 6, 8, 16)}, "k must be"),
        ({"v": torch.zeros(1, 4, 9, 16)}, "v must have the shape of k"),
        ({"v": torch.zeros(1, 4, 8, 16).half()}, "v must have the dtype"),
        ({"sink_size": -1}, "sink_size must be"),
        ({"window_size": 0}, "window_size must be"),
        ({"scale": float("nan")}, "scale must be"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=f"streaming_attention: {message}"):
        streaming_attention(**(GOOD | arguments))


def test_a_gradient_is_refused():
    leaf = GOOD["q"].clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="no gradient"):
        streaming_attention(**(GOOD | {"q": leaf}))
    with torch.no_grad():
        assert not streaming_attention(**(GOOD | {"q": leaf})).requires_grad


def test_bench_counts_the_pairs_of_the_definition():
    for tokens, sink, window in ((50, 4, 9), (20, 30, 5), (33, 0, 33)):
        params = {"tokens": tokens, "sink_size": sink, "window_size": window}
        case = bench.Case(name="", params=params)
        row, key = torch.arange(tokens)[:, None], torch.arange(tokens)
        seen = (key <= row) & ((key < sink) | (key > row - window))
        assert bench.pairs(case, "streaming") == int(seen.sum())


def test_compiles_for_gpus_without_one():
    reports = kernel_compile.check("repro.kernels.streaming_attention.compile_check")
    assert {report.capability for report in reports} == {80, 90, 100}
    for report in reports:
        assert report.shared_bytes <= kernel_compile.SHARED_LIMIT[report.capability], report
        # Products in fp32 go without tensor cores and hold a row of the tile in each thread.
        assert report.spill_bytes == 0 or "float32" in report.name, report
