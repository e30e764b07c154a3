"""The search: pairs that a layer may take, layers that share a choice, trials, the front.

Source: arXiv:2502.04420, section 5.
"""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repro.errors import MissingResource
from repro.methods.kvtuner.tables import PAIRS, Pair, Table, average_bits

#: Distance within which two layers of one cluster lie, and the fewest layers around a core.
EPS, MIN_SAMPLES = 0.05, 2


@dataclass(frozen=True)
class Space:
    """What a search may choose: one of ``choices[i]`` for all layers of ``groups[i]``."""

    groups: tuple[tuple[int, ...], ...]
    choices: tuple[tuple[Pair, ...], ...]

    @property
    def size(self) -> int:
        """Number of tables."""
        return math.prod(map(len, self.choices))

    def expand(self, selection: Sequence[Pair]) -> Table:
        """Return the table, layer by layer, of one pair for each group."""
        chosen = {
            layer: pair
            for group, pair in zip(self.groups, selection, strict=True)
            for layer in group
        }
        return tuple(chosen[layer] for layer in range(len(chosen)))

    def tables(self) -> Iterator[Table]:
        """Yield every table."""
        return map(self.expand, itertools.product(*self.choices))


@dataclass(frozen=True)
class Trial:
    """A table that was tried: mean bits, and the accuracy lost against 16 bits."""

    table: Table
    bits: float
    loss: float


def surviving_pairs(errors: Mapping[Pair, float]) -> tuple[Pair, ...]:
    """Return the pairs that no other beats in both bits and error, by falling bits.

    Of pairs that are equal in both, the one with more key bits stays.
    """
    kept: list[Pair] = []
    least = math.inf
    for pair in sorted(errors, key=lambda pair: (sum(pair), errors[pair], -pair[0])):
        if errors[pair] < least:
            kept.append(pair)
            least = errors[pair]
    return tuple(reversed(kept))


def pruned_space(errors: Sequence[Mapping[Pair, float]]) -> Space:
    """Return the space of layers' surviving pairs, similar layers sharing one choice.

    Layers of the same survivors are clustered by DBSCAN on their errors; one that is in no cluster
    is a group of its own.

    Args:
        errors: Pair -> error, one mapping a layer.
    """
    from sklearn.cluster import DBSCAN

    surviving = [surviving_pairs(layer) for layer in errors]
    groups: list[tuple[int, ...]] = []
    for pairs in dict.fromkeys(surviving):
        layers = [layer for layer, own in enumerate(surviving) if own == pairs]
        points = [[errors[layer][pair] for pair in pairs] for layer in layers]
        labels = DBSCAN(eps=EPS, min_samples=MIN_SAMPLES).fit_predict(points).tolist()
        for label in sorted(set(labels)):
            members = [layer for layer, own in zip(layers, labels, strict=True) if own == label]
            groups += [tuple(members)] if label >= 0 else [(layer,) for layer in members]
    groups.sort()
    return Space(tuple(groups), tuple(surviving[group[0]] for group in groups))


def whole_space(layers: int) -> Space:
    """Return the space of every pair for every layer by itself."""
    return Space(tuple((layer,) for layer in range(layers)), (PAIRS,) * layers)


def search(
    space: Space,
    loss: Callable[[Table], float],
    *,
    trials: int,
    max_bits: float = math.inf,
    sampler: str = "nsga2",
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Trial]:
    """Try tables and return them, each once, in the order of their first try.

    Every table within the cap is tried if there are at most ``trials`` of them. Otherwise an
    optimiser chooses; it minimises bits and loss, with bits above the cap as a violated
    constraint. The same arguments give the same trials; a table costs one call of ``loss``.

    Args:
        space: What there is to choose.
        loss: Table -> accuracy lost.
        trials: Most tries.
        max_bits: Soft cap of the mean bits.
        sampler: ``nsga2`` or ``tpe``.
        seed: Of the optimiser.
        progress: Gets the number of tries done.
    """
    tried: dict[Table, Trial] = {}

    def attempt(table: Table) -> Trial:
        if table not in tried:
            tried[table] = Trial(table, average_bits(table), loss(table))
        return tried[table]

    few = _at_most(space, trials, max_bits)
    if few is not None:
        for done, table in enumerate(few, start=1):
            attempt(table)
            progress(done)
        return list(tried.values())
    study = _study(sampler, seed)
    names = [{f"{k},{v}": (k, v) for k, v in pairs} for pairs in space.choices]
    for done in range(1, trials + 1):
        asked = study.ask()
        chosen = [
            pairs[asked.suggest_categorical(f"group{index}", list(pairs))]
            for index, pairs in enumerate(names)
        ]
        trial = attempt(space.expand(chosen))
        if math.isfinite(max_bits):
            asked.set_constraint("bits", trial.bits - max_bits)
        study.tell(asked, (trial.bits, trial.loss))
        progress(done)
    return list(tried.values())


def _at_most(space: Space, count: int, max_bits: float) -> list[Table] | None:
    """Return the tables within the cap if they are at most ``count``."""
    if space.size > 1000 * count:  # do not even look at them all
        return None
    within = (table for table in space.tables() if average_bits(table) <= max_bits)
    found = list(itertools.islice(within, count + 1))
    return found if len(found) <= count else None


def _study(sampler: str, seed: int) -> Any:
    try:
        import optuna
    except ImportError as error:
        raise MissingResource("kvtuner: the search needs optuna; pip install optuna") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # says of some options that they are new
        kinds = {"nsga2": optuna.samplers.NSGAIISampler, "tpe": optuna.samplers.TPESampler}
        chosen = kinds[sampler](seed=seed)
    return optuna.create_study(directions=["minimize", "minimize"], sampler=chosen)


def front(trials: Iterable[Trial]) -> list[Trial]:
    """Return the trials that no other beats in both bits and loss, by rising bits."""
    kept: list[Trial] = []
    for trial in sorted(trials, key=lambda trial: (trial.bits, trial.loss, trial.table)):
        if not kept or trial.loss < kept[-1].loss:
            kept.append(trial)
    return kept


def pick(trials: Iterable[Trial], max_bits: float) -> Trial | None:
    """Return the trial of the least loss within the cap, of several the one of fewest bits."""
    within = [trial for trial in front(trials) if trial.bits <= max_bits]
    return within[-1] if within else None


class Journal:
    """Losses that were computed before, in a file: a killed search goes on from there.

    The optimiser is deterministic, so a search that is started again makes the same choices and
    reads its known losses instead of computing them.

    Args:
        path: JSON lines; None to keep nothing.
        identity: What the losses depend on; those of another identity are not read.
    """

    def __init__(self, path: Path | None, identity: str) -> None:
        self.path, self.identity = path, identity
        self._known: dict[Table, float] = {}
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                self._read(line)

    def _read(self, line: str) -> None:
        try:
            entry = json.loads(line)
        except ValueError:  # torn by a kill; computed again
            return
        if entry["identity"] == self.identity:
            self._known[tuple(tuple(pair) for pair in entry["table"])] = entry["loss"]

    def loss(self, table: Table, compute: Callable[[Table], float]) -> float:
        """Return the loss of a table, computed and written down if it is not known."""
        if table not in self._known:
            self._known[table] = compute(table)
            if self.path is not None:
                entry = {"identity": self.identity, "table": table, "loss": self._known[table]}
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as stream:
                    # The line before may be torn: it must not take this one with it.
                    stream.write(f"\n{json.dumps(entry)}\n")
        return self._known[table]
