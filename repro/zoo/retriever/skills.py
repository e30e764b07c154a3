"""Make small documents of LongBench-like skills, mixed lightly into the retriever's training."""

from __future__ import annotations

import random

from repro.measurements.ruler import lexicon
from repro.measurements.ruler.lexicon import Source
from repro.measurements.ruler.tasks import Problem, Query

LABELS = ("place", "person", "animal", "thing", "number", "colour")

TEMPLATES = [
    "Read the passages below. Passage Which passage holds this sentence? Passage",
    "How many different passages are there? There are passages.",
    "Read the examples below. Word: Label: " + " ".join(LABELS) + " Which label has the?",
    "Read the lines below. Set to Move to Show to What is the next line? The next line is",
]


def passage_retrieval(rng: random.Random, *, units: int) -> Problem:
    """Ask which numbered passage holds a sentence."""
    prose = lexicon.prose(rng)
    passages = [[next(prose) for _ in range(3)] for _ in range(max(units // 3, 2))]
    asked = []
    for i in rng.sample(range(len(passages)), min(4, len(passages))):
        sentence = rng.choice(passages[i])
        question = f"Which passage holds this sentence? {sentence}"
        asked.append(Query(question, "Passage", f" {i + 1}.", (str(i + 1),)))
    context = "\n".join(f"Passage {i}: {' '.join(p)}" for i, p in enumerate(passages, start=1))
    return Problem("Read the passages below.", context, tuple(asked))


def passage_count(rng: random.Random, *, units: int) -> Problem:
    """Ask how many different passages there are among repeated ones."""
    prose = lexicon.prose(rng)
    total = max(units // 3, 2)
    different = [[next(prose) for _ in range(3)] for _ in range(rng.randint(1, min(total, 9)))]
    passages = different + [rng.choice(different) for _ in range(total - len(different))]
    rng.shuffle(passages)
    context = "\n".join(f"Passage: {' '.join(p)}" for p in passages)
    count = str(len(different))
    query = Query("How many different passages are there?", "There are", f" {count}.", (count,))
    return Problem("Read the passages below.", context, (query,))


def few_shot_labels(rng: random.Random, *, units: int) -> Problem:
    """Show words with labels and ask for the label of words seen before."""
    source = Source(rng, "train")
    label_of = {word: rng.choice(LABELS) for word in source.words(max(units // 2, 3))}
    shown = [rng.choice(list(label_of)) for _ in range(max(units, 4))]
    context = "\n".join(f"Word: {word}. Label: {label_of[word]}." for word in shown)
    asked = [
        Query(f"Which label has the word {word}?", f"Word: {word}. Label:", f" {label}.", (label,))
        for word, label in rng.sample([(w, label_of[w]) for w in sorted(set(shown))], 2)
    ]
    return Problem("Read the examples below.", context, tuple(asked))


def line_completion(rng: random.Random, *, units: int) -> Problem:
    """Repeat blocks of program-like lines and ask for the line after one of them."""
    source = Source(rng, "train")
    lines = [
        f"{rng.choice(['Set', 'Move', 'Show'])} {source.word()} to {source.number(4)}"
        for _ in range(max(units, 4))
    ]
    asked = [
        Query(f"What is the next line? {lines[i]}", lines[i], f"\n{lines[i + 1]}", (lines[i + 1],))
        for i in rng.sample(range(len(lines) - 1), 2)
    ]
    return Problem("Read the lines below.", "\n".join(lines), tuple(asked))


SKILLS = (passage_retrieval, passage_count, few_shot_labels, line_completion)
