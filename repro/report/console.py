"""The short table at the end of a run: verdicts, then accuracy and latency in a few lines."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TextIO

from repro.report import page as pages
from repro.report.page import Page
from repro.report.tables import Column, Table
from repro.verdict import Verdict

_MAX_ROWS = 24
_MAX_WIDTH = 60


def show(page: Page, *, stream: TextIO | None = None) -> None:
    """Print a page's summary: with Rich on a terminal, as plain aligned text elsewhere."""
    stream = stream or sys.stdout
    printed = _tables(page)
    counts = pages.verdict_counts(v for v in page.verdicts if not v.claim.proxy)
    told = ", ".join(f"{count} {name}" for name, count in counts.items())
    last = f"the paper's {sum(counts.values())} numbers: {told}" if counts else ""
    if stream.isatty():
        _print_rich(printed, last, stream)
    else:
        _print_plain(printed, last, stream)


def _tables(page: Page) -> list[Table]:
    found = [_proxies([v for v in page.verdicts if v.claim.proxy])]
    for machine in page.machines:
        for section in machine.sections:
            for table in section.tables:
                if not table.folded:
                    title = f"{section.title}: {table.title}, {machine.heading}"
                    rows = list(table.rows)[:_MAX_ROWS]
                    found.append(Table(table.name, title, table.intro, _short(table), rows))
    return [table for table in found if table.rows]


def _proxies(verdicts: Sequence[Verdict]) -> Table:
    """Return the proxy claims without their settings, a reason only where one did not hold."""
    columns = [
        Column("proxy claim", "claim", numeric=False),
        Column("claimed", "claimed", numeric=False),
        Column("measured", "measured", numeric=False),
        Column("verdict", "verdict", numeric=False),
        Column("", "why", numeric=False),
    ]
    rows = []
    for verdict in verdicts:
        claim = verdict.claim
        rows.append(
            {
                "claim": f"{claim.what}: {claim.at}" if claim.at else claim.what,
                "claimed": pages.bar(verdict),
                "measured": pages.measured(verdict) or "-",
                "verdict": verdict.verdict,
                "why": verdict.reason if pages.needs_reason(verdict) else "",
            }
        )
    return Table("proxies", "Proxy claims", "", columns, rows)


def _short(table: Table) -> Sequence[Column]:
    """Leave out the columns that only the page has room for, and cut long texts."""
    wide = {"sees", "tasks", "attention_share", "selection_share", "roofline_bound", "message"}
    kept = [column for column in table.columns if column.key not in wide]
    kept = kept if len(kept) <= 8 else [*kept[:7], *(c for c in kept[7:] if c.key == "status")]
    return [replace(column, show=_cut(column.show)) for column in kept]


def _cut(show: Callable[[Any], str]) -> Callable[[Any], str]:
    def shown(value: Any) -> str:
        text = show(value)
        return text if len(text) <= _MAX_WIDTH else text[: _MAX_WIDTH - 3] + "..."

    return shown


def _print_rich(printed: Sequence[Table], last: str, stream: TextIO) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console(file=stream)
    colours = {"reproduced": "green", "not reproduced": "red", "invalid": "red"}
    for table in printed:
        shown = RichTable(title=table.title, title_justify="left", header_style="bold")
        for column in table.columns:
            shown.add_column(column.heading, justify="right" if column.numeric else "left")
        for row in table.cells():
            shown.add_row(*(Text(text, style=colours.get(text, "")) for text in row))
        console.print(shown)
    if last:
        console.print(Text(last))


def _print_plain(printed: Sequence[Table], last: str, stream: TextIO) -> None:
    for table in printed:
        lines = [[column.heading for column in table.columns], *table.cells()]
        widths = [max(len(line[i]) for line in lines) for i in range(len(table.columns))]
        print(f"\n{table.title}", file=stream)
        for line in lines:
            padded = [
                text.rjust(width) if column.numeric else text.ljust(width)
                for text, width, column in zip(line, widths, table.columns, strict=True)
            ]
            print("  ".join(padded).rstrip(), file=stream)
    if last:
        print(f"\n{last}", file=stream)
