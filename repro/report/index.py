"""``results/README.md``: which pages there are, and methods against measurements at a glance."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from repro.errors import BadInput, Fault
from repro.report import tables
from repro.report.page import SCHEMA, Page, render
from repro.report.tables import Column, Row, Table
from repro.verdict import VERDICTS

_PAGES = (
    Column("paper", "title", numeric=False),
    Column("page", "link", numeric=False),
    Column("cells", "cells", tables.integer),
    Column("machines", "machines", numeric=False),
    Column("proxy claims", "proxies", numeric=False),
    Column("the paper's numbers", "claims", numeric=False),
)


def read_pages(results: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Return (slug, profile) -> the page's JSON, for all pages in a results folder.

    Raises:
        BadInput: If a page is not JSON of this form.
    """
    found = {}
    for path in sorted(results.glob("*/*.json")):
        try:
            body = json.loads(path.read_bytes())
            if body.get("schema") == SCHEMA and "verdicts" in body:
                found[body["paper"], body["profile"]] = body
        except (ValueError, KeyError, AttributeError, OSError) as error:
            remedy = f"delete it and run `repro report {path.parent.name}`"
            fault = Fault(str(path), "the file", "a results page", str(error), remedy)
            raise BadInput(fault) from None
    return found


def markdown(
    pages: Mapping[tuple[str, str], Mapping[str, Any]], kernels: Iterable[str] = ()
) -> str:
    """Return the index of all pages.

    Args:
        pages: (slug, profile) -> the page's JSON.
        kernels: Names of the kernel pages.
    """
    bodies = [pages[name] for name in sorted(pages)]
    return render(
        "index.md.jinja",
        pages=Table("pages", "Pages", "", _PAGES, [_page_row(body) for body in bodies]),
        matrix=_matrix(bodies),
        kernels=sorted(kernels),
    )


def body_of(page: Page) -> dict[str, Any]:
    """Return a page as it reads back from its file."""
    return json.loads(page.json())


def _page_row(body: Mapping[str, Any]) -> Row:
    slug, profile = body["paper"], body["profile"]
    names = [m["environment"].get("environment_id", "") for m in body["machines"]]
    return {
        "title": body["title"],
        "link": f"[{profile}]({slug}/{profile}.md)",
        "cells": len(body["cells"]),
        "machines": ", ".join(filter(None, names)),
        "proxies": _counts(v for v in body["verdicts"] if v["proxy"]),
        "claims": _counts(v for v in body["verdicts"] if not v["proxy"]),
    }


def _counts(verdicts: Iterable[Mapping[str, Any]]) -> str:
    found = [verdict["verdict"] for verdict in verdicts]
    return ", ".join(f"{found.count(name)} {name}" for name in VERDICTS if name in found)


def _matrix(bodies: Iterable[Mapping[str, Any]]) -> Table:
    """Return one row per page and machine, one column per measurement."""
    rows = []
    for body in bodies:
        for machine in body["machines"]:
            name = machine["environment"].get("environment_id")
            if not name:
                continue
            link = f"[{body['profile']}]({body['paper']}/{body['profile']}.md)"
            row: Row = {"method": body["paper"], "profile": link, "machine": name}
            for section in machine["sections"]:
                measurement = section["title"].partition(" on ")[0]
                headline = _headline(section["tables"])
                if headline:
                    row.setdefault(f"m:{measurement}", headline)
            rows.append(row)
    measured = sorted({key for row in rows for key in row if key.startswith("m:")})
    columns = [
        Column("method", "method", numeric=False),
        Column("profile", "profile", numeric=False),
        Column("machine", "machine", numeric=False),
        *(Column(key[2:], key, numeric=False) for key in measured),
    ]
    intro = (
        "Accuracy: points against dense at the longest length, lowest to highest configuration. "
        "Latency and memory: dense over method, lowest to highest of all cells, never the best "
        "alone. The pages have the intervals."
    )
    return Table("matrix", "Methods and measurements", intro, columns, rows)


def _headline(found: Iterable[Mapping[str, Any]]) -> str:
    for table in found:
        rows = table["rows"]
        differences = [
            (row["length"], row["difference"]["value"])
            for row in rows
            if row.get("difference") and row.get("control") == "none"
        ]
        if table["name"].endswith("_summary") and differences:
            longest = max((length or 0) for length, _ in differences)
            values = [value for length, value in differences if (length or 0) == longest]
            low, high = tables.signed(min(values)), tables.signed(max(values))
            text = low if low == high else f"{low} to {high}"
            return f"{text} points at {longest:,}" if longest else f"{text} points"
    ratios = [
        row["ratio"]["value"]
        for table in found
        for row in table["rows"]
        if isinstance(row.get("ratio"), dict) and not row.get("status")
    ]
    if ratios:
        low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
        return f"{low}x" if low == high else f"{low}x to {high}x"
    return ""
