"""Bench of paged decode attention: a share of the pages against dense attention over all tokens.

Pages lie in random order in their pool, and every KV head selects its own. The dense baseline reads
contiguous K and V of 16 bits; a second one is this kernel over all pages in their format.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from repro.bench.suite import Case, Suite
from repro.kernels.paged_attention.api import paged_attention
from repro.kernels.paged_attention.pages import Format, Pages
from repro.kernels.paged_attention.reference import paged_attention_reference

_OURS, _ALL, _DENSE = "paged_attention", "paged_attention_all", "sdpa"
#: Most of the all-pages time that a quarter of the pages may take.
_QUARTER_BAR = 0.4
_GROUP = 32


@dataclass(frozen=True)
class Inputs:
    """One member of the pool; ``dense_k`` and ``dense_v`` are ``[n_seq, H_kv, T, D]``."""

    q: torch.Tensor
    k: Pages
    v: Pages
    page_table: torch.Tensor
    lengths: torch.Tensor
    selected: torch.Tensor | None
    dense_k: torch.Tensor
    dense_v: torch.Tensor


def parameters(*, tokens: int, batch: int, share: float, bits: int) -> dict[str, Any]:
    """Return the parameters of a case: 8 KV heads, 4 query heads each, D = 128."""
    return {
        "tokens": tokens,
        "batch": batch,
        "kv_heads": 8,
        "n_rep": 4,
        "head_dim": 128,
        "page_size": 64,
        "density": share,
        "bits": bits,
        "dtype": "bfloat16",
    }


def cases(device: str, quick: bool) -> list[Case]:
    """CPU: 4K (quick) and 32K tokens of one sequence; CUDA: 8K to 128K, 1 and 16 sequences."""
    if device == "cpu":
        sizes = [(4096, 1)] if quick else [(4096, 1), (32768, 1)]
    else:
        lengths = [8192, 32768] if quick else [8192, 16384, 32768, 65536, 131072]
        sizes = [(tokens, batch) for tokens in lengths for batch in (1, 16)]
    return [
        Case(
            name=f"T={tokens} n_seq={batch} pages={share:.0%} bits={bits}",
            params=parameters(tokens=tokens, batch=batch, share=share, bits=bits),
        )
        for tokens, batch in sizes
        for bits in (16, 8, 4)
        for share in (1.0, 0.25, 0.10)
    ]


def formats(bits: int) -> tuple[Format, Format]:
    """Return the formats of K (groups along the tokens) and V (along the channels)."""
    if bits == 16:
        return Format(), Format()
    k = Format(bits=bits, axis="channel", group_size=_GROUP)
    return k, Format(bits=bits, axis="token", group_size=_GROUP)


def make_inputs(case: Case, device: torch.device, seed: int) -> Inputs:
    """Draw Gaussian q and pages, or random codes over the range of a Gaussian."""
    p = case.params
    generator = torch.Generator(device).manual_seed(seed)
    options: dict[str, Any] = {"generator": generator, "device": device}
    per_sequence = p["tokens"] // p["page_size"]
    n_pages = p["batch"] * per_sequence

    def drawn(format: Format) -> Pages:
        size = (n_pages, p["kv_heads"], p["page_size"], p["head_dim"])
        pages = Pages.allocate(*size, dtype=torch.bfloat16, device=device, format=format)
        if pages.scale is None or pages.minimum is None:
            pages.data.normal_(generator=generator)
        else:
            pages.data.random_(generator=generator)
            pages.minimum.uniform_(-2.5, -1.5, generator=generator)
            pages.scale.copy_(pages.minimum / -(2**format.bits - 1) * 2)
        return pages

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, **options)

    k, v = (drawn(format) for format in formats(p["bits"]))
    table = torch.randperm(n_pages, **options).int().view(p["batch"], per_sequence)
    lengths = torch.full((p["batch"],), p["tokens"], dtype=torch.int32, device=device)
    selected = None
    if p["density"] < 1:
        score = torch.rand(p["batch"], p["kv_heads"], per_sequence, **options)
        kept = max(1, round(p["density"] * per_sequence))
        selected = score.topk(kept, dim=-1).indices.int()
    dense = (p["batch"], p["kv_heads"], p["tokens"], p["head_dim"])
    q = random(p["batch"], p["kv_heads"] * p["n_rep"], p["head_dim"])
    return Inputs(q, k, v, table, lengths, selected, random(*dense), random(*dense))


def _ours(x: Inputs) -> torch.Tensor:
    return paged_attention(x.q, x.k, x.v, x.page_table, x.lengths, selected=x.selected)


def _all(x: Inputs) -> torch.Tensor:
    return paged_attention(x.q, x.k, x.v, x.page_table, x.lengths)


def _sdpa_gqa(x: Inputs) -> torch.Tensor:
    return F.scaled_dot_product_attention(x.q[:, :, None], x.dense_k, x.dense_v, enable_gqa=True)[
        :, :, 0
    ]


def _sdpa_rows(x: Inputs) -> torch.Tensor:
    """Give the query heads of a KV head as its queries, so that K and V are read once."""
    rows = x.q.view(*x.dense_k.shape[:2], -1, x.q.shape[-1])
    return F.scaled_dot_product_attention(rows, x.dense_k, x.dense_v).flatten(1, 2)


def _strongest(candidates: list[Callable[[Inputs], torch.Tensor]]) -> Any:
    """Return a callable that times the candidates on its first input and keeps the best."""
    best: list[Callable[[Inputs], torch.Tensor]] = []

    def seconds(call: Callable[[Inputs], torch.Tensor], x: Inputs) -> float:
        times = []
        for _ in range(4):
            start = time.perf_counter()
            call(x)
            if x.q.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times)

    def call(x: Inputs) -> torch.Tensor:
        if not best:
            best.append(min(candidates, key=lambda candidate: seconds(candidate, x)))
        return best[0](x)

    return call


def implementations(case: Case, device: torch.device) -> dict[str, Callable[[Inputs], Any]]:
    """Return the stronger way to call SDPA, ours and, where pages are left out, ours over all."""
    calls: dict[str, Callable[[Inputs], Any]] = {
        _DENSE: _strongest([_sdpa_gqa, _sdpa_rows]),
        _OURS: _ours,
    }
    return calls if case.params["density"] == 1 else calls | {_ALL: _all}


def reference(case: Case, x: Inputs) -> torch.Tensor:
    """Evaluate the definition in fp32."""
    return paged_attention_reference(
        x.q.float(), x.k, x.v, x.page_table, x.lengths, selected=x.selected
    )[0]


def compare(case: Case, name: str) -> float | None:
    """Allow four bf16 roundings of the largest outputs; dense is another function.

    With Gaussian scores the outputs have a deviation of sqrt(e / tokens), the largest are 5 of it.
    """
    p = case.params
    if name != _OURS:
        return None
    deviation = (2.718 / (p["tokens"] * p["density"])) ** 0.5
    # Codes are uniform over about +-2, and their mean is not 0.
    largest = 5 * deviation + (0.0 if p["bits"] == 16 else 0.5)
    return 4 * 2.0**-8 * largest


def _density(case: Case, name: str) -> float:
    return case.params["density"] if name == _OURS else 1.0


def flops(case: Case, name: str) -> float:
    """Two products for every token attended to."""
    p = case.params
    heads = p["batch"] * p["kv_heads"] * p["n_rep"]
    return 4.0 * heads * p["head_dim"] * p["tokens"] * _density(case, name)


def bytes_moved(case: Case, name: str) -> float:
    """Read the attended keys and values once, with scales and minima where they are packed."""
    p = case.params
    values = 2.0 * p["batch"] * p["kv_heads"] * p["tokens"] * p["head_dim"] * _density(case, name)
    if p["bits"] == 16 or name == _DENSE:
        return 2 * values
    return values * (p["bits"] / 8 + 2 * 2 / _GROUP)


def ideal_speedup(case: Case, name: str) -> float | None:
    """Return how many times fewer bytes than dense attention must be read."""
    return None if name == _DENSE else bytes_moved(case, _DENSE) / bytes_moved(case, name)


def bar(case: Case, name: str, fraction: float, speedups: Mapping[str, float]) -> str | None:
    """Return which promise of this kernel a row breaks."""
    share = case.params["density"]
    if name != _OURS or case.params["tokens"] < 32768:
        return None
    if share == 1 and speedups.get(_DENSE, 2.0) < 1:
        return "slower than dense"
    if share == 0.25:
        dense = [speedups[other] for other in (_DENSE, _ALL) if other in speedups]
        taken = 1 / min(dense, default=float("inf"))
        if taken > _QUARTER_BAR:
            return f"a quarter of the pages takes {taken:.2f} of the all-pages time"
    return None


SUITE = Suite(
    kernel="paged_attention",
    cases=cases,
    make_inputs=make_inputs,
    implementations=implementations,
    baseline=_DENSE,
    flops=flops,
    bytes_moved=bytes_moved,
    ideal_speedup=ideal_speedup,
    reference=reference,
    compare=compare,
    bar=bar,
)
