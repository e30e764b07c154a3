"""lm-eval's own ``ruler`` group: its prompts and data, through our engine and record format.

Its generators read essays and question sets from the network and split sentences with nltk. What
they give is kept as JSON lines in the cache, so that dense and method cells, reruns and machines
that share the cache see the same items. lm-eval makes 500 items per task and length, always.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from repro.errors import MissingResource, UnsupportedCombination
from repro.keys import digest
from repro.measurements.ruler.harness import HUB_TASKS, dataset_of, greedy, load_task
from repro.measurements.ruler.scoring import item_score
from repro.measurements.ruler.tasks import TASKS

#: What the generators of a task fetch, by the beginning of its name.
_SOURCES = {
    "niah": "the data set baber/paul_graham_essays (Hugging Face hub) and nltk's punkt_tab",
    "qa_1": "https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v2.0.json",
    "qa_2": "hotpot_dev_distractor_v1.json of namlh2004/hotpotqa (Hugging Face hub)",
}
#: lm-eval's names where they are not ours with the prefix ``ruler_``.
_NAMES = {"qa_1": "ruler_qa_squad", "qa_2": "ruler_qa_hotpot"}
_EXAMPLE_TOKENS = 250
_PACKAGES = ("nltk", "wonderwords")
# Distributions whose exceptions mean that something could not be fetched.
_FETCHERS = frozenset({"requests", "urllib3", "httpx", "httpcore", "huggingface_hub", "datasets"})


def task_name(task: str) -> str:
    """Return lm-eval's name of a task."""
    return _NAMES.get(task, task if task.startswith("niah") else f"ruler_{task}")


def load(
    task: str,
    *,
    length: int,
    count: int,
    seed: int,
    max_new_tokens: int,
    tokenizer: Any,
    cache_dir: Path,
) -> tuple[Any, list[dict[str, Any]]]:
    """Load one of lm-eval's RULER tasks over the first ``count`` of its cached documents.

    Args:
        task: Our name of the task.
        length: Tokens of prompt and answer together.
        count: Number of documents, at most lm-eval's 500.
        seed: Seeds the generators, which draw from Python's and numpy's global state.
        max_new_tokens: Limit of new tokens.
        tokenizer: The subject's tokenizer, which measures the length.
        cache_dir: Where documents (and the tokenizer, for lm-eval to load) are kept.

    Returns:
        lm-eval's loaded task and its documents.

    Raises:
        MissingResource: If a package or a source is out of reach; says which.
        UnsupportedCombination: If the tokenizer is too fine for lm-eval's worked example.
    """
    _require_packages()
    if task == "vt":
        _require_room_for_example(tokenizer)
    documents = _documents(task, length, seed, tokenizer, Path(cache_dir))[:count]
    overrides = {
        "custom_dataset": dataset_of(documents),
        "generation_kwargs": greedy(max_new_tokens),
        "process_results": process_results,
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True}
            for name in ("score", "score_lm_eval")
        ],
    }
    return load_task(HUB_TASKS, task_name(task), overrides), documents


def process_results(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score with RULER's official metric, and with lm-eval's, which differs for QA."""
    from lm_eval.tasks.ruler import common_utils

    own = (
        common_utils.process_results_part
        if document["metric"] == "string_match_part"
        else common_utils.process_results
    )
    return {
        "score": item_score(document["metric"], results[0], document["outputs"]),
        "score_lm_eval": own(dict(document), list(results))[str(document["max_length"])],
    }


def _require_packages() -> None:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingResource(
            f"ruler: source: hub needs the packages {' and '.join(missing)}; "
            "install them with: pip install 'repro[ruler-hub]'"
        )


def _require_room_for_example(tokenizer: Any) -> None:
    # lm-eval makes the worked example of variable tracking in 500 tokens and tries for ever, behind
    # a bare ``except``, when its smallest form of five such lines and the prompt is longer.
    line = (
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    )
    tokens = len(tokenizer(" ".join([line] * 5))["input_ids"])
    if tokens > _EXAMPLE_TOKENS:
        raise UnsupportedCombination(
            "ruler: source: hub: vt's worked example must take at most "
            f"{_EXAMPLE_TOKENS} tokens with the subject's tokenizer, got {tokens}"
        )


def _documents(
    task: str, length: int, seed: int, tokenizer: Any, cache_dir: Path
) -> list[dict[str, Any]]:
    folder = _saved_tokenizer(tokenizer, cache_dir)
    name = digest([task, length, seed, folder.name])[:24]
    path = cache_dir / f"hub-{task}-{length}-{name}.jsonl"
    if path.is_file():
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    documents = [
        _document(task, row) for row in _generate(task, length=length, seed=seed, folder=folder)
    ]
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in documents), encoding="utf-8")
    partial.replace(path)
    return documents


def _document(task: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """Add what the engine and the record need to one row of lm-eval's generator."""
    depth = None
    if task.startswith("niah_single") and row["outputs"]:
        found = row["input"].find(row["outputs"][0])
        depth = 100 * found / len(row["input"]) if found >= 0 else None
    key = digest([task, row["max_length"], row["index"], row["input"], row["outputs"]])
    return {**row, "key": key, "metric": TASKS[task].metric, "depth": depth}


def _generate(task: str, *, length: int, seed: int, folder: Path) -> list[dict[str, Any]]:
    """Let lm-eval make its documents, seeded, with its bars and notes out of sight."""
    metadata = {"tokenizer": str(folder), "max_seq_lengths": [length]}
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # The common-words module draws from a generator of its own, made at import: import it afresh,
    # or the items would depend on what was made before.
    sys.modules.pop("lm_eval.tasks.ruler.cwe_utils", None)
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown), contextlib.redirect_stdout(shown):
            loaded = load_task(HUB_TASKS, task_name(task), {"metadata": metadata})
    except Exception as error:
        if not _is_fetch_fault(error):
            raise
        needs = next((text for start, text in _SOURCES.items() if task.startswith(start)), "")
        raise MissingResource(
            f"ruler: source: hub could not fetch what {task} is made of"
            f"{f' ({needs})' if needs else ''}; run once with network access, then the cache "
            f"{folder.parent} is enough: {type(error).__name__}: {error}"
        ) from error
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
    (made,) = loaded["tasks"].values()
    return [dict(row) for row in made.dataset["test"]]


def _is_fetch_fault(error: Exception) -> bool:
    # nltk reports a missing resource as a bare LookupError.
    return (
        isinstance(error, OSError)
        or type(error) is LookupError
        or type(error).__module__.partition(".")[0] in _FETCHERS
    )


def _saved_tokenizer(tokenizer: Any, cache_dir: Path) -> Path:
    """Save the tokenizer where lm-eval can load it by path; the folder's name is its hash."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab())
    folder = cache_dir / f"tokenizer-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
    if not folder.is_dir():
        partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
        tokenizer.save_pretrained(partial)
        with contextlib.suppress(OSError):  # another worker was first
            partial.rename(folder)
    return folder
