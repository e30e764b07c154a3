"""Make the retriever's training sequences: many needles and many questions in each."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerFast

from repro.measurements.ruler import lexicon
from repro.measurements.ruler.tasks import TASKS, Draw, Problem, ask
from repro.zoo.retriever.skills import SKILLS

# Tokens per haystack unit, to guess a size; what is too long is drawn again smaller.
_UNIT_TOKENS = {
    "repeat": 5,
    "essay": 11,
    "needle": 12,
    "code": 48,
    "vt": 5,
    "fwe": 1.5,
    "qa": 47,
    "skill": 11,
}
# Share of the training sequences; hard tasks get more.
MIXTURE = {
    "niah_single_1": 2,
    "niah_single_2": 2,
    "niah_single_3": 4,
    "niah_multikey_1": 2,
    "niah_multikey_2": 4,
    "niah_multikey_3": 8,
    "niah_multivalue": 12,
    "niah_multiquery": 12,
    "vt": 14,
    "cwe": 24,
    "fwe": 14,
    "qa_1": 4,
    "qa_2": 14,
    "prose": 3,
    "skill": 8,
}

# Tasks whose answers (several queries: whose keys) may come in any order.
FREE_ORDER = ("niah_multivalue", "niah_multiquery", "cwe", "fwe")


@dataclass(frozen=True)
class Example:
    """Token ids with, for each, whether predicting it counts as part of an answer."""

    kind: str
    ids: np.ndarray  # int64 [T]
    is_answer: np.ndarray  # bool [T]
    # Where the order of answers is free: position -> first tokens of all answers still to be named.
    choices: dict[int, list[int]] = field(default_factory=dict)


def make_example(
    kind: str, *, length: int, seed: str, tokenizer: PreTrainedTokenizerFast
) -> Example:
    """Return one sequence of at most ``length`` tokens of the task or skill ``kind``."""
    rng = random.Random(f"{seed}/{kind}/{length}")
    if kind == "prose":
        stream = lexicon.prose(rng)
        text = " ".join(next(stream) for _ in range(length // 8))
        ids = np.array(tokenizer.encode(text)[:length])
        return Example(kind, ids, np.zeros(len(ids), dtype=bool))
    fill = rng.uniform(0.75, 1.0)
    while True:
        problem = _problem(kind, rng, length=length, fill=fill, seed=seed)
        example = encode(kind, problem, tokenizer)
        if len(example.ids) <= length:
            return example
        fill *= 0.9 * length / len(example.ids)


def encode(kind: str, problem: Problem, tokenizer: PreTrainedTokenizerFast) -> Example:
    """Return the sequence of a problem: its text, then its questions with their answers."""
    ids = tokenizer.encode(problem.preamble)
    is_answer = [False] * len(ids)
    choices = {}
    for query in problem.queries:
        ids += tokenizer.encode(ask(query))
        answer = [*tokenizer.encode(query.completion), tokenizer.eos_token_id]
        free = query.keys if kind == "niah_multiquery" else query.answers
        if kind in FREE_ORDER:
            starts = _starts(answer, [tokenizer.encode(f" {text}") for text in free])
            for i, start in enumerate(starts):
                choices[len(ids) + start] = sorted({answer[other] for other in starts[i:]})
        is_answer += [False] * (len(ids) - len(is_answer)) + [True] * len(answer)
        ids += answer
    return Example(kind, np.array(ids), np.array(is_answer), choices)


def _starts(text: list[int], parts: list[list[int]]) -> list[int]:
    """Return where the parts begin in the text, in the order of the text."""
    return sorted(i for part in parts for i in range(len(text)) if text[i : i + len(part)] == part)


def _problem(kind: str, rng: random.Random, *, length: int, fill: float, seed: str) -> Problem:
    if kind == "skill":
        skill = SKILLS[rng.randrange(len(SKILLS))]
        return skill(rng, units=max(int(fill * length / _UNIT_TOKENS["skill"]) - 6, 3))
    task = TASKS[kind]
    # More questions for longer texts; the share of the length that they take stays near a third.
    many = max(1, length // 256)
    overrides: dict[str, int] = {}
    if task.family == "niah":
        codes = task.settings.get("value") == "code"
        cost = {"niah_multivalue": 120, "niah_multiquery": 160}.get(kind, 90 if codes else 40)
        if task.settings.get("key") == "code":
            cost = 135
        questions = max(1, min(int(length * 0.45 / cost), 12))
        if kind in ("niah_multivalue", "niah_multiquery"):
            questions = 1
        asked_keys = task.settings.get("queries", 1)
        keys = questions * asked_keys if kind != "niah_multikey_1" else max(questions, 4)
        overrides = {"keys": keys, "questions": questions}
        unit = "code" if task.settings.get("key") == "code" else task.settings["haystack"]
        left = length - questions * cost
    elif task.family == "vt":
        # More chains than the task has, and one question as there: an answer's length tells its end.
        chains = min(max(1, length // 200), 6)
        overrides = {"chains": chains}
        unit, left = "vt", length - chains * 60
    elif task.family == "cwe":
        return _common_words(rng, length=length, fill=fill, seed=seed)
    elif task.family == "fwe":
        unit, left = "fwe", length - 50
    else:
        questions = min(2 * many, 8) if kind == "qa_1" else 1
        overrides = {"questions": questions}
        unit, left = "qa", length - questions * 36
    units = max(int(fill * max(left, 0) / _UNIT_TOKENS[unit]), task.least_units)
    if task.family == "qa" and task.settings["hops"] == 2:
        units = max(units, 2 * overrides["questions"])
    return task.build(Draw(seed, "train", units, length, rng.random()), **overrides)


def _common_words(rng: random.Random, *, length: int, fill: float, seed: str) -> Problem:
    room = fill * (length - 75) / 3  # words, each two syllables and a comma
    often, seldom = rng.choice([(6, 1), (6, 1), (30, 3), (15, 2)])
    while 10 * often > 0.7 * room:
        often, seldom = max(often // 2, 3), 1
    units = max(int((room - 10 * often) / seldom), 1)
    draw = Draw(seed, "train", units, length, 0.5)
    return TASKS["cwe"].build(draw, long=(often, seldom), short=(often, seldom))
