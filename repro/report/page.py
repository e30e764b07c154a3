"""One page per paper and profile: verdicts first, then the tables of every machine."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from repro import evidence, settle
from repro.claims import Paper
from repro.evidence import Evidence
from repro.report import accuracy, plots, scalars, tables
from repro.report.labels import Labels
from repro.report.records import Record, by_machine
from repro.report.tables import Column, Row, Section, Table
from repro.statistics import as_json
from repro.verdict import REPRODUCED, VERDICTS, Verdict, judge_all

SCHEMA = 1


@dataclass
class Machine:
    """What one machine contributes to a page."""

    name: str
    facts: dict[str, Any]
    sections: list[Section]
    common: list[tuple[str, dict[str, Any]]]
    images: dict[str, bytes] = field(default_factory=dict)

    @property
    def heading(self) -> str:
        """Return the machine's name, a CPU marked as such."""
        shown = str(self.facts.get("device_name") or self.name or "Cells that have not run")
        device = str(self.facts.get("device") or "")
        return f"{device.upper()}: {shown}" if device else shown


@dataclass
class Page:
    """Everything that one results page says, before it becomes text."""

    paper: Paper
    profile: str
    verdicts: list[Verdict]
    machines: list[Machine]
    records: list[Record]

    def markdown(self) -> str:
        """Return the page in Markdown."""
        counts = verdict_counts(v for v in self.verdicts if not v.claim.proxy)
        return (
            _templates()
            .get_template("page.md.jinja")
            .render(
                page=self,
                proxies=proxy_table([v for v in self.verdicts if v.claim.proxy]),
                claims=paper_table([v for v in self.verdicts if not v.claim.proxy]),
                counts=counts,
                dates=self.dates(),
                seeds=sorted({int(r["cell"].get("seed", 0)) for r in self.records}),
                ok=sum(evidence.is_ok(r) for r in self.records),
            )
        )

    def json(self) -> bytes:
        """Return the page as JSON: all numbers of the tables, verdicts, and cells."""
        body = {
            "schema": SCHEMA,
            "paper": self.paper.slug,
            "title": self.paper.title,
            "arxiv": self.paper.arxiv,
            "profile": self.profile,
            "verdicts": [verdict.row() for verdict in self.verdicts],
            "machines": [
                {
                    "environment": machine.facts,
                    "sections": [
                        {"title": s.title, "tables": [t.as_json() for t in s.tables]}
                        for s in machine.sections
                    ],
                }
                for machine in self.machines
            ],
            "cells": [_cell(record) for record in self.records],
        }
        return json.dumps(as_json(body), indent=1, ensure_ascii=False).encode() + b"\n"

    def dates(self) -> str:
        """Return the day of the records, or the first and last."""
        days = sorted({str(r["created"])[:10] for r in self.records if r.get("created")})
        return "" if not days else days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


def build(paper: Paper, profile: str, records: Sequence[Record], *, images: bool = True) -> Page:
    """Compute a page from the records of one profile.

    Args:
        paper: The paper with its claims.
        profile: Name of the profile, which is the page's.
        records: Records of that profile, of all machines.
        images: Whether to draw the plots.
    """
    groups = by_machine(records)
    judged = [Evidence(members) for name, members in groups.items() if name]
    verdicts = judge_all(paper.claims, judged, by=settle.judge)
    machines = [_machine(name, members, profile, images) for name, members in groups.items()]
    return Page(paper, profile, verdicts, machines, list(records))


def _machine(name: str, records: list[Record], profile: str, images: bool) -> Machine:
    found, labels = Evidence(records), Labels(records)
    newest = max(records, key=lambda r: str(r.get("created") or ""))
    machine = Machine(name, dict(newest.get("environment") or {}), [], labels.common())
    scored = {group.measurement for group in accuracy.groups(records)}
    if name:
        machine.sections += accuracy.sections(found, labels)
        machine.sections += scalars.sections(records, labels, scored)
    if images and name and plots.calibrated(records):
        machine.sections.append(Section(plots.CALIBRATION))
    early = scalars.ended_early(records)
    if early.rows:
        machine.sections.append(Section(early.title, [early]))
    failed = scalars.failures(records, labels)
    if failed.rows:
        machine.sections.append(Section("Cells without a result", [failed]))
    if images and name:
        sections = {section.title: section for section in machine.sections}
        for plot in plots.draw(found, labels, machine.heading):
            file = f"plots/{profile}-{name}-{plot.stem}.png"
            machine.images[file] = plot.image
            sections[plot.section].plots[file] = plot.caption
    return machine


def _cell(record: Record) -> dict[str, Any]:
    """Return what the JSON page keeps of a cell; its items stay in the committed records."""
    kept = ("key", "cell", "status", "message", "metrics", "patch", "explanation", "seconds")
    cell = {name: record[name] for name in kept if record.get(name) is not None}
    return {**cell, "environment": evidence.environment_of(record)}


# Verdict tables

