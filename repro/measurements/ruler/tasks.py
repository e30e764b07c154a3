"""Define the 13 RULER tasks with their official structure, in our own wording.

Each task turns a seeded source of words and a number of haystack units into a ``Problem``: a
context and one or more queries about it. An evaluation item asks the first query only; training
may ask them all. Deviations from the official prompts: the variable-tracking and common-words tasks
carry no worked example, the common-words list is separated by commas and not numbered, and a two-hop
question names the first hop word for word.

Source: arXiv:2404.06654, section 3 and appendix B.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from repro.measurements.ruler import lexicon
from repro.measurements.ruler.lexicon import Source, Split


@dataclass(frozen=True)
class Query:
    """One question about a context."""

    question: str
    prefix: str  # start of the answer, given to the model
    completion: str  # what a right model writes after the prefix
    answers: tuple[str, ...]
    depth: float | None = None  # 0..100, where in the context the answer stands
    keys: tuple[str, ...] = ()  # what was asked for, where answers name it


@dataclass(frozen=True)
class Problem:
    """A context with the questions that it answers."""

    intro: str
    context: str
    queries: tuple[Query, ...]

    @property
    def preamble(self) -> str:
        """Return all text before the first question."""
        return f"{self.intro}\n{self.context}"


def ask(query: Query) -> str:
    """Return the text of a question with the answer prefix, to be put behind a context."""
    return f"\nQuestion: {query.question}\nAnswer: {query.prefix}"


@dataclass(frozen=True)
class Draw:
    """What a builder needs to make one problem.

    Args:
        seed: Fixes needles and haystack; the needles do not depend on ``units``.
        split: Which half of the vocabularies to draw from.
        units: Size of the haystack, in the task's own unit (sentences, needles, words, documents).
        length: Target length in tokens; fixes word frequencies as in the official tasks.
        depth: Wished position of the asked needle, 0..1.
    """

    seed: str
    split: Split
    units: int
    length: int
    depth: float

    def rng(self, part: str) -> random.Random:
        """Return a generator of its own for ``part``, so that parts do not disturb each other."""
        return random.Random(f"{self.seed}/{part}")


@dataclass(frozen=True)
class Task:
    """One RULER task.

    Args:
        name: Official task name.
        family: Which builder makes it.
        max_new_tokens: Official length of the answer.
        metric: ``string_match_all`` (share of answers found) or ``string_match_part`` (any).
        settings: Keyword arguments of the builder (the official configuration).
        least_units: Smallest haystack that can hold the task.
    """

    name: str
    family: Literal["niah", "vt", "cwe", "fwe", "qa"]
    max_new_tokens: int
    metric: Literal["string_match_all", "string_match_part"]
    settings: dict[str, Any]
    least_units: int

    def build(self, draw: Draw, **overrides: Any) -> Problem:
        """Make the problem; ``overrides`` replace official settings (training only)."""
        return _BUILDERS[self.family](draw, **{**self.settings, **overrides})


def niah(
    draw: Draw,
    *,
    haystack: Literal["repeat", "essay", "needle"],
    key: Literal["word", "code"] = "word",
    value: Literal["number", "code"] = "number",
    keys: int = 1,
    values: int = 1,
    queries: int = 1,
    questions: int = 1,
) -> Problem:
    """Hide key-value sentences in a haystack and ask for the values of some keys.

    Args:
        draw: Seed, split and size.
        haystack: Repeated sentences, prose, or other needles.
        key: What a key is.
        value: What a value is.
        keys: Distinct keys hidden.
        values: Values per key.
        queries: Keys asked in one question.
        questions: Questions asked (training asks several).
    """
    rng = draw.rng("needles")
    source = Source(rng, draw.split)
    make_key = source.word if key == "word" else source.code
    make_value = source.number if value == "number" else source.code
    needles = [(make_key(), [make_value() for _ in range(values)]) for _ in range(keys)]

    hay_rng = draw.rng("haystack")
    if haystack == "repeat":
        sentences = list(itertools.islice(itertools.cycle(lexicon.REPEATED), draw.units))
    elif haystack == "essay":
        sentences = list(itertools.islice(lexicon.prose(hay_rng), draw.units))
    else:
        other = Source(hay_rng, draw.split)
        make_other_key = other.word if key == "word" else other.code
        make_other_value = other.number if value == "number" else other.code
        taken = {k for k, _ in needles}
        drawn = ((make_other_key(), make_other_value()) for _ in range(draw.units))
        sentences = [_needle(k, value, v) for k, v in drawn if k not in taken]

    hidden = [(k, v) for k, vs in needles for v in vs]
    positions = [round(draw.depth * len(sentences))]
    positions += [rng.randint(0, len(sentences)) for _ in hidden[1:]]
    placed = [(p, _needle(k, value, v)) for p, (k, v) in zip(positions, hidden, strict=True)]
    context, depths = _insert(sentences, placed)

    asked = []
    for i in range(questions):
        group = [needles[(i * queries + j) % keys] for j in range(queries)]
        depth = depths[i * values] if queries == values == 1 and i == 0 else None
        asked.append(_niah_query(rng, group, value, depth))
    return Problem(
        f"Read the text below. It hides secret {value}s that you must find later.",
        context,
        tuple(asked),
    )


def _needle(key: str, kind: str, value: str) -> str:
    return f"The secret {kind} of {key} is {value}."


def _niah_query(
    rng: random.Random, group: list[tuple[str, list[str]]], kind: str, depth: float | None
) -> Query:
    names = [key for key, _ in group]
    pairs = [(key, v) for key, vs in group for v in vs]
    if len(pairs) == 1:
        question = f"What is the secret {kind} of {names[0]}?"
    else:
        listed = names[0] if len(names) == 1 else ", ".join(names[:-1]) + f" and {names[-1]}"
        question = f"What are all the secret {kind}s of {listed}?"
    answers = tuple(v for _, v in pairs)
    # Any order is right, and a fixed one would be a hidden extra task; but the start of the answer,
    # which is given, names the first of several keys.
    given = [] if len(group) == 1 else pairs[:1]
    others = pairs[len(given) :]
    rng.shuffle(others)
    first, *rest = given + others
    completion = " ".join([f" {first[1]}.", *(_needle(k, kind, v) for k, v in rest)])
    prefix = f"The secret {kind} of {first[0]} is"
    return Query(question, prefix, completion, answers, depth, tuple(names))


def _insert(sentences: list[str], placed: list[tuple[int, str]]) -> tuple[str, list[float]]:
    """Insert each sentence before its position; return the text and each one's depth (0..100)."""
    by_position: dict[int, list[str]] = {}
    for position, sentence in placed:
        by_position.setdefault(position, []).append(sentence)
    text: list[str] = []
    for i in range(len(sentences) + 1):
        text += by_position.get(i, [])
        text += sentences[i : i + 1]
    return " ".join(text), [100.0 * p / max(len(sentences), 1) for p, _ in placed]


