"""The text that perplexity is measured on: synthetic prose, sets from the hub, local files.

``prose`` is made from the seed. ``wikitext-2`` and ``c4`` are one stream each, cut into consecutive
documents. A local text set is one file, or a folder whose files are read in the order of their
names; every document is taken from its beginning, and one that has too few tokens is left out:

- ``.jsonl``: one JSON object a line with the document under ``text``; other fields and empty lines
  are passed over;
- ``.txt``: documents parted by two or more empty lines (one parts paragraphs).

Both are UTF-8. Relative paths start at the working directory.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from repro.errors import (
    BadInput,
    Fault,
    MissingResource,
    UnsupportedCombination,
    near_matches,
)

PROSE = "prose"
SUFFIXES = (".jsonl", ".txt")
_WHERE = "perplexity"


@dataclass(frozen=True, kw_only=True)
class HubSet:
    """A text set of the Hugging Face hub, as the literature reads it.

    Attributes:
        dataset: Name on the hub.
        split: Split of it.
        revision: Commit, so that the text never changes.
        separator: What stands between two rows once they are joined.
        rows: How many rows, the first ones; None for all.
        arguments: What else ``load_dataset`` needs to find it.
    """

    dataset: str
    split: str
    revision: str
    separator: str
    rows: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


HUB_SETS = {
    # The raw test split whole.
    "wikitext-2": HubSet(
        dataset="Salesforce/wikitext",
        split="test",
        revision="b08601e04326c79dfdd32d625aee71d232d685c3",
        separator="\n\n",
        arguments={"name": "wikitext-2-raw-v1"},
    ),
    # The first 1100 documents of the first of eight validation shards, as papers on quantisation
    # of weights and caches take them.
    "c4": HubSet(
        dataset="allenai/c4",
        split="validation",
        revision="1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
        separator=" ",
        rows=1100,
        arguments={"data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"}},
    ),
}


def revision(text: str) -> str | None:
    """Return what identifies the content of a text: of a local one a hash, of prose None.

    Raises:
        BadInput: If a local text set is not there or not in its format: the first fault of
            each file.
    """
    if text == PROSE:
        return None
    if text in HUB_SETS:
        return HUB_SETS[text].revision[:16]
    return _read_local(text)[0]


def documents(
    options: Mapping[str, Any], *, tokenizer: Any, seed: int, cache: Path
) -> tuple[list[list[int]], dict[str, Any]]:
    """Return the token ids of the documents of a cell, and what to note of the text.

    A document of mode decode has ``length`` tokens, one of mode sliding twice as many; a local one
    may have fewer, down to one window.

    Args:
        options: The options of the cell.
        tokenizer: The subject's tokenizer; no special token is added.
        seed: Fixes the prose.
        cache: Where text from the hub is kept.

    Raises:
        MissingResource: If a hub set is out of reach, or a local one changed since the plan.
        UnsupportedCombination: If there are too few documents of enough tokens.
    """
    text, wanted, length = options["text"], options["documents"], options["length"]
    most = length if options["mode"] == "decode" else 2 * length
    if text == PROSE:
        return [prose_document(tokenizer, seed, place, most) for place in range(wanted)], {}
    if text in HUB_SETS:
        ids = _token_ids(tokenizer, _hub_text(text, cache))
        pieces = [ids[at : at + most] for at in range(0, len(ids) - most + 1, most)]
        _require_enough(text, wanted, f"{most} tokens", len(pieces), len(pieces))
        return pieces[:wanted], {}
    found, contents = _read_local(text)
    if found != options["text_revision"]:
        raise MissingResource(
            f"perplexity: {text} must hold the text of the plan ({options['text_revision']}), got "
            f"{found}; it changed after the plan was made, run again"
        )
    kept: list[list[int]] = []
    left_out = 0
    for content in contents:
        if len(kept) == wanted:
            break
        ids = _token_ids(tokenizer, content)[:most]
        if len(ids) >= length:
            kept.append(ids)
        else:
            left_out += 1
    _require_enough(text, wanted, f"{length} tokens or more", len(kept), len(contents))
    return kept, {"documents_left_out": left_out}


def _require_enough(text: str, wanted: int, size: str, got: int, total: int) -> None:
    if got < wanted:
        raise UnsupportedCombination(
            f"perplexity: text must hold {wanted} documents of {size} for this subject's "
            f"tokenizer, got {got} in {total} of {text}; ask for fewer documents or a shorter length"
        )


def prose_document(tokenizer: Any, seed: int, place: int, tokens: int) -> list[int]:
    """Return exactly ``tokens`` ids of synthetic prose."""
    from repro.measurements.ruler.lexicon import prose

    sentences = prose(random.Random(f"perplexity/{seed}/{place}"))
    text = ""
    ids: list[int] = []
    while len(ids) < tokens:
        text += " ".join(itertools.islice(sentences, max(8, tokens // 8))) + " "
        ids = _token_ids(tokenizer, text)
    return ids[:tokens]


def _token_ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _read_local(text: str) -> tuple[str, list[str]]:
    """Return a hash of the files of a local text set, and its documents."""
    digests: list[str] = []
    contents: list[str] = []
    faults: list[Fault] = []
    for path in _files(text):
        try:
            raw = path.read_bytes()
        except OSError as error:
            got = error.strerror or str(error)
            faults.append(Fault(str(path), "the file", "readable", got))
            continue
        digests.append(f"{path.name}:{hashlib.sha256(raw).hexdigest()}")
        read = _json_lines if path.suffix == ".jsonl" else _plain
        try:
            contents += read(path, _decoded(path, raw))
        except BadInput as error:
            faults += error.faults
    if faults:
        raise BadInput(faults)
    if not contents:
        raise BadInput(Fault(text, "the text set", "of one document or more", "none"))
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()[:16], contents


def _files(text: str) -> list[Path]:
    kinds = " or ".join(SUFFIXES)
    try:
        path = Path(text).expanduser()
        if path.is_dir():
            files = sorted(one for one in path.iterdir() if one.suffix in SUFFIXES)
            if not files:
                raise BadInput(Fault(_WHERE, "text", f"a folder with files {kinds}", text))
            return files
        if path.is_file() and path.suffix not in SUFFIXES:
            raise BadInput(Fault(_WHERE, "text", f"a file {kinds}, or a folder of these", text))
        if path.is_file():
            return [path]
    except (OSError, RuntimeError) as error:  # no right to look, no such home, a name too long
        raise BadInput(
            Fault(_WHERE, "text", "the path of a text set", f"{text} ({error})")
        ) from None
    known = [PROSE, *HUB_SETS]
    rule = f"{', '.join(known)} or the path of a text set"
    raise BadInput(Fault(_WHERE, "text", rule, text, near_matches(text, known)))


def _decoded(path: Path, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        got = f"byte 0x{raw[error.start]:02x}"
        raise BadInput(Fault(f"{path}:{line}", "the file", "UTF-8 text", got)) from None


def _json_lines(path: Path, content: str) -> Iterator[str]:
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadInput(Fault(where, "the line", "one JSON object", str(error))) from None
        if not isinstance(row, dict):
            raise BadInput(Fault(where, "the line", "one JSON object", type(row).__name__))
        if not isinstance(row.get("text"), str):
            got = type(row["text"]).__name__ if "text" in row else "nothing"
            raise BadInput(Fault(where, 'the field "text"', "text", got))
        if not _is_encodable(row["text"]):
            got = "half of a surrogate pair"
            raise BadInput(Fault(where, 'the field "text"', "text that UTF-8 can hold", got))
        yield row["text"]


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _plain(path: Path, content: str) -> Iterator[str]:
    for part in re.split(r"\n(?:[ \t]*\n){2,}", content):
        if part.strip():
            yield part.strip("\n")


def _hub_text(name: str, cache: Path) -> str:
    """Return a hub set as one stream; it is fetched once and kept in the cache."""
    source = HUB_SETS[name]
    path = cache / f"text-{name}-{source.revision[:16]}.txt"
    if path.is_file():
        return path.read_bytes().decode()
    try:
        import datasets
    except ImportError:
        raise MissingResource(
            f"perplexity: text: {name} needs the package datasets; "
            "install it with: pip install datasets"
        ) from None
    try:
        table = datasets.load_dataset(
            source.dataset,
            split=source.split,
            revision=source.revision,
            # A part of the files is asked for, and the checks expect all.
            verification_mode="no_checks",
            **source.arguments,
        )
    except Exception as error:
        # The library raises a dozen types, plain ValueError among them, for what it cannot reach.
        raise MissingResource(
            f"perplexity: text: {name} could not be fetched ({source.dataset} of the Hugging Face "
            f"hub, split {source.split}); run once with network access, then the cache {cache} is "
            f"enough: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from error
    rows = itertools.islice(table, source.rows)
    content = source.separator.join(row["text"] for row in rows)
    cache.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_bytes(content.encode())
    partial.replace(path)
    return content