_PROXIES = (
    Column("claim", "what", numeric=False),
    Column("claimed", "claimed", numeric=False),
    Column("measured", "measured", numeric=False),
    Column("verdict", "verdict", numeric=False),
    Column("on", "machine", numeric=False),
    Column("why", "why", numeric=False),
)
_CLAIMS = (
    Column("claim", "what", numeric=False),
    Column("the paper's number", "claimed", numeric=False),
    Column("verdict", "verdict", numeric=False),
    Column("measured", "measured", numeric=False),
    Column("why, or what it needs", "why", numeric=False),
    Column("source", "source", numeric=False),
)


def proxy_table(verdicts: Sequence[Verdict]) -> Table:
    """Return one row per proxy claim and machine."""
    rows = []
    for verdict in verdicts:
        claim = verdict.claim
        what = f"proxy: {claim.what}" + (f": {claim.at}" if claim.at else "")
        rows.append(
            {
                "what": f"{what} ({claim.setting})" if claim.setting else what,
                "claimed": bar(verdict),
                "measured": measured(verdict) or "-",
                "verdict": verdict.verdict,
                "machine": verdict.environment or "-",
                "why": "; ".join(filter(None, [verdict.reason, verdict.explanation])),
            }
        )
    intro = (
        "Claims of our own that stand in for the paper's on the embedded model. They are judged on "
        "the whole interval, not on the point."
    )
    return Table("proxies", "Proxy claims", intro, _PROXIES, rows)


def paper_table(verdicts: Sequence[Verdict]) -> Table:
    """Return the paper's claims, numbers of one row with the same outcome on one line."""
    lines: dict[tuple[str, ...], list[Verdict]] = {}
    for verdict in verdicts:
        measures = verdict.measured is not None or verdict.possible is not None
        reason = "" if measures else verdict.reason
        key = (verdict.claim.row, verdict.verdict, reason, verdict.environment)
        lines.setdefault(key, []).append(verdict)
    rows: list[Row] = []
    for members in lines.values():
        claim = members[0].claim
        what = claim.what if claim.confirmed else f"{claim.what} (unconfirmed)"
        shown = _list([v for v in members if measured(v)], measured)
        why = "; ".join(dict.fromkeys(filter(None, map(_why, members))))
        if measured(members[0]) and members[0].environment:
            shown += f" on {members[0].environment}"
        rows.append(
            {
                "what": f"{what} [{claim.model}]",
                "claimed": _list(members, bar),
                "measured": shown or "-",
                "verdict": members[0].verdict,
                "why": "; ".join(filter(None, [why, claim.note])),
                "source": claim.source,
            }
        )
    intro = (
        "The paper's numbers as its sources give them; *unconfirmed* ones come without hardware "
        "or setting. A number is judged on the paper's own setting only."
    )
    return Table("claims", "The paper's claims", intro, _CLAIMS, rows)


def _why(verdict: Verdict) -> str:
    at = f"{verdict.claim.at}: " if measured(verdict) and verdict.claim.at else ""
    return at + "; ".join(filter(None, [verdict.reason, verdict.explanation]))


def _list(verdicts: Sequence[Verdict], show: Any) -> str:
    return ", ".join(f"{v.claim.at}: {show(v)}" if v.claim.at else str(show(v)) for v in verdicts)


def bar(verdict: Verdict) -> str:
    """Return the claimed number as text: ``>= 1.2 x``, ``loses < 2 points``."""
    claim = verdict.claim
    if claim.direction == "holds":
        return f"loses < {claim.margin:g} {claim.unit}"
    sign = {"at_least": ">= ", "at_most": "<= ", "equal": ""}[claim.direction]
    return f"{sign}{claim.value:g} {claim.unit}".rstrip()


def measured(verdict: Verdict) -> str:
    """Return the measured number with its interval, "" if there is none.

    Where cells ended early it is where the number lies whatever their other items would give.
    """
    if verdict.possible is not None:
        low, high = map(
            tables.signed if _is_difference(verdict) else tables.points, verdict.possible
        )
        return f"{low} to {high} {verdict.claim.unit} (settled early)"
    if verdict.measured is None:
        return ""
    value = tables.interval(verdict.measured) or {}
    if verdict.claim.unit == "x":
        return tables.times(value)
    if _is_difference(verdict):
        return tables.difference(value)
    return f"{tables.score(value)} {verdict.claim.unit}".rstrip()


def needs_reason(verdict: Verdict) -> bool:
    """Tell whether a verdict does not speak for itself."""
    return verdict.verdict != REPRODUCED or verdict.possible is not None


def _is_difference(verdict: Verdict) -> bool:
    return verdict.claim.direction == "holds" or verdict.claim.unit == "points"


def verdict_counts(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """Return verdict -> how many claims have it, in the fixed order, absent ones left out."""
    found = [verdict.verdict for verdict in verdicts]
    return {name: found.count(name) for name in VERDICTS if name in found}


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("repro.report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown; cells are escaped where the tables are made
    )
    environment.filters["md"] = tables.escape
    return environment


def render(template: str, **values: Any) -> str:
    """Render one of the package's templates."""
    return _templates().get_template(template).render(**values)
