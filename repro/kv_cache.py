"""The one mechanism by which a KV-cache method enters a transformers model, and leaves it.

``patched_kv_cache(model, make_layer)`` registers an attention function, switches the model to it
and yields a ``KVPatch`` whose ``make_cache()`` is the ``Cache`` to run the model with. That cache
stores nothing itself: it hands the new keys and values of a layer to the method's ``LayerCache``,
which keeps what it wants, in the form it wants, and attends over it. Everything else is settled
here:

- Left padding: a prompt's real tokens alone reach the method, one sequence at a time, so a prompt
  gives the same result in a batch as alone. Rows of padding alone give 0.
- Chunks: a prompt may come in several passes, of a cache made with its length.
  ``end_prefill`` is called once for each layer, as soon as that has taken in the whole prompt.
- A model that is run without the patch's cache is run with one that lives for that call.
- What no method defines (masks other than causality with left padding, beams, another cache) is
  refused with ``UnsupportedCombination``.

Keys arrive rotated, as the model's attention gets them.
"""

from __future__ import annotations

import copy
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import causal_mask_function

from repro.attention_patch import (
    check_supported,
    registered_attention,
    switched_attention,
)
from repro.errors import UnsupportedCombination
from repro.method import Patch

_numbers = itertools.count()


@dataclass(frozen=True)
class LayerShape:
    """One layer of a model, and the batch that its cache is for."""

    layer: int
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class NewTokens:
    """What one pass adds to one layer, without padding.

    Attributes:
        q: ``[B, H, T, D]``.
        k: ``[B, H_kv, T, D]``, rotated.
        v: ``[B, H_kv, T, D]``.
        scale: Softmax scale.
        remaining: Tokens of the prompt that later passes bring.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    remaining: int = 0


class LayerCache(ABC):
    """K and V of one layer for a batch of sequences, as a method keeps them."""

    @abstractmethod
    def prefill(self, sequence: int, new: NewTokens) -> torch.Tensor:
        """Take in tokens of one sequence (batch 1) and return their attention ``[1, H, T, D]``."""

    @abstractmethod
    def decode(self, new: NewTokens) -> torch.Tensor:
        """Take in one token of every sequence and return their attention ``[B, H, 1, D]``."""

    @abstractmethod
    def fill(self, sequence: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Take in tokens of one sequence, ``[1, H_kv, T, D]``, without attending."""

    @abstractmethod
    def tensors(self) -> Iterable[torch.Tensor]:
        """Return every tensor that is held for the sequences."""

    def end_prefill(self) -> None:
        """Do what the method does once the prompt is whole; nothing by default."""
        return

    def observed(self) -> tuple[int, int]:
        """Return (tokens read, tokens seen) by decode so far, summed over sequences and KV heads."""
        return 0, 0


MakeLayer = Callable[[LayerShape], LayerCache]


@contextmanager
def patched_kv_cache(
    model: PreTrainedModel, make_layer: MakeLayer, *, facts: Mapping[str, Any] | None = None
) -> Iterator[KVPatch]:
    """Run ``model`` with a method's cache inside the block; restore it on exit, error or not.

    Args:
        model: A decoder of transformers that takes its attention from ``AttentionInterface``.
        make_layer: Makes the cache of one layer, called anew for every cache.
        facts: What ``stats`` is to say besides, JSON-able.

    Raises:
        UnsupportedCombination: If the model cannot switch its attention, or a call needs what the
            mechanism does not define (see the module).
    """
    patch = KVPatch(model, make_layer, facts or {})
    name = f"repro_kv_cache_{next(_numbers)}"
    with (
        registered_attention(name, _Bridge(make_layer).forward, make_mask),
        switched_attention(model, name),
    ):
        yield patch


