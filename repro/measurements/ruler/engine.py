"""The lm-eval model of a cell: answers a request from the item store or computes its batch.

A batch is the unit of storing and resuming. Which items share a batch follows from the items alone,
so a resumed run computes exactly the batches that an undisturbed one does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from repro.errors import UnsupportedCombination
from repro.keys import jsonable
from repro.measurements import CellContext
from repro.measurements.ruler.decoding import Generation, decode_batch, encode
from repro.patch_stats import merge_stats


def plan_batches(lengths: Sequence[int], keys: Sequence[str], batch_size: int) -> list[list[int]]:
    """Return the places of the items of each batch: longest first, equal lengths by key."""
    order = sorted(range(len(keys)), key=lambda place: (-lengths[place], keys[place]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


class StoredLM(LM):
    """Greedy generation under the cell's patch, batch by batch through the cell's item store.

    Attributes:
        generations: Item key -> stored value, after ``generate_until``.
        stats: The joined observations of the patch, after ``generate_until``.
    """

    def __init__(self, context: CellContext, *, batch_size: int) -> None:
        super().__init__()
        self._context = context
        self._batch_size = batch_size
        self.generations: dict[str, dict[str, Any]] = {}
        self.stats: dict[str, Any] = {}

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the text of each request; what is not stored yet is computed and stored."""
        keys = [request.doc["key"] for request in requests]
        if not self._recall(keys):
            prompts = [encode(self._context.subject.tokenizer, r.args[0]) for r in requests]
            settings = requests[0].args[1]
            self._check_positions(prompts, settings["max_gen_toks"])
            self._compute(keys, prompts, settings)
            self._recall(keys)
        return [self.generations[key]["text"] for key in keys]

    def _recall(self, keys: Sequence[str]) -> bool:
        """Read items and batch observations from the store; tell whether nothing is missing."""
        store = self._context.items
        items = {key: store.get(key) for key in keys}
        count = -(-len(keys) // self._batch_size)
        batches = [store.get(_batch_key(place)) for place in range(count)]
        self.generations = {key: value for key, value in items.items() if value is not None}
        self.stats = merge_stats([(b["items"], b["stats"]) for b in batches if b is not None])
        return len(self.generations) == len(items) and None not in batches

    def _check_positions(self, prompts: Sequence[torch.Tensor], new_tokens: int) -> None:
        longest = max(prompt.numel() for prompt in prompts) + new_tokens
        info = self._context.subject.info
        if longest > info.max_length:
            raise UnsupportedCombination(
                "ruler: the longest prompt with its new tokens must be at most the "
                f"{info.max_length} positions of {info.name}, got {longest}; "
                "lower `lengths` or `max_new_tokens`"
            )

    def _compute(
        self, keys: Sequence[str], prompts: Sequence[torch.Tensor], settings: Mapping[str, Any]
    ) -> None:
        """Compute and store every batch that is not stored whole."""
        context = self._context
        batches = plan_batches([p.numel() for p in prompts], keys, self._batch_size)
        done = 0
        with ExitStack() as stack:
            patch = None
            for place, batch in enumerate(batches):
                if not self._stored_whole(place, [keys[item] for item in batch]):
                    # Entered late: a cell that misses nothing must not touch the model.
                    patch = patch or stack.enter_context(context.patch())
                    patch.reset()
                    results = decode_batch(
                        context.subject,
                        [prompts[item] for item in batch],
                        max_new_tokens=settings["max_gen_toks"],
                        stop=settings.get("until") or (),
                        cache=patch.make_cache(),
                    )
                    self._store(place, [keys[item] for item in batch], results, patch.stats())
                done += len(batch)
                context.progress(done, len(keys))

    def _stored_whole(self, place: int, keys: Sequence[str]) -> bool:
        store = self._context.items
        return store.get(_batch_key(place)) is not None and all(map(store.get, keys))

    def _store(
        self,
        place: int,
        keys: Sequence[str],
        results: Sequence[Generation],
        stats: Mapping[str, Any],
    ) -> None:
        rows: list[tuple[str, dict[str, Any]]] = [
            (key, {"text": result.text, "new_tokens": result.new_tokens})
            for key, result in zip(keys, results, strict=True)
        ]
        rows.append((_batch_key(place), {"items": len(keys), "stats": jsonable(stats)}))
        self._context.items.put(rows)

    @property
    def tokenizer_name(self) -> str:
        return self._context.subject.name

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._context.subject.tokenizer.chat_template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render a conversation; one that ends in the answer's prefix is left open."""
        return self._context.subject.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("ruler: only generate_until requests are answered")

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise NotImplementedError("ruler: only generate_until requests are answered")


def _batch_key(place: int) -> str:
    return f"batch/{place}"
