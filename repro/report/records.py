"""Gather records: the run store merged with the committed ones, stale rows dropped.

Committed records lie in ``results/<slug>/records/<environment_id>.jsonl``, one file a machine, so
that the report of one machine never erases another's rows. Values that many records share (item
keys, depths, the environment) are written once, as ``{"shared": <id>, "value": ...}``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from repro import evidence
from repro.errors import BadInput, Fault
from repro.keys import canonical_json, digest
from repro.store import RunStore, is_cut

Record = dict[str, Any]
#: Places in a record whose values are the same for many records.
_SHARED_PLACES = (
    ("environment",),
    ("items", "keys"),
    ("items", "depth"),
    ("items", "length"),
    ("settled", "keys"),
)


def gather(slug: str, *, runs: Path, results: Path) -> list[Record]:
    """Return all records of a slug: each cell's newest one on each machine.

    The order is that of the plan for what the run store holds, then that of the committed files.
    """
    store = RunStore(runs)
    fresh = [
        record
        for name, profile in store.runs()
        if name == slug
        for record in store.records(name, profile)
    ]
    # What a machine has run again, it has run by the manifest of now: its cells of an older one,
    # with fewer items say, would count beside the new ones.
    planned = {_identity(record, machine=False) for record in fresh}
    again = {(_profile(record), _machine(record)) for record in fresh}
    kept = [
        record
        for record in read_committed(results / slug / "records")
        if (_profile(record), _machine(record)) not in again
        or _identity(record, machine=False) in planned
    ]
    return merge([*fresh, *kept])


def merge(records: Iterable[Record]) -> list[Record]:
    """Return one record per cell and machine, the newest; the first place in the list is kept."""
    newest: dict[str, Record] = {}
    for record in records:
        name = _identity(record)
        known = newest.get(name)
        if known is None or _supersedes(record, known):
            newest[name] = record
    found = _without_stale(list(newest.values()))
    done = {_identity(record, machine=False) for record in found if _machine(record)}
    return [r for r in found if _machine(r) or _identity(r, machine=False) not in done]


def _supersedes(record: Record, known: Record) -> bool:
    """Tell whether a record takes the place of another one of its cell.

    The newer one does, but a cell that ended early never that of the same one asked to its end.
    """
    if record["key"] == known["key"] and is_cut(record) != is_cut(known):
        return is_cut(known)
    return str(record.get("created", "")) > str(known.get("created", ""))


def _profile(record: Record) -> str:
    return str(record["cell"].get("profile"))


def _machine(record: Record) -> str:
    return evidence.environment_of(record)


def _identity(record: Record, *, machine: bool = True) -> str:
    """Return what makes a cell this cell; not its label, nor the revision of its subject."""
    cell = {
        key: value
        for key, value in record["cell"].items()
        if key not in ("label", "subject_revision")
    }
    return canonical_json([cell, _machine(record) if machine else ""])


def _without_stale(records: list[Record]) -> list[Record]:
    """Drop what a later record of the same machine voids.

    A retrained subject (another revision) voids all earlier results on it, and a configuration
    that gained or lost a field voids the rows of the old form.
    """
    newest: dict[tuple[str, ...], tuple[str, str]] = {}
    for record in records:
        created = str(record.get("created", ""))
        for scope, form in _forms(record):
            if scope not in newest or created > newest[scope][0]:
                newest[scope] = (created, form)
    return [
        record
        for record in records
        if all(newest[scope][1] == form for scope, form in _forms(record))
    ]


def _forms(record: Record) -> Iterator[tuple[tuple[str, ...], str]]:
    cell, machine, profile = record["cell"], _machine(record), _profile(record)
    revision = str(cell.get("subject_revision", ""))
    yield ("subject", profile, machine, cell["subject"]), revision
    method = cell["method"]
    fields = canonical_json(sorted(method["config"]))
    yield ("config", profile, machine, method["slug"]), fields


def read_committed(folder: Path) -> Iterator[Record]:
    """Yield the committed records of one slug, machine by machine.

    Raises:
        BadInput: If a line is not a record; names file and line.
    """
    for path in sorted(folder.glob("*.jsonl")):
        shared: dict[str, Any] = {}
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            try:
                entry = json.loads(line)
                if "shared" in entry:
                    shared[entry["shared"]] = entry["value"]
                else:
                    yield _unfold(entry, shared)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                remedy = "restore the file from version control"
                got = f"{type(error).__name__} ({error})"
                fault = Fault(f"{path}:{number}", "the line", "a record", got, remedy)
                raise BadInput(fault) from None


def committed_files(records: Iterable[Record]) -> dict[str, bytes]:
    """Return file name -> content for the records that ran, one file per machine."""
    lines: dict[str, list[str]] = {}
    seen: dict[str, set[str]] = {}
    for record in records:
        machine = _machine(record)
        if not machine:
            continue
        folded, parts = _fold(record)
        out, known = lines.setdefault(machine, []), seen.setdefault(machine, set())
        for name, value in parts.items():
            if name not in known:
                known.add(name)
                out.append(_line({"shared": name, "value": value}))
        out.append(_line(folded))
    return {f"{name}.jsonl": ("\n".join(text) + "\n").encode() for name, text in lines.items()}


def _line(value: Any) -> str:
    """Return one line of JSON; the order of keys is kept, since tables show metrics in it."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _fold(record: Record) -> tuple[Record, dict[str, Any]]:
    """Return the record with shared values replaced by their ids, and those values."""
    parts: dict[str, Any] = {}
    folded = dict(record)
    for place in _SHARED_PLACES:
        parent = folded
        for key in place[:-1]:
            if not isinstance(parent.get(key), dict):
                break
            parent[key] = dict(parent[key])
            parent = parent[key]
        else:
            value = parent.get(place[-1])
            if value:
                name = digest(value)[:16]
                parts[name] = value
                parent[place[-1]] = {"shared": name}
    return folded, parts


def _unfold(record: Record, shared: dict[str, Any]) -> Record:
    for place in _SHARED_PLACES:
        parent: Any = record
        for key in place[:-1]:
            parent = parent.get(key) or {}
        value = parent.get(place[-1])
        if isinstance(value, dict) and set(value) == {"shared"}:
            parent[place[-1]] = shared[value["shared"]]
    if not isinstance(record["cell"]["method"]["slug"], str) or not record["status"]:
        raise ValueError("no method or status")
    return record


def by_machine(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Return machine -> records, machines sorted, cells that no machine ran last, under ""."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(_machine(record), []).append(record)
    return dict(sorted(groups.items(), key=lambda group: (not group[0], group[0])))