class KVPatch(Patch):
    """What a patched model offers to the measurements."""

    def __init__(
        self, model: PreTrainedModel, make_layer: MakeLayer, facts: Mapping[str, Any]
    ) -> None:
        config = model.config.get_text_config()
        self.heads: int = config.num_attention_heads
        self._layers = config.num_hidden_layers
        self._facts = dict(facts)
        self._make_layer = make_layer
        self._cache: KVCache | None = None

    def make_cache(self, prompt_length: int | None = None) -> KVCache:
        """Return an empty cache; ``stats`` speaks of the last one made or copied.

        Args:
            prompt_length: Tokens of the prompt, padding counted, if it comes in several passes;
                None if the first pass is all of it.
        """
        layers = [_Layer(self._make_layer, i, prompt_length) for i in range(self._layers)]
        return self.now_at(KVCache(self, layers))

    def now_at(self, cache: KVCache) -> KVCache:
        """Have ``stats`` speak of this cache."""
        self._cache = cache
        return cache

    def reset(self) -> None:
        """Forget the last cache."""
        self._cache = None

    def stats(self) -> dict[str, Any]:
        """Return ``kv_bytes`` (of all tensors held), ``seen_tokens`` and ``decode_density``.

        ``decode_density`` is what decode steps have read of the tokens seen, None before the first.
        """
        layers = [] if self._cache is None else self._cache.held()
        observed = [layer.observed() for layer in layers]
        read, seen = sum(pair[0] for pair in observed), sum(pair[1] for pair in observed)
        return {
            "kv_bytes": sum(_nbytes(layer.tensors()) for layer in layers),
            "seen_tokens": 0 if self._cache is None else self._cache.get_seq_length(),
            "decode_density": read / seen if seen else None,
            **self._facts,
        }


