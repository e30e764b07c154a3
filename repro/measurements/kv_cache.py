"""Bytes that the KV cache really holds, dense beside the method, and the longest context that fits.

All numbers are counted from tensors. Dense is transformers' ``DynamicCache`` after a prefill and a
few decode steps; the method's cache tells its own bytes (``Patch.stats()``) after the same. For the
longest context both are filled with random keys and values, page by page, since a prefill of that
length would cost far more than the cache that it leaves. The search may hold twice the memory that
it is given, and beside it the keys and values of one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from repro.errors import UnsupportedCombination, check_rules
from repro.measurements import CellContext, Measurement, plain_metric
from repro.method import Patch
from repro.subjects import SubjectInfo

if TYPE_CHECKING:
    import torch

PAGE = 64  # tokens; the longest context is found to this accuracy
#: The search ends where dense would hold this many times the memory.
_MOST_TIMES_DENSE = 16


@dataclass(frozen=True, kw_only=True)
class KvCacheOptions:
    """What to measure.

    Attributes:
        lengths: Prompt tokens; a cell each.
        batch: Sequences side by side, also for the longest context.
        new_tokens: Decode steps after the prompt, always exactly so many.
        memory_mib: Memory of which to find the longest context, in MiB; None for no search.
    """

    lengths: tuple[int, ...] = (4096,)
    batch: int = 1
    new_tokens: int = 8
    memory_mib: int | None = None

    def __post_init__(self) -> None:
        lengths, memory = self.lengths, self.memory_mib
        holds = bool(lengths) and min(lengths) >= 16 and len(set(lengths)) == len(lengths)
        check_rules(
            ("lengths", holds, "one or more different numbers >= 16", lengths),
            ("batch", self.batch >= 1, "at least 1", self.batch),
            ("new_tokens", self.new_tokens >= 0, "at least 0", self.new_tokens),
            ("memory_mib", memory is None or memory >= 1, "at least 1", memory),
        )


def expand(options: KvCacheOptions) -> list[dict[str, Any]]:
    """Return one cell per length."""
    shared = {
        "batch": options.batch,
        "new_tokens": options.new_tokens,
        "memory_mib": options.memory_mib,
    }
    return [{"length": length} | shared for length in options.lengths]


def positions(options: Mapping[str, Any]) -> int:
    """Return the positions that a subject must have; a filled cache has no positions."""
    return int(options["length"] + options["new_tokens"])


def run(context: CellContext) -> dict[str, Any]:
    """Fill both caches as a generation does, count them, and search if memory is given.

    Raises:
        UnsupportedCombination: If the subject has too few positions, or the method has a cache of
            its own that does not tell its bytes.
    """
    import torch

    from repro.prompts import timing_prompts

    options, subject = context.options, context.subject
    if positions(options) > subject.info.max_length:
        raise UnsupportedCombination(
            f"kv_cache: {options['length']} prompt tokens and {options['new_tokens']} new ones "
            f"exceed the {subject.info.max_length} positions of {subject.name}"
        )
    prompts, source = timing_prompts(
        subject, length=options["length"], batch=options["batch"], count=1, seed=context.seed
    )
    model, ids, tokens = subject.model, prompts[0], positions(options)
    steps = 2 if options["memory_mib"] is None else 4
    raw: dict[str, Any] = {"inputs": source, "tokens": tokens}
    ends: dict[str, tuple[int | None, str]] = {}
    with torch.inference_mode():
        cache = _generated(model, None, ids, options["new_tokens"])
        dense_bytes, layers = tensor_bytes(cache), _layers_of(cache)
        del cache
        context.progress(1, steps)
        with context.patch() as patch:
            patch.reset()
            made = patch.make_cache()
            cache = _generated(model, made, ids, options["new_tokens"])
            stats = dict(patch.stats())
            held = _held(context, stats, made, cache)
            # Without a cache of its own a method holds what dense holds, however long.
            as_dense = made is None and stats.get("kv_bytes") is None
            del made, cache
            context.progress(2, steps)
            if options["memory_mib"] is not None:
                memory = options["memory_mib"] * 2**20
                most = _MOST_TIMES_DENSE * memory * tokens // dense_bytes
                search = _Search(model, layers, options["batch"], memory, most)
                ends["dense_max_context_tokens"] = search.of_dense()
                context.progress(3, steps)
                found = ends["dense_max_context_tokens"] if as_dense else search.of(patch)
                ends["max_context_tokens"] = found
                context.progress(4, steps)
    metrics = _metrics(dense_bytes, held, stats.get("kv_tokens"), options["batch"] * tokens)
    for name, (most_tokens, _) in ends.items():
        metrics[name] = None if most_tokens is None else plain_metric(most_tokens, "tokens")
    reasons = {name: reason for name, (_, reason) in ends.items() if reason}
    return {
        "metrics": metrics,
        "patch": stats if context.method is not None else {},
        "raw": raw | ({"absent": reasons} if reasons else {}),
        "message": "; ".join(f"{name}: {reason}" for name, reason in reasons.items()),
    }


def _held(context: CellContext, stats: Mapping[str, Any], made: Any, cache: Any) -> int:
    """Return the bytes that the method's cache holds: its own number, else the model's cache."""
    told = stats.get("kv_bytes")
    if told is not None:
        return int(told)
    if made is None:
        return tensor_bytes(cache)
    slug = context.method.slug if context.method else "dense"
    raise UnsupportedCombination(
        f"kv_cache: stats() of {slug} must tell kv_bytes, since it has a cache of its own, got "
        f"{', '.join(stats) or 'nothing'}"
    )


def tensor_bytes(cache: Any) -> int:
    """Return the bytes of the key and value tensors of a transformers cache."""
    layers = [layer for layer in cache.layers if _holds_tokens(layer)]
    return sum(tensor.nbytes for layer in layers for tensor in (layer.keys, layer.values))


def _holds_tokens(layer: Any) -> bool:
    # A layer of linear attention keeps a state of constant size instead.
    return getattr(layer, "keys", None) is not None


def _generated(model: Any, cache: Any | None, ids: torch.Tensor, new_tokens: int) -> Any:
    """Return a cache (the model's own for None) after a prefill of ``[B, T]`` ids and greedy steps."""
    given = {} if cache is None else {"past_key_values": cache}
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1, **given)
    cache = out.past_key_values
    for _ in range(new_tokens):
        token = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=token, past_key_values=cache, use_cache=True)
    return cache


