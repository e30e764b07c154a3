"""The one mechanism by which an attention method enters a transformers model, and leaves it.

``patched_attention(model, attend)`` registers a function in ``AttentionInterface`` and
``AttentionMaskInterface``, switches the model to it and restores exactly what was set before, also
after an exception. A method writes only ``attend(call) -> output``: it sees prompts without
padding, whole or in chunks, never decode steps. Everything else is settled here:

- A step with one query is decode: dense, and no method's fallback.
- Left (or right) padding: each row of the batch is cut to its real tokens, so a prompt gives the
  same result in a batch as alone. Rows of padding alone give 0.
- The mask is kept as ``[B, 1, 1, Tk]`` (which keys are real) as long as causality explains the
  rest. A mask that it does not explain (sliding window, packed sequences, a custom 4-D mask) is
  refused with ``UnsupportedCombination``, as are soft-capped scores, attention sinks as learnt
  logits, position biases, dropout and attention weights as an output.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from repro.errors import UnsupportedCombination

_numbers = itertools.count()


@dataclass(frozen=True)
class AttentionCall:
    """One prefill of one layer, without padding.

    Attributes:
        layer: Index of the decoder layer.
        q: ``[B, H, Tq, D]``, ``Tq > 1``.
        k: ``[B, H_kv, Tk, D]``, ``Tk >= Tq``; the queries are the last ``Tq`` of these tokens.
        v: ``[B, H_kv, Tk, D]``.
        scale: Softmax scale.
    """

    layer: int
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float


class Attend(Protocol):
    """What a method supplies: an attention over one call, or None to have it computed densely."""

    def __call__(self, call: AttentionCall) -> torch.Tensor | None:
        """Return ``[B, H, Tq, D]``, or None if this call is to run dense."""


@contextmanager
def registered_attention(
    name: str, attention: Callable[..., Any], make_mask: Callable[..., Any]
) -> Iterator[None]:
    """Make an attention function known to transformers inside the block.

    There is no unregister: without taking it out by hand the registry would keep alive all that
    the function holds.
    """
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, make_mask)
    try:
        yield
    finally:
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop(name, None)


@contextmanager
def patched_attention(
    model: PreTrainedModel,
    attend: Attend,
    *,
    observe_decode: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Run ``model`` with ``attend`` inside the block; restore it on exit, error or not.

    A call that ``attend`` declines, and every decode step, runs transformers' own SDPA function on
    the mask that SDPA would have got: bit for bit what a dense model computes. Blocks may nest;
    the inner one holds.

    Args:
        model: A decoder of transformers that takes its attention from ``AttentionInterface``.
        attend: The method.
        observe_decode: Called once per layer and decode step.

    Raises:
        UnsupportedCombination: If the model cannot switch its attention, or a call needs what the
            mechanism does not define (see the module).
    """
    bridge = _Bridge(attend, observe_decode)
    # A name of its own per block: two patched models may run at once. It must not contain the
    # name of a backend, or transformers checks for that backend.
    name = f"repro_attention_{next(_numbers)}"
    with (
        registered_attention(name, bridge.forward, bridge.make_mask),
        switched_attention(model, name),
    ):
        yield


