"""Manifests: which subjects x methods x measurements, per profile; checked whole, all faults at once.

    paper: xattention
    profiles:
      embedded:
        subjects: [zoo:retriever]
        methods:
          - dense: {reruns: 1}
          - xattention: {threshold: 0.9, sweep: {stride: [8, 16]}}
        measurements:
          - ruler: {tasks: all, lengths: [1024, 4096], samples: 20}

An entry is a name or ``{name: {options}}``. ``sweep`` is the only place where a list means a grid.
``dense`` is added where it is missing; its ``reruns`` repeat the dense cells as the noise floor.
A method's ``only: {ruler: {samples: 20}}`` keeps it to some measurements, with other options there:
a control of many draws need not run everywhere, nor on every item. For ``dense``, with which every
method is compared, it limits the reruns alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator

from repro import measurements, registry, subjects, yamlfile
from repro.errors import BadInput, Fault, MissingResource, near_matches
from repro.keys import canonical_json, jsonable
from repro.measurements import Measurement
from repro.profiles import DenseOptions, Manifest, MeasurementEntry, MethodEntry, Profile
from repro.schema import STRICT, changed_fields, model_of, rule_of
from repro.subjects import SubjectInfo
from repro.yamlfile import Location, YamlFile, dotted

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"  # profile and paper names become file names


class _Resources(BaseModel):
    model_config = STRICT
    # A fraction below 1 lets several workers share a GPU; timings still have it to themselves.
    gpus: float = Field(default=0.0, ge=0, le=64)
    gpu_memory_gib: float = Field(default=0.0, ge=0)
    memory_gib: float = Field(default=0.0, ge=0)

    @field_validator("gpus")
    @classmethod
    def _whole_or_shared(cls, value: float) -> float:
        if value > 1 and not value.is_integer():
            raise ValueError("a whole number, or a fraction below 1")
        return value


class _Profile(BaseModel):
    model_config = STRICT
    subjects: list[str] = Field(min_length=1)
    methods: list[Any] = Field(default_factory=list)
    measurements: list[Any] = Field(min_length=1)
    seeds: list[int] = Field(default=[0], min_length=1)
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    timeout_minutes: float = Field(default=60.0, gt=0)
    resources: _Resources = _Resources()


class _Top(BaseModel):
    model_config = STRICT
    paper: str | None = None
    profiles: dict[str, Any] = Field(min_length=1)


def load(path: str | Path, *, profile: str | None = None) -> Manifest:
    """Read and check a manifest whole; nothing heavy is loaded.

    Args:
        path: The manifest.
        profile: Ask a hub for the subjects of this profile alone (None: of all); a run of the
            embedded profile needs no network.

    Raises:
        BadInput: With every fault of the file, each as ``<file>:<line>: <path> must be <rule>,
            got <value>``.
    """
    return _Reader(yamlfile.load(path), profile).manifest()


class _Reader:
    """Checks one file and collects its faults."""

    def __init__(self, file: YamlFile, described: str | None) -> None:
        self.file = file
        self.described = described
        self.faults: list[Fault] = []
        self.voided: set[Location] = set()
        self.infos: dict[str, SubjectInfo] = {}
        self.missing: dict[str, str] = {}

    def manifest(self) -> Manifest:
        data = self.file.data
        if not isinstance(data, dict):
            got = "an empty file" if data is None else type(data).__name__
            raise BadInput(Fault(self.file.where(()), "the manifest", "a mapping", got))
        data = self._json_data(data, ())
        self._validate(_Top, data, ())
        paper = data.get("paper")
        if isinstance(paper, str) and paper not in registry.slugs():
            remedy = near_matches(paper, registry.slugs())
            self._fault(("paper",), "a known method", paper, remedy)
        raw_profiles = data.get("profiles")
        profiles = {}
        for name, raw in (raw_profiles if isinstance(raw_profiles, dict) else {}).items():
            if not re.match(NAME_PATTERN, name):
                self._fault(("profiles", name), "a plain word (letters, digits, - _ .)", name)
            profile = self._profile(name, raw, ("profiles", name))
            if profile is not None:
                profiles[name] = profile
        name = paper or Path(self.file.path).stem
        if paper is None and not re.match(NAME_PATTERN, name):
            rule = "a plain word (letters, digits, - _ .): its results are named after it"
            self.faults.append(Fault(self.file.where(()), "the name of the manifest", rule, name))
        if self.faults:
            raise BadInput(dict.fromkeys(self.faults))
        return Manifest(
            path=self.file.path,
            name=name,
            paper=paper,
            profiles=profiles,
            infos=self.infos,
            missing=self.missing,
        )

    def _profile(self, name: str, raw: Any, at: Location) -> Profile | None:
        before = len(self.faults)
        shape = self._validate(_Profile, raw, at)
        if not isinstance(raw, dict):
            return None
        describe = self.described in (None, name)
        names = self._subjects(raw.get("subjects"), (*at, "subjects"), describe)
        only = self._only(raw, at)
        methods = self._methods(raw.get("methods"), (*at, "methods"))
        entries = self._measurements(raw.get("measurements"), (*at, "measurements"), names, only)
        self._distinct(raw.get("seeds"), (*at, "seeds"), canonical_json)
        if shape is None or len(self.faults) > before:
            return None
        return Profile(
            name=name,
            subjects=tuple(names),
            methods=tuple(methods),
            measurements=tuple(entries),
            seeds=tuple(shape.seeds),
            dtype=shape.dtype,
            timeout_minutes=shape.timeout_minutes,
            resources=shape.resources.model_dump(),
        )

    def _subjects(self, raw: Any, at: Location, describe: bool) -> list[str]:
        names = [name for name in raw if isinstance(name, str)] if isinstance(raw, list) else []
        self._distinct(raw, at, str)
        for index, name in enumerate(raw if isinstance(raw, list) else ()):
            if not isinstance(name, str) or name in self.infos or name in self.missing:
                continue
            try:
                info = subjects.describe(name, offline=not describe)
                if info is not None:
                    self.infos[name] = info
            except MissingResource as error:
                self.missing[name] = str(error)
            except BadInput as error:
                for fault in error.faults:
                    self._fault((*at, index), fault.rule, fault.got, fault.remedy)
        return names

    def _methods(self, raw: Any, at: Location) -> list[MethodEntry]:
        entries: list[MethodEntry] = []
        places: dict[str, int] = {}
        for index, value in enumerate(raw if isinstance(raw, list) else ()):
            known = [registry.DENSE, *registry.slugs()]
            parsed = self._entry(value, (*at, index), known, "a method")
            if parsed is None:
                continue
            slug, options, place = parsed
            for entry in self._configs(slug, options, place, index):
                key = canonical_json([entry.slug, entry.config])
                if key in places:
                    first = dotted((*at, places[key]))
                    got = f"{_title(entry)} twice"
                    self._fault((*at, index), f"without a duplicate of {first}", got)
                places.setdefault(key, index)
                entries.append(entry)
        if not any(entry.slug == registry.DENSE for entry in entries):
            entries.insert(0, MethodEntry(registry.DENSE, {}))
        return entries

    def _only(self, raw: dict[str, Any], at: Location) -> dict[int, dict[str, dict[str, Any]]]:
        """Return index of a method entry -> measurement -> options that replace the profile's."""
        methods, entries = raw.get("methods"), raw.get("measurements")
        known = [
            entry if isinstance(entry, str) else next(iter(entry))
            for entry in (entries if isinstance(entries, list) else ())
            if isinstance(entry, str) or (isinstance(entry, dict) and len(entry) == 1)
        ]
        found: dict[int, dict[str, dict[str, Any]]] = {}
        for index, value in enumerate(methods if isinstance(methods, list) else ()):
            if not isinstance(value, dict) or len(value) != 1:
                continue
            [(slug, options)] = value.items()
            if not isinstance(options, dict) or "only" not in options:
                continue
            place = (*at, "methods", index, slug, "only")
            only = options["only"]
            if isinstance(only, list) and all(isinstance(name, str) for name in only):
                only = {name: {} for name in only}
            if not isinstance(only, dict) or not only:
                self._fault(place, "measurements of this profile, not empty", options["only"])
                continue
            for name, changes in only.items():
                if name not in known:
                    rule = "a measurement of this profile"
                    self._fault((*place, name), rule, name, near_matches(name, known))
                elif changes is not None and not isinstance(changes, dict):
                    self._fault((*place, name), "a mapping of options", changes)
            found[index] = {
                name: changes if isinstance(changes, dict) else {} for name, changes in only.items()
            }
        return found

    def _configs(
        self, slug: str, options: dict[str, Any], at: Location, index: int
    ) -> Iterator[MethodEntry]:
        """Yield one entry per point of the grid that ``sweep`` spans."""
        if slug == registry.DENSE:
            own = {name: value for name, value in options.items() if name != "only"}
            dense = self._build(DenseOptions, own, {}, at)
            if dense is not None:
                yield MethodEntry(slug, {}, reruns=dense.reruns, index=index)
            return
        config_type = registry.get(slug).config
        fixed = {name: value for name, value in options.items() if name not in ("sweep", "only")}
        axes = self._axes(options, at, {field.name for field in dataclasses.fields(config_type)})
        if axes is None:
            self._build(config_type, fixed, {}, at)  # for what else is wrong
            return
        for point in itertools.product(*(list(enumerate(axis)) for axis in axes.values())):
            swept = {name: value for name, (_, value) in zip(axes, point, strict=True)}
            places = {
                name: (*at, "sweep", name, index)
                for name, (index, _) in zip(axes, point, strict=True)
            }
            config = self._build(config_type, {**fixed, **swept}, places, at)
            if config is None:
                continue
            values = jsonable(dataclasses.asdict(config))
            told = changed_fields(config) | swept.keys() | fixed.keys()
            shown = tuple(name for name in values if name in told)
            yield MethodEntry(slug, values, shown, config_object=config, index=index)

    def _axes(
        self, options: dict[str, Any], at: Location, known: set[str]
    ) -> dict[str, list[Any]] | None:
        if "sweep" not in options:
            return {}
        sweep, place = options["sweep"], (*at, "sweep")
        rule = "a mapping of field -> list of values, not empty"
        if not isinstance(sweep, dict) or not sweep:
            self._fault(place, rule, sweep)
            return None
        fine = True
        for name, values in sweep.items():
            here = (*place, name)
            if name not in known:
                self._fault(here, "a known field", name, near_matches(name, known))
            elif name in options:
                self._fault(here, f"given once; {name} also stands outside of sweep", name)
            elif not isinstance(values, list) or not values:
                self._fault(here, "a list of values, not empty", values)
            else:
                continue
            fine = False
        return dict(sweep) if fine else None

    def _measurements(
        self,
        raw: Any,
        at: Location,
        names: list[str],
        only: Mapping[int, Mapping[str, dict[str, Any]]],
    ) -> list[MeasurementEntry]:
        entries: list[MeasurementEntry] = []
        places: dict[str, int] = {}
        for index, value in enumerate(raw if isinstance(raw, list) else ()):
            parsed = self._entry(value, (*at, index), measurements.names(), "a measurement")
            if parsed is None:
                continue
            name, options, place = parsed
            measurement = measurements.get(name)
            built = self._build(measurement.options, options, {}, place)
            if built is None:
                continue
            cells = self._expanded(measurement, built, place)
            if cells is None:
                continue
            for cell in cells:
                key = canonical_json([name, cell])
                if key in places:
                    first = dotted((*at, places[key]))
                    got = f"{name} {canonical_json(cell)} twice"
                    self._fault((*at, index), f"without a duplicate of a cell of {first}", got)
                places.setdefault(key, index)
            self._check_lengths(measurement, cells, names, place)
            self._check_kinds(measurement, names, place)
            restricted = self._restricted(measurement, options, names, (*at[:-1], "methods"), only)
            resolved = jsonable(dataclasses.asdict(built))
            entries.append(MeasurementEntry(name, resolved, cells, restricted))
        return entries

    def _restricted(
        self,
        measurement: Measurement,
        options: dict[str, Any],
        names: list[str],
        at: Location,
        only: Mapping[int, Mapping[str, dict[str, Any]]],
    ) -> dict[int, tuple[dict[str, Any], ...]]:
        """Return the cells of the method entries that ``only`` keeps from the whole measurement."""
        found: dict[int, tuple[dict[str, Any], ...]] = {}
        for index, kept in only.items():
            changes = kept.get(measurement.name)
            if changes is None:
                found[index] = ()
            elif changes:
                [slug] = self._part((*at, index))
                place = (*at, index, slug, "only", measurement.name)
                places = {name: (*place, name) for name in changes}
                built = self._build(measurement.options, {**options, **changes}, places, place)
                cells = None if built is None else self._expanded(measurement, built, place)
                if cells is not None:
                    self._check_lengths(measurement, cells, names, place)
                    found[index] = cells
        return found

    def _expanded(
        self, measurement: Measurement, options: Any, at: Location
    ) -> tuple[dict[str, Any], ...] | None:
        """Return the cells of a measurement, or None after noting what is wrong with its data."""
        try:
            return tuple(jsonable(cell) for cell in measurement.expand(options))
        except BadInput as error:
            for fault in error.faults:
                if fault.where == measurement.name:
                    self._fault((*at, fault.what), fault.rule, fault.got, fault.remedy)
                else:  # in a file of its own, which the fault names
                    self.faults.append(fault)
            return None

    def _part(self, at: Location) -> Any:
        part = self.file.data
        for step in at:
            part = part[step]
        return part

    def _check_lengths(
        self,
        measurement: Measurement,
        cells: tuple[dict[str, Any], ...],
        names: list[str],
        at: Location,
    ) -> None:
        place = next(
            ((*at, key) for key in ("lengths", "length") if (*at, key) in self.file.lines), at
        )
        for name in names:
            info = self.infos.get(name)
            for needed in sorted({measurement.positions(cell) for cell in cells}):
                if info is not None and needed > info.max_length:
                    rule = f"at most {info.max_length} (the positions of {name})"
                    self._fault(place, rule, needed)

    def _check_kinds(self, measurement: Measurement, names: list[str], at: Location) -> None:
        infos = [self.infos[name] for name in names if name in self.infos]
        if infos and len(infos) == len(names) and not any(applies(measurement, i) for i in infos):
            needs = "trained " if measurement.needs_training else ""
            rule = f"a measurement of {' or '.join(names)} (this one needs a {needs}subject of "
            self._fault(at, f"{rule}kind {' or '.join(measurement.kinds)})", measurement.name)

    def _entry(
        self, value: Any, at: Location, known: list[str], noun: str
    ) -> tuple[str, dict[str, Any], Location] | None:
        options: Any = None
        if isinstance(value, str):
            name, place = value, at
        elif isinstance(value, dict) and len(value) == 1:
            name, options = next(iter(value.items()))
            place = (*at, name)
        else:
            self._fault(at, f"{noun}: a name, or one name with its options", value)
            return None
        if name not in known:
            self._fault(place, f"{noun} that exists", name, near_matches(name, known))
            return None
        if options is not None and not isinstance(options, dict):
            self._fault(place, "a mapping of options", options)
            return None
        return name, options or {}, place

    def _build(
        self, kind: type, options: dict[str, Any], places: Mapping[str, Location], at: Location
    ) -> Any | None:
        """Return ``kind(**options)``, or None after noting what is wrong with them.

        ``places`` says where a value stands that is not under its own name (a swept one).
        """
        fields = {field.name for field in dataclasses.fields(kind)}
        model = model_of(kind)
        wrong: set[str] = set()
        try:
            checked = model.model_validate_json(json.dumps(options))
        except ValidationError as error:
            for problem in error.errors():
                name = str(problem["loc"][0])
                wrong.add(name)
                here = places.get(name, (*at, *problem["loc"]))
                self._pydantic_fault(problem, here, fields)
            # The other values may break rules of their own.
            rest = {name: value for name, value in options.items() if name not in wrong}
            try:
                checked = model.model_validate_json(json.dumps(rest))
            except ValidationError:  # a required one is among the wrong ones
                return None
        try:
            built = kind(**{name: getattr(checked, name) for name in checked.model_fields_set})
        except (ValueError, TypeError) as error:
            for rule in re.split(r"\n|; (?=\w+ must be )", str(error)):
                self._rule_fault(rule, fields, places, at)
            return None
        return None if wrong else built

    def _rule_fault(
        self, text: str, fields: set[str], places: Mapping[str, Location], at: Location
    ) -> None:
        """Note a broken rule ``<field> must be <rule>, got <value>`` at the field's own line."""
        match = re.match(r"^(?:.*?\b)?(\w+) must be (.+), got (.*)$", text.strip())
        if match and match.group(1) in fields:
            name = match.group(1)
            self._fault(places.get(name, (*at, name)), match.group(2), match.group(3))
        else:
            self._fault(at, "valid", text.strip())

    def _validate(self, model: type[BaseModel], data: Any, at: Location) -> Any | None:
        try:
            return model.model_validate_json(json.dumps(data))
        except ValidationError as error:
            for problem in error.errors():
                self._pydantic_fault(problem, (*at, *problem["loc"]), set(model.model_fields))
            return None

    def _pydantic_fault(self, problem: Any, at: Location, known: set[str]) -> None:
        kind = problem["type"]
        rule, got, remedy = rule_of(problem), problem.get("input"), ""
        if kind == "extra_forbidden":
            got = at[-1]
            remedy = near_matches(str(got), known)
        elif kind == "missing":
            got = "nothing"
        self._fault(at, rule, got, remedy)

    def _json_data(self, value: Any, at: Location) -> Any:
        """Return the data with null for what JSON cannot hold, each noted as a fault."""
        if isinstance(value, list):
            return [self._json_data(entry, (*at, index)) for index, entry in enumerate(value)]
        if isinstance(value, dict):
            for key in (key for key in value if not isinstance(key, str)):
                self._fault(at, "a mapping whose keys are text", key)
            named = {key: entry for key, entry in value.items() if isinstance(key, str)}
            return {key: self._json_data(entry, (*at, key)) for key, entry in named.items()}
        if isinstance(value, float) and not math.isfinite(value):
            rule = "a finite number"
        elif value is not None and not isinstance(value, (str, int, float)):
            rule, value = "text, a number, true or false", type(value).__name__
        else:
            return value
        self._fault(at, rule, value)
        self.voided.add(at)
        return None

    def _distinct(self, raw: Any, at: Location, key: Callable[[Any], str]) -> None:
        seen: dict[str, int] = {}
        for index, value in enumerate(raw if isinstance(raw, list) else ()):
            name = key(value)
            if name in seen:
                self._fault((*at, index), f"different from {dotted((*at, seen[name]))}", value)
            seen.setdefault(name, index)

    def _fault(self, at: Location, rule: str, got: Any, remedy: str = "") -> None:
        """Note a fault; the name of an entry is left out of its path."""
        if at in self.voided:  # its own fault stands there already
            return
        shown: list[str | int] = []
        for index, part in enumerate(at):
            follows_entry = index >= 2 and isinstance(at[index - 1], int)
            if follows_entry and at[index - 2] in ("methods", "measurements") and index == 4:
                continue
            shown.append(part)
        self.faults.append(Fault(self.file.where(at), dotted(shown), rule, _plain(got), remedy))


def applies(measurement: Measurement, info: SubjectInfo) -> bool:
    """Tell whether a measurement means anything on a subject."""
    return info.kind in measurement.kinds and (info.trained or not measurement.needs_training)


def _title(entry: MethodEntry) -> str:
    shown = " ".join(f"{name}={entry.config[name]}" for name in entry.shown)
    return f"{entry.slug} {shown}".strip()


def _plain(value: Any) -> Any:
    """Return what a message shows of a value: no dump of a whole mapping."""
    return value if isinstance(value, (str, int, float, bool)) else canonical_json(jsonable(value))
