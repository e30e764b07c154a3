"""Block-sparse attention: Triton kernels (interpreted) and CPU path against the definition."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from repro import attention_products, kernel_compile
from repro.kernels.block_sparse_attention import (
    bench,
    block_sparse_attention,
    block_sparse_attention_reference,
    cpu,
    kernel,
)
from repro.kernels.block_sparse_attention.layout import make_layout


@dataclass(frozen=True)
class Shape:
    """One problem; ``padding`` tokens are missing on the left of the first sequence."""

    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    tokens_q: int = 32
    tokens_k: int = 32
    dim: int = 16
    block_q: int = 16
    block_k: int = 16
    causal: bool = True
    padding: int = 0
    keep: float = 0.6

    def __str__(self) -> str:
        shape = f"B{self.batch}-H{self.heads}:{self.kv_heads}-T{self.tokens_q}:{self.tokens_k}"
        rule = "causal" if self.causal else "full"
        return f"{shape}-D{self.dim}-{self.block_q}x{self.block_k}-{rule}-pad{self.padding}"


SMALL = [
    Shape(tokens_q=1, tokens_k=1),
    Shape(tokens_q=1, tokens_k=33, heads=1, kv_heads=1),
    Shape(tokens_q=32, tokens_k=32, block_q=32, block_k=16),
    Shape(tokens_q=33, tokens_k=33, dim=48, heads=4, kv_heads=2),
    Shape(tokens_q=20, tokens_k=52, batch=2, block_q=16, block_k=32, padding=19),
    Shape(tokens_q=40, tokens_k=20, heads=2, kv_heads=1),
    Shape(tokens_q=33, tokens_k=47, causal=False, block_k=32, batch=2, padding=5),
    # Several tiles in a key block, the last block partly filled.
    Shape(tokens_q=40, tokens_k=200, heads=1, kv_heads=1, block_q=32, block_k=128),
]
MEDIUM = [
    Shape(tokens_q=256, tokens_k=256, dim=64, block_q=128, block_k=128, heads=4, kv_heads=2),
    Shape(tokens_q=257, tokens_k=257, dim=48, block_q=64, block_k=64, batch=2, padding=100),
    Shape(tokens_q=150, tokens_k=278, dim=32, block_q=64, block_k=64, batch=2, padding=64),
    Shape(tokens_q=200, tokens_k=300, dim=64, block_q=32, block_k=128, causal=False),
    Shape(tokens_q=300, tokens_k=200, dim=64, block_q=64, block_k=32, padding=70),
    Shape(tokens_q=129, tokens_k=129, dim=64, block_q=128, block_k=128, causal=False),
]


def embedded(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` as a strided view into a larger buffer of 1e30, which shows any over-read."""
    batch, heads, tokens, dim = x.shape
    buffer = torch.full((batch, heads, tokens + 3, dim + 8), 1e30 if x.dtype.itemsize > 2 else 6e4)
    buffer = buffer.to(x.dtype)
    buffer[:, :, :tokens, :dim] = x
    return buffer[:, :, :tokens, :dim]


