"""Make RULER items of a wished token length with a subject's own tokenizer, seeded and cached."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from repro.measurements.ruler import lexicon, tasks
from repro.measurements.ruler.lexicon import Split
from repro.measurements.ruler.tasks import TASKS, Draw, Task


class Tokenizer(Protocol):
    """Any object with the ``encode`` of a Hugging Face tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]: ...


@dataclass(frozen=True)
class Item:
    """One RULER question, ready to be given to a model.

    Args:
        task: Official task name.
        index: Number of the item within its task and length.
        length: Target length in tokens, answer included.
        prompt: Text to complete, answer prefix included.
        answers: The strings that the score looks for.
        depth: Where the asked needle stands, 0..100, or None where that is not one place.
        n_tokens: Length of ``prompt`` in tokens of the tokenizer it was made with.
        key: SHA-256 of the content.
    """

    task: str
    index: int
    length: int
    prompt: str
    answers: tuple[str, ...]
    depth: float | None
    n_tokens: int
    key: str


def generate_items(
    task: str,
    *,
    length: int,
    count: int,
    seed: int,
    tokenizer: Tokenizer,
    split: Split = "evaluation",
    cache_dir: Path | None = None,
) -> list[Item]:
    """Return ``count`` items whose prompt and answer fill, but never exceed, ``length`` tokens.

    Args:
        task: One of the 13 names of ``TASKS``.
        length: Tokens of prompt and answer together.
        count: Number of items; the first ones do not depend on it.
        seed: Fixes all content.
        tokenizer: Measures lengths; items made with another tokenizer differ in size only.
        split: Which half of the vocabularies to use.
        cache_dir: Folder of JSONL files to read from and write to, keyed by content.

    Raises:
        ValueError: If the task is unknown, ``count`` is negative, or the smallest form of the task
            does not fit in ``length``, or the tokenizer encodes text to nothing.
    """
    if task not in TASKS:
        raise ValueError(f"generate_items: task must be one of {sorted(TASKS)}, got {task!r}")
    if count < 0:
        raise ValueError(f"generate_items: count must be at least 0, got {count}")
    path = None
    if cache_dir is not None:
        path = cache_dir / f"{_cache_key(task, length, count, seed, tokenizer, split)}.jsonl"
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            return [_from_json(line) for line in lines]
    items = [
        _make(TASKS[task], index, length=length, seed=seed, tokenizer=tokenizer, split=split)
        for index in range(count)
    ]
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        lines = [json.dumps(dataclasses.asdict(item), sort_keys=True) for item in items]
        partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        partial.replace(path)
    return items


def _make(
    task: Task, index: int, *, length: int, seed: int, tokenizer: Tokenizer, split: Split
) -> Item:
    # Steps of the golden ratio spread depths evenly whatever the number of items.
    depth = (0.5 + index * 0.6180339887498949) % 1.0
    draw = Draw(f"{task.name}/{length}/{seed}/{split}/{index}", split, 0, length, depth)

    def prompt_of(units: int) -> tuple[str, int, tasks.Query]:
        problem = task.build(tasks.resized(draw, units))
        query = problem.queries[0]
        prompt = problem.preamble + tasks.ask(query)
        return prompt, len(tokenizer.encode(prompt, add_special_tokens=False)), query

    room = length - task.max_new_tokens
    units = task.least_units
    best = prompt_of(units)
    if best[1] > room:
        raise ValueError(
            f"generate_items: length must leave {task.name} at least {best[1]} prompt tokens and "
            f"{task.max_new_tokens} answer tokens with this tokenizer, got {length}"
        )
    if best[1] == 0:
        raise ValueError(
            "generate_items: tokenizer must encode text to at least one token, got none for "
            f"{len(best[0])} characters"
        )
    # Token counts are close to affine in the units: interpolate between a size that fits (low) and
    # one that does not (high), and stop within 1 % of the room. `most` keeps the search finite for
    # a tokenizer that does not see part of the text.
    low, high, n_high, most = units, None, 0, 4 * length
    while (high is None or high - low > 1) and room - best[1] > length // 100 and low < most:
        if high is None:
            middle = min(max(low + 16, int(1.1 * low * room / best[1])), most)
        else:
            share = (room - best[1]) / (n_high - best[1])
            middle = min(max(low + int(share * (high - low)), low + 1), high - 1)
        candidate = prompt_of(middle)
        if candidate[1] <= room:
            low, best = middle, candidate
        else:
            high, n_high = middle, candidate[1]
    prompt, n_tokens, query = best
    digest = hashlib.sha256(json.dumps([task.name, prompt, query.answers]).encode()).hexdigest()
    return Item(task.name, index, length, prompt, query.answers, query.depth, n_tokens, digest)


def _cache_key(
    task: str, length: int, count: int, seed: int, tokenizer: Tokenizer, split: Split
) -> str:
    """Hash everything that the items depend on: arguments, these sources, and the tokenizer."""
    digest = hashlib.sha256()
    for module in (lexicon, tasks):
        digest.update(Path(str(module.__file__)).read_bytes())
    digest.update(Path(__file__).read_bytes())
    digest.update(json.dumps([task, length, count, seed, split]).encode())
    # A tokenizer has no portable identity; how it cuts a sample of our text is what matters here.
    sample = TASKS[task].build(Draw("cache", split, 70, length, 0.5))
    text = sample.preamble + "".join(tasks.ask(query) for query in sample.queries)
    digest.update(json.dumps(tokenizer.encode(text, add_special_tokens=False)).encode())
    return f"{task}-{length}-{digest.hexdigest()[:32]}"


def _from_json(line: str) -> Item:
    fields = json.loads(line)
    return Item(**{**fields, "answers": tuple(fields["answers"])})
