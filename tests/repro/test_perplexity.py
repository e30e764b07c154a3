"""Perplexity: each token scored once, against a direct computation; decoding; sets of text."""

import contextlib
import json
import math
import sys
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from repro import manifest, measurements
from repro.errors import BadInput, MissingResource, UnsupportedCombination
from repro.measurements import perplexity
from repro.measurements.perplexity import PerplexityOptions, expand, texts
from repro.measurements.perplexity import cell as cells
from repro.measurements.perplexity.cell import windows
from repro.method import Method, Patch
from repro.testing import byte_tokenizer, cell_context, tiny_subject


@pytest.fixture(scope="module")
def subject():
    made = tiny_subject(vocabulary=300, positions=512)
    made.tokenizer = byte_tokenizer()
    return made


def cell(**changes):
    return expand(PerplexityOptions(**{"lengths": [64], "documents": 3} | changes))[0]


@given(st.integers(2, 200), st.integers(2, 60), st.data())
def test_windows_score_every_token_but_the_first_once(total, length, data):
    stride = data.draw(st.integers(1, length - 1))
    scored = []
    for begin, end, first in windows(total, length, stride):
        assert 0 <= begin < end <= total and end - begin <= length
        assert first > begin  # a scored token has something before it
        scored += range(first, end)
    assert scored == list(range(1, total))


def test_is_the_direct_loss(subject):
    body = perplexity.run(cell_context(subject, cell(stride=32), seed=2))
    expected = []
    for place in range(3):
        ids = torch.tensor(texts.prose_document(subject.tokenizer, 2, place, 128))
        loss = 0.0
        for begin, first in ((0, 1), (32, 64), (64, 96)):
            window = ids[begin : begin + 64]
            chances = subject.model(window[None]).logits[0].log_softmax(-1)
            loss -= sum(float(chances[at - begin - 1, ids[at]]) for at in range(first, begin + 64))
        expected.append(loss / 127)
    assert body["raw"]["loss_per_token"] == pytest.approx(expected, rel=1e-5)
    value = body["metrics"]["perplexity"]
    assert value["low"] < value["value"] < value["high"]
    assert math.log(value["value"]) == pytest.approx(sum(expected) / 3, rel=1e-5)


def test_resumes_between_documents(subject, monkeypatch):
    whole = cell_context(subject, cell())
    body = perplexity.run(whole)
    cut = cell_context(subject, cell())
    key = body["raw"]["keys"][0]
    cut.items.values[key] = whole.items.values[key]
    measured = []
    measure = cells.measure
    monkeypatch.setattr(
        cells, "measure", lambda context, ids: measured.append(ids) or measure(context, ids)
    )
    assert perplexity.run(cut) == body
    assert len(measured) == 2


def test_nan_is_numerical():
    broken = tiny_subject(vocabulary=300)
    broken.tokenizer = byte_tokenizer()
    torch.nn.init.constant_(broken.model.get_output_embeddings().weight, float("nan"))
    with pytest.raises(FloatingPointError):
        perplexity.run(cell_context(broken, cell()))


def test_unsupported(subject):
    with pytest.raises(UnsupportedCombination, match="exceed the 512 positions"):
        perplexity.run(cell_context(subject, cell(lengths=[1024])))
    with pytest.raises(UnsupportedCombination, match="no tokenizer"):
        perplexity.run(cell_context(tiny_subject(), cell()))