def make_inputs(shape: Shape, dtype: torch.dtype, seed: int = 0):
    """Return q, k, v (strided views), per-head block mask and key padding mask (or None)."""
    random = torch.Generator().manual_seed(seed)
    size_q = (shape.batch, shape.heads, shape.tokens_q, shape.dim)
    size_k = (shape.batch, shape.kv_heads, shape.tokens_k, shape.dim)
    q, k, v = (
        embedded(torch.randn(size, generator=random).to(dtype)) for size in (size_q, size_k, size_k)
    )
    grid = (-(-shape.tokens_q // shape.block_q), -(-shape.tokens_k // shape.block_k))
    mask = torch.rand(shape.batch, shape.heads, *grid, generator=random) < shape.keep
    padding = None
    if shape.padding:
        padding = torch.ones(shape.batch, shape.tokens_k, dtype=torch.bool)
        padding[0, : shape.padding] = False
    return q, k, v, mask, padding


def reference(shape: Shape, q, k, v, mask, padding, compute_dtype=None):
    return block_sparse_attention_reference(
        q,
        k,
        v,
        mask,
        block_size=(shape.block_q, shape.block_k),
        causal=shape.causal,
        key_padding_mask=padding,
        compute_dtype=compute_dtype,
    )


def run(backend, shape: Shape, q, k, v, mask, padding, grad_out):
    """Return output, log-sum-exp and the three gradients of one backend's host functions."""
    layout = make_layout(
        mask,
        tokens_q=shape.tokens_q,
        tokens_k=shape.tokens_k,
        block_q=shape.block_q,
        block_k=shape.block_k,
        causal=shape.causal,
        key_padding_mask=padding,
    )
    scale = shape.dim**-0.5
    out, lse = backend.forward(q, k, v, layout, scale)
    return out, lse, backend.backward(q, k, v, out, lse, grad_out, layout, scale)


def with_gradients(shape: Shape, q, k, v, mask, padding, grad_out, compute_dtype):
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out, lse = reference(shape, *leaves, mask, padding, compute_dtype)
    return out.detach(), lse.detach(), torch.autograd.grad(out, leaves, grad_out)


def fault_of(actual, exact, eager, what: str) -> list[str]:
    """Return what is wrong, or nothing: the error (2-norm) against the fp64 definition must be at
    most twice that of eager code in the dtype."""
    if not torch.isfinite(actual).all():
        return [f"{what}: not finite"]
    limit = 2 * (eager.double() - exact).norm()
    # One rounding is always allowed: eager code can be exact by luck.
    limit += torch.finfo(eager.dtype).eps * exact.norm()
    error = (actual.double() - exact).norm()
    return [] if error <= limit else [f"{what}: error {error:.3g} above {limit:.3g}"]


def fault_of_lse(actual, exact, eager) -> list[str]:
    """Likewise for log-sum-exps, by the largest error; -inf stands for no visible key."""
    seen = exact.isfinite()
    if not torch.equal(actual.isfinite(), seen):
        return ["log-sum-exp: not finite where it should be, or the other way"]
    limit = 2 * float((eager.double() - exact)[seen].abs().max()) + 2e-3 if seen.any() else 0.0
    error = float((actual.double() - exact)[seen].abs().max()) if seen.any() else 0.0
    return [] if error <= limit else [f"log-sum-exp: error {error:.3g} above {limit:.3g}"]


def faults_of_backend(backend, shape: Shape, dtype: torch.dtype) -> list[str]:
    """Return what of output, log-sum-exp and gradients differs from the fp64 reference."""
    q, k, v, mask, padding = make_inputs(shape, dtype)
    grad_out = embedded(torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(dtype))
    doubles = [x.double() for x in (q, k, v)]
    exact = with_gradients(shape, *doubles, mask, padding, grad_out.double(), torch.float64)
    eager = with_gradients(shape, q, k, v, mask, padding, grad_out, dtype)
    out, lse, gradients = run(backend, shape, q, k, v, mask, padding, grad_out)
    faults = [] if out.dtype == dtype else [f"output: {out.dtype} in place of {dtype}"]
    faults += fault_of(out, exact[0], eager[0], "output")
    faults += fault_of_lse(lse, exact[1], eager[1])
    for name, *grads in zip("qkv", gradients, exact[2], eager[2], strict=True):
        faults += fault_of(*grads, f"gradient of {name}")
    return faults


# The interpreter multiplies the bit patterns of bf16 in tl.dot, so bf16 runs on the CPU path only.
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_triton_matches_reference(shape, nan_filled_empty):
    assert faults_of_backend(kernel, shape, torch.float32) == []


def test_triton_matches_reference_in_half_precision(nan_filled_empty):
    shape = Shape(tokens_q=33, tokens_k=65, block_k=32, dim=32)
    assert faults_of_backend(kernel, shape, torch.float16) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SMALL + MEDIUM, ids=str)
def test_cpu_matches_reference(shape, dtype, nan_filled_empty):
    assert faults_of_backend(cpu, shape, dtype) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [SMALL[3], *MEDIUM[:2], MEDIUM[4]], ids=str)
