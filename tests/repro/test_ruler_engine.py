"""Batches through the item store: resuming, padding, patches, faults, and lm-eval's own model."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import DynamicCache

from repro.errors import UnsupportedCombination
from repro.measurements.ruler import decoding, engine
from repro.measurements.ruler.decoding import decode_batch, encode
from repro.measurements.ruler.engine import StoredLM, plan_batches
from repro.method import Method, Patch
from repro.patch_stats import merge_stats
from repro.testing import byte_tokenizer, cell_context, tiny_subject

TEXTS = [
    "The lamp is on the table.",
    "A",
    "One of the special numbers for river is 48213.",
    "Say it again: blue, green, red.",
    "What is hidden in the garden behind the old mill?",
    "Two words",
    "The mountain road is closed today because of the snow.",
]


@pytest.fixture(scope="module")
def subject():
    made = tiny_subject(vocabulary=300)
    made.tokenizer = byte_tokenizer()
    return made


def requests_for(texts, *, max_gen_toks=6, until=()):
    settings = {"max_gen_toks": max_gen_toks, "until": list(until), "do_sample": False}
    return [
        Instance(
            request_type="generate_until",
            doc={"key": f"key-{place:02d}"},
            arguments=(text, dict(settings)),
            idx=0,
            metadata=("repro_ruler", place, 1),
        )
        for place, text in enumerate(texts)
    ]


def model_of(context, *, batch_size=3):
    return StoredLM(context, batch_size=batch_size)


class RecordingPatch(Patch):
    """Counts what the engine asks of it; every batch reports the density of its number."""

    def __init__(self):
        self.resets = 0
        self.caches = []
        self.entered = 0
        self.left = 0

    def reset(self):
        self.resets += 1

    def make_cache(self):
        self.caches.append(DynamicCache())
        return self.caches[-1]

    def stats(self):
        return {"density": float(self.resets), "sparse_calls": 2}


def recording_method(patch):
    @contextmanager
    def apply(subject, config, artifact=None):
        patch.entered += 1
        try:
            yield patch
        finally:
            patch.left += 1

    return Method(
        slug="recording", title="", arxiv="", kind="attention", config=object, apply=apply
    )


# -- planning and joining -------------------------------------------------------------------------


@given(st.lists(st.integers(1, 5), min_size=1, max_size=20), st.integers(1, 6), st.randoms())
def test_batches_hold_each_item_once_and_ignore_the_order_of_arrival(lengths, size, random):
    keys = [f"{place:03d}" for place in range(len(lengths))]
    batches = plan_batches(lengths, keys, size)
    order = [place for batch in batches for place in batch]
    assert sorted(order) == list(range(len(keys)))
    assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
    assert [lengths[place] for place in order] == sorted(lengths, reverse=True)

    shuffled = list(range(len(keys)))
    random.shuffle(shuffled)
    again = plan_batches([lengths[p] for p in shuffled], [keys[p] for p in shuffled], size)
    named = [[keys[shuffled[place]] for place in batch] for batch in again]
    assert named == [[keys[place] for place in batch] for batch in batches]


def test_stats_of_one_batch_stay_as_they_are():
    stats = {
        "density": 0.25,
        "density_per_head": [[0.1, 0.4]],
        "dense_calls": 3,
        "kv_bytes": 10,
        "note": "text",
        "fallback_share": None,
    }
    assert merge_stats([(4, stats)]) == stats


def test_stats_join_by_items_sums_and_maxima():
    first = {"density": 0.2, "density_per_head": [[0.0, 1.0]], "dense_calls": 3, "kv_bytes": 10}
    second = {"density": 0.8, "density_per_head": [[1.0, 0.0]], "dense_calls": 1, "kv_bytes": 7}
    joined = merge_stats([(3, first), (1, second)])
    assert joined["density"] == pytest.approx(0.35)
    assert joined["density_per_head"] == [[pytest.approx(0.25), pytest.approx(0.75)]]
    assert joined["dense_calls"] == 4
    assert joined["kv_bytes"] == 10
    assert merge_stats([]) == {}


# -- the model of a cell --------------------------------------------------------------------------


def test_same_texts_as_lm_evals_own_model(subject):
    requests = requests_for(TEXTS)
    own = HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=3)
    expected = own.generate_until(requests, disable_tqdm=True)
    assert model_of(cell_context(subject, {})).generate_until(requests) == expected


def test_batched_is_single(subject):
    requests = requests_for(TEXTS)
    single = model_of(cell_context(subject, {}), batch_size=1).generate_until(requests)
    assert model_of(cell_context(subject, {}), batch_size=4).generate_until(requests) == single


def test_stored_items_never_touch_the_model(subject, monkeypatch):
    context = cell_context(subject, {})
    first = model_of(context)
    texts = first.generate_until(requests_for(TEXTS))
    monkeypatch.setattr(engine, "decode_batch", None)
    context = replace(context, method=recording_method(patch := RecordingPatch()))
    second = model_of(context)
    assert second.generate_until(requests_for(TEXTS)) == texts
    assert second.generations == first.generations
    assert patch.entered == 0


def interrupt_at(monkeypatch, batch):
    calls = []

    def decode(*args, **options):
        calls.append(len(args[1]))
        if len(calls) == batch:
            raise KeyboardInterrupt
        return decode_batch(*args, **options)

    monkeypatch.setattr(engine, "decode_batch", decode)
    return calls


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_resumed_run_is_the_undisturbed_run(subject, monkeypatch, batch):
    whole = cell_context(subject, {}, method=recording_method(RecordingPatch()))
    undisturbed = model_of(whole)
    texts = undisturbed.generate_until(requests_for(TEXTS))

    patch = RecordingPatch()
    context = cell_context(subject, {}, method=recording_method(patch))
    interrupt_at(monkeypatch, batch)
    with pytest.raises(KeyboardInterrupt):
        model_of(context).generate_until(requests_for(TEXTS))
    assert context.items.batches == batch - 1
    assert patch.left == patch.entered == 1

    # The batch that was cut reports again; what came before it must not be computed twice.
    patch.resets = batch - 1
    calls = interrupt_at(monkeypatch, 0)
    resumed = model_of(context)
    assert resumed.generate_until(requests_for(TEXTS)) == texts
    assert resumed.stats == undisturbed.stats
    assert context.items.values == whole.items.values
    assert sum(calls) == len(TEXTS) - 3 * (batch - 1)


@pytest.mark.parametrize("lost", ["item", "batch"])
def test_a_batch_with_a_lost_line_is_computed_whole(subject, monkeypatch, lost):
    context = cell_context(subject, {})
    model_of(context).generate_until(requests_for(TEXTS))
    before = dict(context.items.values)
    item = "batch/1" if lost == "batch" else "key-00"
    del context.items.values[item]
    calls = interrupt_at(monkeypatch, 0)
    model_of(context).generate_until(requests_for(TEXTS))
    assert calls == [3]
    assert context.items.values == before


def test_patch_is_entered_once_and_asked_for_every_batch(subject, monkeypatch):
    patch = RecordingPatch()
    used = []
    generate = subject.model.generate

    def watched(**options):
        used.append(options["past_key_values"])
        return generate(**options)

    monkeypatch.setattr(subject.model, "generate", watched)
    context = cell_context(subject, {}, method=recording_method(patch))
    model = model_of(context)
    model.generate_until(requests_for(TEXTS))
    assert (patch.entered, patch.left, patch.resets) == (1, 1, 3)
    assert used == patch.caches and len(set(map(id, used))) == 3
    # Batches of 3, 3 and 1 items reported 1, 2 and 3.
    assert model.stats == {"density": pytest.approx((3 * 1 + 3 * 2 + 3) / 7), "sparse_calls": 6}


def test_progress_counts_items(subject):
    seen = []
    context = cell_context(subject, {}, progress=lambda done, total: seen.append((done, total)))
    model_of(context).generate_until(requests_for(TEXTS))
    assert seen == [(3, 7), (6, 7), (7, 7)]


def test_nan_is_a_numerical_fault_and_stores_nothing(subject, monkeypatch):
    broken = tiny_subject(vocabulary=300)
    broken.tokenizer = subject.tokenizer
    torch.nn.init.constant_(broken.model.get_output_embeddings().weight, float("nan"))
    context = cell_context(broken, {})
    with pytest.raises(FloatingPointError, match="NaN"):
        model_of(context).generate_until(requests_for(TEXTS))
    assert context.items.values == {}


def test_prompts_beyond_the_positions_are_refused_before_anything_runs(subject, monkeypatch):
    short = replace(subject, info=replace(subject.info, max_length=40))
    monkeypatch.setattr(engine, "decode_batch", None)
    with pytest.raises(
        UnsupportedCombination, match="at most the 40 positions of random:tiny, got 60"
    ):
        model_of(cell_context(short, {})).generate_until(requests_for(TEXTS))


# -- decoding -------------------------------------------------------------------------------------


def decode(subject, texts, **options):
    prompts = [encode(subject.tokenizer, text) for text in texts]
    return decode_batch(subject, prompts, **{"max_new_tokens": 8} | options)


def free_run(subject, texts):
    """Return the new ids of each text when nothing ends it before the limit."""
    rows = []
    for text in texts:
        ids = encode(subject.tokenizer, text).long()[None]
        output = subject.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
        )
        rows.append(output[0, ids.shape[1] :].tolist())
    return rows


def test_ends_at_the_end_token_and_does_not_count_it(subject, monkeypatch):
    rows = free_run(subject, TEXTS[:3])
    end = rows[0][3]
    monkeypatch.setattr(subject.model.generation_config, "eos_token_id", [end, 1])
    results = decode(subject, TEXTS[:3])
    for row, result in zip(rows, results, strict=True):
        expected = row[: row.index(end)] if end in row else row
        assert result.new_tokens == len(expected)
        assert result.text == subject.tokenizer.decode(expected, skip_special_tokens=True)


def test_stop_string_is_cut_off_with_what_follows(subject):
    free = decode(subject, TEXTS[:4])
    stop = next(char for char in free[0].text[1:] if char.isascii())
    stopped = decode(subject, TEXTS[:4], stop=[stop])
    assert [one.text for one in stopped] == [one.text.split(stop)[0] for one in free]
    assert stopped[0].new_tokens <= free[0].new_tokens


def test_settings_of_the_model_do_not_disturb_greedy_decoding(subject, monkeypatch):
    plain = decode(subject, TEXTS)
    settings = {"do_sample": True, "temperature": 9.0, "repetition_penalty": 5.0, "num_beams": 2}
    for name, value in settings.items():
        monkeypatch.setattr(subject.model.generation_config, name, value)
    assert decode(subject, TEXTS) == plain


def test_padding_is_on_the_left():
    ids, mask = decoding._pad_left([torch.tensor([5, 6, 7]), torch.tensor([8])], 0)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize(("text", "adds"), [("<s>abc", False), ("abc", True)])
def test_only_a_prompt_without_its_beginning_gets_special_tokens(text, adds):
    asked = []

    class Watched:
        bos_token = "<s>"

        def __call__(self, text, *, add_special_tokens):
            asked.append(add_special_tokens)
            return {"input_ids": [1, 2]}

    assert encode(Watched(), text).tolist() == [1, 2]
    assert asked == [adds]
