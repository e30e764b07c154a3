import random

import pytest

from repro.measurements.ruler import lexicon
from repro.measurements.ruler.generate import generate_items
from repro.measurements.ruler.tasks import TASKS, Draw, ask, hotpot_set, squad_set

OFFICIAL_LIMITS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}


class WordTokenizer:
    """Cuts at spaces, as no real tokenizer does: items must not depend on ours."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [len(word) for word in text.split()]


class CharacterTokenizer:
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [ord(character) for character in text]


class BlindTokenizer:
    """Sees nothing but the first characters, as a tokenizer with a fixed limit does."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [0] * min(len(text), self.limit)


def draw(**changes):
    fields = {"seed": "s", "split": "train", "units": 80, "length": 4096, "depth": 0.5}
    return Draw(**{**fields, **changes})


def items(task, *, length=1500, count=3, seed=0, tokenizer=None, **options):
    return generate_items(
        task,
        length=length,
        count=count,
        seed=seed,
        tokenizer=tokenizer or WordTokenizer(),
        **options,
    )


def test_all_official_tasks_with_their_limits():
    assert len(TASKS) == 13
    for name, task in TASKS.items():
        assert task.name == name
        assert task.max_new_tokens == OFFICIAL_LIMITS[task.family]
        expected = "string_match_part" if task.family == "qa" else "string_match_all"
        assert task.metric == expected


@pytest.mark.parametrize("tokenizer", [WordTokenizer(), CharacterTokenizer()], ids=["word", "char"])
@pytest.mark.parametrize("task", TASKS)
def test_items_fill_the_length_and_hold_their_answers(task, tokenizer):
    length = 1500 if isinstance(tokenizer, WordTokenizer) else 6000
    for item in items(task, length=length, tokenizer=tokenizer):
        assert item.n_tokens == len(tokenizer.encode(item.prompt))
        assert item.n_tokens + TASKS[task].max_new_tokens <= length
        assert item.n_tokens + TASKS[task].max_new_tokens >= 0.85 * length
        assert all(answer in item.prompt for answer in item.answers)
        assert not item.prompt.endswith(" ")


@pytest.mark.parametrize("task", TASKS)
def test_seeded_and_independent_of_count(task):
    three, one = items(task, count=3), items(task, count=1)
    assert three[:1] == one
    assert items(task, seed=1, count=1)[0].key != one[0].key
    assert len({item.key for item in three}) == 3


@pytest.mark.parametrize("task", TASKS)
def test_too_short_a_length_is_refused(task):
    with pytest.raises(ValueError, match=f"length must leave {task} at least"):
        items(task, length=TASKS[task].max_new_tokens + 10)


@pytest.mark.parametrize("task", ["niah_single_1", "cwe", "qa_2"])
def test_a_tokenizer_that_sees_only_a_part_ends(task):
    assert len(items(task, length=200, count=1, tokenizer=BlindTokenizer(limit=50))) == 1


def test_a_tokenizer_that_sees_nothing_is_refused():
    with pytest.raises(ValueError, match="tokenizer must encode text to at least one token"):
        items("vt", tokenizer=BlindTokenizer(limit=0))


def test_bad_arguments():
    with pytest.raises(ValueError, match="task must be one of"):
        items("niah_single_9")
    with pytest.raises(ValueError, match="count must be at least 0"):
        items("vt", count=-1)


def test_depths_are_spread_evenly():
    depths = [item.depth for item in items("niah_single_2", count=20)]
    fifths = [sum(int(depth // 20) == i for depth in depths) for i in range(5)]
    assert min(fifths) >= 3 and max(fifths) <= 5


def test_depth_says_where_the_needle_is():
    for item in items("niah_multikey_1", count=10, length=3000):
        place = item.prompt.index(item.answers[0]) / item.prompt.index("\nQuestion:")
        assert abs(100 * place - item.depth) < 6


def test_splits_share_no_vocabulary():
    vocabularies = {}
    for split in ("train", "evaluation"):
        source = lexicon.Source(random.Random(0), split)
        words, numbers = set(source.words(5000)), {source.number() for _ in range(5000)}
        vocabularies[split] = words | numbers | {source.code() for _ in range(1000)}
        assert all(lexicon.in_split(text, split) for text in vocabularies[split])
    assert not vocabularies["train"] & vocabularies["evaluation"]


@pytest.mark.parametrize("task", TASKS)
def test_answers_come_from_the_split(task):
    for split in ("train", "evaluation"):
        for item in items(task, split=split):
            assert all(lexicon.in_split(answer, split) for answer in item.answers)


def test_official_needle_counts():
    def asked(name):
        return TASKS[name].build(draw()).queries[0]

    assert len(asked("niah_multivalue").answers) == 4
    assert len(asked("niah_multiquery").answers) == 4
    assert len(asked("vt").answers) == 5
    assert len(asked("cwe").answers) == 10
    assert len(asked("fwe").answers) == 3
    context = TASKS["niah_multikey_1"].build(draw()).context
    assert context.count("secret number") == 4
    assert TASKS["niah_multikey_3"].build(draw(units=9)).context.count("secret code") == 10


@pytest.mark.parametrize("length, often, seldom", [(4096, 30, 3), (2048, 6, 1)])
def test_common_words_frequencies(length, often, seldom):
    problem = TASKS["cwe"].build(draw(length=length))
    words = problem.context.removeprefix("List: ").removesuffix(".").split(", ")
    counts = {word: words.count(word) for word in words}
    answers = problem.queries[0].answers
    assert {counts[word] for word in answers} == {often}
    assert {count for word, count in counts.items() if word not in answers} == {seldom}


def test_frequent_words_follow_the_zeta_distribution():
    problem = TASKS["fwe"].build(draw(units=1000))
    words = problem.context.removeprefix("Text: ").split()
    first, second, third = (words.count(word) for word in problem.queries[0].answers)
    assert words.count("...") == 607 and (first, second, third) == (151, 67, 37)


def test_question_sets_have_the_public_schemas():
    paragraph = squad_set("s", "train", documents=3)["data"][1]["paragraphs"][0]
    for qa in paragraph["qas"]:
        text, start = qa["answers"][0]["text"], qa["answers"][0]["answer_start"]
        assert paragraph["context"][start : start + len(text)] == text
    for row in hotpot_set("s", "train", questions=2, documents=6):
        sentences = dict(row["context"])
        one, two = (sentences[title][i] for title, i in row["supporting_facts"])
        bridge = one.removesuffix(".").split()[-1]
        assert two.startswith(f"The {bridge} ") and two.endswith(f" {row['answer']}.")


@pytest.mark.parametrize("task", TASKS)
def test_completion_holds_all_answers_and_fits_the_limit(task):
    from repro.zoo.retriever.tokenizer import build_tokenizer

    query = TASKS[task].build(draw()).queries[0]
    assert all(answer in query.completion for answer in query.answers)
    assert ask(query).endswith(query.prefix)
    # The last full stop may be cut off, an answer may not.
    written = build_tokenizer().encode(query.completion.removesuffix("."))
    assert len(written) <= TASKS[task].max_new_tokens


def test_cache_is_read_back_and_keyed_by_everything(tmp_path):
    made = items("qa_1", cache_dir=tmp_path)
    assert items("qa_1", cache_dir=tmp_path) == made
    assert len(list(tmp_path.iterdir())) == 1
    items("qa_1", cache_dir=tmp_path, split="train")
    items("qa_1", cache_dir=tmp_path, length=6000, tokenizer=CharacterTokenizer())
    assert len(list(tmp_path.iterdir())) == 3
