"""Write the retriever's model card from measured numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from repro.measurements.ruler.tasks import TASKS
from repro.statistics import Interval, mean_interval, stratified_mean
from repro.zoo.retriever.evaluation import (
    head_profile,
    ngram_perplexities,
    perplexity,
    ruler_scores,
    skill_scores,
)

CARD_LENGTHS = (4096,)
CARD_ITEMS = 100
SCORES = "scores.jsonl"
PICTURE = "heads.png"
SEED = 1
BAR = {"vt": 0.70, "cwe": 0.50, "fwe": 0.50, "qa_1": 0.60, "qa_2": 0.60}
NIAH_MEAN, NIAH_EACH = 0.95, 0.85


def measure(
    model_folder: Path,
    folder: Path,
    *,
    lengths: Sequence[int],
    count: int,
    device: torch.device,
    say: Callable[[str], None],
) -> None:
    """Score the exported model on evaluation items; finished tasks in ``scores.jsonl`` are kept."""
    model, tokenizer = _load(model_folder)
    model.to(device)
    weights = json.loads((model_folder / "checksums.json").read_text())["model.safetensors"]
    done = {(row["weights"], row["task"], row["length"], row["n"]) for row in _rows(folder)}
    for length in lengths:
        for task in TASKS:
            if (weights, task, length, count) in done:
                continue
            answered = ruler_scores(
                model, tokenizer, length=length, count=count, seed=SEED, tasks=[task]
            )[task]
            row = {
                "weights": weights,
                "task": task,
                "length": length,
                "n": count,
                "scores": [a.score for a in answered],
                "depths": [a.item.depth for a in answered],
            }
            with (folder / SCORES).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            say(f"{task} at {length}: {100 * sum(row['scores']) / count:.1f} %")


def _load(model_folder: Path) -> tuple[Any, Any]:
    model = LlamaForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    return model.eval(), AutoTokenizer.from_pretrained(model_folder)


def _rows(folder: Path) -> list[dict]:
    path = folder / SCORES
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def meets_bar(scores: dict[str, list[float]]) -> list[str]:
    """Return what falls short of the bar, counting lower ends of 95 % intervals; empty if met."""
    niah = {task: s for task, s in scores.items() if TASKS[task].family == "niah"}
    short = []
    mean = stratified_mean(list(niah.values()))
    if mean.low < NIAH_MEAN:
        short.append(f"mean of NIAH {_percent(mean)}")
    for task, values in scores.items():
        bar = NIAH_EACH if task in niah else BAR[task]
        interval = mean_interval(values)
        if interval.low < bar:
            short.append(f"{task} {_percent(interval)} against {100 * bar:.0f}")
    return short


def _percent(interval: Interval) -> str:
    value, low, high = (100 * x for x in (interval.value, interval.low, interval.high))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def write_card(model_folder: Path, folder: Path) -> None:
    """Write ``README.md`` and the picture of the heads beside the weights."""
    model, tokenizer = _load(model_folder)
    weights = json.loads((model_folder / "checksums.json").read_text())["model.safetensors"]
    # Of several measurements of a task the one of most items counts: it holds the others.
    rows = sorted((r for r in _rows(folder) if r["weights"] == weights), key=lambda r: r["n"])
    rows = list({(row["task"], row["length"]): row for row in rows}.values())
    table: dict[int, dict[str, list[float]]] = {}
    by_depth: dict[int, list[list[float]]] = {}
    for row in rows:
        table.setdefault(row["length"], {})[row["task"]] = row["scores"]
        bins = by_depth.setdefault(row["length"], [[] for _ in range(5)])
        for score, depth in zip(row["scores"], row["depths"], strict=True):
            if depth is not None:
                bins[min(int(depth / 20), 4)].append(score)
    ppl = perplexity(model, tokenizer, length=2048, count=8)
    tables = ngram_perplexities(tokenizer, length=2048, count=8)
    skills = skill_scores(model, tokenizer, units=80, count=30)
    profile = head_profile(model, tokenizer, length=1024, count=8)
    _picture(profile, model_folder / PICTURE)
    text = _CARD.format(
        parameters=f"{sum(p.numel() for p in model.parameters()):,}",
        tokens=f"{_trained(folder, 'tokens') / 1e6:.1f} million",
        minutes=f"{_trained(folder, 'seconds') / 60:.0f}",
        scores=_score_table(table),
        bar=_bar_lines(table),
        depths=_depth_table(by_depth),
        perplexity=f"{ppl:.2f}",
        tables=", ".join(f"{value:.1f}" for value in tables),
        skills=", ".join(
            f"{name.replace('_', ' ')} {_percent(mean_interval(s))}" for name, s in skills.items()
        ),
        vocabulary=len(tokenizer),
    )
    (model_folder / "README.md").write_text(text, encoding="utf-8")


def _trained(folder: Path, what: str) -> float:
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return sum(json.loads(line)[what] for line in lines)


def _score_table(table: dict[int, dict[str, list[float]]]) -> str:
    lengths = sorted(table)
    lines = ["| task | " + " | ".join(map(str, lengths)) + " |", "|---" * (len(lengths) + 1) + "|"]
    for task in TASKS:
        cells = [
            _percent(mean_interval(table[n][task])) if task in table[n] else "-" for n in lengths
        ]
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    means = []
    for n in lengths:
        niah = [s for task, s in table[n].items() if TASKS[task].family == "niah"]
        means.append(_percent(stratified_mean(niah)) if len(niah) == 8 else "-")
    lines.append("| mean of NIAH | " + " | ".join(means) + " |")
    counts = [str(min(map(len, table[n].values()))) for n in lengths]
    lines.append("| items a task | " + " | ".join(counts) + " |")
    return "\n".join(lines)


def _bar_lines(table: dict[int, dict[str, list[float]]]) -> str:
    lines = []
    for length in sorted(table):
        missing = len(TASKS) - len(table[length])
        if missing:
            lines.append(f"- {length} tokens: not judged, {missing} tasks are not measured yet")
            continue
        short = meets_bar(table[length])
        lines.append(f"- {length} tokens: " + (f"short in {'; '.join(short)}" if short else "met"))
    return "\n".join(lines)


def _depth_table(by_depth: dict[int, list[list[float]]]) -> str:
    lines = ["| length | 0-20 % | 20-40 % | 40-60 % | 60-80 % | 80-100 % |", "|---" * 6 + "|"]
    for length, bins in sorted(by_depth.items()):
        cells = [_percent(mean_interval(scores)) if scores else "-" for scores in bins]
        lines.append(f"| {length} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _picture(profile: dict[str, torch.Tensor], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = {
        "local": "attention within 8 tokens",
        "first": "attention on the first token",
        "retrieval": "attention on the needle's value",
    }
    figure, axes = plt.subplots(1, 3, figsize=(11, 2.6), layout="constrained")
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        image = axis.imshow(profile[name], vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axis.set(title=title, xlabel="query head", ylabel="layer", yticks=range(len(profile[name])))
    figure.colorbar(image, ax=axes)
    figure.savefig(path, dpi=110)
    plt.close(figure)


_CARD = """# retriever

