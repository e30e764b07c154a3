"""What the listing commands show: the data for ``--json``, and its tables."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from repro import registry
from repro.keys import jsonable
from repro.method import Method
from repro.plan import Plan
from repro.progress import duration
from repro.store import RunStore

Row = dict[str, Any]


def methods() -> list[Row]:
    """Return one row per method."""
    return [_summary(method) for method in registry.methods().values()]


def method(slug: str) -> Row:
    """Return a method with its options and claims.

    Raises:
        BadInput: If there is none of that name.
    """
    found = registry.get(slug)
    options = [
        {
            "name": entry.name,
            "type": entry.type.__name__ if isinstance(entry.type, type) else str(entry.type),
            "default": _default(entry),
        }
        for entry in dataclasses.fields(found.config)
    ]
    doc = (found.config.__doc__ or "").strip()
    return {**_summary(found), "about": doc, "options": options, "claim_list": _claims(found)}


def plan(made: Plan, runs: str) -> Row:
    """Return a plan with what is done already in a run store (on any machine)."""
    done = RunStore(runs).done(cell.key for cell in made.cells)
    listing = made.to_json()
    for cell in listing["cells"]:
        cell["done"] = cell["key"] in done
    listing["done"] = len(done)
    return listing


def zoo() -> list[Row]:
    """Return one row per embedded model."""
    from repro import subjects
    from repro.errors import ReproError
    from repro.zoo import names

    rows = []
    for name in names():
        subject = f"zoo:{name}"
        try:
            info = subjects.describe(subject)
            rows.append({**dataclasses.asdict(info), "status": "ready"})
        except ReproError as error:
            rows.append({"name": subject, "status": str(error)})
    return rows


def print_methods(rows: list[Row]) -> None:
    if not rows:
        print("no methods are installed")
        return
    columns = ["slug", "title", "arxiv", "kind", "claims"]
    _table(columns, [[row[name] for name in columns] for row in rows])


def print_method(detail: Row) -> None:
    link = f", arXiv:{detail['arxiv']}" if detail["arxiv"] else ""
    print(f"{detail['title']} ({detail['slug']}, {detail['kind']}{link})")
    if detail["about"]:
        print(f"\n{detail['about']}")
    print()
    options = [[row["name"], row["type"], row["default"]] for row in detail["options"]]
    _table(["option", "type", "default"], options)
    if detail["claim_list"]:
        names = ["id", "what", "value", "unit", "model", "source"]
        rows = [[claim.get(name, "") for name in names] for claim in detail["claim_list"]]
        _table(names, rows)


def print_plan(listing: Row) -> None:
    rows = [
        [
            cell["cell"]["label"],
            duration(cell["estimate_seconds"]),
            "yes" if cell["done"] else "",
            cell["key"][:8],
        ]
        for cell in listing["cells"]
    ]
    _table(["cell", "about", "done", "key"], rows)
    number = len(listing["cells"])
    print(
        f"{listing['name']} {listing['profile']} on {listing['device']}: {number} cells, "
        f"{listing['done']} done, about {duration(listing['estimate_seconds'])} in all"
    )
    for text in listing["skipped"]:
        print(f"left out: {text}")
    for what, how in listing["missing"].items():
        print(f"missing {what}: {how}")


def print_zoo(rows: list[Row]) -> None:
    columns = ["name", "kind", "parameters", "max_length", "revision", "status"]
    _table(columns, [[str(row.get(name, ""))[:60] for name in columns] for row in rows])


def print_verdicts(rows: list[Row]) -> None:
    columns = ["method", "claim", "paper", "measured", "verdict", "reason"]
    if not rows:
        print("no claims")
        return
    _table(columns, [[row[name] for name in columns] for row in rows])


def _summary(found: Method) -> Row:
    return {
        "slug": found.slug,
        "title": found.title,
        "arxiv": found.arxiv,
        "kind": found.kind,
        "claims": len(_claims(found)),
    }


def _claims(found: Method) -> list[Row]:
    """Return the claims of a method's ``paper.yaml``, one per number."""
    from repro import claims

    return [claim.as_json() for claim in claims.for_method(found.slug).claims]


def _default(entry: dataclasses.Field[Any]) -> Any:
    if entry.default is not dataclasses.MISSING:
        return jsonable(entry.default)
    if entry.default_factory is not dataclasses.MISSING:
        return jsonable(entry.default_factory())
    return "required"


def print_runs(found: list[Row]) -> None:
    if not found:
        print("no runs here; start one with: repro run MANIFEST")
        return
    rows = []
    for state in found:
        left = state["left_seconds"]
        rows.append(
            [
                f"{state['name']}/{state['profile']}",
                state["state"],
                f"{_done(state)} of {state['total']}",
                len(state["failed"]),
                "" if left is None else duration(left),
            ]
        )
    _table(["run", "state", "cells", "failed", "time left"], rows)


def print_run(state: Row) -> None:
    counts = ", ".join(f"{number} {status}" for status, number in state["counts"].items())
    run, total = f"{state['name']}/{state['profile']}", state["total"]
    print(f"{run}: {state['state']}, {_done(state)} of {total} cells done ({counts})")
    if state["left_seconds"] is not None:
        print(f"about {duration(state['left_seconds'])} left")
    elif state["state"] == "stopped" and state["silent_seconds"] is not None:
        heard = duration(state["silent_seconds"])
        print(f"its driver was last heard of {heard} ago; run the manifest again to go on")
    if state["running"]:
        now = time.time()
        rows = [
            [
                cell["label"],
                cell["worker"],
                duration(max(now - cell["since"], 0.0)),
                f"{cell['done']} of {cell['total']}" if cell["total"] else "",
            ]
            for cell in state["running"]
        ]
        _table(["running", "worker", "for", "done"], rows)
    if state["workers"]:
        rows = [
            [
                name,
                worker["cells"],
                worker["items"],
                duration(worker["seconds"]),
                f"{worker['items'] / worker['seconds']:.3g}" if worker["seconds"] else "",
            ]
            for name, worker in sorted(state["workers"].items())
        ]
        _table(["worker", "cells", "items", "busy", "items/s"], rows)
    if state["failed"]:
        _table(["failed", "why"], [[label, why] for label, why in state["failed"].items()])


def print_logs(found: list[Row]) -> None:
    if not found:
        print("no such cell has run yet")
    for row in found:
        print(f"{row['label']} ({row['key'][:12]})\n{row['status']}: {row['message'] or 'fine'}")
        for text in filter(None, (row["output"], row["log"])):
            print(text)


def _done(state: Row) -> int:
    return int(state["total"] - state["counts"].get("not_run", 0))


def _table(columns: list[str], rows: list[list[Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:  # a log or a pipe is not folded at 80 columns
        console = Console(width=200)
    table = Table(*columns, box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*(_text(value) for value in row))
    console.print(table)


def _text(value: Any) -> Any:
    from rich.text import Text

    return Text("" if value is None else str(value), overflow="fold")