def variable_tracking(draw: Draw, *, chains: int = 1, hops: int = 4, questions: int = 1) -> Problem:
    """Hide chains of assignments and ask for every variable that holds a value."""
    rng = draw.rng("chains")
    source = Source(rng, draw.split)
    sentences = list(itertools.islice(itertools.cycle(lexicon.REPEATED), draw.units))
    placed: list[tuple[int, str]] = []
    asked = []
    for _ in range(chains):
        names, value = source.words(hops + 1), source.number(5)
        steps = [f"Put {a} into {b}." for a, b in itertools.pairwise([value, *names])]
        positions = sorted(rng.randint(0, len(sentences)) for _ in steps)
        placed += zip(positions, steps, strict=True)
        completion = " ".join([f" {names[0]}.", *steps[1:]])
        question = f"Which words hold the number {value} or what was put on from there?"
        asked.append(Query(question, f"Put {value} into", completion, tuple(names)))
    context, _ = _insert(sentences, placed)
    return Problem(
        "Read the text below. It hides a number that is put from word into word.",
        context,
        tuple(asked[:questions]),
    )


def common_words(
    draw: Draw,
    *,
    common: int = 10,
    long: tuple[int, int] = (30, 3),
    short: tuple[int, int] = (6, 1),
) -> Problem:
    """List words of which ``common`` come up ten (short: six) times as often as the others.

    Args:
        draw: Seed, split and size; ``units`` counts the uncommon words.
        common: Number of common words.
        long: Repeats of common and uncommon words from 4096 tokens on, as in the official task.
        short: The same below 4096 tokens.
    """
    often, seldom = long if draw.length >= 4096 else short
    rng = draw.rng("words")
    source = Source(rng, draw.split)
    answers = source.words(common)
    words = answers * often + source.words(draw.units) * seldom
    rng.shuffle(words)
    rng.shuffle(answers)
    return Problem(
        "Read the list of words below. Some words come up more often than others.",
        ", ".join(["List:", *words]).replace("List:,", "List:") + ".",
        (
            Query(
                f"What are the {common} most common words in the list?",
                "The most common words are",
                " " + ", ".join(answers) + ".",
                tuple(answers),
            ),
        ),
    )


