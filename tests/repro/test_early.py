"""Cells that a run with a budget ends early: which, and what a page says of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from repro import measurements, report, runner, status
from repro.evidence import has_scores
from repro.measurements import ruler
from repro.store import RunStore, is_cut
from repro.testing import comparable_records

MEASUREMENT = '''
"""Items whose score is written in the options: a digit an item, for dense, method and control."""
import os
from dataclasses import dataclass

from repro.measurements import Measurement


@dataclass(frozen=True, kw_only=True)
class Options:
    tasks: tuple[str, ...] = ("easy",)
    items: int = 20
    batch: int = 4
    dense: str = "1"
    own: str = "1"
    control: str = "0"
    marker: str = ""


def expand(options):
    names = ("items", "batch", "dense", "own", "control", "marker")
    return [{"task": t} | {name: getattr(options, name) for name in names} for t in options.tasks]


def keys_of(options):
    return [f"{options['task']}-{index}" for index in range(options["items"])]


def role_of(context):
    if context.method is None:
        return "dense"
    return "own" if context.config.control == "none" else "control"


def run(context):
    options, keys, role = context.options, keys_of(context.options), role_of(context)
    digits = options[role]
    for start in range(0, len(keys), options["batch"]):
        part = keys[start : start + options["batch"]]
        if any(context.items.get(key) is None for key in part):
            if role == "control" and options["marker"] and start >= 8:
                if not os.path.exists(options["marker"]):
                    open(options["marker"], "w").close()
                    os.kill(os.getpid(), 9)
            with open(os.environ["TOY_LOADS"] + ".asked", "a") as stream:
                print(role, len(part), file=stream)
            context.items.put([(key, {"digit": digits[keys.index(key) % len(digits)]})
                               for key in part])
        context.progress(start + len(part), len(keys))
    scores = [float(context.items.get(key)["digit"]) for key in keys]
    value = 100 * sum(scores) / len(scores)
    return {"metrics": {"score": {"value": value, "unit": "%"}},
            "items": {"keys": keys, "scores": scores}}


MEASUREMENT = Measurement(
    name="asked", options=Options, expand=expand, run=run, item_count="items",
    estimate_seconds=lambda options, info: 1.0,
)
'''
EARLY = """
from repro.measurements import Scoring
from repro.measurements.asked import keys_of


def scoring(context):
    return Scoring(keys_of(context.options), lambda key, value: float(value["digit"]))
"""
METHOD = '''
"""A method with controls that does nothing."""
from contextlib import contextmanager
from dataclasses import dataclass

from repro.method import Method, Patch


@dataclass(frozen=True, kw_only=True)
class Config:
    control: str = "none"
    draw: int = 0


@contextmanager
def apply(subject, config, artifact=None):
    yield Patch()


METHOD = Method(slug="guess", title="Guess", arxiv="", kind="attention", config=Config, apply=apply)
'''
CLAIM = """paper: guess
title: Guess
claims:
  - id: beats_random
    what: against the control
    proxy: true
    unit: points
    model: m
    source: s
    direction: at_least
    strict: true
    min_items: 8
    values: [{value: 0}]
    query: {measurement: asked, compare: minus_control}
"""
MANIFEST = """paper: guess
profiles:
  p:
    subjects: [toy:a]
    methods: [guess, {guess: {control: random}}]
    measurements: [{asked: %s}]