def _nbytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of the storages behind tensors, each once: a view keeps all of its own."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class KVCache(Cache):
    """The ``Cache`` that a patched model is run with."""

    def __init__(self, patch: KVPatch, layers: list[_Layer]) -> None:
        super().__init__(layers=[*layers])
        self._patch, self._taken = patch, layers

    def __deepcopy__(self, memo: dict[int, Any]) -> KVCache:
        return self._patch.now_at(KVCache(self._patch, copy.deepcopy(self._taken, memo)))

    def held(self) -> list[LayerCache]:
        """Return the method's layers that have got tokens."""
        return [layer.held for layer in self._taken if layer.held is not None]

    def fill(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store ``[B, H_kv, T, D]`` in one layer as if prefilled, without attending.

        Args:
            layer: Its index.
            k: Keys, rotated.
            v: Values.
        """
        entry = self._taken[layer]
        entry.take(k, self._patch.heads)
        for sequence in range(k.shape[0]):
            rows = slice(sequence, sequence + 1)
            entry.held.fill(sequence, k[rows], v[rows])
        entry.count(k.shape[2])

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Refuse beam search."""
        raise UnsupportedCombination("kv cache: beam search would need copies of sequences")

    def crop(self, max_length: int) -> None:
        """Refuse to forget tokens."""
        raise UnsupportedCombination("kv cache: tokens cannot be taken back (assisted generation)")


class _Layer(CacheLayerMixin):
    """Counts the tokens of one layer and tells the attention function which layer they are for."""

    def __init__(self, make_layer: MakeLayer, index: int, prompt_length: int | None) -> None:
        super().__init__()
        self.make_layer, self.index = make_layer, index
        self.prompt_length = prompt_length
        self.held: Any = None
        self.batch = 0
        self.seen = 0  # padding counted
        self.prefilling = True
        self.handed_out = False  # keys are on their way to the attention function

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.handed_out:
            raise UnsupportedCombination(
                "kv cache: the model must hand keys to its attention as the cache returned them, got "
                "others (latent attention expands them in between)"
            )
        # The model hands this very tensor to its attention function.
        key_states.repro_kv_layer = self  # type: ignore[attr-defined]
        self.handed_out = True
        return key_states, value_states

    def take(self, k: torch.Tensor, heads: int) -> LayerCache:
        """Return the method's layer for a batch of this shape, made at the first call."""
        if self.held is None:
            batch, kv_heads, _, head_dim = k.shape
            if head_dim % 8 or head_dim > 256:
                raise UnsupportedCombination(
                    f"kv cache: head_dim must be a multiple of 8 up to 256, got {head_dim}"
                )
            self.batch, self.is_initialized = batch, True
            shape = LayerShape(self.index, batch, heads, kv_heads, head_dim, k.dtype, k.device)
            self.held = self.make_layer(shape)
        elif k.shape[0] != self.batch:
            raise UnsupportedCombination(
                f"kv cache: the batch must be the {self.batch} sequences that the cache holds, got "
                f"{k.shape[0]}; make a new cache for another batch"
            )
        return self.held

    def count(self, tokens: int) -> None:
        """Count tokens that were taken in; the prompt may be whole now."""
        self.seen += tokens
        if self.prefilling and self.seen >= (self.prompt_length or 0):
            self.prefilling = False
            self.held.end_prefill()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.held, self.seen, self.prefilling, self.is_initialized = None, 0, True, False
        self.handed_out = False


_MASKS = (
    "kv cache: the attention mask must be causality with padding, got a sliding window, packed "
    "sequences or a custom 4-D mask"
)


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor | None:
    """Return which tokens are real, ``[B, 1, 1, Tk]`` bool, or None if all are.

    Raises:
        UnsupportedCombination: If the mask is more than causality with padding.
    """
    plain = mask_function is causal_mask_function and options.get("local_size") is None
    if not plain or (attention_mask is not None and attention_mask.ndim != 2):
        raise UnsupportedCombination(_MASKS)
    if not q_length:
        raise UnsupportedCombination(
            "kv cache: a pass must bring new tokens, got none; the cache holds all of them already"
        )
    if attention_mask is None:
        return None
    if attention_mask.shape[1] != kv_length:
        raise UnsupportedCombination(
            f"kv cache: the attention mask must cover the {kv_length} tokens so far, got "
            f"{attention_mask.shape[1]}"
        )
    return attention_mask.bool()[:, None, None, :]


class _Bridge:
    """Between the signature of attention functions and the method's layers."""

    def __init__(self, make_layer: MakeLayer) -> None:
        self.make_layer = make_layer

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
        """Return the attention output ``[B, T, H, D]`` of one layer."""
        layer: _Layer | None = getattr(key, "repro_kv_layer", None)
        if layer is not None:
            layer.handed_out = False
        check_supported(module, dropout, options)
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        tokens = query.shape[2]
        if attention_mask is not None and attention_mask.dtype != torch.bool:
            raise UnsupportedCombination(_MASKS)  # one that the model was given as it is
        if key.shape[2] != tokens:
            raise UnsupportedCombination(
                "kv cache: the model must be run with the cache of the patch (make_cache), got "
                f"{key.shape[2]} keys for {tokens} queries from another one"
            )
        if value.shape != key.shape:
            raise UnsupportedCombination(
                "kv cache: values must be of the shape of keys, got "
                f"{list(value.shape)} and {list(key.shape)}"
            )
        if layer is None:
            layer = _Layer(self.make_layer, int(getattr(module, "layer_idx", 0)), None)
        held = layer.take(key, query.shape[1])
        remaining = max((layer.prompt_length or 0) - layer.seen - tokens, 0)
        new = NewTokens(query, key, value, scale, remaining)
        if layer.prefilling:
            out = _prefill(held, new, attention_mask)
        elif tokens == 1:
            out = held.decode(new).transpose(1, 2)
        else:
            raise UnsupportedCombination(
                f"kv cache: after the prompt tokens must come one by one, got {tokens}; make the "
                "cache with prompt_length to prefill in chunks"
            )
        layer.count(tokens)
        return out, None


def _prefill(held: LayerCache, new: NewTokens, mask: torch.Tensor | None) -> torch.Tensor:
    """Return ``[B, T, H, D]``: every sequence by itself, its padding 0."""
    batch, heads, tokens, _ = new.q.shape
    starts = [0] * batch if mask is None else _starts(mask[:, 0, 0, -tokens:])
    out = new.q.new_zeros(batch, tokens, heads, new.v.shape[3])
    for row, start in enumerate(starts):
        if start < tokens:
            q, k, v = (x[row : row + 1, :, start:] for x in (new.q, new.k, new.v))
            attended = held.prefill(row, NewTokens(q, k, v, new.scale, new.remaining))
            out[row, start:] = attended[0].transpose(0, 1)
    return out


def _starts(real: torch.Tensor) -> list[int]:
    """Return the place of the first real token of each row of ``[B, T]`` bool, T if there is none.

    Raises:
        UnsupportedCombination: If padding follows a real token.
    """
    starts = (~real).sum(dim=1)
    places = torch.arange(real.shape[1], device=real.device)
    if not torch.equal(real, places >= starts[:, None]):
        raise UnsupportedCombination(
            "kv cache: padding must lie on the left of a prompt, got padding after a real token"
        )
    return starts.tolist()