@pytest.mark.parametrize("products", [True, False], ids=["products", "flash"])
def test_both_ways_on_the_cpu_match_reference(products, shape, dtype, monkeypatch):
    """Which one runs is the machine's matter."""
    monkeypatch.setattr(attention_products, "are_faster", lambda dtype: products)
    monkeypatch.setattr(attention_products, "_SCORE_KEYS", 48)  # several pieces in a row
    assert faults_of_backend(cpu, shape, dtype) == []


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    shape=st.builds(
        Shape,
        batch=st.integers(1, 2),
        heads=st.sampled_from([2, 4]),
        kv_heads=st.sampled_from([1, 2]),
        tokens_q=st.integers(1, 150),
        tokens_k=st.integers(1, 150),
        dim=st.sampled_from([16, 24]),
        block_q=st.sampled_from([16, 32, 64]),
        block_k=st.sampled_from([16, 32, 64]),
        causal=st.booleans(),
        padding=st.integers(0, 80),
        keep=st.sampled_from([0.0, 0.2, 0.7, 1.0]),
    ),
    seed=st.integers(0, 100),
)
def test_cpu_matches_reference_on_any_shape(shape, seed):
    q, k, v, mask, padding = make_inputs(shape, torch.float32, seed)
    expected = reference(shape, q, k, v, mask, padding)
    actual = block_sparse_attention(
        q,
        k,
        v,
        mask,
        block_size=(shape.block_q, shape.block_k),
        causal=shape.causal,
        key_padding_mask=padding,
        return_lse=True,
    )
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_reference_passes_gradcheck():
    shape = Shape(tokens_q=18, tokens_k=20, heads=2, kv_heads=1, dim=3, padding=17)
    q, k, v, mask, padding = make_inputs(shape, torch.float64)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(
        lambda *x: reference(shape, *x, mask, padding)[0], leaves, fast_mode=True
    )


def test_gradients_flow_through_the_public_function():
    shape = Shape(tokens_q=100, tokens_k=140, heads=4, kv_heads=2, block_q=32, block_k=32)
    q, k, v, mask, _ = make_inputs(shape, torch.float32)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = block_sparse_attention(*leaves, mask, block_size=32)
    expected, _ = reference(shape, *leaves, mask, None)
    grad_out = torch.randn_like(out)
    actual_grads = torch.autograd.grad(out, leaves, grad_out)
    expected_grads = torch.autograd.grad(expected, leaves, grad_out)
    torch.testing.assert_close(actual_grads, expected_grads, atol=1e-5, rtol=1e-5)


def square(tokens=96, heads=4, kv_heads=2, dim=32, seed=0):
    shape = Shape(tokens_q=tokens, tokens_k=tokens, heads=heads, kv_heads=kv_heads, dim=dim)
    return make_inputs(shape, torch.float32, seed)


@pytest.mark.parametrize("causal", [True, False])
def test_full_mask_equals_dense_attention(causal):
    q, k, v, mask, _ = square()
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    full = block_sparse_attention(q, k, v, torch.ones_like(mask), block_size=16, causal=causal)
    torch.testing.assert_close(full, dense, atol=1e-5, rtol=1e-5)


def test_sparse_equals_dense_with_dropped_blocks_masked():
    q, k, v, mask, _ = square()
    mask |= torch.eye(mask.shape[-1], dtype=torch.bool)
    tokens = mask.repeat_interleave(16, dim=2).repeat_interleave(16, dim=3).tril()
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=tokens, enable_gqa=True)
    torch.testing.assert_close(
        block_sparse_attention(q, k, v, mask, block_size=16), dense, atol=1e-5, rtol=1e-5
    )


