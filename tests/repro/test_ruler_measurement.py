"""The measurement as the worker uses it: options, cells, records, offline, scored from the store."""

import json
import socket
import subprocess
import sys
from dataclasses import replace

import pytest

from repro import measurements
from repro.errors import UnsupportedCombination
from repro.measurements import ruler
from repro.measurements.ruler import decoding, harness
from repro.measurements.ruler.generate import generate_items
from repro.measurements.ruler.options import RulerOptions, estimate_seconds, expand
from repro.measurements.ruler.tasks import TASKS
from repro.statistics import mean_interval
from repro.testing import byte_tokenizer, cell_context, tiny_subject


@pytest.fixture(scope="module")
def subject():
    made = tiny_subject(vocabulary=300)
    made.tokenizer = byte_tokenizer()
    return made


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def cell(task="niah_single_1", **changes):
    options = {"tasks": [task], "lengths": [1024], "samples": 5, "batch_size": 2}
    return expand(RulerOptions(**options | {"max_new_tokens": 3} | changes))[0]


# -- options --------------------------------------------------------------------------------------


def test_cells_are_lengths_by_tasks_with_everything_that_matters():
    cells = expand(RulerOptions(tasks="all", lengths=[2048, 1024], samples=7))
    assert [(c["length"], c["task"]) for c in cells] == [
        (length, task) for length in (1024, 2048) for task in TASKS
    ]
    assert len({json.dumps(c, sort_keys=True) for c in cells}) == 26
    assert set(cells[0]) == {
        "task",
        "length",
        "samples",
        "batch_size",
        "source",
        "max_new_tokens",
        "chat_template",
    }
    assert {c["task"]: c["max_new_tokens"] for c in cells} == {
        name: task.max_new_tokens for name, task in TASKS.items()
    }


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"tasks": ["niah_singel_1"]}, "did you mean niah_single_1"),
        ({"tasks": "vtt"}, "got 'vtt'; did you mean vt"),
        ({"tasks": []}, "tasks must be 'all' or a list of at least one task, got"),
        ({"tasks": ["vt", "cwe", "vt"]}, "tasks must be distinct, got vt more than once"),
        ({"lengths": []}, "lengths must be a list of at least one length"),
        ({"lengths": [4096, 0]}, "lengths must be positive numbers of tokens, got 0"),
        ({"lengths": [4096, 4096]}, "lengths must be distinct, got 4096 more than once"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"source": "disk"}, "source must be embedded or hub, got 'disk'"),
        ({"source": "hub", "samples": 501}, "samples must be at most 500 with source: hub"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, or null, got 0"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(ValueError) as caught:
        RulerOptions(**options)
    assert text in str(caught.value)


def test_measurement_is_found_without_torch_or_lm_eval():
    code = (
        "import sys; from repro import measurements; m = measurements.get('ruler');"
        "m.expand(m.options());"
        "assert not {'torch', 'lm_eval', 'transformers', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_estimate_grows_with_work(subject):
    small, large = cell(), cell(lengths=[16384], samples=100)
    assert 0 < estimate_seconds(small, subject.info) < estimate_seconds(large, subject.info)


# -- records --------------------------------------------------------------------------------------


def test_record(subject):
    body = ruler.run(cell_context(subject, cell(), seed=4))
    items = generate_items(
        "niah_single_1", length=1024, count=5, seed=4, tokenizer=subject.tokenizer
    )
    assert body["items"]["keys"] == [item.key for item in items]
    assert body["items"]["depth"] == [item.depth for item in items]
    assert body["items"]["length"] == [1024] * 5
    assert all(0 <= count <= 3 for count in body["items"]["new_tokens"])
    interval = mean_interval(body["items"]["scores"]).scaled(100)
    assert body["metrics"]["score"] == {
        "value": interval.value,
        "low": interval.low,
        "high": interval.high,
        "n": 5,
        "unit": "%",
    }
    assert "patch" not in body
    json.dumps(body, allow_nan=False)


def test_scores_are_read_from_the_stored_texts(subject):
    context = cell_context(subject, cell())
    ruler.run(context)
    items = generate_items(
        "niah_single_1", length=1024, count=5, seed=0, tokenizer=subject.tokenizer
    )
    for item in items[:3]:
        context.items.values[item.key]["text"] = f" \x00it is {item.answers[0].upper()}. "
    body = ruler.run(context)
    assert body["items"]["scores"] == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert body["metrics"]["score"]["value"] == pytest.approx(60.0)


def test_a_right_model_scores_full_marks_on_every_task(subject, monkeypatch):
    """Whole way through lm-eval: documents, requests, post-processing, official metric."""
    from repro.measurements.ruler import engine
    from repro.measurements.ruler.decoding import Generation

    answers = {}

    def oracle(subject, prompts, **options):
        asked = [subject.tokenizer.decode(prompt.tolist()) for prompt in prompts]
        return [Generation(" ".join(answers[prompt]), 1) for prompt in asked]

    monkeypatch.setattr(engine, "decode_batch", oracle)
    for task in TASKS:
        items = generate_items(task, length=2048, count=2, seed=0, tokenizer=subject.tokenizer)
        for item in items:
            answers[item.prompt] = item.answers if task != "qa_1" else item.answers[:1]
        body = ruler.run(cell_context(subject, cell(task, lengths=[2048], samples=2)))
        assert body["items"]["scores"] == [1.0, 1.0], task


def test_every_task_runs_without_any_connection(subject, monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for task in TASKS:
        options = cell(task, lengths=[2048], samples=2, max_new_tokens=2)
        assert len(ruler.run(cell_context(subject, options))["items"]["keys"]) == 2


def test_rerun_on_a_fresh_store_has_the_same_items_computed_afresh(subject):
    first, again = (cell_context(subject, cell()) for _ in range(2))
    assert ruler.run(first)["items"] == ruler.run(again)["items"]
    assert first.items.batches == again.items.batches == 3


def test_seeds_give_other_items(subject):
    keys = [
        set(ruler.run(cell_context(subject, cell(), seed=seed))["items"]["keys"]) for seed in (0, 1)
    ]
    assert not keys[0] & keys[1]


def test_items_come_from_the_cache_of_the_run_the_second_time(subject, monkeypatch, tmp_path):
    body = ruler.run(cell_context(subject, cell(), cache=tmp_path / "elsewhere"))
    assert list((tmp_path / "elsewhere" / "ruler").iterdir())
    assert not (tmp_path / "runs").exists()
    monkeypatch.setattr("repro.measurements.ruler.generate._make", None)
    context = cell_context(subject, cell(), cache=tmp_path / "elsewhere")
    assert ruler.run(context)["items"] == body["items"]


def test_lm_eval_gives_the_prompt_unchanged(subject, monkeypatch):
    seen = []

    def spy(self, requests, disable_tqdm=False):
        seen.extend(request.args[0] for request in requests)
        self.generations = {r.doc["key"]: {"text": "", "new_tokens": 0} for r in requests}
        return ["" for _ in requests]

    monkeypatch.setattr("repro.measurements.ruler.engine.StoredLM.generate_until", spy)
    ruler.run(cell_context(subject, cell()))
    items = generate_items(
        "niah_single_1", length=1024, count=5, seed=0, tokenizer=subject.tokenizer
    )
    assert seen == [item.prompt for item in items]


def test_chat_template_wraps_the_prompt_within_the_length(subject, monkeypatch):
    chatty = replace(subject, tokenizer=byte_tokenizer())
    chatty.tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    seen = []

    def watched(tokenizer, text):
        seen.append(text)
        return decoding.encode(tokenizer, text)

    monkeypatch.setattr("repro.measurements.ruler.engine.encode", watched)
    ruler.run(cell_context(chatty, cell(chat_template=True)))
    around = len("[user][assistant]")
    assert ruler.template_tokens(chatty.tokenizer) == around
    items = generate_items(
        "niah_single_1", length=1024 - around, count=5, seed=0, tokenizer=chatty.tokenizer
    )
    assert seen == [f"[user]{item.prompt}[assistant]" for item in items]


def test_a_chat_template_that_is_not_there_is_unsupported(subject):
    with pytest.raises(UnsupportedCombination, match="use chat_template: false"):
        ruler.run(cell_context(subject, cell(chat_template=True)))


def test_task_index_is_built_once_and_holds_our_task_alone():
    manager = harness.task_manager(harness.OWN_TASKS)
    assert manager is harness.task_manager(harness.OWN_TASKS)
    assert manager.all_tasks == ["repro_ruler"]
    with pytest.raises(RuntimeError, match="run it through repro"):
        harness.no_documents()


def test_nothing_is_printed(subject, capfd):
    ruler.run(cell_context(subject, cell()))
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "")


def test_a_length_too_short_for_the_task_is_unsupported(subject):
    with pytest.raises(UnsupportedCombination, match="length must leave qa_2 at least"):
        ruler.run(cell_context(subject, cell("qa_2", lengths=[64])))


def test_a_subject_without_tokenizer_is_unsupported():
    with pytest.raises(UnsupportedCombination, match="no tokenizer"):
        ruler.run(cell_context(tiny_subject(), cell()))


def test_registered():
    measurement = measurements.get("ruler")
    assert measurement.needs_training and not measurement.paired
    assert measurement.libraries == ("lm-eval", "transformers")
