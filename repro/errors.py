"""Errors that a user can cause or mend: one clear line each, printed without a traceback.

ReproError                 exit code 1
+-- BadInput               exit code 2, one or many faults at once (also a ValueError)
+-- MissingResource        weights, data or a package that must be fetched first
+-- UnsupportedCombination a combination that is known and not supported (NotImplementedError)
+-- MachineFault           the machine: disk full, read-only folder, dead device
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


class ReproError(Exception):
    """Base of every error whose text is written for the user."""

    exit_code = 1


@dataclass(frozen=True)
class Fault:
    """One broken rule: ``<where>: <what> must be <rule>, got <got>; <remedy>``."""

    where: str
    what: str
    rule: str
    got: Any
    remedy: str = ""

    def __str__(self) -> str:
        shown = self.got if isinstance(self.got, str) else repr(self.got)
        if len(shown) > 120:
            shown = shown[:117] + "..."
        tail = f"; {self.remedy}" if self.remedy else ""
        return f"{self.where}: {self.what} must be {self.rule}, got {shown}{tail}"


class BadInput(ReproError, ValueError):
    """Input that breaks one or more rules; all faults are reported together."""

    exit_code = 2

    def __init__(self, faults: Fault | Iterable[Fault]):
        self.faults = (faults,) if isinstance(faults, Fault) else tuple(faults)
        super().__init__("\n".join(str(fault) for fault in self.faults))


class MissingResource(ReproError, RuntimeError):
    """Something that has to be fetched or installed first; the text says what and how."""

    exit_code = 2


class UnsupportedCombination(ReproError, NotImplementedError):
    """A known combination that is not supported; the text gives the reason."""


class MachineFault(ReproError, RuntimeError):
    """The machine failed: a full disk, a read-only folder, a lost device."""


def check_rules(*rules: tuple[str, bool, str, Any]) -> None:
    """Raise one ValueError that names every broken rule of ``(field, holds, rule, got)``.

    Options of methods and measurements check themselves with it; a manifest takes the text apart
    again and gives each fault its own line.
    """
    broken = [f"{name} must be {rule}, got {got}" for name, holds, rule, got in rules if not holds]
    if broken:
        raise ValueError("; ".join(broken))


def near_matches(name: str, known: Iterable[str]) -> str:
    """Return the remedy line for an unknown name: near matches first, then every known name."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    guess = f"did you mean {' or '.join(close)}? " if close else ""
    return f"{guess}known: {', '.join(names) if names else 'none'}"
