"""A checked manifest as data: profiles with every default filled in and every sweep unrolled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from repro import registry
from repro.errors import BadInput, Fault, near_matches
from repro.subjects import SubjectInfo


@dataclass(frozen=True, kw_only=True)
class DenseOptions:
    """Options of the dense entry.

    Attributes:
        reruns: How often the dense cells are run again, as the noise floor.
    """

    reruns: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.reruns <= 10:
            raise ValueError(f"reruns must be in [0, 10], got {self.reruns}")


@dataclass(frozen=True)
class MethodEntry:
    """One configuration of a method; ``dense`` has an empty configuration.

    Attributes:
        shown: Fields that a label shows: those given, and those that differ from the default.
        index: Place in the profile's list, -1 for a dense entry that was added.
        config_object: The validated dataclass, None for dense.
    """

    slug: str
    config: dict[str, Any]
    shown: tuple[str, ...] = ()
    reruns: int = 0
    config_object: Any = field(default=None, compare=False, repr=False)
    index: int = field(default=-1, compare=False)


@dataclass(frozen=True)
class MeasurementEntry:
    """One measurement with its options and the cells that they expand to.

    Attributes:
        restricted: Index of a method entry with ``only`` -> the cells that it runs instead. Dense
            runs all cells, since every method is compared with it: there it limits the reruns.
    """

    name: str
    options: dict[str, Any]
    cells: tuple[dict[str, Any], ...]
    restricted: Mapping[int, tuple[dict[str, Any], ...]] = field(default_factory=dict)

    def cells_of(self, method: MethodEntry, repeat: int = 0) -> tuple[dict[str, Any], ...]:
        """Return the cells that a method runs, the first time or as a rerun."""
        if method.slug == registry.DENSE and not repeat:
            return self.cells
        return self.restricted.get(method.index, self.cells)


@dataclass(frozen=True)
class Profile:
    """One profile, resolved: every default filled in, every sweep unrolled."""

    name: str
    subjects: tuple[str, ...]
    methods: tuple[MethodEntry, ...]
    measurements: tuple[MeasurementEntry, ...]
    seeds: tuple[int, ...] = (0,)
    dtype: str = "bfloat16"
    timeout_minutes: float = 60.0
    resources: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """A checked manifest.

    Attributes:
        path: As given by the user.
        name: ``paper`` where given, else the file's stem; names the folder of the runs.
        infos: Subject -> what is known of it without loading it.
        missing: Subject -> what has to be fetched first, and how.
    """

    path: str
    name: str
    paper: str | None
    profiles: dict[str, Profile]
    infos: dict[str, SubjectInfo]
    missing: dict[str, str]

    def profile(self, name: str) -> Profile:
        """Return a profile by name.

        Raises:
            BadInput: If there is none of that name.
        """
        if name not in self.profiles:
            raise BadInput(
                Fault(
                    self.path, "--profile", "a known name", name, near_matches(name, self.profiles)
                )
            )
        return self.profiles[name]

    def to_json(self) -> dict[str, Any]:
        """Return the resolved manifest, as it is kept beside the records."""
        profiles = {
            name: {
                "subjects": list(profile.subjects),
                "methods": [
                    {"slug": entry.slug, "config": entry.config, "reruns": entry.reruns}
                    for entry in profile.methods
                ],
                "measurements": [
                    {"name": entry.name, "options": entry.options} for entry in profile.measurements
                ],
                "seeds": list(profile.seeds),
                "dtype": profile.dtype,
                "timeout_minutes": profile.timeout_minutes,
                "resources": profile.resources,
            }
            for name, profile in self.profiles.items()
        }
        return {"path": self.path, "paper": self.paper, "profiles": profiles}
