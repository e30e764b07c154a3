"""The attention phase of a KV-cache method: decode steps of one layer, over a cache in place."""

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


def cached_attention(context: CellContext, pool: Sequence[OperatorInputs], source: str) -> Work:
    """Return the work of one layer's decode steps, keys and values before them in place.

    The method stores each new token and attends. Dense is the fastest of SDPA as the model calls
    it, SDPA with the query heads of a KV head as its queries (for both all keys and values lie in
    place), and the paged kernel over all pages, which stores each new token.

    Args:
        context: The cell.
        pool: Queries, keys and values of ``length`` tokens; the last ``STEPS`` are decoded.
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
    item = pool[len(pool) // 2]
    module = next(m for m in attention_modules(subject.model) if m.layer_idx == item.layer)
    places = range(options["length"] - STEPS, options["length"])
    filled: dict[str, Any] = {}  # filled once per arm and copied before each call

    def state(arm: str, patch: Patch, item: OperatorInputs) -> Any:
        if arm not in filled:
            k, v = item.k[:, :, : places.start], item.v[:, :, : places.start]
            if arm == "dense":
                filled[arm] = _full_store(item)
                filled[arm].append(k, v)
            else:
                filled[arm] = patch.make_cache()
                if not hasattr(filled[arm], "fill"):
                    raise UnsupportedCombination(
                        f"latency: {type(filled[arm]).__name__} cannot be filled without a prefill"
                    )
                filled[arm].fill(item.layer, k, v)
        return copy.deepcopy(filled[arm])

    def call(patch: Patch, item: OperatorInputs, cache: Any) -> torch.Tensor:
        attention = ALL_ATTENTION_FUNCTIONS[subject.model.config._attn_implementation]
        for place in places:
            q, k, v = _token(item, place)
            k, v = cache.update(k, v, item.layer)
            out: torch.Tensor = attention(module, q, k, v, None, scaling=module.scaling)[0]
        return out

    def through_sdpa(patch: Patch, item: OperatorInputs, store: PagedStore) -> torch.Tensor:
        for place in places:
            q = _token(item, place)[0]
            k, v = item.k[:, :, : place + 1], item.v[:, :, : place + 1]
            out: torch.Tensor = sdpa_attention_forward(
                module, q, k, v, None, scaling=module.scaling
            )[0]
        return out

    def through_sdpa_rows(patch: Patch, item: OperatorInputs, store: PagedStore) -> torch.Tensor:
        for place in places:
            q = _token(item, place)[0]
            k, v = item.k[:, :, : place + 1], item.v[:, :, : place + 1]
            rows = q.view(q.shape[0], k.shape[1], -1, q.shape[3])
            out = F.scaled_dot_product_attention(rows, k, v, scale=module.scaling)
        return out.reshape(q.shape).transpose(1, 2)

    def through_pages(patch: Patch, item: OperatorInputs, store: PagedStore) -> torch.Tensor:
        for place in places:
            q, k, v = _token(item, place)
            store.append(k, v)
            out = store.attend(q, module.scaling)[0]
        return out.transpose(1, 2)

    ways = (through_sdpa, through_sdpa_rows, through_pages)
    dense = _fastest(ways, lambda: state("dense", Patch(), item), item)
    flops, moved = attention_cost(subject, options, queries=1)
    layers = len(attention_modules(subject.model))
    return Work(
        pool=[item],
        call=call,
        dense_call=dense,
        state=state,
        steps=STEPS,
        resets=False,
        density_key="decode_density",
        flops=flops / layers,
        bytes_moved=moved / layers,
        only_attention=True,
        source=f"{source}; dense is {dense.__name__.removeprefix('through_')}",
    )


Call = Callable[[Patch, OperatorInputs, Any], torch.Tensor]


def _fastest(calls: Sequence[Call], make_state: Callable[[], Any], item: OperatorInputs) -> Call:
    """Return the call that takes least time, of two runs each after one to warm up."""

    def seconds(call: Call) -> float:
        found = []
        for _ in range(3):
            given = make_state()
            _wait(item.q.device)
            begun = time.perf_counter()
            call(Patch(), item, given)
            _wait(item.q.device)
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