def test_disjoint_keys_merge_by_lse_to_the_whole():
    q, k, v, mask, _ = square()
    halves = []
    for keys in (slice(0, 48), slice(48, 96)):
        blocks = slice(keys.start // 16, keys.stop // 16)
        halves.append(
            block_sparse_attention(
                q,
                k[:, :, keys],
                v[:, :, keys],
                mask[..., blocks],
                block_size=16,
                causal=False,
                return_lse=True,
            )
        )
    whole, lse = block_sparse_attention(q, k, v, mask, block_size=16, causal=False, return_lse=True)
    torch.testing.assert_close(torch.logaddexp(halves[0][1], halves[1][1]), lse)
    weights = [(half - lse).exp().nan_to_num(0.0)[..., None] for _, half in halves]
    merged = halves[0][0] * weights[0] + halves[1][0] * weights[1]
    torch.testing.assert_close(merged, whole, atol=1e-5, rtol=1e-5)


def test_broadcast_mask_equals_repeated_mask():
    q, k, v, mask, _ = square()
    shared = mask[:, :1]
    torch.testing.assert_close(
        block_sparse_attention(q, k, v, shared, block_size=16),
        block_sparse_attention(q, k, v, shared.expand_as(mask).contiguous(), block_size=16),
        atol=0,
        rtol=0,
    )


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_block_indices_equal_block_mask(dtype):
    q, k, v, mask, _ = square()
    count = mask.shape[-1]
    indices = torch.where(mask, torch.arange(count), -1).flip(-1).to(dtype)
    by_index = block_sparse_attention(q, k, v, block_indices=indices, block_size=16)
    by_mask = block_sparse_attention(q, k, v, mask, block_size=16)
    assert torch.equal(by_index, by_mask)


def test_blocks_above_the_diagonal_do_not_matter():
    q, k, v, mask, _ = square()
    hidden = torch.ones(mask.shape[-2:], dtype=torch.bool).triu(1)
    without, extra = (
        block_sparse_attention(q, k, v, m, block_size=16) for m in (mask & ~hidden, mask | hidden)
    )
    assert torch.equal(without, extra)


@pytest.mark.parametrize("backend", [cpu, kernel], ids=["cpu", "triton"])
def test_query_without_visible_key_gives_zero(backend, nan_filled_empty):
    # More queries than keys: the first 20 see none; and one row of blocks keeps nothing.
    shape = Shape(tokens_q=52, tokens_k=32, keep=1.0)
    q, k, v, mask, _ = make_inputs(shape, torch.float32)
    mask[:, :, 2] = False
    blind = torch.zeros(52, dtype=torch.bool)
    blind[:20], blind[32:48] = True, True
    out, lse, (grad_q, grad_k, grad_v) = run(
        backend, shape, q, k, v, mask, None, torch.ones(q.shape)
    )
    assert (out[:, :, blind] == 0).all()
    assert (lse[:, :, blind] == -torch.inf).all() and torch.isfinite(lse[:, :, ~blind]).all()
    assert (grad_q[:, :, blind] == 0).all()
    assert torch.isfinite(grad_k).all() and torch.isfinite(grad_v).all()


def test_nothing_kept_gives_zero():
    q, k, v, mask, _ = square()
    out, lse = block_sparse_attention(
        q, k, v, torch.zeros_like(mask), block_size=16, return_lse=True
    )
    assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("missing", [32, 21])
def test_left_padded_batch_equals_singles(missing):
    q, k, v, _, _ = square(tokens=96)
    short = 96 - missing
    padded = [F.pad(x[:, :, :short], (0, 0, missing, 0)) for x in (q, k, v)]
    batch = [torch.cat(pair) for pair in zip((q, k, v), padded, strict=True)]
    real = torch.ones(2, 96, dtype=torch.bool)
    real[1, :missing] = False
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    out = block_sparse_attention(*batch, mask, block_size=16, key_padding_mask=real)
    for row, tokens in ((0, 96), (1, short)):
        single = F.scaled_dot_product_attention(
            *(x[:, :, :tokens] for x in (q, k, v)), is_causal=True, enable_gqa=True
        )
        torch.testing.assert_close(out[row, :, 96 - tokens :], single[0], atol=1e-5, rtol=1e-5)


def test_chunked_prefill_equals_whole():
    q, k, v, mask, _ = square()
    whole = block_sparse_attention(q, k, v, mask, block_size=16)
    # The second chunk has 33 queries and all keys; its first block starts on the grid.
    chunk = block_sparse_attention(q[:, :, 48:81], k[:, :, :81], v[:, :, :81],
                                   mask[:, :, 3:6, :6], block_size=16)  # fmt: skip
    torch.testing.assert_close(chunk, whole[:, :, 48:81], atol=1e-5, rtol=1e-5)


def test_scale_is_applied():
    q, k, v, mask, _ = square()
    scaled = block_sparse_attention(q, k, v, mask, block_size=16, scale=0.5)
    default = block_sparse_attention(q * 0.5 * 32**0.5, k, v, mask, block_size=16)
    torch.testing.assert_close(scaled, default, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("inference", [False, True])
def test_number_of_threads_changes_neither_result_nor_setting(inference):
    q, k, v, mask, _ = square(tokens=700, heads=8)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3, 2):
            torch.set_num_threads(threads)
            with torch.inference_mode(inference):
                results.append(block_sparse_attention(q, k, v, mask, block_size=16))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert results[0].is_inference() == inference


@pytest.mark.parametrize("density", [0.1, 0.25, 1.0])
def test_bench_mask_keeps_exactly_its_density(density):
    mask = bench.random_mask(heads=3, count=40, density=density, seed=1)
    assert mask.shape == (1, 3, 40, 40)
    assert mask.sum(dim=(0, 2, 3)).tolist() == [round(density * 820)] * 3
    assert mask.diagonal(dim1=2, dim2=3).all() and not mask.triu(1).any()


def test_bench_reference_is_the_definition():
    params = {"tokens": 512, "heads": 2, "head_dim": 64, "density": 0.5, "block_size": 128}
    case = bench.Case(name="small", params=params)
    inputs = bench.make_inputs(case, torch.device("cpu"), 0)
    expected, _ = block_sparse_attention_reference(inputs.q, inputs.k, inputs.v, inputs.mask)
    torch.testing.assert_close(bench.SUITE.reference(case, inputs), expected)
    ours = bench.implementations(case, torch.device("cpu"))["block_sparse"](inputs)
    error = (ours.float() - expected.float()).abs().max()
    assert error <= bench.SUITE.compare(case, "block_sparse")


GOOD = torch.zeros(2, 4, 32, 16)
KEYS = torch.zeros(2, 2, 48, 16)
MASK = torch.ones(1, 1, 2, 3, dtype=torch.bool)
BAD_ARGUMENTS = {
    "q must be [B, H, Tq, D]": {"q": GOOD[0]},
    "none of them 0": {"q": GOOD[:, :, :0]},
    "D <= 256": {"q": torch.zeros(2, 4, 32, 512)},
    "q must be float16, bfloat16 or float32": {"q": GOOD.double()},
    "k must be [B=2, H_kv dividing 4": {"k": torch.zeros(2, 3, 48, 16)},
    "D=16], got (2, 2, 48, 8)": {"k": KEYS[..., :8]},
    "v must have the shape of k": {"v": KEYS[:, :, :47]},
    "v must have the dtype and device of q": {"v": KEYS.half()},
    "block_size must be one or two of 16, 32, 64, 128, got 48": {"block_size": 48},
    "block_size must be one or two of 16, 32, 64, 128, got (16, 256)": {"block_size": (16, 256)},
    "exactly one of block_mask and block_indices must be given, got neither": {"block_mask": None},
    "must be given, got both": {"block_indices": torch.zeros(1, 1, 2, 1, dtype=torch.int64)},
    "block_mask must be [1 or 2, 1 or 4, 2, 3]": {"block_mask": MASK[0]},
    "on cpu, got (1, 1, 3, 3)": {"block_mask": torch.ones(1, 1, 3, 3, dtype=torch.bool)},
    "block_mask must be bool with 3 key blocks, got torch.bool with 2": {
        "block_mask": MASK[..., :2]
    },
    "block_mask must be bool with 3 key blocks, got torch.int64": {"block_mask": MASK.long()},
    "block_indices must be int32 or int64": {
        "block_mask": None,
        "block_indices": torch.zeros(1, 1, 2, 1),
    },
    "block_indices must lie in [-1, 2], got 0 to 3": {
        "block_mask": None,
        "block_indices": torch.tensor([0, 3]).expand(1, 1, 2, 2),
    },
    "key_padding_mask must be bool (2, 48)": {"key_padding_mask": torch.ones(2, 48)},
    "scale must be finite, got nan": {"scale": float("nan")},
}


@pytest.mark.parametrize("message", BAD_ARGUMENTS)
def test_bad_argument_is_named(message):
    arguments = {"q": GOOD, "k": KEYS, "v": KEYS, "block_mask": MASK, "block_size": 16}
    arguments |= BAD_ARGUMENTS[message]
    with pytest.raises(ValueError) as caught:
        block_sparse_attention(**arguments)
    assert str(caught.value).startswith("block_sparse_attention: ")
    assert message in str(caught.value)


def test_kernels_compile_for_gpus_that_are_not_here(capsys):
    reports = kernel_compile.check("repro.kernels.block_sparse_attention.compile_check")
    assert {report.capability for report in reports} == {80, 90, 100}
    for report in reports:
        assert report.shared_bytes <= kernel_compile.SHARED_LIMIT[report.capability], report
        if report.name.startswith("forward"):
            assert report.spill_bytes == 0, report
    with capsys.disabled():
        for report in reports:
            print(f"\n  {report}", end="")
