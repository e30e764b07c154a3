import json
import subprocess
import sys

import pytest
import torch

from repro import subjects, zoo
from repro.errors import BadInput, MissingResource
from repro.measurements.ruler.generate import generate_items
from repro.measurements.ruler.tasks import TASKS, ask
from repro.zoo.retriever import recipe
from repro.zoo.retriever.evaluation import (
    answer,
    ngram_perplexities,
    perplexity,
    ruler_scores,
    skill_scores,
)
from repro.zoo.retriever.examples import MIXTURE, make_example
from repro.zoo.retriever.initial import Words, initial_model, retriever_config
from repro.zoo.retriever.skills import SKILLS
from repro.zoo.retriever.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def retriever():
    return subjects.load("zoo:retriever", device="cpu")


@pytest.fixture(scope="module")
def untrained(tokenizer):
    config = retriever_config(
        recipe.VOCAB_SIZE, end=tokenizer.eos_token_id, pad=tokenizer.pad_token_id
    )
    return initial_model(config, Words.of(tokenizer), seed=0).eval()


def test_import_needs_no_torch():
    code = "import sys, repro.zoo as z; z.verify('retriever'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_names_and_paths():
    assert "retriever" in zoo.names()
    assert (zoo.zoo_path("retriever") / "recipe.py").exists()
    with pytest.raises(BadInput, match="did you mean retriever"):
        zoo.zoo_path("retreiver")


def test_a_changed_weight_is_refused(copied_zoo):
    zoo.verify("retriever")
    path = copied_zoo / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    text = r"model.safetensors must be SHA-256 \w{12}..., got SHA-256 \w{12}...; restore it"
    with pytest.raises(MissingResource, match=text):
        zoo.verify("retriever")


def test_an_absent_file_is_refused(copied_zoo):
    (copied_zoo / "config.json").unlink()
    with pytest.raises(MissingResource, match=r"config.json must be SHA-256 .*, got absent"):
        zoo.verify("retriever")
    (copied_zoo / "checksums.json").write_text('{"config.json": ')
    with pytest.raises(MissingResource, match=r"checksums.json is not readable: .*; restore it"):
        zoo.verify("retriever")
    (copied_zoo / "checksums.json").unlink()
    with pytest.raises(MissingResource, match="repro zoo train retriever"):
        zoo.verify("retriever")


def test_shape_that_later_methods_rely_on(retriever):
    config = retriever.model.config
    assert config.model_type == "llama" and config.head_dim == 64
    assert config.num_attention_heads >= 8
    assert config.num_attention_heads > config.num_key_value_heads
    assert config.hidden_size % 128 == config.intermediate_size % 128 == 0
    assert config.max_position_embeddings == 32768
    assert 4e6 <= sum(p.numel() for p in retriever.model.parameters()) <= 10e6
    shipped = sum(path.stat().st_size for path in zoo.zoo_path("retriever").iterdir())
    assert shipped < 25e6


def test_shipped_tokenizer_is_the_built_one(retriever, tokenizer):
    assert retriever.tokenizer.get_vocab() == tokenizer.get_vocab()
    for task in TASKS:
        item = generate_items(task, length=800, count=1, seed=0, tokenizer=tokenizer)[0]
        ids = tokenizer.encode(item.prompt)
        assert retriever.tokenizer.encode(item.prompt) == ids
        assert tokenizer.decode(ids) == item.prompt


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n\t",
        "Hello, wörld! 漢字 \N{GRINNING FACE}",
        "x = {1: 'a'}\n\n  y",
        "add bad 0x1f",
        "<end>",
    ],
    ids=["nothing", "space", "breaks", "unicode", "code", "hex", "special"],
)
def test_any_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


@pytest.mark.parametrize("kind", MIXTURE)
def test_examples_fit_and_are_seeded(tokenizer, kind):
    for length in (256, 1024):
        one, same = (
            make_example(kind, length=length, seed="7", tokenizer=tokenizer) for _ in range(2)
        )
        assert (one.ids == same.ids).all() and one.choices == same.choices
        assert 0.3 * length < len(one.ids) <= length
        assert one.is_answer.any() == (kind != "prose")
        for position, tokens in one.choices.items():
            assert one.ids[position] in tokens


def test_examples_continue_evaluation_prompts(tokenizer):
    """Training text must look exactly like a prompt followed by its answer."""
    example = make_example("vt", length=256, seed="7", tokenizer=tokenizer)
    first = int(example.is_answer.argmax())
    text = tokenizer.decode(example.ids[:first])
    assert "\nQuestion: " in text and text.endswith(" into")
    assert ask(TASKS["vt"].build(_draw()).queries[0]).endswith(" into")


def _draw():
    from repro.measurements.ruler.tasks import Draw

    return Draw("s", "train", 20, 512, 0.5)


@pytest.mark.parametrize("skill", SKILLS, ids=lambda skill: skill.__name__)
def test_skills_can_be_answered_from_their_text(skill):
    import random

    problem = skill(random.Random(0), units=12)
    for query in problem.queries:
        assert query.answers[0] in query.completion
    assert problem.context.count("\n") > 2