@pytest.mark.parametrize(
    "options",
    [
        {"lengths": []},
        {"lengths": [8, 8]},
        {"documents": 1},
        {"stride": 0},
        {"text": ""},
        {"mode": "both"},
        {"prefix": 4},
        {"stride": 4, "mode": "decode"},
        {"prefix": 2047, "mode": "decode"},
        {"lengths": [2], "mode": "decode"},
    ],
)
def test_bad_options(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        PerplexityOptions(**options)


def test_registered():
    assert measurements.get("perplexity").needs_training


class Counting(DynamicCache):
    """A cache that counts the tokens that pass through its first layer."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if layer_idx == 0:
            self.calls.append(key_states.shape[2])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


class Forgetful(Counting):
    """A cache of which all but the newest tokens read as zeros."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        k, v = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        old = (torch.arange(k.shape[2]) < k.shape[2] - 4)[:, None]
        return k.masked_fill(old, 0), v.masked_fill(old, 0)


class Caching(Patch):
    def __init__(self, kind):
        self.kind, self.caches, self.events = kind, [], []

    def reset(self):
        self.events.append("reset")

    def make_cache(self):
        self.events.append("cache")
        self.caches.append(self.kind())
        return self.caches[-1]

    def stats(self):
        return {"kv_tokens": sum(self.caches[-1].calls)} if self.caches else {}


def caching(kind):
    """Return a method of one patch, and the patch."""
    patch = Caching(kind)
    method = Method(
        slug="toy",
        title="",
        arxiv="",
        kind="kv_cache",
        config=object,
        apply=lambda *arguments: contextlib.nullcontext(patch),
    )
    return method, patch


@pytest.mark.parametrize("mode", ["sliding", "decode"])
def test_an_exact_cache_measures_what_dense_does(subject, mode):
    method, patch = caching(Counting)
    options = cell(mode=mode, documents=2)
    dense = perplexity.run(cell_context(subject, options))
    body = perplexity.run(cell_context(subject, options, method=method))
    losses = dense["raw"]["loss_per_token"]
    assert body["raw"]["loss_per_token"] == pytest.approx(losses, rel=1e-5)
    # Every cache is made anew after a reset, whether of a window or of a document.
    assert patch.events == ["reset", "cache"] * len(patch.caches)
    if mode == "decode":
        assert [cache.calls for cache in patch.caches] == 2 * [[32] + 31 * [1]]
    else:
        assert [cache.calls for cache in patch.caches] == 6 * [[64]]
    assert body["patch"] == {"kv_tokens": 64 if mode == "sliding" else 63}


@pytest.mark.parametrize("mode", ["sliding", "decode"])
def test_nothing_is_measured_past_the_methods_cache(subject, mode):
    method, _ = caching(Forgetful)
    options = cell(mode=mode, documents=2)
    dense = perplexity.run(cell_context(subject, options))["raw"]["loss_per_token"]
    losses = perplexity.run(cell_context(subject, options, method=method))["raw"]["loss_per_token"]
    assert all(abs(a - b) > 1e-3 for a, b in zip(losses, dense, strict=True))


@pytest.mark.parametrize(("length", "prefix"), [(3, 1), (24, 1), (24, 22), (17, 8)])
def test_decoding_scores_what_follows_the_prefix(subject, length, prefix):
    options = cell(mode="decode", lengths=[length], prefix=prefix, documents=2)
    body = perplexity.run(cell_context(subject, options, seed=3))
    expected = []
    for place in range(2):
        ids = torch.tensor(texts.prose_document(subject.tokenizer, 3, place, length))
        chances = subject.model(ids[None]).logits[0].log_softmax(-1)
        scored = range(prefix + 1, length)
        expected.append(-sum(float(chances[at - 1, ids[at]]) for at in scored) / len(scored))
    assert body["raw"]["loss_per_token"] == pytest.approx(expected, rel=1e-4)


def test_decoding_resumes_and_tells_progress(subject):
    told = []
    first = cell_context(subject, cell(mode="decode"), progress=lambda *at: told.append(at))
    body = perplexity.run(first)
    assert told == [(1, 3), (2, 3), (3, 3)] and first.items.batches == 3
    assert perplexity.run(first) == body and first.items.batches == 3


# Sets of text

WORDS = "The river rose in the night and nobody on the bank was awake to see it. "


@pytest.fixture
def lines(tmp_path):
    """Return a writer of JSON lines; a text becomes a document, anything else a line as it is."""

    def write(*rows, name="set.jsonl"):
        shown = [json.dumps({"text": row, "id": 1}) if row else "" for row in rows]
        path = tmp_path / name
        path.write_text("\n".join(shown) + "\n")
        return path

    return write


def test_json_lines_are_measured_and_short_documents_told(subject, lines):
    path = lines("short", 3 * WORDS, "", "x" + 3 * WORDS, "y" + 2 * WORDS, "not reached")
    options = cell(text=str(path))
    body = perplexity.run(cell_context(subject, options))
    assert body["raw"]["documents_left_out"] == 1
    texts_of = [3 * WORDS, "x" + 3 * WORDS, "y" + 2 * WORDS]
    ids, _ = texts.documents(options, tokenizer=subject.tokenizer, seed=0, cache=None)
    assert [subject.tokenizer.decode(one) for one in ids] == [text[:128] for text in texts_of]


def test_plain_text_is_parted_by_two_empty_lines(tmp_path):
    path = tmp_path / "set.txt"
    path.write_bytes(b"one\r\n\r\nstill one\r\n\r\n \r\ntwo\n\n\n\nthree\n\n\n\n")
    assert texts._read_local(str(path))[1] == ["one\n\nstill one", "two", "three"]


def test_a_folder_is_read_in_the_order_of_names(lines, tmp_path):
    lines("c", name="b.jsonl")
    lines("a", "b", name="a.jsonl")
    (tmp_path / "notes.md").write_bytes(b"\xff")
    assert texts._read_local(str(tmp_path))[1] == ["a", "b", "c"]


def test_a_changed_text_is_another_cell(subject, lines):
    path = lines(*3 * [3 * WORDS])
    before = cell(text=str(path))
    assert before == cell(text=str(path))
    lines(*3 * [3 * WORDS], "more")
    assert cell(text=str(path)) != before
    with pytest.raises(MissingResource, match="changed after the plan was made"):
        perplexity.run(cell_context(subject, before))


def test_prose_needs_no_revision():
    assert "text_revision" not in cell()


@pytest.mark.parametrize("mode", ["sliding", "decode"])
def test_too_little_text(subject, lines, mode):
    path = lines(*2 * [3 * WORDS], "short")
    with pytest.raises(UnsupportedCombination, match="hold 3 documents of 64 tokens.*got 2 in 3"):
        perplexity.run(cell_context(subject, cell(text=str(path), mode=mode)))


BAD_FILES = {
    "no field": ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', ':2: the field "text" must be text'),
    "a number": ("a.jsonl", b'{"text": 3}\n', ':1: the field "text" must be text, got int'),
    "surrogate": ("a.jsonl", b'{"text": "\\ud800"}\n', ":1: .*UTF-8 can hold"),
    "a list": ("a.jsonl", b"\n[1]\n", ":2: the line must be one JSON object, got list"),
    "syntax": ("a.jsonl", b"{\n", ":1: the line must be one JSON object"),
    "deep": ("a.jsonl", b"[" * 100_000 + b"\n", ":1: the line must be one JSON object"),
    "latin": ("a.jsonl", b'{"text": "a"}\n\n{"text": "\xe9"}\n', ":3: the file must be UTF-8 text"),
    "latin text": ("a.txt", b"one\n\xff", ":2: the file must be UTF-8 text, got byte 0xff"),
    "empty": ("a.txt", b"\n \n", "one document or more, got none"),
    "another kind": ("a.csv", b"a,b", "text must be a file .jsonl or .txt"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_one_clear_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=message) as caught:
        cell(text=str(tmp_path / name))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "text", ["none.jsonl", "wikitext2", "~nobody-at-all/x", "x" * 5000, "a\0b"]
)
def test_a_text_that_is_not_there(text):
    with pytest.raises(BadInput, match="^perplexity: text must be"):
        cell(text=text)


def test_a_folder_without_text_and_one_with_two_faults(tmp_path):
    with pytest.raises(BadInput, match="a folder with files"):
        cell(text=str(tmp_path))
    (tmp_path / "a.txt").mkdir()
    (tmp_path / "b.jsonl").write_text("{}\n")
    with pytest.raises(BadInput) as caught:
        cell(text=str(tmp_path))
    assert len(caught.value.faults) == 2


def test_a_manifest_names_the_line_and_every_fault(tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}\n")
    path = tmp_path / "m.yaml"
    path.write_text(
        "profiles:\n"
        "  p:\n"
        "    subjects: [zoo:retriever]\n"
        "    measurements:\n"
        "      - perplexity:\n"
        "          documents: 2\n"
        "          text: c5\n"
        f"      - perplexity: {{text: {bad}}}\n"
    )
    with pytest.raises(BadInput) as caught:
        manifest.load(path)
    first, second = (str(fault) for fault in caught.value.faults)
    assert first.startswith(f"{path}:7: profiles.p.measurements[0].text must be prose")
    assert "did you mean c4?" in first
    assert second.startswith(f'{bad}:1: the field "text"')


@pytest.fixture
def hub(monkeypatch):
    """Stand in for the datasets library; holds what it was asked for."""
    asked = []

    def load_dataset(path, **arguments):
        asked.append((path, arguments))
        return [{"text": f"{place} {WORDS}"} for place in range(2000)]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return asked


@pytest.mark.parametrize(("name", "rows"), [("wikitext-2", 2000), ("c4", 1100)])
def test_a_hub_set_is_one_stream_and_kept(subject, hub, tmp_path, name, rows):
    context = cell_context(subject, cell(text=name), cache=tmp_path / "cache")
    body = perplexity.run(context)
    [(dataset, arguments)] = hub
    assert dataset == texts.HUB_SETS[name].dataset
    assert arguments["revision"].startswith(context.options["text_revision"])
    separator = texts.HUB_SETS[name].separator
    stream = separator.join(f"{place} {WORDS}" for place in range(rows))
    assert texts._hub_text(name, tmp_path / "cache") == stream and len(hub) == 1
    ids, _ = texts.documents(
        context.options, tokenizer=subject.tokenizer, seed=0, cache=tmp_path / "cache"
    )
    assert "".join(subject.tokenizer.decode(one) for one in ids) == stream[: 3 * 128]
    assert len(body["raw"]["keys"]) == 3
    with pytest.raises(UnsupportedCombination, match="hold 100000 documents of 128 tokens"):
        perplexity.run(
            cell_context(subject, cell(text=name, documents=100000), cache=tmp_path / "cache")
        )


def test_a_hub_set_out_of_reach(subject, hub, monkeypatch, tmp_path):
    context = cell_context(subject, cell(text="c4"), cache=tmp_path)

    def fail(*arguments, **options):
        raise ValueError("Couldn't find cache for\nallenai/c4")

    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", fail)
    with pytest.raises(MissingResource, match="run once with network access.*find cache for allen"):
        perplexity.run(context)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingResource, match="pip install datasets"):
        perplexity.run(context)