def _metrics(dense_bytes: int, held: int, kv_tokens: Any, tokens: int) -> dict[str, Any]:
    metrics: dict[str, Any] = {
        "ratio": plain_metric(dense_bytes / held, "x") if held else None,
        "dense_kv_bytes": plain_metric(dense_bytes, "bytes"),
        "kv_bytes": plain_metric(held, "bytes"),
        "kv_bytes_per_token": plain_metric(held / tokens, "bytes/token"),
    }
    if kv_tokens is not None:
        metrics["kv_tokens"] = plain_metric(kv_tokens, "tokens")
    return metrics


@dataclass(frozen=True)
class _Layer:
    """What one layer of the dense cache holds of a token."""

    index: int
    heads: int
    k_dim: int
    v_dim: int
    dtype: torch.dtype
    device: torch.device


def _layers_of(cache: Any) -> list[_Layer]:
    return [
        _Layer(
            index,
            layer.keys.shape[1],
            layer.keys.shape[-1],
            layer.values.shape[-1],
            layer.keys.dtype,
            layer.keys.device,
        )
        for index, layer in enumerate(cache.layers)
        if _holds_tokens(layer)
    ]


class _Search:
    """Finds the longest context whose filled cache stays within a memory.

    Args:
        model: The subject's model.
        layers: What to fill.
        batch: Sequences side by side.
        memory: Bytes that the cache may hold.
        most: Tokens at which the search ends.
    """

    def __init__(
        self, model: Any, layers: list[_Layer], batch: int, memory: int, most: int
    ) -> None:
        self._model, self._layers, self._batch = model, layers, batch
        self._memory, self._most_pages = memory, max(1, most // PAGE)
        self._drawn: dict[tuple[Any, ...], torch.Tensor] = {}

    def of_dense(self) -> tuple[int | None, str]:
        """Return the tokens that the model's own cache can hold, or None and why."""
        from transformers import DynamicCache

        def held(tokens: int) -> int:
            cache = DynamicCache(config=self._model.config)
            self._fill(lambda index, k, v: cache.update(k, v, index), tokens)
            return tensor_bytes(cache)

        return longest(held, self._memory, self._most_pages)

    def of(self, patch: Patch) -> tuple[int | None, str]:
        """Return the tokens that the method's cache can hold, or None and why."""
        patch.reset()
        if not hasattr(patch.make_cache(), "fill"):
            return None, "the method's cache offers no fill"

        def held(tokens: int) -> int:
            patch.reset()
            cache: Any = patch.make_cache()
            self._fill(cache.fill, tokens)
            return int(patch.stats()["kv_bytes"])

        return longest(held, self._memory, self._most_pages)

    def _fill(self, fill: Callable[[int, torch.Tensor, torch.Tensor], Any], tokens: int) -> None:
        for layer in self._layers:
            k, v = (self._random(layer, dim, tokens) for dim in (layer.k_dim, layer.v_dim))
            # A cache that keeps what it is given must not share it between layers.
            fill(layer.index, k.clone(), v.clone())

    def _random(self, layer: _Layer, dim: int, tokens: int) -> torch.Tensor:
        """Return random ``[B, H_kv, T, D]``, drawn once for all layers and kept for the longest."""
        import torch

        key = (layer.heads, dim, layer.dtype, layer.device)
        drawn = self._drawn.get(key)
        if drawn is None or drawn.shape[2] < tokens:
            shape = (self._batch, layer.heads, tokens, dim)
            generator = torch.Generator(layer.device).manual_seed(0)
            drawn = torch.randn(shape, dtype=layer.dtype, device=layer.device, generator=generator)
            self._drawn[key] = drawn
        return drawn[:, :, :tokens]


def longest(held: Callable[[int], int], memory: int, most_pages: int) -> tuple[int | None, str]:
    """Return the most tokens, in whole pages, that hold at most ``memory`` bytes.

    Args:
        held: Tokens -> bytes; must not fall as tokens grow.
        memory: Bytes.
        most_pages: Where the search ends.

    Returns:
        The tokens, 0 if not even a page fits; or None and why there is no end.
    """
    fits, over, before = 0, 1, -1
    while (found := held(over * PAGE)) <= memory:
        if over == most_pages:
            if found == before:
                return None, "constant size"
            times = f"{_MOST_TIMES_DENSE} times the memory for dense"
            return None, f"{over * PAGE} tokens, {times}, still fit"
        fits, before = over, found
        over = min(2 * over, most_pages)
    while over - fits > 1:
        middle = (fits + over) // 2
        if held(middle * PAGE) <= memory:
            fits = middle
        else:
            over = middle
    return fits * PAGE, ""


def estimate_seconds(options: Mapping[str, Any], info: SubjectInfo) -> float:
    """Return rough seconds on 2 CPU cores."""
    once = options["batch"] * info.prefill_seconds(options["length"])
    return 1.0 + 2 * once + 0.05 * (options["memory_mib"] or 0)


MEASUREMENT = Measurement(
    name="kv_cache",
    options=KvCacheOptions,
    expand=expand,
    run=run,
    positions=positions,
    paired=True,
    kinds=("llm",),
    libraries=("torch", "transformers"),
    estimate_seconds=estimate_seconds,
)