def test_untrained_heads_already_copy(untrained, tokenizer):
    """The structured start names most values and does not repeat the ones already named."""
    hits = []
    for seed in range(4):
        example = make_example("niah_multivalue", length=512, seed=str(seed), tokenizer=tokenizer)
        with torch.no_grad():
            logits = untrained(input_ids=torch.from_numpy(example.ids)[None]).logits[0]
        hits += [logits[at - 1].argmax().item() in tokens for at, tokens in example.choices.items()]
    assert sum(hits) > len(hits) / 2


@pytest.mark.parametrize("kind", ["niah_multikey_2", "niah_multikey_3", "qa_1"])
def test_untrained_heads_match_exactly(untrained, tokenizer, kind):
    """Every token of every value is right among hundreds of needles of the same wording."""
    example = make_example(kind, length=2048, seed="1", tokenizer=tokenizer)
    with torch.no_grad():
        predicted = untrained(input_ids=torch.from_numpy(example.ids)[None]).logits[0].argmax(-1)
    opener = Words.of(tokenizer).openers[0]
    values = []
    for at in range(1, len(example.ids)):
        inside = example.is_answer[at] and values and values[-1][1] == at - 1
        if example.is_answer[at] and (example.ids[at - 1] == opener or inside):
            token = tokenizer.decode([example.ids[at]])
            if token not in (".", "<end>"):
                values.append((int(predicted[at - 1]) == example.ids[at], at))
    assert len(values) > 15
    assert all(right for right, _ in values)


def test_untrained_heads_already_count(untrained, tokenizer):
    """The structured start names common words, one after the other, of a list of 4096 tokens."""
    example = make_example("cwe", length=4096, seed="1", tokenizer=tokenizer)
    with torch.no_grad():
        logits = untrained(input_ids=torch.from_numpy(example.ids)[None]).logits[0]
    hits = [logits[at - 1].argmax().item() in tokens for at, tokens in example.choices.items()]
    assert len(hits) == 10 and sum(hits) > 5


def test_retriever_finds_needles(retriever, tokenizer):
    scores = ruler_scores(
        retriever.model,
        tokenizer,
        length=1024,
        count=4,
        seed=5,
        tasks=["niah_single_2", "niah_multikey_1"],
    )
    assert all(answered.score == 1.0 for rows in scores.values() for answered in rows)


def test_retriever_models_its_language_better_than_pairs_of_tokens(retriever, tokenizer):
    one, two, three = ngram_perplexities(tokenizer, length=1024, count=2)
    assert one > two > three > 1
    assert perplexity(retriever.model, tokenizer, length=1024, count=2) < two


def test_skills_are_scored_by_question(retriever, tokenizer):
    scores = skill_scores(retriever.model, tokenizer, units=12, count=2)
    assert list(scores) == [skill.__name__ for skill in SKILLS]
    assert [len(found) for found in scores.values()] == [8, 2, 4, 4]
    assert {score for found in scores.values() for score in found} <= {0.0, 1.0}
    assert sum(map(sum, scores.values())) > 4


def test_batched_answers_equal_single_ones(retriever, tokenizer):
    items = [
        item
        for length in (400, 700)
        for item in generate_items(
            "niah_single_2", length=length, count=2, seed=3, tokenizer=tokenizer
        )
    ]
    together = answer(retriever.model, tokenizer, items, batch_size=4)
    alone = answer(retriever.model, tokenizer, items, batch_size=1)
    assert [a.text for a in together] == [a.text for a in alone]


TINY = (recipe.Stage("tiny", 3, ((1, 256, 1), (1, 256, 2)), 1e-3),)


def _run_tiny(folder, **options):
    return recipe.train_retriever(
        folder, TINY, device=torch.device("cpu"), say=lambda line: None, resume=True, **options
    )[0]


def test_recipe_killed_and_resumed_ends_with_the_same_bits(tmp_path, monkeypatch):
    whole = _run_tiny(tmp_path / "whole").state_dict()

    class Killed(Exception):
        pass

    def kill(steps):
        if steps == 2:
            raise Killed

    monkeypatch.setattr(recipe, "CHECKPOINT_EVERY", 1)
    with pytest.raises(Killed):
        _run_tiny(tmp_path / "killed", advance=kill)
    resumed = _run_tiny(tmp_path / "killed").state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_export_loads_with_checksums(tmp_path, untrained, tokenizer):
    recipe.export(untrained, tokenizer, tmp_path)
    assert json.loads((tmp_path / zoo.CHECKSUMS).read_text()) == zoo.checksum(tmp_path)
    assert "model.safetensors" in zoo.checksum(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_quick_recipe_reaches_its_bar(tmp_path, tokenizer):
    """At least 80 % of the single needles and of the first multikey task at 1024 tokens."""
    folder = zoo.train("retriever", quick=True, output=tmp_path, progress=print)
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    easy = [s for row in rows if row["task"] in recipe.QUICK_TASKS for s in row["scores"]]
    assert sum(easy) / len(easy) >= recipe.QUICK_BAR
    assert (folder / "README.md").exists()