@contextmanager
def switched_attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Have ``model`` take a registered attention inside the block; set back on exit what was set.

    Raises:
        UnsupportedCombination: If the model cannot switch its attention.
    """
    if not isinstance(model, PreTrainedModel) or not model._can_set_attn_implementation():
        raise UnsupportedCombination(
            f"attention patch: {type(model).__name__} does not take its attention from "
            "transformers' AttentionInterface"
        )
    before = [(config, config._attn_implementation_internal) for config in _configs(model)]
    try:
        model.set_attn_implementation(name)
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation


def _configs(model: PreTrainedModel) -> list[Any]:
    """Return every config whose attention implementation a switch may change, each once."""
    found: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            config = module.config
            children = [getattr(config, name, None) for name in config.sub_configs]
            for each in (config, *children):
                if each is not None and hasattr(each, "_attn_implementation_internal"):
                    found[id(each)] = each
    return list(found.values())


class _Bridge:
    """Between the signatures of transformers and ``attend``."""

    def __init__(self, attend: Attend, observe_decode: Callable[[], None]) -> None:
        self.attend = attend
        self.observe_decode = observe_decode
        # All layers of a forward pass get the same mask object: it is read once.
        self._read: tuple[torch.Tensor, _Padding] | None = None

    def make_mask(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int = 0,
        kv_offset: int = 0,
        mask_function: Callable[..., Any] = causal_mask_function,
        attention_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor | None:
        """Return ``[B, 1, 1, Tk]`` bool for a plain causal prefill, else what SDPA would get."""
        self._read = None
        plain = mask_function is causal_mask_function and options.get("local_size") is None
        # With a static cache there are keys beyond the last query; SDPA's mask tells them apart.
        grown = bool(kv_offset == 0 and q_offset + q_length == kv_length)
        if plain and grown and q_length > 1:
            if attention_mask is None:
                whole = q_length == kv_length and options.get("allow_is_causal_skip", True)
                if whole:
                    return None
                return torch.ones(
                    batch_size, 1, 1, kv_length, dtype=torch.bool, device=options.get("device")
                )
            if attention_mask.ndim == 2 and attention_mask.shape[1] == kv_length:
                real = attention_mask.bool()
                if q_length == kv_length and bool(real.all()):
                    return None
                return real[:, None, None, :]
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **options,
        )

    def forward(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        """Return the attention output ``[B, Tq, H, D]`` of one layer."""
        check_supported(module, dropout, options)
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        if query.shape[2] == 1:
            self.observe_decode()
            return _dense(module, query, key, value, attention_mask, scale), None
        layer = int(getattr(module, "layer_idx", 0))
        padding = self._padding(query, key, attention_mask)
        if padding is None:
            # SDPA's own causal mask is aligned to the first key: a static cache may hold more.
            key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
            out = self.attend(AttentionCall(layer, query, key, value, scale))
            if out is None:
                return _dense(module, query, key, value, None, scale), None
            return out.transpose(1, 2), None
        out = self._attend_rows(layer, query, key, value, scale, padding)
        if out is None:
            return _dense(module, query, key, value, padding.dense_mask(), scale), None
        return out, None

    def _padding(
        self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None
    ) -> _Padding | None:
        """Return what the mask says, None for a plain causal prefill of equal lengths."""
        if mask is None:
            return None
        if self._read is None or self._read[0] is not mask:
            self._read = (mask, _Padding.read(mask, query.shape[2], key.shape[2]))
        return self._read[1]

    def _attend_rows(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        padding: _Padding,
    ) -> torch.Tensor | None:
        """Attend over the real tokens of each row; None if the method declined every one."""
        batch, heads, tokens_q, _ = query.shape
        if padding.uniform:
            end = padding.spans[0][1]
            call = AttentionCall(layer, query, key[:, :, :end], value[:, :, :end], scale)
            whole = self.attend(call)
            return None if whole is None else whole.transpose(1, 2)
        offset = padding.tokens_k - tokens_q
        rows = []
        for row, (first, end) in enumerate(padding.spans):
            start, stop = max(first - offset, 0), end - offset
            if start < stop:
                q = query[row : row + 1, :, start:stop]
                k, v = (x[row : row + 1, :, first:end] for x in (key, value))
                call = AttentionCall(layer, q, k, v, scale)
                rows.append((row, start, call, self.attend(call) if q.shape[2] > 1 else None))
        if all(part is None for *_, part in rows):
            return None  # the whole batch at once is bit-equal to dense
        out = query.new_zeros(batch, tokens_q, heads, value.shape[3])
        for row, start, call, part in rows:
            if part is None:
                part = dense_causal(call.q, call.k, call.v, scale)
            out[row, start : start + part.shape[2]] = part[0].transpose(0, 1)
        return out


@dataclass
class _Padding:
    """The real tokens of each row of a batch, read from a mask.

    Attributes:
        spans: (first real key, one past the last) per row; equal numbers if there is none.
        tokens_q: Queries in the pass.
        tokens_k: Keys up to the last query's own, padding counted.
        columns: Keys that the cache holds, beyond the last query's too.
        real: ``[B, columns]`` bool.
        given: The mask as it came, if it was whole.
    """

    spans: list[tuple[int, int]]
    tokens_q: int
    tokens_k: int
    columns: int
    real: torch.Tensor
    given: torch.Tensor | None

    @property
    def uniform(self) -> bool:
        """Whether no row has padding."""
        return all(span == (0, self.tokens_k) for span in self.spans)

    @classmethod
    def read(cls, mask: torch.Tensor, tokens_q: int, columns: int) -> _Padding:
        """Read a mask ``[B, 1, 1 or Tq, Tk]`` bool.

        Raises:
            UnsupportedCombination: If it is not causality and padding at the ends of rows.
        """
        if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1] != 1:
            raise UnsupportedCombination(
                "attention patch: the mask must be boolean [B, 1, Tq, Tk], got "
                f"{mask.dtype} {list(mask.shape)}"
            )
        real = mask[:, 0, -1, :columns]
        tokens_k = columns
        given = None
        if mask.shape[2] > 1:
            given = mask
            tokens_k = int(real.any(dim=0).nonzero().amax()) + 1 if bool(real.any()) else columns
            tokens_k = max(tokens_k, tokens_q)  # every row may be padded on the right
            expected = _causal_and_real(real, tokens_q, tokens_k)
            if mask.shape[2] != tokens_q or not torch.equal(mask[:, 0, :, :columns], expected):
                raise UnsupportedCombination(
                    "attention patch: the attention mask is not causality with padding (a sliding "
                    "window shorter than the prompt, packed sequences or a custom 4-D mask)"
                )
        spans = []
        for row in real[:, :tokens_k].tolist():
            first = row.index(True) if True in row else 0
            count = sum(row)
            if not all(row[first : first + count]):
                raise UnsupportedCombination(
                    "attention patch: padding must lie at the ends of a row, got real tokens on "
                    "both sides of it"
                )
            spans.append((first, first + count))
        return cls(spans, tokens_q, tokens_k, columns, real, given)

    def dense_mask(self) -> torch.Tensor:
        """Return the mask that SDPA gets: ``[B, 1, Tq, Tk]`` bool; made once per forward pass."""
        if self.given is None:
            self.given = _causal_and_real(self.real, self.tokens_q, self.tokens_k)[:, None]
        return self.given


def _causal_and_real(real: torch.Tensor, tokens_q: int, tokens_k: int) -> torch.Tensor:
    """Return ``[B, Tq, columns]`` bool: real keys up to the query's own."""
    rows = torch.arange(tokens_k - tokens_q, tokens_k, device=real.device)[:, None]
    columns = torch.arange(real.shape[1], device=real.device)[None, :]
    return (columns <= rows) & real[:, None, :]


