"""What the suite costs: RULER through ``repro run`` against lm-eval with its own HF model class.

Both sides load the model, run the same items at the same batch size, greedy, and score them; ours
also plans, stores every batch and writes records. They alternate (ABBA) in one process. The items
are made beforehand, for both.
"""

from __future__ import annotations

import contextlib
import gc
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from repro.errors import MissingResource

HELP = "RULER through `repro run` against lm-eval's simple_evaluate on the same items (bar: 1.15x)"
BAR = 1.15
SUBJECT = "zoo:retriever"
BATCH_SIZE = 4
_QUICK = {"tasks": ["niah_single_2", "vt"], "lengths": [1024], "samples": 8}
_FULL = {
    "tasks": ["niah_single_1", "niah_multikey_2", "niah_multivalue", "vt", "cwe", "qa_1"],
    "lengths": [1024, 2048],
    "samples": 16,
}


def run(*, quick: bool, console: Any = None) -> dict[str, Any]:
    """Measure both sides alternately and return the ratio of their times.

    Args:
        quick: Two short tasks and three pairs instead of the full set and five.
        console: Rich console to print to, or None.

    Returns:
        ``ratio`` (``repro run`` over lm-eval; geometric mean over pairs with its interval),
        ``seconds`` of every run of each side, both again in processor time (which a machine shared
        with other work disturbs less, best with ``REPRO_THREADS=1``), ``same_answers`` (share of items whose text is
        equal), what was run, and ``bar``.
    """
    from repro.statistics import as_json, geometric_mean

    work = _QUICK if quick else _FULL
    with tempfile.TemporaryDirectory() as temporary, _quiet():
        subject, note = _subject(Path(temporary))
        sides = {
            "repro": lambda: _through_repro(subject, work, Path(temporary)),
            "lm_eval": lambda: _through_lm_eval(subject, work),
        }
        # Warm-up: imports, and the items of both sides in the cache.
        _through_lm_eval(subject, work, warm_up=True)
        _through_repro(subject, {**work, "samples": BATCH_SIZE}, Path(temporary))
        seconds, processor, answers = _alternate(sides, pairs=3 if quick else 5)
    mean, busy = (
        geometric_mean([ours / theirs for ours, theirs in zip(*times.values(), strict=True)])
        for times in (seconds, processor)
    )
    ours, theirs = answers.values()
    result: dict[str, Any] = {
        "subject": subject,
        "note": note,
        "work": {**work, "batch_size": BATCH_SIZE},
        "items": len(ours),
        "seconds": {side: [round(value, 2) for value in runs] for side, runs in seconds.items()},
        "processor_seconds": {
            side: [round(value, 2) for value in runs] for side, runs in processor.items()
        },
        "ratio": asdict(mean),
        "processor_ratio": asdict(busy),
        "same_answers": sum(ours[key] == theirs[key] for key in ours) / len(ours),
        "bar": BAR,
        "within_bar": mean.value <= BAR,
    }
    if console is not None:
        _print(console, result)
    return as_json(result)


