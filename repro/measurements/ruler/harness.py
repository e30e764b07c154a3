"""lm-eval as the engine: our task given to it by folder, its own tasks by theirs, both quietly.

Only the folder that is needed is indexed: all of lm-eval's tasks take seconds.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import lm_eval.api.task
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from repro.measurements.ruler.scoring import item_score

OWN_TASKS = Path(__file__).parent / "lm_eval_tasks"
HUB_TASKS = Path(lm_eval.__file__).parent / "tasks" / "ruler"
#: Columns of a document that the engine itself reads; a task may have more.
COLUMNS = ("key", "metric", "input", "outputs")


def no_documents(**_: Any) -> dict[str, datasets.Dataset]:
    """Refuse to run the bare task: its documents come from the cell."""
    raise RuntimeError("repro_ruler: documents are given by the measurement, run it through repro")


def process_results(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score one generation with the official metric that the document names."""
    return {"score": item_score(document["metric"], results[0], document["outputs"])}


@functools.cache
def task_manager(folder: Path) -> TaskManager:
    """Return the index of one folder of tasks, made once in a process."""
    return TaskManager(include_path=folder, include_defaults=False)


def load_task(folder: Path, name: str, overrides: Mapping[str, Any]) -> Any:
    """Return lm-eval's loaded task (``TaskDict``) with parts of its configuration replaced."""
    # A group of one task is the only form in which lm-eval merges overrides into a known task.
    cell = {"group": "repro_cell", "task": [{"task": name, **overrides}]}
    with quiet():
        return task_manager(folder).load([cell])


def greedy(max_new_tokens: int) -> dict[str, Any]:
    """Return the ``generation_kwargs`` of RULER: greedy, ended by the end token or the limit."""
    return {"do_sample": False, "until": [], "max_gen_toks": max_new_tokens}


def dataset_of(documents: Sequence[Mapping[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Return a ``custom_dataset`` function that gives these documents."""
    table = datasets.Dataset.from_list([dict(document) for document in documents])
    return lambda **_: {"test": table}


def run_task(lm: LM, loaded: Any, *, chat_template: bool = False) -> list[dict[str, Any]]:
    """Run one loaded task and return lm-eval's samples in the order of the documents."""
    with quiet():
        results = evaluate(
            lm,
            loaded,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=chat_template,
        )
    (samples,) = results["samples"].values()
    return sorted(samples, key=lambda sample: sample["doc_id"])


@contextmanager
def quiet() -> Iterator[None]:
    """Silence lm-eval's progress bar and its notes on custom data; errors still show."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    bar = lm_eval.api.task.tqdm
    logger.setLevel(logging.ERROR)
    lm_eval.api.task.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = bar
        logger.setLevel(level)
