"""What the arms of a latency cell do: one ``Work`` per phase, the same for dense and method."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from repro import operator_inputs
from repro.errors import UnsupportedCombination
from repro.measurements import CellContext
from repro.measurements.latency import positions
from repro.method import Patch
from repro.operator_inputs import OperatorInputs
from repro.prompts import timing_prompts
from repro.subjects import Subject


def _no_state(arm: str, patch: Patch, item: Any) -> Any:
    return None


@dataclass(frozen=True, kw_only=True)
class Work:
    """One phase as a function.

    Attributes:
        pool: Inputs that the calls rotate through.
        call: (patch, input, state) -> output tensor; this alone is timed.
        dense_call: Likewise for dense, where the protocol makes it differ; else the same.
        state: (arm, patch, input) -> what the call uses up, made before it and not timed.
        steps: Reported times are divided by this (tokens of a decode).
        resets: Whether each call begins a new sample.
        density_key: Which of the patch's statistics is the density of this phase.
        flops: Of all attention of a dense call, causal.
        bytes_moved: Of the same.
        dense_factor: Attention of the dense arm over causal attention (2 without the mask).
        only_attention: The call is the attention operator and nothing else.
        source: What the inputs are.
    """

    pool: list[Any]
    call: Callable[[Patch, Any, Any], torch.Tensor]
    dense_call: Callable[[Patch, Any, Any], torch.Tensor]
    state: Callable[[str, Patch, Any], Any] = _no_state
    steps: int = 1
    resets: bool = True
    density_key: str = "density"
    flops: float
    bytes_moved: float
    dense_factor: float = 1.0
    only_attention: bool = False
    source: str


def make_work(context: CellContext) -> Work:
    """Return the work of a cell.

    Raises:
        UnsupportedCombination: If the prompt and the new tokens do not fit, or the phase does not
            apply to the subject or the method.
    """
    options, subject = context.options, context.subject
    needed = positions(options)
    if needed > subject.info.max_length:
        raise UnsupportedCombination(
            f"latency: {options['length']} prompt tokens and {options.get('new_tokens', 0)} new "
            f"ones exceed the {subject.info.max_length} positions of {subject.name}"
        )
    makers = {
        "prefill": _prefill,
        "decode": _decode,
        "end_to_end": _end_to_end,
        "attention": _attention,
    }
    return makers[options["phase"]](context)


def _prompts(context: CellContext, count: int) -> tuple[list[torch.Tensor], str]:
    options = context.options
    return timing_prompts(
        context.subject,
        length=options["length"],
        batch=options["batch"],
        count=count,
        seed=context.seed,
    )


def _prefill_model(subject: Subject, patch: Patch, ids: torch.Tensor) -> Any:
    cache = patch.make_cache()
    given = {} if cache is None else {"past_key_values": cache}
    return subject.model(input_ids=ids, use_cache=True, logits_to_keep=1, **given)


def _prefill(context: CellContext) -> Work:
    subject = context.subject
    pool, source = _prompts(context, 2)

    def call(patch: Patch, ids: torch.Tensor, state: Any) -> torch.Tensor:
        logits: torch.Tensor = _prefill_model(subject, patch, ids).logits
        return logits

    flops, moved = attention_cost(subject, context.options, queries=context.options["length"])
    return Work(
        pool=pool, call=call, dense_call=call, flops=flops, bytes_moved=moved, source=source
    )


def _decode(context: CellContext) -> Work:
    """Decode from a cache that was filled once per arm and is copied before each call."""
    subject, steps = context.subject, context.options["new_tokens"]
    pool, source = _prompts(context, 1)
    filled: dict[str, Any] = {}

    def state(arm: str, patch: Patch, ids: torch.Tensor) -> Any:
        if arm not in filled:
            out = _prefill_model(subject, patch, ids)
            filled[arm] = (out.past_key_values, out.logits[:, -1:].argmax(-1))
        return copy.deepcopy(filled[arm])

    def call(patch: Patch, ids: torch.Tensor, state: Any) -> torch.Tensor:
        cache, token = state
        for _ in range(steps):
            logits = subject.model(input_ids=token, past_key_values=cache, use_cache=True).logits
            token = logits[:, -1:].argmax(-1)
        return logits

    flops, moved = attention_cost(subject, context.options, queries=1)
    return Work(
        pool=pool,
        call=call,
        dense_call=call,
        state=state,
        steps=steps,
        resets=False,
        density_key="decode_density",
        flops=flops,
        bytes_moved=moved,
        source=source,
    )


def _end_to_end(context: CellContext) -> Work:
    subject, count = context.subject, context.options["new_tokens"]
    pool, source = _prompts(context, 2)

    def call(patch: Patch, ids: torch.Tensor, state: Any) -> torch.Tensor:
        cache = patch.make_cache()
        given = {} if cache is None else {"past_key_values": cache}
        tokens: torch.Tensor = subject.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=count,
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            **given,
        )
        return tokens[:, ids.shape[1] :]

    flops, moved = attention_cost(subject, context.options, queries=context.options["length"])
    return Work(
        pool=pool, call=call, dense_call=call, flops=flops, bytes_moved=moved, source=source
    )


def _attention(context: CellContext) -> Work:
    """The operator as the model calls it: the registered attention function of a layer."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    subject, options = context.subject, context.options
    method = context.method
    if method is not None and method.kind == "kv_cache":
        from repro.measurements.latency.cached import cached_attention

        return cached_attention(context, *_operator_pool(context, layers=None))
    if method is not None and method.kind != "attention":
        raise UnsupportedCombination(
            "latency: the attention phase is for attention and KV-cache methods; "
            f"{method.slug} is of kind {method.kind}"
        )
    pool, source = _operator_pool(context, layers=3)
    modules = {
        module.layer_idx: module for module in operator_inputs.attention_modules(subject.model)
    }

    def call(patch: Patch, item: OperatorInputs, state: Any, **extra: Any) -> torch.Tensor:
        module = modules[item.layer]
        attention = ALL_ATTENTION_FUNCTIONS[subject.model.config._attn_implementation]
        out: torch.Tensor = attention(
            module, item.q, item.k, item.v, None, dropout=0.0, scaling=module.scaling, **extra
        )[0]
        return out

    def uncausal(patch: Patch, item: OperatorInputs, state: Any) -> torch.Tensor:
        return call(patch, item, state, is_causal=False)

    paper = options["protocol"] == "paper"
    flops, moved = attention_cost(subject, options, queries=options["length"])
    layers = len(modules)
    return Work(
        pool=pool,
        call=call,
        dense_call=uncausal if paper else call,
        flops=flops / layers,
        bytes_moved=moved / layers,
        dense_factor=2.0 if paper else 1.0,
        only_attention=True,
        source=source,
    )