def frequent_words(draw: Draw, *, alpha: float = 2.0, answers: int = 3) -> Problem:
    """Write a coded text whose word frequencies fall as rank**-alpha, the first rank being dots.

    Args:
        draw: Seed, split and size; ``units`` counts all words of the text.
        alpha: Exponent of the zeta distribution.
        answers: How many of the most frequent words are asked for.
    """
    rng = draw.rng("words")
    vocabulary = ["...", *Source(rng, draw.split).words(max(draw.length // 50, answers + 2))]
    # The zeta function of `alpha`, summed far enough for counts of whole words.
    total = sum(k**-alpha for k in range(1, 100_000)) if alpha != 2.0 else math.pi**2 / 6
    words = []
    for rank, word in enumerate(vocabulary, start=1):
        words += [word] * int(draw.units * rank**-alpha / total)
    rng.shuffle(words)
    found = vocabulary[1 : 1 + answers]
    return Problem(
        "Read the coded text below. The dots do not matter.",
        " ".join(["Text:", *words]),
        (
            Query(
                f"What are the {answers} most frequent words in the coded text?",
                "The most frequent words are",
                " " + ", ".join(found) + ".",
                tuple(found),
            ),
        ),
    )


def squad_set(seed: str, split: Split, *, documents: int, facts: int = 5) -> dict[str, Any]:
    """Return a question set in the schema of SQuAD 2.0, one paragraph per made-up place."""
    rng = random.Random(seed)
    source = Source(rng, split)
    data = []
    for _ in range(documents):
        place = source.word()
        context, qas = "", []
        for relation in rng.sample(lexicon.RELATIONS, facts):
            value = source.word()
            sentence = f"The {place} {relation} is {value}."
            context += (" " if context else "") + sentence
            start = len(context) - len(value) - 1
            qas.append(
                {
                    "id": f"{place}-{relation}",
                    "question": f"What is the {place} {relation}?",
                    "answers": [{"text": value, "answer_start": start}],
                    "is_impossible": False,
                }
            )
        data.append({"title": place, "paragraphs": [{"context": context, "qas": qas}]})
    return {"version": "repro-1", "data": data}


def hotpot_set(
    seed: str, split: Split, *, questions: int, documents: int, facts: int = 5
) -> list[dict[str, Any]]:
    """Return two-hop questions in the schema of HotpotQA, all over the same documents."""
    rng = random.Random(seed)
    source = Source(rng, split)
    first, second = source.words(questions), source.words(questions)
    places = [*first, *second, *source.words(max(documents - 2 * questions, 0))]
    links = dict(zip(first, second, strict=True))
    documents_of, rows = {}, []
    for place in places:
        relations = rng.sample(lexicon.RELATIONS, facts)
        values = [source.word() for _ in relations]
        if place in links:
            values[rng.randrange(facts)] = links[place]
        documents_of[place] = list(zip(relations, values, strict=True))
    context = [
        [place, [f"The {place} {r} is {v}." for r, v in pairs]]
        for place, pairs in documents_of.items()
    ]
    for a, b in links.items():
        i = [v for _, v in documents_of[a]].index(b)
        relation_1 = documents_of[a][i][0]
        j = rng.randrange(facts)
        relation_2, answer = documents_of[b][j]
        rows.append(
            {
                "_id": f"{a}-{b}",
                "question": f"Look up the {a} {relation_1}. What is its {relation_2}?",
                "answer": answer,
                "supporting_facts": [[a, i], [b, j]],
                "context": context,
            }
        )
    return rows


_QA_INTRO = "Read the documents below. They answer a question that comes later."


def question_answering(draw: Draw, *, hops: Literal[1, 2], questions: int = 1) -> Problem:
    """Ask about facts in numbered documents; two hops join the facts of two documents."""
    rng = draw.rng("order")
    if hops == 1:
        data = squad_set(draw.rng("squad").random().hex(), draw.split, documents=draw.units)["data"]
        gold, *others = data
        rng.shuffle(others)
        place = round(draw.depth * len(others))
        ordered = [*others[:place], gold, *others[place:]]
        texts = [d["paragraphs"][0]["context"] for d in ordered]
        asked = []
        for i in range(questions):
            paragraph = (gold if i == 0 else rng.choice(data))["paragraphs"][0]
            qa = rng.choice(paragraph["qas"])
            value = qa["answers"][0]["text"]
            prefix = "The " + qa["question"].removeprefix("What is the ").removesuffix("?") + " is"
            depth = 100.0 * place / max(len(others), 1) if i == 0 else None
            asked.append(Query(qa["question"], prefix, f" {value}.", (value,), depth))
    else:
        rows = hotpot_set(
            draw.rng("hotpot").random().hex(), draw.split, questions=questions, documents=draw.units
        )
        documents = [" ".join(sentences) for _, sentences in rows[0]["context"]]
        sentence_of = dict(rows[0]["context"])
        rng.shuffle(documents)
        texts, asked = documents, []
        for row in rows:
            one, two = (sentence_of[title][i] for title, i in row["supporting_facts"])
            prefix, middle = one.removesuffix(".").rsplit(" ", 1)
            asked_last = row["question"].partition(". ")[2]
            completion = f" {middle}. {asked_last} {two}"
            asked.append(Query(row["question"], prefix, completion, (row["answer"],)))
    context = "\n".join(f"Document {i}: {text}" for i, text in enumerate(texts, start=1))
    return Problem(_QA_INTRO, context, tuple(asked))


_BUILDERS: dict[str, Callable[..., Problem]] = {
    "niah": niah,
    "vt": variable_tracking,
    "cwe": common_words,
    "fwe": frequent_words,
    "qa": question_answering,
}


def _niah_task(name: str, **settings: Any) -> Task:
    return Task(f"niah_{name}", "niah", 128, "string_match_all", settings, least_units=1)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _niah_task("single_1", haystack="repeat"),
        _niah_task("single_2", haystack="essay"),
        _niah_task("single_3", haystack="essay", value="code"),
        _niah_task("multikey_1", haystack="essay", keys=4),
        _niah_task("multikey_2", haystack="needle"),
        _niah_task("multikey_3", haystack="needle", key="code", value="code"),
        _niah_task("multivalue", haystack="essay", values=4),
        _niah_task("multiquery", haystack="essay", keys=4, queries=4),
        Task("vt", "vt", 30, "string_match_all", {"chains": 1, "hops": 4}, least_units=4),
        Task("cwe", "cwe", 120, "string_match_all", {}, least_units=1),
        Task("fwe", "fwe", 50, "string_match_all", {"alpha": 2.0}, least_units=66),
        Task("qa_1", "qa", 32, "string_match_part", {"hops": 1}, least_units=1),
        Task("qa_2", "qa", 32, "string_match_part", {"hops": 2}, least_units=2),
    )
}


def resized(draw: Draw, units: int) -> Draw:
    """Return the same draw with another haystack size."""
    return replace(draw, units=units)
