"""The attention phase of a KV-cache method: decode steps of all layers' attention, caches in place."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from repro.errors import UnsupportedCombination
from repro.kv_cache import LayerShape
from repro.kv_pages import PagedStore
from repro.measurements import CellContext
from repro.measurements.latency.work import Work, attention_cost
from repro.method import Patch
from repro.operator_inputs import OperatorInputs, attention_modules

#: Tokens that one call decodes.
STEPS = 16

Layers = tuple[OperatorInputs, ...]
Stores = dict[int, PagedStore]


def cached_attention(context: CellContext, pool: Sequence[OperatorInputs], source: str) -> Work:
    """Return the work of decode steps of every layer's attention, keys and values before them in place.

    A method may treat its layers differently, so one of them says nothing of the others. The method
    stores each new token and attends. Dense is the fastest of SDPA as the model calls it, SDPA with
    the query heads of a KV head as its queries (for both all keys and values lie in place), and the
    paged kernel over all pages, which stores each new token.

    Args:
        context: The cell.
        pool: For each layer queries, keys and values of ``length`` tokens; the last ``STEPS`` are
            decoded.
        source: What they are.

    Raises:
        UnsupportedCombination: If the cell asks for the paper's protocol of prefill methods.
    """
    subject, options = context.subject, context.options
    if options["protocol"] != "fair":
        raise UnsupportedCombination(
            "latency: the paper protocol times prefill without the causal mask, which decode has "
            "none of; use fair for a KV-cache method"
        )
    modules = {module.layer_idx: module for module in attention_modules(subject.model)}
    places = range(options["length"] - STEPS, options["length"])
    filled: dict[str, Any] = {}  # filled once per arm and copied before each call

    def state(arm: str, patch: Patch, layers: Layers) -> Any:
        if arm not in filled:
            made: Any = {} if arm == "dense" else patch.make_cache()
            if arm != "dense" and not hasattr(made, "fill"):
                raise UnsupportedCombination(
                    f"latency: {type(made).__name__} cannot be filled without a prefill"
                )
            for item in layers:
                k, v = item.k[:, :, : places.start], item.v[:, :, : places.start]
                if arm == "dense":
                    made[item.layer] = _full_store(item)
                    made[item.layer].append(k, v)
                else:
                    made.fill(item.layer, k, v)
            filled[arm] = made
        return copy.deepcopy(filled[arm])

    def steps(
        attend: Callable[[OperatorInputs, int], torch.Tensor], layers: Layers
    ) -> torch.Tensor:
        for place in places:
            outs = [attend(item, place) for item in layers]
        return torch.stack(outs)

    def call(patch: Patch, layers: Layers, cache: Any) -> torch.Tensor:
        attention = ALL_ATTENTION_FUNCTIONS[subject.model.config._attn_implementation]

        def attend(item: OperatorInputs, place: int) -> torch.Tensor:
            q, k, v = _token(item, place)
            k, v = cache.update(k, v, item.layer)
            module = modules[item.layer]
            out: torch.Tensor = attention(module, q, k, v, None, scaling=module.scaling)[0]
            return out

        return steps(attend, layers)

    def through_sdpa(patch: Patch, layers: Layers, stores: Stores) -> torch.Tensor:
        def attend(item: OperatorInputs, place: int) -> torch.Tensor:
            q, module = _token(item, place)[0], modules[item.layer]
            k, v = item.k[:, :, : place + 1], item.v[:, :, : place + 1]
            out: torch.Tensor = sdpa_attention_forward(
                module, q, k, v, None, scaling=module.scaling
            )[0]
            return out

        return steps(attend, layers)

    def through_sdpa_rows(patch: Patch, layers: Layers, stores: Stores) -> torch.Tensor:
        def attend(item: OperatorInputs, place: int) -> torch.Tensor:
            q = _token(item, place)[0]
            k, v = item.k[:, :, : place + 1], item.v[:, :, : place + 1]
            rows = q.view(q.shape[0], k.shape[1], -1, q.shape[3])
            out = F.scaled_dot_product_attention(rows, k, v, scale=modules[item.layer].scaling)
            return out.reshape(q.shape).transpose(1, 2)

        return steps(attend, layers)

    def through_pages(patch: Patch, layers: Layers, stores: Stores) -> torch.Tensor:
        def attend(item: OperatorInputs, place: int) -> torch.Tensor:
            q, k, v = _token(item, place)
            stores[item.layer].append(k, v)
            out = stores[item.layer].attend(q, modules[item.layer].scaling)[0]
            return out.transpose(1, 2)

        return steps(attend, layers)

    layers = tuple(pool)
    ways = (through_sdpa, through_sdpa_rows, through_pages)
    dense = _fastest(ways, lambda: state("dense", Patch(), layers), layers)
    flops, moved = attention_cost(subject, options, queries=1)
    return Work(
        pool=[layers],
        call=call,
        dense_call=dense,
        state=state,
        steps=STEPS,
        resets=False,
        density_key="decode_density",
        flops=flops,
        bytes_moved=moved,
        only_attention=True,
        source=f"{source}; dense is {dense.__name__.removeprefix('through_')}",
    )


Call = Callable[[Patch, Layers, Any], torch.Tensor]


def _fastest(calls: Sequence[Call], make_state: Callable[[], Any], layers: Layers) -> Call:
    """Return the call that takes least time, of two runs each after one to warm up."""

    def seconds(call: Call) -> float:
        found = []
        for _ in range(3):
            given = make_state()
            _wait(layers[0].q.device)
            begun = time.perf_counter()
            call(Patch(), layers, given)
            _wait(layers[0].q.device)
            found.append(time.perf_counter() - begun)
        return min(found[1:])

    with torch.inference_mode():
        return min(calls, key=seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _token(item: OperatorInputs, place: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = (x[:, :, place : place + 1] for x in (item.q, item.k, item.v))
    return q, k, v


def _full_store(item: OperatorInputs) -> PagedStore:
    batch, heads = item.q.shape[:2]
    kv_heads, head_dim = item.k.shape[1], item.k.shape[3]
    shape = LayerShape(item.layer, batch, heads, kv_heads, head_dim, item.k.dtype, item.k.device)
    return PagedStore(shape)