def _dense(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Return transformers' own SDPA attention, ``[B, Tq, H, D]``."""
    return sdpa_attention_forward(module, query, key, value, mask, scaling=scale)[0]


def dense_causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Return dense causal attention ``[B, H, Tq, D]`` of the last ``Tq`` of the ``Tk`` tokens."""
    mask = None
    if 1 < q.shape[2] < k.shape[2]:
        real = torch.ones(1, k.shape[2], dtype=torch.bool, device=k.device)
        mask = _causal_and_real(real, q.shape[2], k.shape[2])[:, None]
    return torch.nn.functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None and q.shape[2] > 1,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )


#: Options of attention functions that change the arithmetic -> what they are.
_UNDEFINED = {
    "softcap": "soft-capped scores",
    "s_aux": "attention sinks as learnt logits",
    "position_bias": "a position bias",
    "output_attentions": "attention weights as an output",
}


def check_supported(module: torch.nn.Module, dropout: float, options: dict[str, Any]) -> None:
    """Raise UnsupportedCombination if an attention call wants what no method defines."""
    wants = [text for name, text in _UNDEFINED.items() if _is_set(options.get(name))]
    if dropout:
        wants.append("dropout")
    if "Paged" in type(options.get("cache")).__name__:
        wants.append("a paged cache (continuous batching)")
    causal = options.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        wants.append("attention that is not causal (an encoder or cross-attention)")
    if wants:
        raise UnsupportedCombination(
            f"attention patch: {type(module).__name__} wants {' and '.join(wants)}, which "
            "methods do not define here"
        )


def _is_set(value: Any) -> bool:
    return value is not None and value is not False
