"""Claims: the numbers of a paper as data, with the query over records that measures each of them.

``methods/<slug>/paper.yaml`` holds rows; a row with several ``values`` is one claim per value.
Rows inherit what ``defaults`` says. The query of a value is the row's query with ``at`` put at the
place that ``each`` names, and then with the value's own ``where``::

    - id: speedup_s8
      what: attention speed-up, S = 8
      unit: x
      direction: at_least
      each: options.length
      values: [{at: 8192, value: 1.7}, {at: 16384, value: 2.2}]
      query: {measurement: latency, metric: ratio, config: {stride: 8}}
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from repro import registry, yamlfile
from repro.errors import BadInput, Fault

Direction = Literal["at_least", "at_most", "equal", "holds"]
Scope = Literal["single", "mean", "best_of"]
Compare = Literal["none", "minus_dense", "minus_control"]
Scalar = str | int | float | bool | None

_STRICT = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Query(BaseModel):
    """Which records measure a claim, and how they become one number.

    Attributes:
        subjects: Subjects that count as the paper's model, as ``fnmatch`` patterns.
        device: ``cpu``, ``cuda`` or ``any``.
        hardware: Patterns of the device's name; empty takes any of that device.
        method: Slug; ``dense`` for the baseline itself.
        config: Fields of the configuration that must be equal, a list means any of them; fields
            that are not named are at the method's defaults.
        measurement: Name of the measurement.
        options: Options that must be equal; a list means any of them.
        metric: Name in the record's metrics, or ``density``.
        compare: ``minus_dense`` and ``minus_control`` are paired differences over items.
        control: Which control ``minus_control`` takes.
        min_cells: Fewest cells (tasks) that the number may rest on.
    """

    model_config = _STRICT

    subjects: tuple[str, ...] = ("*",)
    device: Literal["cpu", "cuda", "any"] = "any"
    hardware: tuple[str, ...] = ()
    method: str
    config: dict[str, Scalar | tuple[Scalar, ...]] = Field(default_factory=dict)
    measurement: str
    options: dict[str, Scalar | tuple[Scalar, ...]] = Field(default_factory=dict)
    metric: str = "score"
    compare: Compare = "none"
    control: str = Field("random", pattern=r"^[a-z_]+$")
    min_cells: int = Field(1, ge=1)


class _Value(BaseModel):
    """One number of a row: where it was taken, the number, and what that changes in the query."""

    model_config = _STRICT

    at: Scalar = None
    value: float
    where: dict[str, Any] = Field(default_factory=dict)
    confirmed: bool | None = None


class _Row(BaseModel):
    model_config = _STRICT

    id: str = Field(pattern=r"^[a-z0-9_]+$")
    what: str
    unit: str
    model: str
    hardware: str = "not stated"
    setting: str = ""
    source: str
    confirmed: bool = True
    proxy: bool = False
    note: str = ""
    needs: str = ""
    direction: Direction = "equal"
    strict: bool = False
    tolerance: float = Field(0.1, ge=0, lt=1)
    points: float | None = Field(None, ge=0)
    margin: float | None = Field(None, gt=0)
    scope: Scope = "single"
    min_items: int = Field(0, ge=0)
    min_draws: int = Field(0, ge=0)
    each: str = Field("", pattern=r"^(|metric|method|(options|config)\.\w+)$")
    values: tuple[_Value, ...] = Field(min_length=1)
    query: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> _Row:
        if self.direction == "holds" and (self.margin is None or not self.min_items):
            raise ValueError("holds needs margin and min_items")
        if self.strict and self.direction not in ("at_least", "at_most"):
            raise ValueError("strict goes with at_least or at_most")
        if self.query is None and not self.needs:
            raise ValueError("a row without a query needs a text under needs")
        return self


class _Paper(BaseModel):
    model_config = _STRICT

    paper: str
    title: str
    arxiv: str = ""
    venue: str = ""
    defaults: dict[str, Any] = Field(default_factory=dict)
    claims: tuple[dict[str, Any], ...]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One number of a paper (or one proxy claim of ours), ready to be judged.

    Attributes:
        id: ``<row>`` or ``<row>@<at>``.
        row: The row it belongs to; the report shows rows together.
        at: The condition inside the row, "" if the row has one value.
        value: The number, in ``unit``.
        model, hardware, setting: What the paper used, as text.
        source: Where in the paper or its code the number stands.
        confirmed: False where only a secondary source gives it.
        proxy: True for a claim of our own, on the embedded subjects.
        direction: ``holds`` is non-inferiority: the lower bound of the paired difference must be
            above ``-margin``.
        strict: The unfavourable end of the interval must reach the value, without tolerance.
        tolerance: Relative; ``points``, where given, replaces it by an absolute one in ``unit``.
        scope: ``best_of`` for "up to".
        min_items: Fewest items per cell (task) for a verdict; of a comparison, fewest pairs.
        min_draws: Fewest draws of a random control for a verdict.
        needs: What a run takes, for "not run".
        query: None if nothing here can measure it.
    """

    id: str
    row: str
    at: str
    what: str
    value: float
    unit: str
    model: str
    hardware: str
    setting: str
    source: str
    confirmed: bool
    proxy: bool
    note: str
    needs: str
    direction: Direction
    strict: bool
    tolerance: float
    points: float | None
    margin: float | None
    scope: Scope
    min_items: int
    min_draws: int
    query: Query | None
    where: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return all fields as plain JSON types."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**found, "query": self.query.model_dump(mode="json") if self.query else None}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Claim:
        """Return the claim of ``as_json``."""
        query = data["query"]
        return cls(**{**data, "query": None if query is None else Query.model_validate(query)})


