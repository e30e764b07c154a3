"""lm-eval's own RULER tasks over local stand-ins of their sources, in the same schemas."""

import importlib.util
import sys
import types

import pytest
from lm_eval.tasks._yaml_loader import load_yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from repro.errors import MissingResource, UnsupportedCombination
from repro.measurements import ruler
from repro.measurements.ruler import harness, hub
from repro.measurements.ruler.options import RulerOptions, expand
from repro.measurements.ruler.tasks import TASKS
from repro.testing import byte_tokenizer, cell_context, tiny_subject

nltk = pytest.importorskip("nltk", reason="source: hub needs nltk")
WORDS = [a + b + c for a in "bdfgklmnpr" for b in "aeiou" for c in "klmnrst"]
SENTENCES = [f"Essay sentence number {number} speaks of {WORDS[number]}." for number in range(300)]
LENGTH = 1024
# lm-eval makes 500 items of whatever it is asked for: the fast tests look at one task of each kind.
FAST = ("niah_single_2", "vt", "qa_1")
ALL = [task if task in FAST else pytest.param(task, marks=pytest.mark.slow) for task in TASKS]


def squad():
    paragraphs = [
        {
            "context": f"The keeper of {WORDS[n % 350]}{n} lives in room {n}.",
            "qas": [
                {
                    "question": f"Where does the keeper of {WORDS[n % 350]}{n} live?",
                    "answers": [{"text": f"room {n}"}, {"text": f"in room {n}"}],
                    "is_impossible": False,
                }
            ],
        }
        for n in range(510)
    ]
    return {"data": [{"paragraphs": paragraphs[n : n + 3]} for n in range(0, 510, 3)]}


def hotpot():
    return [
        {
            "question": f"Who painted gate {n}?",
            "answer": f"painter {n}",
            "context": [[f"Gate {n}", [f"Gate {n} was painted by painter {n}."]]],
        }
        for n in range(510)
    ]


@pytest.fixture
def sources(monkeypatch):
    """Stand in for nltk's data, wonderwords, the essays and the two question sets."""

    class RandomWord:
        def __init__(self):
            kinds = {"noun": WORDS[:150], "adjective": WORDS[150:250], "verb": WORDS[250:]}
            self._categories = kinds | {f"{kind}s": words for kind, words in kinds.items()}

    class Response:
        def __init__(self, url):
            self.url = url

        def raise_for_status(self):
            pass

        def json(self):
            return hotpot() if "hotpot" in self.url else squad()

    fake = types.ModuleType("wonderwords")
    fake.RandomWord = RandomWord
    fake.__spec__ = importlib.util.spec_from_loader("wonderwords", loader=None)
    monkeypatch.setitem(sys.modules, "wonderwords", fake)
    monkeypatch.setattr(nltk.data, "find", lambda name: name)
    monkeypatch.setattr(
        nltk, "sent_tokenize", lambda text: [f"{part}." for part in text.rstrip(".").split(". ")]
    )
    monkeypatch.setattr("datasets.load_dataset", lambda path, **_: {"text": [" ".join(SENTENCES)]})
    monkeypatch.setattr("requests.get", lambda url, timeout: Response(url))
    forget_lm_eval_ruler()
    yield
    forget_lm_eval_ruler()


def forget_lm_eval_ruler():
    """Its modules keep what they read for the life of the process."""
    for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.ruler")]:
        del sys.modules[name]


