"""The zoo: small models trained here and shipped with the package.

Every folder with a ``recipe.py`` is a zoo model; its weights lie beside it with their checksums.
Importing this module imports no torch.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable
from pathlib import Path

from repro.errors import BadInput, Fault, MissingResource, near_matches

CHECKSUMS = "checksums.json"
# What a checksum covers: all that decides what the model computes, and not the card.
_COVERED = ("*.safetensors", "config.json", "generation_config.json", "tokenizer*.json")
_ROOT = Path(__file__).parent


def names() -> list[str]:
    """Return the names of all zoo models, trained or not."""
    return sorted(path.parent.name for path in _ROOT.glob("*/recipe.py"))


def zoo_path(name: str) -> Path:
    """Return the folder of a zoo model.

    Raises:
        BadInput: If there is no such model.
    """
    known = names()
    if name not in known:
        raise BadInput(Fault("zoo", "a model", "a known name", name, near_matches(name, known)))
    return _ROOT / name


def checksum(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in ``folder`` that decides what the model computes."""
    files = sorted({path for pattern in _COVERED for path in folder.glob(pattern)})
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def write_checksums(folder: Path) -> None:
    """Record the checksums of a freshly exported model."""
    text = json.dumps(checksum(folder), indent=2, sort_keys=True) + "\n"
    (folder / CHECKSUMS).write_text(text, encoding="utf-8")


def verify(name: str) -> None:
    """Compare the files of a zoo model with their recorded checksums.

    Raises:
        BadInput: If there is no such model.
        MissingResource: If a file is absent, added or changed, or no checksums are recorded.
    """
    folder = zoo_path(name)
    record = folder / CHECKSUMS
    if not record.exists():
        raise MissingResource(
            f"zoo:{name}: {record} is missing; make the model with `repro zoo train {name}`"
        )
    restore = "restore it (git checkout, or reinstall)"
    try:
        expected = dict(json.loads(record.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise MissingResource(f"zoo:{name}: {record} is not readable: {error}; {restore}") from None
    found = checksum(folder)
    for file in sorted({*expected, *found}):
        wanted, got = (_short(sums.get(file)) for sums in (expected, found))
        if wanted != got:
            raise MissingResource(
                f"zoo:{name}: {folder / file} must be {wanted}, got {got}; {restore}"
            )


def _short(checksum: str | None) -> str:
    return f"SHA-256 {checksum[:12]}..." if checksum else "absent"


def train(
    name: str,
    *,
    quick: bool = False,
    output: Path | None = None,
    resume: bool = True,
    device: str = "auto",
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Train a zoo model by its recipe and return the folder of the exported model.

    Args:
        name: One of ``names()``.
        quick: Stop after about ten minutes, at the recipe's lower bar.
        output: Folder of checkpoints, log and result; ``runs/zoo/<name>`` if None. The shipped
            model is never overwritten.
        resume: Go on from the checkpoints in ``output``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:<n>``.
        progress: Receives one line at a time; by default a Rich progress bar is shown.

    Raises:
        BadInput: If there is no such model.
    """
    zoo_path(name)
    recipe = importlib.import_module(f"repro.zoo.{name}.recipe")
    suffix = "-quick" if quick else ""
    folder = output if output is not None else Path("runs") / "zoo" / f"{name}{suffix}"
    return recipe.run(folder, quick=quick, resume=resume, device=device, progress=progress)
