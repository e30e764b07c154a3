"""How a cell of a run with a budget ends early: what travels to its worker, and what looks there.

The driver knows which claims a cell enters and how the cells before it ended; that goes along with
the cell as plain data (its stake). The worker looks again after every stored batch. What a cell is
told is a matter of the order of the cells alone and never of what else has ended by then, so that a
run that was killed, or has other workers, ends the same cells after the same items.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from repro import claims, evidence, measurements, settle
from repro.claims import Claim
from repro.evidence import Evidence, Record
from repro.measurements import ItemStore, Scoring
from repro.plan import Plan, PlannedCell
from repro.store import is_cut
from repro.worker import Settled

#: What of an environment a claim may ask for.
_MACHINE = ("environment_id", "device", "device_name")
Stake = dict[str, Any]


class Stakes:
    """The claims of a plan's paper, and the cells that enter each of them.

    Args:
        plan: All cells that the claims may rest on.
        order: The cells of this run in running order.
        environment: The machine that runs them.
    """

    def __init__(
        self, plan: Plan, order: Sequence[PlannedCell], environment: Mapping[str, Any]
    ) -> None:
        self._place = {planned.key: place for place, planned in enumerate(order)}
        machine = {name: environment.get(name) for name in _MACHINE}
        self._open = {
            planned.key: _not_asked(planned) | {"environment": machine} for planned in plan.cells
        }
        self._entered: dict[str, list[Claim]] = {}
        self._members: dict[str, list[str]] = {}
        # Key -> (cells that had ended when it was asked, whether it had to wait)
        self._asked_about: dict[str, tuple[int, bool]] = {}
        whole = settle.completed(aligned(self._open.values()), lambda record: 0.0)
        kept: set[str] = set()
        for claim in claims.for_method(plan.name).claims:
            entering = [record["key"] for record in settle.members(claim, whole)]
            self._members[claim.id] = entering
            for key in entering:
                self._entered.setdefault(key, []).append(claim)
            if entering and not settle.is_of_scores(claim):
                kept |= _read_by(claim, whole)
        for key in kept:
            self._entered.pop(key, None)

    def of(self, planned: PlannedCell, ended: Mapping[str, Record]) -> Stake | None:
        """Return what a cell's worker is told, None if the cell is asked whole.

        Args:
            planned: The cell.
            ended: Key -> record of cells that have ended; those before it in the order count.
        """
        entered = self._entered.get(planned.key)
        if not entered or not is_cut(self._open[planned.key]):
            return None
        wanted = {key for claim in entered for key in self._members[claim.id]}
        records = [
            _told(ended[key]) if key in ended and self._is_before(key, planned) else record
            for key, record in self._open.items()
            if key in wanted
        ]
        return {"claims": [claim.as_json() for claim in entered], "records": records}

    def awaits(self, planned: PlannedCell, ended: Mapping[str, Record]) -> bool:
        """Tell whether a cell before this one, not ended yet, may decide when this one ends.

        Arguments as of ``of``. As long as that is open, the cell must not begin: what it is told
        would depend on chance.
        """
        stake = self.of(planned, ended)
        if stake is None:
            return False
        records = stake["records"]
        before = [r["key"] for r in records if self._is_before(r["key"], planned)]
        if all(key in ended for key in before):
            return False
        if self._asked_about.get(planned.key, (-1, False))[0] != len(ended):
            known = {*before, planned.key}
            later = [_filled(record) if record["key"] in known else record for record in records]
            now, then = Evidence(aligned(records)), Evidence(aligned(later))
            found = all(settle.can_be_decided(c, now, then) for c in self._entered[planned.key])
            self._asked_about[planned.key] = len(ended), found
        return self._asked_about[planned.key][1]

    def _is_before(self, key: str, planned: PlannedCell) -> bool:
        last = len(self._place)
        return self._place.get(key, last) < self._place[planned.key]


class Watch:
    """The items of a running cell; every stored batch may be the last that matters."""

    def __init__(self, planned: PlannedCell, items: ItemStore, scoring: Scoring) -> None:
        stake = planned.stake or {"claims": [], "records": []}
        self._key = planned.key
        self._claims = [Claim.from_json(data) for data in stake["claims"]]
        self._records: list[Record] = stake["records"]
        self._items = items
        self._scoring = scoring
        self._scores: dict[str, float] = {}

    def get(self, key: str) -> dict[str, Any] | None:
        return self._items.get(key)

    def put(self, batch: Iterable[tuple[str, dict[str, Any]]]) -> None:
        self._items.put(batch)
        self.look()

    def look(self) -> None:
        """End the cell if no outcome of its other items changes the verdict of a claim.

        Raises:
            Settled: If that is so, and there are others.
        """
        for key in self._scoring.keys:
            value = None if key in self._scores else self._items.get(key)
            if value is not None:
                self._scores[key] = self._scoring.score(key, value)
        scores = [self._scores.get(key) for key in self._scoring.keys]
        if None not in scores or not self._claims:
            return
        part = {
            "asked": len(self._scores),
            "of": len(scores),
            "keys": list(self._scoring.keys),
            "scores": scores,
        }
        mine = {"settled": part}
        told = [{**r, **mine} if r["key"] == self._key else r for r in self._records]
        records = Evidence(aligned(told))
        verdicts: dict[str, str] = {}
        for claim in self._claims:
            found = settle.decide(claim, records)
            if found is None:
                # It is the first to be asked next time: as long as it is open, the others are idle.
                self._claims.remove(claim)
                self._claims.insert(0, claim)
                return
            verdicts[claim.id] = found.verdict
        message = f"settled early: {part['asked']} of {part['of']} items asked"
        verdicts = dict(sorted(verdicts.items()))
        raise Settled({"message": message, "settled": {**part, "verdicts": verdicts}})


def aligned(records: Iterable[Record]) -> list[Record]:
    """Return the records, those of cells that have not begun with the items of their setting.

    The first items of a setting are the same in every cell of it; those that no cell has told yet
    go by their place.
    """
    found = list(records)
    known: dict[evidence.Setting, list[str]] = {}
    for record in found:
        keys = _keys(record)
        setting = evidence.setting_of(record)
        if len(keys) > len(known.get(setting, [])):
            known[setting] = keys
    return [_named(record, known.get(evidence.setting_of(record), [])) for record in found]


def _keys(record: Record) -> list[str]:
    return list((record.get("items") or record.get("settled") or {}).get("keys") or ())


def _named(record: Record, keys: Sequence[str]) -> Record:
    if not is_cut(record) or record["settled"]["keys"]:
        return record
    count = record["settled"]["of"]
    names = [*keys[:count], *(f"item {place}" for place in range(len(keys), count))]
    return {**record, "settled": {**record["settled"], "keys": names}}


def _not_asked(planned: PlannedCell) -> dict[str, Any]:
    """Return the record of a cell of which nothing is known, as of one that ended at once."""
    record: dict[str, Any] = {"key": planned.key, "cell": planned.cell, "status": "ok"}
    if planned.items and measurements.early_scoring(planned.cell["measurement"]["name"]):
        scores = [None] * planned.items
        record["settled"] = {"asked": 0, "of": planned.items, "keys": None, "scores": scores}
    return record


def _filled(record: Record) -> dict[str, Any]:
    """Return a record as if all its items were known."""
    part = record.get("settled") or {}
    known = [score or 0.0 for score in part.get("scores", ())]
    return {**record, "settled": {**part, "scores": known}} if part else dict(record)


def _told(record: Record) -> dict[str, Any]:
    """Return what of a record a claim of scores reads."""
    told = {name: record[name] for name in ("key", "cell", "status")}
    machine = record.get("environment") or {}
    told["environment"] = {name: machine.get(name) for name in _MACHINE}
    if is_cut(record):
        told["settled"] = record["settled"]
    elif record.get("items"):
        told["items"] = {name: record["items"][name] for name in ("keys", "scores")}
    return told


def _read_by(claim: Claim, records: Evidence) -> set[str]:
    """Return the cells that a claim of other numbers than scores reads.

    Its own ones, and the others of its method: a timing counts only with the density of these.
    """
    entering = {record["key"] for record in settle.members(claim, records)}
    method = "" if claim.query is None else claim.query.method
    slugs = {record["key"]: evidence.variant_of(record) for record in records.records}
    return entering | {k for k, v in slugs.items() if v.slug == method and v.control == "none"}