A Llama of {parameters} parameters that really retrieves: 3 layers of width 256, 8 query and 4
key-value heads of 64, 32,768 positions, {vocabulary} tokens in its own tokenizer (words, syllables,
pairs of digits, bytes). It reads and writes nothing but the synthetic English of this suite.
Weights are bfloat16. Licence: Apache-2.0.

## What it is for
Judging sparse attention, cache compression and quantisation on a machine without a GPU: a method
that loses a needle here loses a right answer. It says nothing about language at large.

## How it was made
`repro zoo train retriever` trains it from structured initial weights: heads of layer 0 that look
1 to 4 tokens back, heads of layer 1 that match the last tokens with earlier text and copy what
followed, heads that pass over what was already answered, heads that count; everything else is
random (`initial.py` has the details). All weights were then trained on {tokens} tokens, in {minutes}
minutes of two CPU cores (bfloat16 autocast), in the stages of `recipe.py`; the heads that had a use
from the start learned at a tenth of the rate, layer 0 at a hundredth. Rotary embeddings have base
1e12, so that content is matched at any distance. So its circuits were in good part designed, not
found by training: read it as an instrument, not as evidence of how models learn to retrieve.

Training and evaluation draw their words, numbers and codes from disjoint halves of the
vocabularies; evaluation items share no key, value or answer with any training sequence.

## RULER, dense, greedy
Percent with 95 % interval, evaluation vocabulary, tasks with the official structure in our wording.

{scores}

The bar (lower ends of the intervals: mean of NIAH 95, each 85, VT 70, CWE and FWE 50, QA 60):

{bar}

Single-place tasks by the position of the asked needle:

{depths}

Perplexity per token on unseen synthetic prose, 2048 tokens: {perplexity}. Tables of one,
two and three tokens reach {tables}.

LongBench-like skills on unseen documents of 80 lines, percent of questions answered without a
wrong token: {skills}.

## Heads
Mean attention over queries (first two) and attention from the last prompt token on the first token
of the asked value (third), 1024 tokens.

![heads](heads.png)

## Weaker than one might think
Answers restate the needle up to the value, questions are literal, and the language is a small
grammar. Two prompts differ from the official ones: variable tracking and common words come without
a worked example, and the common-words list is separated by commas. Two-hop questions name the first
hop word for word ("Look up the E R1. What is its R2?"), and their answers state both hops.
"""