def word_tokenizer():
    """Count words and marks as any real tokenizer would; which word it is does not matter here."""
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    vocabulary = {token: index for index, token in enumerate(special.values())}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.fixture(scope="module")
def subject():
    made = tiny_subject(vocabulary=300)
    made.tokenizer = word_tokenizer()
    return made


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One cache for the module, as a run has it."""
    return tmp_path_factory.mktemp("cache")


def load(task, subject, cache, **changes):
    options = {"length": LENGTH, "count": 4, "seed": 5, "max_new_tokens": 7} | changes
    return hub.load(task, tokenizer=subject.tokenizer, cache_dir=cache / "ruler", **options)


@pytest.mark.parametrize("task", ALL)
def test_every_task_loads_with_lm_evals_own_settings(task, sources, subject, shared):
    loaded, documents = load(task, subject, shared)
    (made,) = loaded["tasks"].values()
    assert len(documents) == len(made.eval_docs) == 4
    assert made.config.generation_kwargs["max_gen_toks"] == 7
    own = load_yaml(harness.task_manager(harness.HUB_TASKS).task_index[made.task_name].yaml_path)
    assert own["generation_kwargs"]["max_gen_toks"] == TASKS[task].max_new_tokens
    assert own["generation_kwargs"]["until"] == [] and own["doc_to_text"] == "{{input}}"
    assert len({document["key"] for document in documents}) == 4
    for document in documents:
        assert document["metric"] == TASKS[task].metric
        assert document["outputs"] and document["max_length"] == LENGTH
        assert len(subject.tokenizer(document["input"])["input_ids"]) <= LENGTH
        prompt = made.fewshot_context(document, 0, gen_prefix=made.doc_to_prefix(document))
        assert prompt.startswith(document["input"]) and prompt.endswith(document["gen_prefix"])
    if task.startswith("niah_single"):
        assert all(0 <= document["depth"] <= 100 for document in documents)


def test_record_through_the_measurement(sources, subject, shared):
    options = RulerOptions(
        tasks=["qa_1"], lengths=[LENGTH], samples=3, batch_size=2, source="hub", max_new_tokens=2
    )
    context = cell_context(subject, expand(options)[0], seed=5, cache=shared)
    ruler.run(context)
    _, documents = load("qa_1", subject, shared, count=3)
    # Both references hold the shorter one: the release counts 1, lm-eval a half.
    key, answers = documents[0]["key"], documents[0]["outputs"]
    context.items.values[key]["text"] = f"It is {answers[0]}."
    body = ruler.run(context)
    assert body["items"]["keys"] == [document["key"] for document in documents]
    assert body["items"]["scores"] == [1.0, 0.0, 0.0]
    assert body["metrics"]["score"]["value"] == pytest.approx(100 / 3)
    assert body["metrics"]["score_lm_eval"]["value"] == pytest.approx(100 / 6)


def test_documents_are_made_once_and_shared_by_any_count(sources, subject, shared, monkeypatch):
    _, more = load("vt", subject, shared)
    monkeypatch.setattr(hub, "_generate", None)
    _, fewer = load("vt", subject, shared, count=2)
    assert fewer == more[:2]


@pytest.mark.parametrize("task", ["vt", pytest.param("cwe", marks=pytest.mark.slow)])
def test_the_seed_alone_decides(task, sources, subject, shared, tmp_path):
    _, first = load(task, subject, shared)
    # What was made before must not show: the common words have a generator of their own.
    _, other = load(task, subject, shared, seed=6)
    _, again = load(task, subject, tmp_path)
    assert first == again
    assert first != other


def test_missing_packages_are_named(subject, tmp_path, monkeypatch):
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingResource, match=r"nltk and wonderwords; .*repro\[ruler-hub\]"):
        load("vt", subject, tmp_path)


@pytest.mark.parametrize(
    ("task", "named"),
    [("niah_single_2", "baber/paul_graham_essays"), ("qa_1", "SQuAD"), ("qa_2", "hotpotqa")],
)
def test_unreachable_sources_are_named(task, named, sources, subject, tmp_path, monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("datasets.load_dataset", offline)
    monkeypatch.setattr("requests.get", offline)
    with pytest.raises(MissingResource) as caught:
        load(task, subject, tmp_path)
    assert named in str(caught.value) and "no route to host" in str(caught.value)
    assert not list(tmp_path.glob("hub-*"))


def test_missing_sentence_data_is_named(sources, subject, tmp_path, monkeypatch):
    def missing(text):
        raise LookupError("Resource punkt_tab not found.")

    monkeypatch.setattr(nltk, "sent_tokenize", missing)
    with pytest.raises(MissingResource, match="punkt_tab"):
        load("niah_single_2", subject, tmp_path)


def test_a_tokenizer_that_would_hang_lm_eval_is_refused(sources, tmp_path):
    letters = tiny_subject(vocabulary=300)
    letters.tokenizer = byte_tokenizer()
    with pytest.raises(UnsupportedCombination, match="at most 250 tokens .*, got 4"):
        load("vt", letters, tmp_path)


def test_other_errors_are_not_taken_for_missing_data(sources, subject, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise KeyError("text")

    monkeypatch.setattr("datasets.load_dataset", broken)
    with pytest.raises(KeyError):
        load("niah_single_2", subject, tmp_path)


def test_names_are_lm_evals():
    assert {hub.task_name(task) for task in TASKS} | {"ruler", "longcxt"} == set(
        harness.task_manager(harness.HUB_TASKS).all_tasks
    )
