"""Verdicts: a claim against the records of one profile on one machine.

    reproduced       the favourable end of the interval reaches the value less its tolerance, and
                     the point lies on the value's side of no effect (ratio 1, difference 0)
    within noise     the interval holds the claim and no effect alike
    too few items    fewer items or tasks than the claim asks for
    not reproduced   none of these
    not comparable   measured, but on another model, device or setting than the paper's
    not run          nothing to judge yet; says what it needs
    invalid          the records failed a check of their own, or do not belong together

``holds`` is non-inferiority: reproduced only if the lower bound of the paired difference lies above
the negative margin. A ``strict`` claim asks the unfavourable end of the interval for the value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from repro import evidence, registry, statistics
from repro.claims import Claim, Query
from repro.evidence import Evidence, Record
from repro.keys import jsonable
from repro.schema import default_values
from repro.statistics import Interval, as_json

REPRODUCED = "reproduced"
WITHIN_NOISE = "within noise"
TOO_FEW = "too few items"
NOT_REPRODUCED = "not reproduced"
NOT_COMPARABLE = "not comparable"
NOT_RUN = "not run"
INVALID = "invalid"
#: Best evidence first.
VERDICTS = (REPRODUCED, NOT_REPRODUCED, WITHIN_NOISE, INVALID, TOO_FEW, NOT_COMPARABLE, NOT_RUN)
CONCLUSIVE = frozenset({REPRODUCED, NOT_REPRODUCED, WITHIN_NOISE})

#: The accuracy cells and a latency cell see other prompts, and density follows the prompt: over the
#: RULER tasks alone it differs by a third. So the latency cell must lie inside the range of the
#: accuracy cells of its length, widened by the larger of these. A kernel that computes other blocks
#: than the scored model (an emulation, another threshold) lands further out.
DENSITY_ABSOLUTE = 0.05
DENSITY_RELATIVE = 0.25
#: Phases whose sparse work is the prefill that the accuracy cells run too.
PREFILL_PHASES = (None, "prefill", "end_to_end")


@dataclass(frozen=True)
class Verdict:
    """The judgement of one claim.

    Attributes:
        measured: The number found here in the claim's unit, None if there is none. An end of the
            interval is NaN where it is not known.
        reason: One short sentence.
        explanation: Arithmetic behind a latency verdict, "" for others.
        cells: Labels of the cells that it rests on.
        possible: Where cells ended early, the lowest and highest number that their other items
            could give, all of the same verdict; ``measured`` is then None.
        contradiction: True if the records of one model disagree with each other.
    """

    claim: Claim
    verdict: str
    reason: str
    measured: Interval | None = None
    explanation: str = ""
    profile: str = ""
    environment: str = ""
    cells: tuple[str, ...] = ()
    possible: tuple[float, float] | None = None
    contradiction: bool = False

    @property
    def broken(self) -> bool:
        """True for a proxy claim that the records contradict.

        A cell that calls itself invalid (a noisy machine, say) breaks nothing; one that computed
        something else than the scored model does.
        """
        return self.claim.proxy and (self.verdict == NOT_REPRODUCED or self.contradiction)

    def row(self) -> dict[str, Any]:
        """Return everything as one JSON-able row."""
        claim = self.claim
        measured = None
        if self.measured is not None:
            m = self.measured
            measured = {"value": m.value, "low": m.low, "high": m.high, "n": m.n}
        row = {
            "id": claim.id,
            "row": claim.row,
            "at": claim.at,
            "what": claim.what,
            "proxy": claim.proxy,
            "value": claim.value,
            "unit": claim.unit,
            "direction": claim.direction,
            "tolerance": claim.tolerance,
            "points": claim.points,
            "margin": claim.margin,
            "model": claim.model,
            "hardware": claim.hardware,
            "setting": claim.setting,
            "source": claim.source,
            "confirmed": claim.confirmed,
            "note": claim.note,
            "needs": claim.needs,
            "measured": measured,
            **({} if self.possible is None else {"possible": list(self.possible)}),
            "verdict": self.verdict,
            "reason": self.reason,
            "explanation": self.explanation,
            "broken": self.broken,
            "profile": self.profile,
            "environment": self.environment,
            "cells": list(self.cells),
        }
        return as_json(row)


def judge(claim: Claim, records: Evidence) -> Verdict:
    """Judge one claim against the records of one profile on one machine."""
    if claim.query is None:
        return Verdict(claim, NOT_RUN, f"needs {claim.needs}")
    related = related_to(claim.query, records)
    exact = exact_of(claim.query, related)
    if not exact:
        return _without_records(claim, related)
    labels = tuple(str(record["cell"].get("label", "")) for record in exact)
    found = replace(_judge_exact(claim, exact, records), cells=labels)
    where = next((e for r in exact if (e := evidence.environment_of(r))), "")
    profile = str(exact[0]["cell"].get("profile", ""))
    return replace(found, environment=where, profile=profile)


def judge_all(
    claims: Iterable[Claim],
    groups: Sequence[Evidence],
    *,
    by: Callable[[Claim, Evidence], Verdict] = judge,
) -> list[Verdict]:
    """Judge every claim against every group; keep the best evidence of each machine.

    A claim that no machine could judge appears once, with the verdict that says most. ``by`` judges
    one claim against one group.
    """
    verdicts = []
    for claim in claims:
        found = [by(claim, group) for group in groups] or [by(claim, Evidence([]))]
        best: dict[str, Verdict] = {}
        for verdict in found:
            known = best.get(verdict.environment)
            if known is None or _strength(verdict) < _strength(known):
                best[verdict.environment] = verdict
        ranked = sorted(best.values(), key=_strength)
        judged = [v for v in ranked if v.verdict not in (NOT_COMPARABLE, NOT_RUN)]
        verdicts.extend(sorted(judged, key=lambda v: v.environment) or ranked[:1])
    return verdicts


def _strength(verdict: Verdict) -> tuple[int, int]:
    """Return a sorting key: conclusive first, then by number of items."""
    rank = 0 if verdict.verdict in CONCLUSIVE else VERDICTS.index(verdict.verdict)
    return rank, -(verdict.measured.n if verdict.measured else 0)


# Which records a claim asks for


def _default_config(slug: str) -> dict[str, Any]:
    """Return the configuration of the method as it is; no control, whatever the method."""
    known = default_values(registry.get(slug).config) if slug in registry.slugs() else {}
    return {"control": "none", **jsonable(known)}


def related_to(query: Query, records: Evidence) -> list[Record]:
    """Return the cells of the configuration that a query asks for, in any setting."""
    defaults = _default_config(query.method)
    cells = records.of(query.method, query.measurement)
    return [record for record in cells if _is_asked(query, record, defaults)]


def exact_of(query: Query, related: Iterable[Record]) -> list[Record]:
    """Return those of the related cells that are of the asked setting, too."""
    return [record for record in related if not _differences(query, record)]


def _is_asked(query: Query, record: Record, defaults: Mapping[str, Any]) -> bool:
    """Tell whether a record is of the asked configuration."""
    config = {**defaults, **record["cell"]["method"]["config"]}
    wanted = {**defaults, **query.config}
    return all(_is_allowed(config.get(name), value) for name, value in wanted.items())


def _is_allowed(value: Any, wanted: Any) -> bool:
    return value in wanted if isinstance(wanted, tuple) else value == wanted


def _differences(query: Query, record: Record) -> dict[str, str]:
    """Return what differs from the asked setting, and what it is here.

    Names are ``model``, ``hardware`` and those of options.
    """
    cell = record["cell"]
    found = {}
    if not any(fnmatchcase(cell["subject"], pattern) for pattern in query.subjects):
        found["model"] = str(cell["subject"])
    machine = record.get("environment") or {}
    device = str(machine.get("device") or cell.get("device", ""))
    name = str(machine.get("device_name") or device)
    if query.device != "any" and not device.startswith(query.device):
        found["hardware"] = f"{device.upper()}, {name}" if name != device else device.upper()
    elif query.hardware and not any(fnmatchcase(name.lower(), p.lower()) for p in query.hardware):
        found["hardware"] = name
    options = evidence.options_of(record)
    for key, wanted in query.options.items():
        if not _is_allowed(options.get(key), wanted):
            found[key] = str(options.get(key))
    return found


def _without_records(claim: Claim, related: Sequence[Record]) -> Verdict:
    """Judge a claim without a record of its own setting: not comparable, or not run."""
    assert claim.query is not None
    needs = f"needs {claim.needs}" if claim.needs else "no record yet"
    ran = [record for record in related if evidence.is_ok(record)]
    if claim.proxy or not ran:
        return Verdict(claim, NOT_RUN, needs)
    closest = min((_differences(claim.query, record) for record in ran), key=len)
    if not {"model", "hardware"} & set(closest):
        return Verdict(claim, NOT_RUN, needs)
    # The value of an option is left out: claims of one row then share one line of the page.
    said = [
        f"other {name} ({what})" if name in ("model", "hardware") else f"other {name}"
        for name, what in closest.items()
    ]
    return Verdict(claim, NOT_COMPARABLE, f"{', '.join(said)}; {needs}")


# From records to a number


def _judge_exact(claim: Claim, exact: Sequence[Record], records: Evidence) -> Verdict:
    assert claim.query is not None
    good = [record for record in exact if _is_usable(claim.query, record)]
    bad = [record for record in exact if not _is_usable(claim.query, record)]
    if bad and not (good and claim.scope == "best_of"):
        return _failed(claim, bad, len(exact))
    for record in good:
        clash = density_clash(record, records)
        if clash:
            return Verdict(claim, INVALID, clash, contradiction=True)
    variants: dict[evidence.Variant, list[Record]] = {}
    for record in good:
        variants.setdefault(evidence.variant_of(record), []).append(record)
    judged = [_judge_variant(claim, cells, records) for cells in variants.values()]
    if len(judged) == 1:
        return judged[0]
    return _over_variants(claim, judged)


def _is_usable(query: Query, record: Record) -> bool:
    if not evidence.is_ok(record):
        return False
    if query.compare != "none" or (query.metric == "score" and record.get("items")):
        return evidence.has_scores(record)
    return evidence.metric(record, query.metric) is not None


def _failed(claim: Claim, bad: Sequence[Record], total: int) -> Verdict:
    """Say why the cells of a claim give no number."""
    invalid = [record for record in bad if record.get("status") == "invalid"]
    shown = (invalid or list(bad))[0]
    status = str(shown.get("status"))
    message = _one_line(str(shown.get("message") or ""))
    if status == "ok":
        status = f"no {claim.query.metric if claim.query else 'metric'} in the record"
    text = f"{len(bad)} of {total} cells: {status}" if total > 1 else status
    text += f" ({message})" if message else ""
    return Verdict(claim, INVALID if invalid else NOT_RUN, text)


def _one_line(text: str, limit: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def density_clash(record: Record, records: Evidence) -> str:
    """Return why a latency record does not belong to the scored model, "" if it does.

    The densities of the accuracy cells of the same subject, variant and length span a range; a
    latency cell of prefill outside of it, widened by the tolerance above, computed something else.
    """
    options = evidence.options_of(record)
    mine = evidence.density_of(record)
    if not evidence.has_ratio(record) or mine is None:
        return ""
    if options.get("phase") not in PREFILL_PHASES:
        return ""
    cell, variant = record["cell"], evidence.variant_of(record)
    scored = [
        density
        for other in records.methods
        if evidence.is_ok(other)
        and evidence.has_scores(other)
        and other["cell"]["subject"] == cell["subject"]
        and other["cell"].get("dtype") == cell.get("dtype")
        and evidence.variant_of(other) == variant
        and evidence.options_of(other).get("length") == options.get("length")
        and (density := evidence.density_of(other)) is not None
    ]
    if not scored:
        return ""
    low, high = min(scored), max(scored)
    slack = max(DENSITY_ABSOLUTE, DENSITY_RELATIVE * sum(scored) / len(scored))
    if low - slack <= mine <= high + slack:
        return ""
    return (
        f"density {mine:.3f} in the latency cell, {low:.3f} to {high:.3f} in the accuracy cells of "
        f"the same model and length (tolerance {slack:.3f}): not the same computation"
    )


def _judge_variant(claim: Claim, cells: Sequence[Record], records: Evidence) -> Verdict:
    """Judge one configuration: enough cells and items, then the number."""
    query = claim.query
    assert query is not None
    if len(cells) < query.min_cells:
        text = f"{len(cells)} of {query.min_cells} tasks or cells; needs the others"
        return Verdict(claim, TOO_FEW, text)
    measured = measure(query, cells, records)
    if isinstance(measured, str):
        return Verdict(claim, NOT_RUN, measured)
    explanation = "; ".join(dict.fromkeys(filter(None, map(explain, cells))))
    for found, needed, what in (
        (_fewest_items(query, cells, records), claim.min_items, "items a task"),
        (_draws(query, cells, records), claim.min_draws, "draws of the control"),
    ):
        if found < needed:
            text = f"{found} {what}, needs {needed} ({needed - found} more)"
            return Verdict(claim, TOO_FEW, text, measured, explanation)
    verdict, reason = compare(claim, measured)
    return Verdict(claim, verdict, reason, measured, explanation)


def _fewest_items(query: Query, cells: Sequence[Record], records: Evidence) -> int:
    """Return the items of the cell that has the fewest; of a comparison, the pairs."""
    if query.compare == "minus_dense":
        return min((len(dense) for dense, _ in records.pairs(cells)), default=0)
    if query.compare == "minus_control":
        shared = [records.minus_control([record], query.control) for record in cells]
        return min((0 if found is None else found.shape[1] for found in shared), default=0)
    return min((len(r["items"]["keys"]) for r in cells if r.get("items")), default=0)


def _draws(query: Query, cells: Sequence[Record], records: Evidence) -> int:
    """Return how many draws of the control all cells share."""
    found = records.minus_control(cells, query.control)
    return 0 if found is None else found.shape[0]


def _over_variants(claim: Claim, judged: Sequence[Verdict]) -> Verdict:
    """Reduce several configurations: the best for "up to", else the least favourable."""
    measured = [verdict for verdict in judged if verdict.measured is not None]
    if not measured:
        return judged[0]
    highest = (claim.scope == "best_of") == (claim.direction != "at_most")
    pick = max if highest else min
    chosen = pick(measured, key=lambda v: v.measured.value if v.measured else math.nan)
    word = "best" if claim.scope == "best_of" else "least favourable"
    reason = f"{chosen.reason}; {word} of {len(judged)} configurations"
    return replace(chosen, reason=reason)


def measure(query: Query, cells: Sequence[Record], records: Evidence) -> Interval | str:
    """Return the number that a query asks for in its unit, or why there is none."""
    if query.compare == "minus_dense":
        pairs = records.pairs(cells)
        if len(pairs) < len(cells):
            return f"{len(cells) - len(pairs)} of {len(cells)} cells have no dense cell beside them"
        return statistics.stratified_difference(pairs).scaled(100)
    if query.compare == "minus_control":
        differences = records.minus_control(cells, query.control)
        if differences is None:
            return f"needs the {query.control} control at the same density"
        return statistics.crossed_interval(differences).scaled(100)
    if query.metric == "score" and all(evidence.has_scores(record) for record in cells):
        return evidence.mean_score(cells).scaled(100)
    found = [evidence.metric(record, query.metric) for record in cells]
    metrics = [m for m in found if m is not None]
    if len(metrics) == 1:
        return _interval_of(metrics[0], query.metric)
    values = [float(m["value"]) for m in metrics]
    if query.metric == "ratio":
        return statistics.geometric_mean(values)
    scale = 100.0 if query.metric == "density" else 1.0
    return Interval(scale * sum(values) / len(values), math.nan, math.nan, len(values))


def _interval_of(metric: Mapping[str, Any], name: str) -> Interval:
    scale = 100.0 if name == "density" and metric.get("unit") != "%" else 1.0
    low, high = (math.nan if metric.get(e) is None else metric[e] * scale for e in ("low", "high"))
    return Interval(metric["value"] * scale, low, high, int(metric.get("n") or 1))


# From a number to a verdict


def compare(claim: Claim, measured: Interval) -> tuple[str, str]:
    """Return the verdict of a number against a claim, and the reason in words."""
    low = measured.value if math.isnan(measured.low) else measured.low
    high = measured.value if math.isnan(measured.high) else measured.high
    if claim.direction == "holds":
        return _non_inferior(claim, low, high)
    slack = claim.points if claim.points is not None else claim.tolerance * abs(claim.value)
    if claim.strict:
        return _strictly(claim, low, high)
    neutral = no_effect(claim)
    if neutral is not None and low <= neutral <= high and low <= claim.value <= high:
        return WITHIN_NOISE, f"the interval holds {claim.value:g} and no effect ({neutral:g}) alike"
    reached = {
        "at_least": high >= claim.value - slack,
        "at_most": low <= claim.value + slack,
        "equal": low <= claim.value + slack and high >= claim.value - slack,
    }[claim.direction]
    if not reached:
        return NOT_REPRODUCED, f"{_distance(claim, measured.value)}, tolerance {slack:g}"
    side = neutral is not None and (claim.value - neutral) * (measured.value - neutral) < 0
    if side:
        return NOT_REPRODUCED, f"the point lies on the other side of {neutral:g}"
    return REPRODUCED, f"{_distance(claim, measured.value)}, tolerance {slack:g}"


def thresholds(claim: Claim) -> tuple[float, ...]:
    """Return all numbers that ``compare`` holds an interval or its point against.

    Between two of them nothing that ``compare`` asks changes its answer.
    """
    if claim.direction == "holds":
        assert claim.margin is not None
        return -claim.margin, 0.0
    if claim.strict:
        return (claim.value,)
    slack = claim.points if claim.points is not None else claim.tolerance * abs(claim.value)
    below, above = claim.value - slack, claim.value + slack
    ends = {"at_least": (below,), "at_most": (above,), "equal": (below, above)}[claim.direction]
    neutral = no_effect(claim)
    return ends if neutral is None else (*ends, claim.value, neutral)


def _distance(claim: Claim, value: float) -> str:
    off = value - claim.value
    unit = "points" if claim.unit == "%" else claim.unit
    return f"{abs(off):.3g} {unit} {'above' if off >= 0 else 'below'} the claim"


def _non_inferior(claim: Claim, low: float, high: float) -> tuple[str, str]:
    assert claim.margin is not None
    if low > -claim.margin:
        return REPRODUCED, f"loses less than {claim.margin:g} points: lower bound {low:.2f}"
    if high < -claim.margin:
        return NOT_REPRODUCED, f"loses more than {claim.margin:g} points: upper bound {high:.2f}"
    if low <= 0 <= high:
        return WITHIN_NOISE, f"the interval holds 0 and -{claim.margin:g} alike"
    return NOT_REPRODUCED, f"a loss is seen, and one of {claim.margin:g} points is not excluded"


def _strictly(claim: Claim, low: float, high: float) -> tuple[str, str]:
    """The whole interval must lie on the claim's side of the value."""
    if claim.direction == "at_most":
        low, high, bar = -high, -low, -claim.value
    else:
        bar = claim.value
    if low >= bar:
        return REPRODUCED, f"the whole interval is {claim.direction.replace('_', ' ')} the bar"
    if high < bar:
        return NOT_REPRODUCED, "the whole interval misses the bar"
    return WITHIN_NOISE, "the interval holds the bar: more items or blocks would settle it"


def no_effect(claim: Claim) -> float | None:
    """Return the value that means "does nothing": ratio 1, difference 0; a raw score has none."""
    if claim.query is None:
        return None
    if claim.query.compare != "none":
        return 0.0
    return 1.0 if claim.query.metric == "ratio" else None


def explain(record: Record) -> str:
    """Return the arithmetic behind a latency record in one line, "" if it carries none."""
    if not evidence.has_ratio(record):
        return ""
    told = record.get("explanation") or {}
    parts = []
    if (share := told.get("attention_share")) is not None:
        parts.append(f"attention is {share:.0%} of dense time here")
    density = told.get("density", evidence.density_of(record))
    if density is not None:
        parts.append(f"density {density:.3f}")
    for name, word in (("amdahl_bound", "Amdahl bound"), ("roofline_bound", "roofline bound")):
        if told.get(name) is not None:
            parts.append(f"{word} {told[name]:.2f}x")
    if (selection := told.get("selection_share")) is not None:
        parts.append(f"selection takes {selection:.0%} of the method's time")
    parts += [str(note) for note in told.get("notes") or []]
    return ", ".join(parts)
