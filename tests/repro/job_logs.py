"""A cell, the lines of a job's log that carry it, and what may happen to them."""

import itertools
from pathlib import Path
from typing import Any

from repro.joblog import Inbox, lines_of
from repro.store import CellFolder, RunStore, environment_key, make_record

KEY = "ab" + "0" * 62
CLUSTER = {"environment_id": "cluster", "device_name": "a GPU", "threads": 1, "versions": {}}
FOLDER = f"cells/ab/{KEY}/{environment_key(CLUSTER)}"
RECORD, ITEMS = f"{FOLDER}/record.json", f"{FOLDER}/items.jsonl"


def cell_of(root: Path) -> CellFolder:
    """Return the one cell of a store."""
    return RunStore(root).cell(KEY, environment_key(CLUSTER))


def write_cell(
    root: Path,
    status: str = "ok",
    *,
    items: int = 3,
    day: int = 1,
    message: str = "",
    environment: dict[str, Any] = CLUSTER,
) -> dict[str, Any]:
    """Write a cell with a record and as many items; return the record."""
    folder = RunStore(root).cell(KEY, environment_key(environment))
    with folder.items() as file:
        file.put([(f"item {i}", {"score": i}) for i in range(items)])
    body = {} if status == "not_run" else {"environment": environment}
    created = f"2026-01-{day:02d}T00:00:00+00:00"
    record = make_record(KEY, {"label": "a"}, status, message, created=created, **body)
    folder.write_record(record)
    return record


def lines_of_cell(
    root: Path, names: tuple[str, ...] = ("items.jsonl", "record.json")
) -> list[list[str]]:
    """Return the lines that a job sends of a cell, file by file."""
    files = {name: (cell_of(root).path / name).read_bytes() for name in names}
    return [list(lines_of(f"{FOLDER}/{name}", data)) for name, data in files.items()]


def take_all(root: Path, *files: list[str]) -> list[str]:
    """Let a store take in the lines of files; return what is missing then."""
    inbox = Inbox(RunStore(root))
    for line in itertools.chain(*files):
        assert inbox.take(line) is None
    return inbox.missing()


def harmed(lines: list[str], harm: str) -> list[str]:
    """Return the lines of a file after something happened to one in the middle."""
    first, line = lines[: len(lines) // 2], lines[len(lines) // 2]
    last = lines[len(first) + 1 :]
    if harm == "cut":
        return [*first, line[:-5], *last]
    if harm == "cut in its head":
        return [*first, line[: line.rindex(" ") - 4], *last]
    if harm == "a letter is changed":
        return [*first, line[:-5] + ("A" if line[-5] != "A" else "B") + line[-4:], *last]
    return [*first, *last] if harm == "a part is missing" else first


HARMS = [
    "a part is missing",
    "a letter is changed",
    "cut",
    "cut in its head",
    "the rest is missing",
]