"""


@pytest.fixture
def guess(plugins, monkeypatch):
    """The folder of the method ``guess``, beside the toys."""
    files = {
        "measurements/asked/__init__.py": MEASUREMENT,
        "measurements/asked/early.py": EARLY,
        "methods/guess/__init__.py": METHOD,
        "methods/guess/paper.yaml": CLAIM,
    }
    for name, text in files.items():
        (plugins.root / name).parent.mkdir(parents=True, exist_ok=True)
        (plugins.root / name).write_text(text)
    yield plugins.root / "methods/guess"
    for name in [name for name in sys.modules if name.split(".")[2:3] in (["asked"], ["guess"])]:
        del sys.modules[name]


@pytest.fixture
def run(guess, tmp_path):
    def call(runs="runs", budget="10h", executor="inline", **options):
        text = "{" + ", ".join(f"{name}: {value}" for name, value in options.items()) + "}"
        (tmp_path / "guess.yaml").write_text(MANIFEST % text)
        outcome = runner.run(
            tmp_path / "guess.yaml",
            profile="p",
            runs=tmp_path / runs,
            executor=executor,
            device="cpu",
            quiet=True,
            budget=budget,
        )
        return list(outcome.records)

    return call


@pytest.fixture
def asked(plugins):
    """Return how many items the cells of a role have really been asked so far."""

    def count(role):
        path = Path(f"{plugins.root / 'loads'}.asked")
        lines = path.read_text().split("\n") if path.exists() else []
        return sum(int(line.split()[1]) for line in lines if line.startswith(f"{role} "))

    return count


def test_a_control_that_cannot_matter_any_more_is_cut(run, asked):
    dense, method, control = run()
    assert has_scores(dense) and has_scores(method)
    assert (control["status"], control["metrics"]) == ("ok", {})
    part = control["settled"]
    # Some misses: with nothing but hits from then on, the method would still be ahead.
    assert 0 < part["asked"] == asked("control") < part["of"] == 20
    assert part["verdicts"] == {"beats_random": "reproduced"}
    assert control["message"] == f"settled early: {part['asked']} of 20 items asked"
    assert part["scores"].count(None) == 20 - part["asked"]


def test_a_control_that_may_matter_is_asked_to_its_end(run):
    assert not any(map(is_cut, run(control='"1"')))


def test_without_a_budget_nothing_is_cut(run):
    assert not any(map(is_cut, run(budget=None)))


def test_a_cell_of_no_claim_is_never_cut(run, guess):
    (guess / "paper.yaml").write_text(CLAIM.replace("control}", "control, options: {task: x}}"))
    assert not any(map(is_cut, run()))


def test_a_verdict_that_no_item_can_give_cuts_nothing(run, guess):
    # Too few items whatever they say: the numbers are wanted all the same.
    (guess / "paper.yaml").write_text(CLAIM.replace("min_items: 8", "min_items: 80"))
    assert not any(map(is_cut, run()))


def test_a_claim_of_another_number_keeps_the_cells_of_its_method(run, guess):
    far = CLAIM.replace("value: 0", "value: 50")
    (guess / "paper.yaml").write_text(far)
    options = {"own": '"0"', "control": '"1"'}
    assert [is_cut(record) for record in run("one", **options)] == [False, True, True]
    density = far.replace("compare: minus_control", "metric: density").split("claims:\n")[1]
    (guess / "paper.yaml").write_text(far + density.replace("beats_random", "sparse"))
    assert [is_cut(record) for record in run("two", **options)] == [False, False, True]


def test_a_run_without_a_budget_finishes_it(run, asked):
    cut = run()[2]["settled"]["asked"]
    finished = run(budget=None)
    assert asked("control") == 20 and cut < 20
    assert comparable_records(finished) == comparable_records(run("other", budget=None))
    # It is whole from now on, under a budget too.
    assert comparable_records(run()) == comparable_records(finished)


def test_a_second_run_with_the_budget_asks_nothing(run, asked):
    first = run()
    count = asked("control")
    assert comparable_records(run()) == comparable_records(first)
    assert asked("control") == count


@pytest.mark.skipif(os.name != "posix", reason="a process is killed by signal")
@pytest.mark.parametrize("again", ["inline", "ray"])
def test_killed_and_resumed_equals_undisturbed(run, plugins, tmp_path, monkeypatch, again):
    if again == "ray":
        pytest.importorskip("ray")
        monkeypatch.setenv("PYTHONPATH", plugins.environment["PYTHONPATH"])
    options = {"marker": str(tmp_path / "marker"), "control": '"0111"'}
    (tmp_path / "marker").touch()
    undisturbed = run("other", **options)
    assert undisturbed[2]["settled"]["asked"] > 8
    (tmp_path / "marker").unlink()
    command = [sys.executable, "-m", "repro", "run", str(tmp_path / "guess.yaml"), "--profile", "p"]
    command += ["--runs", str(tmp_path / "runs"), "--device", "cpu", "--budget", "10h", "--quiet"]
    command += ["--executor", "inline", "--no-report"]
    killed = subprocess.run(command, env=plugins.environment, capture_output=True, check=False)
    assert killed.returncode == -9
    assert comparable_records(run(executor=again, **options)) == comparable_records(undisturbed)


def test_what_ended_early_shows(run, tmp_path):
    part = run(tasks="[easy, hard]")
    cut = [record for record in part if is_cut(record)]
    assert cut
    (row,) = report.verify(["guess"], runs=tmp_path / "runs", results=tmp_path / "results")
    assert row["verdict"] == "reproduced" and not row["broken"]
    assert row["reason"].startswith("settled early: no outcome of the others changes it")
    assert row["measured"].endswith("points (settled early)")
    written = report.write(["guess"], runs=tmp_path / "runs", results=tmp_path / "results")
    page = next(path for path in written if path.name == "p.md").read_text()
    asked = cut[-1]["settled"]["asked"]
    assert "### Cells that ended early" in page
    assert f"| {asked} of 20 | 0.0 to {100 - 5 * asked:.1f} | beats_random: reproduced |" in page
    assert "settled early" in page and "Cells without a result" not in page
    # The committed records alone say the same.
    kept = report.verify(["guess"], runs=tmp_path / "none", results=tmp_path / "results")
    assert [kept[0][name] for name in ("verdict", "measured")] == [row["verdict"], row["measured"]]


def test_status_shows_it_as_done(run, tmp_path):
    run()
    found = status.examine(RunStore(tmp_path / "runs"), "guess", "p")
    assert (found["state"], found["counts"], found["failed"]) == ("finished", {"ok": 3}, {})


def test_ruler_scores_single_items_as_its_records_do(tmp_path, monkeypatch):
    from repro.testing import byte_tokenizer, cell_context, tiny_subject

    monkeypatch.chdir(tmp_path)
    subject = tiny_subject(vocabulary=300)
    subject.tokenizer = byte_tokenizer()
    made = ruler.MEASUREMENT.options(
        tasks=["niah_multivalue"], lengths=[1024], samples=3, batch_size=2, max_new_tokens=3
    )
    context = cell_context(subject, options=ruler.MEASUREMENT.expand(made)[0])
    body = ruler.run(context)
    scoring = measurements.early_scoring("ruler")(context)
    stored = [context.items.get(key) for key in scoring.keys]
    assert list(scoring.keys) == body["items"]["keys"]
    assert list(map(scoring.score, scoring.keys, stored)) == body["items"]["scores"]
    # An answer that is right in part, since a random model has none.
    document = ruler.load(context)[1][0]
    said = {"text": " ".join(document["outputs"][:2])}
    assert scoring.score(document["key"], said) == 2 / len(document["outputs"])
