"""q/k/v for the attention operator: captured from a subject, Gaussian, or of planted structure.

Which of the three it was is always named in the record: sparsity on noise says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from repro.subjects import Subject

KINDS = ("captured", "gaussian", "structured")


@dataclass(frozen=True)
class OperatorInputs:
    """One member of an input pool.

    Attributes:
        q: ``[B, H, Tq, D]``.
        k: ``[B, H_kv, Tk, D]``.
        v: ``[B, H_kv, Tk, D]``.
        kind: One of ``KINDS``.
        layer: Decoder layer that the operator is to act for.
        facts: JSON-able description of how the tensors came about.
        planted: Structured inputs: ``[H, N, N]`` bool, causal blocks that were given weight.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    kind: str
    layer: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    planted: torch.Tensor | None = None


def gaussian(
    shape: tuple[int, int, int, int, int],
    *,
    seed: int,
    dtype: torch.dtype,
    device: torch.device | str,
    layer: int = 0,
) -> OperatorInputs:
    """Draw independent standard normal q, k, v.

    Args:
        shape: ``(B, H, H_kv, T, D)``.
        seed: Of the draw, made on the device.
        dtype: Of the tensors.
        device: Where they lie.
        layer: Recorded as the layer to act for.
    """
    batch, heads, kv_heads, tokens, head_dim = shape
    generator = torch.Generator(device).manual_seed(seed)

    def draw(n_heads: int) -> torch.Tensor:
        extents = (batch, n_heads, tokens, head_dim)
        return torch.randn(extents, generator=generator, device=device, dtype=dtype)

    facts = {"seed": seed, "distribution": "standard normal"}
    return OperatorInputs(
        draw(heads), draw(kv_heads), draw(kv_heads), "gaussian", layer=layer, facts=facts
    )


@dataclass(frozen=True, kw_only=True)
class Structure:
    """What ``structured`` plants, in blocks of ``block_size`` tokens.

    Attributes:
        density: Target share of the causal blocks that carry weight, in (0, 1].
        sink_size: Leading tokens that every query attends to.
        band: Blocks of the local band, the diagonal included.
        stripes: At most so many positions that every later query attends to (vertical lines);
            fewer where they would take more than 30 % of the target density.
        strength: Logit that a planted key has above the background of about 0.
        block_size: Tokens.
    """

    density: float = 0.1
    sink_size: int = 4
    band: int = 2
    stripes: int = 4
    strength: float = 6.5
    block_size: int = 128

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be in (0, 1], got {self.density}")