def _alternate(
    sides: Mapping[str, Callable[[], dict[str, str]]], *, pairs: int
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, dict[str, str]]]:
    """Return wall and processor seconds by side, pair by pair (ABBA), and the last answers."""
    answers: dict[str, dict[str, str]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    processor: dict[str, list[float]] = {name: [] for name in sides}
    for pair in range(pairs):
        for name in sides if pair % 2 == 0 else reversed(list(sides)):
            gc.collect()
            started = time.perf_counter(), time.process_time()
            answers[name] = sides[name]()
            seconds[name].append(time.perf_counter() - started[0])
            processor[name].append(time.process_time() - started[1])
    return seconds, processor, answers


def _through_repro(subject: str, work: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Run a manifest of dense cells through plan, worker and store; return texts by item key."""
    from repro import runner
    from repro.store import RunStore

    runs = folder / "runs"
    manifest = folder / "manifest.yaml"
    options = ", ".join(f"{name}: {value}" for name, value in work.items())
    manifest.write_text(
        f"profiles:\n  bench:\n    subjects: ['{subject}']\n"
        f"    methods: [dense]\n    measurements: [ruler: {{{options}, batch_size: {BATCH_SIZE}}}]\n"
    )
    outcome = runner.run(
        manifest,
        profile="bench",
        runs=runs,
        executor="inline",
        device="cpu",
        fresh=True,
        quiet=True,
    )
    store = RunStore(runs)
    texts: dict[str, str] = {}
    for record in outcome.records:
        if record["status"] != "ok":
            raise MissingResource(f"ruler_cost: {record['status']}: {record['message']}")
        machine = next((runs / "cells" / record["key"][:2] / record["key"]).iterdir()).name
        with store.cell(record["key"], machine).items() as items:
            for key in record["items"]["keys"]:
                texts[key] = (items.get(key) or {})["text"]
    return texts


def _through_lm_eval(
    subject: str, work: Mapping[str, Any], *, warm_up: bool = False
) -> dict[str, str]:
    """Run the same items through ``simple_evaluate`` and ``HFLM``; return texts by item key."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from repro import environment, subjects
    from repro.measurements.ruler import harness

    environment.set_threads()
    loaded = subjects.load(subject, device="cpu")
    model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=BATCH_SIZE)
    results = simple_evaluate(
        model=model,
        tasks=list(_lm_eval_tasks(loaded, work)),
        task_manager=harness.task_manager(harness.OWN_TASKS),
        batch_size=BATCH_SIZE,
        limit=1 if warm_up else None,
    )
    return {
        sample["doc"]["key"]: sample["filtered_resps"][0]
        for samples in results["samples"].values()
        for sample in samples
    }


def _lm_eval_tasks(subject: Any, work: Mapping[str, Any]) -> Iterator[Any]:
    from repro.measurements import ruler
    from repro.measurements.ruler.options import RulerOptions, expand
    from repro.testing import cell_context

    for cell in expand(RulerOptions(**work, batch_size=BATCH_SIZE)):
        loaded, _ = ruler.load(cell_context(subject, cell))
        (task,) = loaded["tasks"].values()
        task.config.task = f"{cell['task']}_{cell['length']}"
        yield task


def _subject(folder: Path) -> tuple[str, str]:
    """Return the retriever, or a tiny random model in a folder where it is not trained yet."""
    from repro import subjects
    from repro.testing import byte_tokenizer, tiny_subject

    try:
        subjects.describe(SUBJECT)
        return SUBJECT, ""
    except MissingResource:
        stand_in = tiny_subject(vocabulary=300, dtype="bfloat16")
        stand_in.model.save_pretrained(folder / "stand_in")
        byte_tokenizer().save_pretrained(folder / "stand_in")
        return f"hf:{folder / 'stand_in'}", f"{SUBJECT} is not trained: a tiny random model"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's bars and notes out of the table."""
    import logging

    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _print(console: Any, result: Mapping[str, Any]) -> None:
    from rich.table import Table

    title = f"RULER, {result['items']} items, batch {BATCH_SIZE}, {result['subject']}"
    table = Table(title=title, caption=result["note"] or None)
    for column in ("side", "seconds (each run)", "median", "processor seconds", "median"):
        table.add_column(column, justify="left" if column == "side" else "right")
    names = {"repro": "repro run", "lm_eval": "lm-eval simple_evaluate + HFLM"}
    for side, name in names.items():
        row = []
        for runs in (result["seconds"][side], result["processor_seconds"][side]):
            row += [" ".join(f"{value:.1f}" for value in runs), f"{statistics.median(runs):.1f}"]
        table.add_row(name, *row)
    console.print(table)
    for name, label in (("ratio", "ratio"), ("processor_ratio", "ratio of processor time")):
        ratio = result[name]
        console.print(
            f"{label} {ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}], bar {BAR}"
        )
    console.print(f"{result['same_answers']:.1%} of the answers are the same text")
