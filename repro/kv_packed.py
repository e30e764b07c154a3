"""K and V of one layer really packed: codes of few bits, with their scales and minima, in pages.

Both modes quantise groups of neighbours between their minimum and maximum, and touch no code again:

- ``per_token``: a group is one token of one KV head, of keys and of values. Nothing stays as it is.
- ``kivi``: keys in groups of one channel over ``group_size`` consecutive tokens, values in groups
  of ``group_size`` channels of one token. With ``T`` tokens the last ``T mod residual`` keys and
  the last ``residual`` values stay unquantised; keys are packed in blocks of ``residual`` tokens,
  values one token at a time.

Source: arXiv:2402.02750 (kivi); arXiv:2502.04420, section 3 (per_token).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from repro.attention_patch import dense_causal
from repro.errors import UnsupportedCombination, check_rules
from repro.kernels.kv_quantize import quantize
from repro.kernels.paged_attention import Format, Pages, dequantize, merge_attention
from repro.kv_cache import LayerShape, NewTokens
from repro.kv_pages import PagedStore
from repro.kv_prompt import PromptLayer

MODES = ("per_token", "kivi")
BITS = (2, 4, 8, 16)


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How K and V of one layer are packed.

    Attributes:
        k_bits: Bits of a key: 2, 4, 8, or 16 for keys as they are.
        v_bits: Bits of a value, the same.
        mode: See the module.
        group_size: Tokens (keys) and channels (values) of a group in mode ``kivi``.
        residual: Newest tokens that stay unquantised in mode ``kivi``, a multiple of the group.
    """

    k_bits: int
    v_bits: int
    mode: Literal["per_token", "kivi"] = "per_token"
    group_size: int = 32
    residual: int = 128

    def __post_init__(self) -> None:
        check_rules(
            ("k_bits", self.k_bits in BITS, f"one of {BITS}", self.k_bits),
            ("v_bits", self.v_bits in BITS, f"one of {BITS}", self.v_bits),
            *packing_rules(self.mode, self.group_size, self.residual),
        )

    @property
    def has_residual(self) -> bool:
        return self.mode == "kivi"

    @property
    def k_format(self) -> Format:
        """How keys lie in pages."""
        if self.mode == "per_token":
            return Format(bits=self.k_bits)
        return Format(bits=self.k_bits, axis="channel", group_size=self.group_size)

    @property
    def v_format(self) -> Format:
        """How values lie in pages."""
        group_size = self.group_size if self.mode == "kivi" else None
        return Format(bits=self.v_bits, group_size=group_size)

    @property
    def page_size(self) -> int:
        """Tokens of a page, whole groups."""
        return self.group_size * -(-64 // self.group_size) if self.mode == "kivi" else 64

    def packed(self, tokens: int) -> tuple[int, int]:
        """Return how many of so many tokens have a packed key, and how many a packed value."""
        if not self.has_residual:
            return tokens, tokens
        return tokens - tokens % self.residual, max(0, tokens - self.residual)

    def rounded(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values ``[B, H_kv, T, D]`` of a whole prompt as they are read back."""
        keys, values = self.packed(k.shape[2])
        return _rounded(k, self.k_format, keys), _rounded(v, self.v_format, values)

    def stored_bits(self, head_dim: int) -> float:
        """Return the mean bits of a packed value with its share of scale and minimum, 16 each."""
        total = 0.0
        for form in (self.k_format, self.v_format):
            total += form.bits + (32 / (form.group_size or head_dim) if form.quantized else 0)
        return total / 2


def packing_rules(mode: str, group_size: int, residual: int) -> list[tuple[str, bool, str, object]]:
    """Return the rules of these options for ``check_rules``."""
    multiple = group_size >= 1 and residual >= group_size and residual % group_size == 0
    rule = f"a positive multiple of group_size {group_size}"
    return [
        ("mode", mode in MODES, f"one of {', '.join(MODES)}", mode),
        ("group_size", group_size >= 1, "at least 1", group_size),
        ("residual", multiple, rule, residual),
    ]


def _rounded(x: torch.Tensor, form: Format, tokens: int) -> torch.Tensor:
    if not form.quantized or not tokens:
        return x
    codes, scale, minimum = quantize(x[:, :, :tokens], form)
    # A sequence is a page here: the layout within one is the same.
    read = dequantize(Pages(codes, form, scale, minimum)).to(x.dtype)
    return torch.cat([read, x[:, :, tokens:]], dim=2)


class PackedLayer(PromptLayer):
    """One layer: packed pages, and in mode ``kivi`` a ring of the newest tokens beside them.

    The ring holds both K and V of the newest ``residual`` tokens; where a key is packed already it
    holds what is read back, so that a step unpacks no key outside the kernel. That costs the memory
    of at most ``residual`` keys.

    Args:
        shape: Layer and batch.
        packing: How it is packed.
        force_quantized: Let the prefill, too, attend to what will be read back (of the tokens so
            far, in a prefill of several passes); by default it attends to exact K and V.

    Raises:
        UnsupportedCombination: If no whole number of groups or bytes makes a head.
    """

    def __init__(
        self, shape: LayerShape, packing: Packing, *, force_quantized: bool = False
    ) -> None:
        super().__init__(shape)
        check_head_dim(packing, shape.head_dim)
        self.packing, self.force_quantized = packing, force_quantized
        self.store = PagedStore(
            shape,
            page_size=packing.page_size,
            k_format=packing.k_format,
            v_format=packing.v_format,
        )
        self.lengths = [0] * shape.batch
        slots = packing.residual if packing.has_residual else 0
        ring = (shape.batch, shape.kv_heads, slots, shape.head_dim)
        self._ring_k, self._ring_v = (
            torch.zeros(ring, dtype=shape.dtype, device=shape.device) for _ in range(2)
        )

    def prefill(self, sequence: int, new: NewTokens) -> torch.Tensor:
        if not self.force_quantized:
            return super().prefill(sequence, new)
        self.fill(sequence, new.k, new.v)
        k, v = self.packing.rounded(*self._prompts[sequence])
        return dense_causal(new.q, k, v, new.scale)

    def keep(self, sequence: int, k: torch.Tensor, v: torch.Tensor) -> None:
        tokens = self.lengths[sequence] = k.shape[2]
        keys, values = self.packing.packed(tokens)
        self.store.append(k[:, :, :keys], v[:, :, :values], sequence)
        if not self.packing.has_residual or not tokens:
            return
        newest = range(max(0, tokens - self.packing.residual), tokens)
        slots = torch.tensor(newest, device=k.device) % self.packing.residual
        read = self.store.keys(sequence, newest.start, keys)
        self._ring_k[sequence][:, slots] = torch.cat([read, k[:, :, keys:]], dim=2)[0]
        self._ring_v[sequence][:, slots] = v[0, :, newest.start :]

    def decode(self, new: NewTokens) -> torch.Tensor:
        if self.packing.has_residual:
            self._push(new.k, new.v)
        else:
            self.store.append(new.k, new.v)
        self.lengths = [tokens + 1 for tokens in self.lengths]
        if self.packing.has_residual:
            self._pack_blocks()
        seen = self.shape.kv_heads * sum(self.lengths)
        self.count(seen, seen)
        if not self.packing.has_residual:
            return self.store.attend(new.q, new.scale)[0]
        out, lse = self._attend_ring(new.q, new.scale)
        if not any(self.store.lengths):
            return out
        packed_out, packed_lse = self.store.attend(new.q, new.scale)
        merged = merge_attention([packed_out[:, :, 0], out[:, :, 0]], [packed_lse, lse])
        return merged[0][:, :, None]

    def _push(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Put one token of every sequence in the ring; the values that it takes out are packed."""
        residual = self.packing.residual
        slots = torch.tensor([n % residual for n in self.lengths], device=k.device)
        rows = torch.arange(len(slots), device=k.device)
        full = [tokens >= residual for tokens in self.lengths]
        oldest = self._ring_v[rows, :, slots][:, :, None]
        if all(full):
            self.store.append(None, oldest)
        else:
            for row in (row for row, is_full in enumerate(full) if is_full):
                self.store.append(None, oldest[row : row + 1], row)
        self._ring_k[rows, :, slots] = k[:, :, 0]
        self._ring_v[rows, :, slots] = v[:, :, 0]

    def _pack_blocks(self) -> None:
        """Pack the keys of every sequence whose ring is one block, in order."""
        residual = self.packing.residual
        for row, tokens in enumerate(self.lengths):
            if tokens % residual == 0:
                self.store.append(self._ring_k[row : row + 1], None, row)
                self._ring_k[row] = self.store.keys(row, tokens - residual, tokens)[0]

    def _attend_ring(self, q: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the attention ``[B, H, 1, D]`` over the ring and its log-sum-exp ``[B, H]``."""
        grouped = q.float().unflatten(1, (self.shape.kv_heads, -1))[..., 0, :]
        scores = scale * (grouped @ self._ring_k.float().mT)  # [B, H_kv, n_rep, residual]
        residual = self.packing.residual
        if min(self.lengths) < residual:
            counts = torch.tensor(self.lengths, device=q.device)[:, None, None, None]
            hidden = torch.arange(residual, device=q.device) >= counts
            scores = scores.masked_fill(hidden, -torch.inf)
        out = scores.softmax(-1) @ self._ring_v.float()
        return out.flatten(1, 2)[:, :, None].to(q.dtype), scores.logsumexp(-1).flatten(1)

    def tensors(self) -> Iterable[torch.Tensor]:
        yield from super().tensors()
        yield from self.store.tensors()
        yield from (self._ring_k, self._ring_v)


def check_head_dim(packing: Packing, head_dim: int) -> None:
    """Raise UnsupportedCombination if no whole number of groups or bytes makes a head."""
    if packing.mode == "kivi" and head_dim % packing.group_size:
        raise UnsupportedCombination(
            f"packed kv cache: head_dim must be a multiple of group_size {packing.group_size}, got "
            f"{head_dim}"
        )
    bits = min(packing.k_bits, packing.v_bits)
    if head_dim * bits % 8:
        raise UnsupportedCombination(
            f"packed kv cache: a head of {bits} bits must be whole bytes, got head_dim {head_dim}"
        )