@dataclass(frozen=True)
class Paper:
    """A paper's identity and its claims."""

    slug: str
    title: str
    arxiv: str = ""
    venue: str = ""
    claims: tuple[Claim, ...] = ()


def paper_path(slug: str) -> Path | None:
    """Return where a method's ``paper.yaml`` lies, None if it has none; imports no method."""
    package = importlib.import_module("repro.methods")
    folders = [Path(place) / slug for place in package.__path__]
    source = registry.sources().get(slug)
    if source is not None:
        folders += _module_folders(source.module)
    paths = [folder / "paper.yaml" for folder in folders]
    return next((path for path in paths if path.is_file()), None)


def _module_folders(name: str) -> list[Path]:
    """Return the folders of a module of another distribution."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return []
    if spec is None:
        return []
    if spec.submodule_search_locations:
        return [Path(place) for place in spec.submodule_search_locations]
    return [Path(spec.origin).parent] if spec.origin else []


def for_method(slug: str) -> Paper:
    """Return the paper of a method; one without ``paper.yaml`` has no claims.

    Raises:
        BadInput: If its ``paper.yaml`` breaks a rule; all faults at once with file:line.
    """
    path = paper_path(slug)
    return Paper(slug, slug) if path is None else load(path)


def load(path: str | Path) -> Paper:
    """Read a ``paper.yaml``.

    Raises:
        BadInput: All faults at once, each with file:line, place, rule and value.
    """
    file = yamlfile.load(path)
    try:
        paper = _Paper.model_validate(file.data)
    except ValidationError as error:
        known = {"": list(_Paper.model_fields)}
        raise BadInput(yamlfile.validation_faults(file, error.errors(), known=known)) from None
    faults: list[Fault] = []
    claims: list[Claim] = []
    for index, raw in enumerate(paper.claims):
        found = _expand(file, index, _merge(paper.defaults, raw), paper.paper, faults)
        claims.extend(found)
    faults += _duplicates(claims)
    if faults:
        raise BadInput(faults)
    return Paper(paper.paper, paper.title, paper.arxiv, paper.venue, tuple(claims))


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with ``over`` on top, mappings merged and ``null`` taking a key out."""
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _expand(
    file: yamlfile.YamlFile, index: int, raw: dict[str, Any], slug: str, faults: list[Fault]
) -> list[Claim]:
    """Return the claims of one row; what is wrong with it is added to ``faults``."""
    at = ("claims", index)
    try:
        row = _Row.model_validate(raw)
    except ValidationError as error:
        known = {yamlfile.dotted(at): list(_Row.model_fields)}
        faults.extend(yamlfile.validation_faults(file, error.errors(), at=at, known=known))
        return []
    claims = []
    for number, value in enumerate(row.values):
        place = (*at, "values", number)
        query = None
        if row.query is not None:
            asked = _merge({"method": slug}, row.query)
            if row.each:
                asked = _merge(asked, _nested(row.each, value.at))
            asked = _merge(asked, value.where)
            try:
                query = Query.model_validate(asked)
            except ValidationError as error:
                spot = (*at, "query")
                known = {yamlfile.dotted(spot): list(Query.model_fields)}
                found = yamlfile.validation_faults(file, error.errors(), at=spot, known=known)
                faults.extend(fault for fault in found if fault not in faults)
                continue
        claims.append(_claim(row, value, query, file.where(place), len(row.values) > 1))
    return claims


def _nested(path: str, value: Scalar) -> dict[str, Any]:
    head, _, tail = path.partition(".")
    return {head: {tail: value} if tail else value}


def _claim(row: _Row, value: _Value, query: Query | None, where: str, many: bool) -> Claim:
    at = "" if value.at is None else str(value.at)
    own = {"id", "value", "confirmed", "query"}
    shared = {
        field.name: getattr(row, field.name)
        for field in fields(Claim)
        if field.name in _Row.model_fields and field.name not in own
    }
    return Claim(
        id=f"{row.id}@{at}" if at and many else row.id,
        row=row.id,
        at=at,
        value=value.value,
        confirmed=row.confirmed if value.confirmed is None else value.confirmed,
        query=query,
        where=where,
        **shared,
    )


def _duplicates(claims: list[Claim]) -> list[Fault]:
    seen: dict[str, str] = {}
    faults = []
    for claim in claims:
        if claim.id in seen:
            rule = f"unique (first at {seen[claim.id]})"
            faults.append(Fault(claim.where, "a claim's id", rule, claim.id))
        seen.setdefault(claim.id, claim.where)
    return faults
