"""The report: tables, plots and verdicts as a pure function of records and claims.

``repro.report`` runs nothing. It reads the run store and the committed records, and writes
``results/<slug>/<profile>.md`` with its ``.json`` and plots, ``results/<slug>/records/``,
``results/kernels/*.md`` and ``results/README.md``. The same records give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

from repro import claims, registry, settle
from repro.errors import BadInput, Fault, near_matches
from repro.evidence import Evidence
from repro.report import index, kernels, page, records
from repro.report.files import write_all
from repro.store import RunStore
from repro.verdict import Verdict, judge_all

__all__ = ["console_table", "verify", "write"]


def write(
    slugs: Sequence[str] | None = None,
    *,
    runs: Path | str = Path("runs"),
    results: Path | str = Path("results"),
) -> list[Path]:
    """Write the results of some papers (default: of all that have records).

    Args:
        slugs: Names of papers or manifests.
        runs: The run store.
        results: The results folder; its committed records take part.

    Returns:
        The paths of all files that belong to these results, pages first.

    Raises:
        BadInput: If a slug is unknown, or a claims file or a committed record is broken.
        MachineFault: If the folder cannot be written; then the old results stand.
    """
    runs, results = Path(runs), Path(results)
    files: dict[Path, bytes] = {}
    void: list[Path] = []
    bodies = index.read_pages(results)
    for slug in _chosen(slugs, runs, results):
        found = records.gather(slug, runs=runs, results=results)
        made = _pages(slug, found)
        own = _files_of(results / slug, made, found)
        files.update(own)
        void += [old for old in (results / slug / "plots").glob("*.png") if old not in own]
        bodies.update({(slug, p.profile): index.body_of(p) for p in made})
    own = kernels.pages(results / "kernels")
    files.update(own)
    names = [path.stem for path in own]
    files[results / "README.md"] = index.markdown(bodies, names).encode()
    return write_all(files, remove=void)


def _files_of(
    folder: Path, pages: Iterable[page.Page], found: list[records.Record]
) -> dict[Path, bytes]:
    """Return path -> content for one paper."""
    files: dict[Path, bytes] = {}
    pages = list(pages)
    for made in pages:
        files[folder / f"{made.profile}.md"] = made.markdown().encode()
    for made in pages:
        files[folder / f"{made.profile}.json"] = made.json()
        for machine in made.machines:
            files.update({folder / name: data for name, data in machine.images.items()})
    for name, data in records.committed_files(found).items():
        files[folder / "records" / name] = data
    return files


def _pages(slug: str, found: list[records.Record], *, images: bool = True) -> list[page.Page]:
    paper = claims.for_method(slug)
    profiles = dict.fromkeys(str(record["cell"].get("profile")) for record in found)
    return [
        page.build(paper, name, _of_profile(found, name), images=images)
        for name in sorted(profiles)
    ]


def _of_profile(found: Iterable[records.Record], profile: str) -> list[records.Record]:
    return [record for record in found if record["cell"].get("profile") == profile]


def verify(
    slugs: Sequence[str] | None = None,
    *,
    runs: Path | str = Path("runs"),
    results: Path | str = Path("results"),
) -> list[dict[str, Any]]:
    """Judge every claim of some papers (default: of all) over all their records.

    Returns:
        One row per claim and machine that could judge it: ``method``, ``claim``, ``paper`` and
        ``measured`` as text, ``verdict``, ``reason``, ``proxy``, ``broken``, and under
        ``details`` everything else.

    Raises:
        BadInput: If a slug is unknown, or a claims file or a committed record is broken.
    """
    runs, results = Path(runs), Path(results)
    chosen = _chosen(slugs, runs, results) if slugs else _all_slugs(runs, results)
    rows = []
    for slug in chosen:
        paper = claims.for_method(slug)
        verdicts = judge_all(
            paper.claims,
            _groups(records.gather(slug, runs=runs, results=results)),
            by=settle.judge,
        )
        rows += [_row(slug, verdict) for verdict in verdicts]
    return rows


def _groups(found: list[records.Record]) -> list[Evidence]:
    """Return the records of every profile on every machine."""
    profiles = sorted({str(record["cell"].get("profile")) for record in found})
    return [
        Evidence(members)
        for profile in profiles
        for name, members in records.by_machine(_of_profile(found, profile)).items()
        if name
    ]


def _row(slug: str, verdict: Verdict) -> dict[str, Any]:
    claim = verdict.claim
    text = f"{claim.what}: {claim.at}" if claim.at else claim.what
    return {
        "method": slug,
        "claim": f"proxy: {text}" if claim.proxy else text,
        "paper": page.bar(verdict),
        "measured": page.measured(verdict),
        "verdict": verdict.verdict,
        "reason": verdict.reason,
        "proxy": claim.proxy,
        "broken": verdict.broken,
        "details": verdict.row(),
    }


def console_table(
    paper: str,
    profile: str,
    *,
    runs: Path | str = Path("runs"),
    results: Path | str = Path("results"),
    stream: TextIO | None = None,
) -> None:
    """Print the short table of one profile, as ``repro run`` ends with."""
    from repro.report import console

    found = records.gather(paper, runs=Path(runs), results=Path(results))
    members = _of_profile(found, profile)
    if members:
        made = page.build(claims.for_method(paper), profile, members, images=False)
        console.show(made, stream=stream)


def _all_slugs(runs: Path, results: Path) -> list[str]:
    """Return all methods, and what else has records."""
    return sorted({*registry.slugs(), *_with_records(runs, results)})


def _with_records(runs: Path, results: Path) -> list[str]:
    stored = {name for name, _ in RunStore(runs).runs()}
    kept = {path.parent.parent.name for path in results.glob("*/records/*.jsonl")}
    return sorted({*stored, *kept} - {"kernels"})


def _chosen(slugs: Sequence[str] | None, runs: Path, results: Path) -> list[str]:
    known = _all_slugs(runs, results)
    if not slugs:
        return _with_records(runs, results)
    faults = [
        Fault(
            "report",
            "a slug",
            "a method, or a manifest with records",
            slug,
            near_matches(slug, known),
        )
        for slug in slugs
        if slug not in known
    ]
    if faults:
        raise BadInput(faults)
    return list(dict.fromkeys(slugs))
