"""RULER (arXiv:2404.06654): the 13 long-context tasks, run through lm-eval, greedy decoding.

A cell is one task at one length. Items are made offline from their seed (``source: embedded``) or
by lm-eval's own generators (``source: hub``) and kept in a cache; generations are stored batch by
batch, and scores are computed from what is stored at every reading.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from repro.errors import UnsupportedCombination
from repro.measurements import CellContext, Measurement, plain_metric
from repro.measurements.ruler.options import RulerOptions, estimate_seconds, expand


def run(context: CellContext) -> dict[str, Any]:
    """Run one cell: its items through lm-eval, stored batch by batch, then scored.

    Raises:
        MissingResource: If ``source: hub`` cannot fetch its packages or data.
        FloatingPointError: If the model gave NaN.
        UnsupportedCombination: If the subject has no tokenizer or no chat template where one is
            asked for, a prompt does not fit its positions, or the task does not fit the length.
    """
    from repro.measurements.ruler.engine import StoredLM
    from repro.measurements.ruler.harness import run_task

    options = context.options
    if context.subject.tokenizer is None:
        raise UnsupportedCombination(f"ruler: {context.subject.name} has no tokenizer")
    loaded, documents = load(context)
    model = StoredLM(context, batch_size=options["batch_size"])
    samples = run_task(model, loaded, chat_template=options["chat_template"])
    body: dict[str, Any] = {
        "metrics": _metrics(samples, [model.generations[d["key"]] for d in documents]),
        "items": {
            "keys": [document["key"] for document in documents],
            "scores": [float(sample["score"]) for sample in samples],
            "depth": [document["depth"] for document in documents],
            "new_tokens": [model.generations[d["key"]]["new_tokens"] for d in documents],
            "length": [options["length"]] * len(documents),
        },
    }
    if model.stats:
        body["patch"] = model.stats
    return body


def load(context: CellContext) -> tuple[Any, list[dict[str, Any]]]:
    """Return lm-eval's loaded task and the documents of the cell, by source."""
    options, tokenizer = context.options, context.subject.tokenizer
    # As in RULER's release, the chat template takes its tokens out of the length.
    taken = template_tokens(tokenizer) if options["chat_template"] else 0
    wanted = {
        "length": options["length"] - taken,
        "count": options["samples"],
        "seed": context.seed,
        "tokenizer": tokenizer,
        "cache_dir": context.cache / "ruler",
    }
    if options["source"] == "hub":
        from repro.measurements.ruler import hub

        return hub.load(options["task"], max_new_tokens=options["max_new_tokens"], **wanted)

    from repro.measurements.ruler import harness
    from repro.measurements.ruler.generate import generate_items
    from repro.measurements.ruler.tasks import TASKS

    try:
        items = generate_items(options["task"], split="evaluation", **wanted)
    except ValueError as error:
        raise UnsupportedCombination(f"ruler: {error}") from error
    documents = [
        {
            "key": item.key,
            "metric": TASKS[item.task].metric,
            "input": item.prompt,
            "outputs": list(item.answers),
            "depth": item.depth,
        }
        for item in items
    ]
    overrides = {
        "custom_dataset": harness.dataset_of(documents),
        "generation_kwargs": harness.greedy(options["max_new_tokens"]),
    }
    return harness.load_task(harness.OWN_TASKS, "repro_ruler", overrides), documents


def template_tokens(tokenizer: Any) -> int:
    """Return the tokens that the subject's chat template puts around a prompt.

    Raises:
        UnsupportedCombination: If the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UnsupportedCombination(
            "ruler: chat_template needs a tokenizer with a chat template; use chat_template: false"
        )
    messages = [{"role": "user", "content": "word"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    whole, content = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (text, "word"))
    return len(whole) - len(content)


def _metrics(
    samples: list[dict[str, Any]], generations: list[Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return every score of lm-eval's samples in percent, and the mean length of an answer."""
    from repro.statistics import mean_interval

    metrics: dict[str, dict[str, Any]] = {}
    for name in ("score", "score_lm_eval"):
        if name in samples[0]:
            interval = mean_interval([float(sample[name]) for sample in samples]).scaled(100)
            metrics[name] = {
                "value": interval.value,
                "low": interval.low,
                "high": interval.high,
                "n": interval.n,
                "unit": "%",
            }
    counts = [generation["new_tokens"] for generation in generations]
    mean = sum(counts) / len(counts)
    metrics["new_tokens"] = plain_metric(mean, "tokens", n=len(counts))
    return metrics


MEASUREMENT = Measurement(
    name="ruler",
    options=RulerOptions,
    expand=expand,
    run=run,
    needs_training=True,
    libraries=("lm-eval", "transformers"),
    estimate_seconds=estimate_seconds,
)
