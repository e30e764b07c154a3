"""Keys: what a cell's outcome depends on, as SHA-256 over canonical JSON.

Sources take part by their bytes. They are found by reading ``import`` statements, never by
importing: a plan must not load torch. A unit (method, kernel, measurement package) counts as a
whole folder; any other module of ``repro`` counts as a file, with what it imports in turn.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The contract and what only describes or presents a run: a change there reruns nothing.
NOT_SOURCES = frozenset(
    {
        "repro",
        "repro.errors",
        "repro.method",
        "repro.subjects",
        "repro.measurements",
        "repro.environment",
        "repro.testing",
        "repro.registry",
        "repro.keys",
        "repro.store",
        "repro.artifacts",
    }
)
# Folders whose direct children are units.
UNIT_PACKAGES = ("repro.methods", "repro.kernels", "repro.measurements")
# Files of a unit that no outcome depends on.
IGNORED_FILES = frozenset({"bench.py", "compile_check.py", "early.py", "paper.yaml"})
IGNORED_SUFFIXES = frozenset({".md", ".pyc", ".png", ".corrupt"})


def canonical_json(value: Any) -> str:
    """Return the one JSON text of a value: sorted keys, no spaces, no NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def digest(value: Any) -> str:
    """Return the SHA-256 (64 hex digits) of a JSON-able value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def jsonable(value: Any) -> Any:
    """Return a value as plain JSON types: tuples to lists, array scalars to numbers, NaN to None."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): jsonable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        entries = sorted(value) if isinstance(value, (set, frozenset)) else value
        return [jsonable(entry) for entry in entries]
    if hasattr(value, "tolist"):  # numpy and torch scalars and arrays
        return jsonable(value.tolist())
    return str(value)


def library_versions(names: Iterable[str]) -> dict[str, str]:
    """Return distribution name -> installed version, ``absent`` where there is none."""
    versions = {}
    for name in sorted(set(names)):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions


@dataclass(frozen=True)
class _File:
    """A source file: where it is, its name inside the unit, the package its imports start from."""

    path: Path
    name: str
    package: str


class SourceDigests:
    """Digests of modules with everything of ours that they import; one object per plan."""

    def __init__(self) -> None:
        self._files: dict[str, tuple[_File, ...]] = {}
        self._imports: dict[Path, frozenset[str]] = {}
        self._bytes: dict[Path, str] = {}
        self._digests: dict[str, str] = {}

    def of(self, module: str) -> str:
        """Return the digest of a module's unit and of the units and modules that it imports."""
        if module not in self._digests:
            files: dict[str, str] = {}
            for unit in self.closure(module):
                for file in self._unit_files(unit):
                    files[f"{unit}:{file.name}"] = self._file_digest(file.path)
            self._digests[module] = digest(files)
        return self._digests[module]

    def closure(self, module: str) -> list[str]:
        """Return the names of the units and modules that an outcome of ``module`` depends on."""
        roots = {"repro", module.partition(".")[0]}
        start = unit_of(module)
        seen = {start}
        waiting = [start]
        while waiting:
            for file in self._unit_files(waiting.pop()):
                for name in self._imports_of(file):
                    if name.partition(".")[0] not in roots:
                        continue
                    target = unit_of(name)
                    if target in seen or target in NOT_SOURCES or target in UNIT_PACKAGES:
                        continue
                    if self._unit_files(target):
                        seen.add(target)
                        waiting.append(target)
        return sorted(seen)

    def _unit_files(self, unit: str) -> tuple[_File, ...]:
        if unit not in self._files:
            self._files[unit] = tuple(_files_of(unit))
        return self._files[unit]

    def _file_digest(self, path: Path) -> str:
        if path not in self._bytes:
            self._bytes[path] = hashlib.sha256(path.read_bytes()).hexdigest()
        return self._bytes[path]

    def _imports_of(self, file: _File) -> frozenset[str]:
        if file.path.suffix != ".py":
            return frozenset()
        if file.path not in self._imports:
            self._imports[file.path] = frozenset(_imported_names(file.path, file.package))
        return self._imports[file.path]


def unit_of(module: str) -> str:
    """Return the unit that a module belongs to: its method, kernel or measurement, else itself."""
    for package in UNIT_PACKAGES:
        if module.startswith(package + "."):
            return ".".join(module.split(".")[:3])
    return module


def _locate(module: str) -> Path | None:
    """Return a module's file or package folder without importing it (or its parents)."""
    first, *rest = module.split(".")
    loaded = sys.modules.get(first)
    if loaded is not None and hasattr(loaded, "__path__"):
        places = [Path(place) for place in loaded.__path__]
    else:
        spec = importlib.util.find_spec(first)
        if spec is None:
            return None
        if not rest and spec.origin and not spec.submodule_search_locations:
            return Path(spec.origin)
        places = [Path(place) for place in spec.submodule_search_locations or ()]
    name = first
    for index, part in enumerate(rest):
        for place in places:
            if index == len(rest) - 1 and (place / f"{part}.py").is_file():
                return place / f"{part}.py"
        name = f"{name}.{part}"
        package = sys.modules.get(name)
        if package is not None and hasattr(package, "__path__"):
            places = [Path(place) for place in package.__path__]
        else:
            places = [place / part for place in places if (place / part).is_dir()]
    return next((place for place in places if (place / "__init__.py").is_file()), None)


def _files_of(unit: str) -> Iterator[_File]:
    located = _locate(unit)
    if located is None:
        return
    if located.is_file():
        yield _File(located, located.name, unit.rpartition(".")[0])
        return
    # A unit is its whole folder; of any other package only the __init__ counts, since what it
    # holds is found by imports.
    if unit.rpartition(".")[0] not in UNIT_PACKAGES and unit.partition(".")[0] == "repro":
        yield _File(located / "__init__.py", "__init__.py", unit)
        return
    for path in sorted(located.rglob("*")):
        relative = path.relative_to(located)
        if not path.is_file() or "__pycache__" in relative.parts:
            continue
        if path.name in IGNORED_FILES or path.suffix in IGNORED_SUFFIXES:
            continue
        yield _File(path, relative.as_posix(), ".".join([unit, *relative.parts[:-1]]))


def _imported_names(path: Path, package: str) -> Iterator[str]:
    """Yield every module name that a file may import, lazy imports included."""
    tree = ast.parse(path.read_bytes(), filename=str(path))
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and _is_type_checking(node.test):
            waiting.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - (node.level - 1)]
                base = ".".join([*parents, *filter(None, [node.module])])
            if base:
                yield base
                # ``from package import module`` names a module as often as an object
                yield from (f"{base}.{alias.name}" for alias in node.names)
        waiting.extend(ast.iter_child_nodes(node))


def _is_type_checking(test: ast.expr) -> bool:
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", "")
    return name == "TYPE_CHECKING"