def structured(
    shape: tuple[int, int, int, int, int],
    structure: Structure | None = None,
    *,
    seed: int,
    dtype: torch.dtype,
    device: torch.device | str,
    layer: int = 0,
) -> OperatorInputs:
    """Make q, k, v whose attention lies on a sink, a local band, stripes and hot blocks.

    The head dimension is split: two coordinates carry sink and stripes, half carries codes
    of the key blocks and a query block adds up the codes of its hot blocks, a quarter
    carries slow rotations that make neighbours similar, the rest is noise. Hot blocks fill up to
    the target density; every query head has its own.

    Args:
        shape: ``(B, H, H_kv, T, D)``, D at least 16.
        structure: What to plant.
        seed: Of all draws, made on the CPU so that it means the same everywhere.
        dtype: Of the tensors.
        device: Where they lie.
        layer: Recorded as the layer to act for.
    """
    structure = structure or Structure()
    batch, heads, kv_heads, tokens, head_dim = shape
    if head_dim < 16:
        raise ValueError(f"structured: head dimension must be at least 16, got {head_dim}")
    generator = torch.Generator().manual_seed(seed)
    n_blocks = math.ceil(tokens / structure.block_size)
    lines, planted = _plan(structure, heads, tokens, n_blocks, generator)
    code_width = head_dim // 2
    codes = torch.randn(kv_heads, n_blocks, code_width, generator=generator)
    codes = codes / codes.norm(dim=-1, keepdim=True)
    band = _rotations(tokens, head_dim // 8, structure.band * structure.block_size, generator)
    # Half of every logit goes to each side; the operator divides by sqrt(D).
    half = math.sqrt(structure.strength * math.sqrt(head_dim))
    block_of = torch.arange(tokens) // structure.block_size
    q = 0.3 * torch.randn(batch, heads, tokens, head_dim, generator=generator)
    k = 0.3 * torch.randn(batch, kv_heads, tokens, head_dim, generator=generator)
    q[..., 0] = half
    k[..., 0] = 0.0
    # One key competes with whole blocks of hot keys: its logit carries part of log(block_size).
    bonus = 1 + 0.6 * math.log(structure.block_size) / structure.strength
    k[:, :, lines, 0] = half * bonus
    hot = _hot_codes(planted.hot, codes, heads // kv_heads)
    q[..., 2 : 2 + code_width] = half * hot[:, block_of]
    k[..., 2 : 2 + code_width] = half * codes[:, block_of]
    start = 2 + code_width
    q[..., start : start + band.shape[1]] = half * band
    k[..., start : start + band.shape[1]] = half * band
    v = torch.randn(batch, kv_heads, tokens, head_dim, generator=generator)
    visible = torch.ones(n_blocks, n_blocks, dtype=torch.bool).tril()
    achieved = (planted.mask & visible).sum() / (heads * visible.sum())
    facts = {"seed": seed, "planted_density": round(float(achieved), 4)} | {
        name: getattr(structure, name) for name in structure.__dataclass_fields__
    }
    q, k, v = (tensor.to(device=device, dtype=dtype) for tensor in (q, k, v))
    return OperatorInputs(
        q,
        k,
        v,
        kind="structured",
        layer=layer,
        facts=facts,
        planted=planted.mask.to(device),
    )


@dataclass(frozen=True)
class _Planted:
    hot: torch.Tensor  # [H, N, N] bool
    mask: torch.Tensor  # [H, N, N] bool, everything planted


def _plan(
    structure: Structure, heads: int, tokens: int, n_blocks: int, generator: torch.Generator
) -> tuple[torch.Tensor, _Planted]:
    """Choose the columns of sink and stripes, and the hot blocks that fill up to the density."""
    n_sink = min(structure.sink_size, tokens)
    # A column takes 1 / n_blocks of the causal blocks on average.
    n_stripes = min(structure.stripes, int(0.3 * structure.density * n_blocks))
    stripes = torch.randperm(tokens, generator=generator)[:n_stripes]
    lines = torch.unique(torch.cat([torch.arange(n_sink), stripes]))
    rows, columns = torch.arange(n_blocks)[:, None], torch.arange(n_blocks)[None]
    visible = columns <= rows
    fixed = visible & (rows - columns < structure.band)
    line_blocks = torch.unique(lines // structure.block_size)
    fixed = fixed | (visible & torch.isin(columns, line_blocks))
    free = visible & ~fixed
    wanted = structure.density * float(visible.sum()) - float(fixed.sum())
    share = min(1.0, max(0.0, wanted / max(1.0, float(free.sum()))))
    draw = torch.rand(heads, n_blocks, n_blocks, generator=generator)
    hot = free & (draw < share)
    return lines, _Planted(hot, hot | fixed)


def _hot_codes(hot: torch.Tensor, codes: torch.Tensor, n_rep: int) -> torch.Tensor:
    """Sum the codes of the hot blocks of each query block: ``[H, N, code_width]``."""
    return hot.float() @ codes.repeat_interleave(n_rep, dim=0)


def _rotations(tokens: int, pairs: int, reach: int, generator: torch.Generator) -> torch.Tensor:
    """Return unit vectors ``[T, 2 * pairs]`` whose products fall off beyond ``reach`` tokens."""
    # Jittered frequencies have no common period, so the band does not come back far away.
    spread = (torch.arange(pairs) + torch.rand(pairs, generator=generator)) / pairs
    angle = torch.arange(tokens)[:, None] * (1.5 * math.pi / reach * spread)[None]
    return torch.cat([angle.cos(), angle.sin()], dim=1) / math.sqrt(pairs)


def attention_modules(model: Any) -> list[Any]:
    """Return the modules that call the registered attention function, by layer."""
    found = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "scaling")
    ]
    return sorted(found, key=lambda module: module.layer_idx)


def spread_layers(n_layers: int, count: int) -> list[int]:
    """Return up to ``count`` layers spread evenly over the depth, ends left out where possible."""
    if count >= n_layers:
        return list(range(n_layers))
    return sorted({round((index + 1) * (n_layers - 1) / (count + 1)) for index in range(count)})


@contextmanager
def wrapped_attention(model: Any, name: str, wrap: Callable[[Any], Any]) -> Iterator[None]:
    """Run ``model`` with ``wrap(attention function)`` in the place of its attention function.

    Args:
        model: A transformers model; its implementation is set back on exit, error or not.
        name: Under which the wrapped function is registered.
        wrap: Attention function -> attention function of the same signature.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from repro.attention_patch import registered_attention

    previous = model.config._attn_implementation
    wrapped = wrap(ALL_ATTENTION_FUNCTIONS[previous])
    with registered_attention(name, wrapped, ALL_MASK_ATTENTION_FUNCTIONS[previous]):
        try:
            model.set_attn_implementation(name)
            yield
        finally:
            model.set_attn_implementation(previous)


def capture(
    subject: Subject, token_ids: torch.Tensor, layers: Sequence[int], *, source: str
) -> list[OperatorInputs]:
    """Record q, k, v of some layers during one dense prefill.

    Args:
        subject: Its attention runs as it is set (SDPA); nothing stays changed afterwards.
        token_ids: ``[B, T]`` int64.
        layers: Layer numbers.
        source: What the prompt is, for the record.
    """
    taken: dict[int, OperatorInputs] = {}

    def wrap(inner: Any) -> Any:
        def record(module: Any, q: Any, k: Any, v: Any, mask: Any, **options: Any) -> Any:
            if module.layer_idx in layers:
                facts = {"subject": subject.name, "prompt": source, "tokens": q.shape[2]}
                taken[module.layer_idx] = OperatorInputs(
                    q.clone(), k.clone(), v.clone(), "captured", module.layer_idx, facts
                )
            return inner(module, q, k, v, mask, **options)

        return record

    with wrapped_attention(subject.model, "repro_capture", wrap), torch.inference_mode():
        subject.model(token_ids.to(subject.device), use_cache=False, logits_to_keep=1)
    return [taken[layer] for layer in sorted(taken)]