def _operator_pool(context: CellContext, *, layers: int | None) -> tuple[list[OperatorInputs], str]:
    """Return the inputs of so many layers spread over the depth, None for all, and what they are."""
    subject, options = context.subject, context.options
    available = len(operator_inputs.attention_modules(subject.model))
    numbers = operator_inputs.spread_layers(available, available if layers is None else layers)
    if options["inputs"] == "captured":
        if not subject.info.trained:
            raise UnsupportedCombination(
                f"latency: inputs captured from {subject.name} say nothing, its weights are "
                "random; use gaussian or structured"
            )
        prompts, source = _prompts(context, 1)
        pool = operator_inputs.capture(subject, prompts[0], numbers, source=source)
        return pool, f"captured from layers {', '.join(map(str, numbers))}: {source}"
    config = subject.model.config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    shape = (
        options["batch"],
        heads,
        getattr(config, "num_key_value_heads", None) or heads,
        options["length"],
        head_dim,
    )
    where: dict[str, Any] = {"dtype": subject.dtype, "device": subject.device}
    if options["inputs"] == "gaussian":
        pool = [
            operator_inputs.gaussian(shape, seed=context.seed + layer, layer=layer, **where)
            for layer in numbers
        ]
        return pool, "independent standard normal q, k, v"
    pool = [
        operator_inputs.structured(shape, seed=context.seed + layer, layer=layer, **where)
        for layer in numbers
    ]
    density = pool[0].facts["planted_density"]
    return pool, f"sink, local band, stripes and hot blocks, {density:.1%} of the blocks planted"


def attention_cost(
    subject: Subject, options: Mapping[str, Any], *, queries: int
) -> tuple[float, float]:
    """Return FLOPs and bytes of all causal attention layers for ``queries`` new tokens.

    The two products count 2 FLOPs per multiply-add; q, k, v and the output cross memory once.
    """
    config = subject.model.config.get_text_config()
    heads, keys, batch = config.num_attention_heads, options["length"], options["batch"]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    pairs = keys * (keys + 1) / 2 if queries == keys else float(queries * keys)
    layers = config.num_hidden_layers
    flops = 4.0 * batch * heads * head_dim * pairs * layers
    size = torch.finfo(subject.dtype).bits // 8
    moved = 2.0 * size * batch * head_dim * (heads * queries + kv_heads * keys) * layers
    return flops, moved
