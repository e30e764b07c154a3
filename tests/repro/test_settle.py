"""When a claim is decided: whatever the items that were not asked would give, its verdict stands."""

import functools
import itertools

import numpy as np
import pytest

from repro import settle, statistics, verdict
from repro.evidence import Evidence
from repro.report.testing import CONFIG, scored
from tests.repro.test_verdict import claim

OUTCOMES = (0.0, 0.5, 1.0)
LENGTH = 4096
RESAMPLES = 400


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """The rule holds for any number of resamples, and for few the bootstrap moves about most."""
    monkeypatch.setattr(statistics, "RESAMPLES", RESAMPLES)
    for name in ("stratified_difference", "crossed_interval"):
        fewer = functools.partial(getattr(statistics, name), resamples=RESAMPLES)
        monkeypatch.setattr(statistics, name, fewer)
    # Entry points are read anew at every claim otherwise.
    monkeypatch.setattr(verdict, "_default_config", functools.cache(verdict._default_config))


def cut(record, open_places):
    """Return a record of which some items were not asked."""
    scores = [None if i in open_places else s for i, s in enumerate(record["items"]["scores"])]
    part = {"asked": len(scores) - scores.count(None), "of": len(scores), "scores": scores}
    kept = {name: value for name, value in record.items() if name != "items"}
    return {**kept, "settled": {**part, "keys": record["items"]["keys"]}, "metrics": {}}


def completions(records):
    """Yield every way in which the items that were not asked can end."""
    places = [
        (index, place)
        for index, record in enumerate(records)
        for place, score in enumerate((record.get("settled") or {}).get("scores", ()))
        if score is None
    ]
    for outcome in itertools.product(OUTCOMES, repeat=len(places)):
        given = dict(zip(places, outcome, strict=True))
        whole = []
        for index, record in enumerate(records):
            part = record.get("settled")
            if part:
                scores = [
                    given[index, place] if score is None else score
                    for place, score in enumerate(part["scores"])
                ]
                items = {"keys": part["keys"], "scores": scores}
                record = {n: v for n, v in record.items() if n != "settled"} | {"items": items}
            whole.append(record)
        yield Evidence(whole)


def method_cell(task, scores, control="none", draw=0):
    return scored(task, LENGTH, scores, config={**CONFIG, "control": control, "draw": draw})


def sample(rng, size, level):
    return np.where(rng.random(size) < level, 1.0, rng.choice([0.0, 0.5], size))


def campaign(compare, rng):
    """Return cells of two tasks, three items of one cell not asked, and a mean far or near."""
    sizes = rng.integers(4, 12, 2)
    level, other = rng.choice([0.05, 0.5, 0.95, 1.0], 2)
    found = []
    for task, size in zip(("vt", "cwe"), sizes, strict=True):
        found.append(method_cell(task, sample(rng, size, level)))
        if compare == "minus_dense":
            found.append(scored(task, LENGTH, sample(rng, size, other), method="dense"))
        if compare == "minus_control":
            for draw in range(2):
                found.append(method_cell(task, sample(rng, size, other), "random", draw))
    index = int(rng.integers(len(found)))
    count = len(found[index]["items"]["keys"])
    places = rng.choice(count, size=min(3, count), replace=False).tolist()
    found[index] = cut(found[index], places)
    return found


def claim_near(compare, cells, rng):
    """Return a claim of any kind whose numbers lie about where the cells do."""
    query = {"measurement": "ruler", "metric": "score", "compare": compare}
    world = next(completions(cells))
    judged = verdict.exact_of(claim(query).query, verdict.related_to(claim(query).query, world))
    value = verdict.measure(claim(query).query, judged, world).value + float(rng.normal(0, 25))
    kind = rng.integers(4)
    if kind == 0 and compare != "none":
        return claim(query, direction="holds", margin=abs(value), min_items=1, unit="points")
    direction = str(rng.choice(["at_least", "at_most"]))
    if kind in (0, 1):
        return claim(query, value=value, direction=direction, strict=True, unit="%")
    if kind == 2:
        return claim(query, value=value, direction="equal", points=5.0, unit="%")
    return claim(query, value=value, direction=direction, unit="%")


@pytest.mark.parametrize("compare", ["none", "minus_dense", "minus_control"])
def test_what_is_decided_is_the_verdict_of_every_completion(compare):
    decided = 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        cells = campaign(compare, rng)
        asked = claim_near(compare, cells, rng)
        found = settle.decide(asked, Evidence(cells))
        if found is None:
            continue
        decided += 1
        judged = [verdict.judge(asked, world) for world in completions(cells)]
        assert {one.verdict for one in judged} == {found.verdict}, seed
        values = [one.measured.value for one in judged]
        low, high = found.possible
        assert low == pytest.approx(min(values)) and high == pytest.approx(max(values)), seed
    assert decided >= 15


def test_what_can_not_be_decided_is_decided_by_no_outcome():
    """A cell need not wait for another one that settles nothing for it, however it ends."""
    refused = 0
    for seed in range(120):
        rng = np.random.default_rng(seed)
        cells = campaign("minus_control", rng)
        asked = claim_near("minus_control", cells, rng)
        (now,) = (index for index, record in enumerate(cells) if "settled" in record)
        whole = [index for index in range(len(cells)) if index != now]
        later = int(rng.choice(whole))
        size = len(cells[later]["items"]["keys"])
        cells[later] = cut(cells[later], rng.choice(size, size // 2, replace=False).tolist())
        known = next(completions([cells[now]])).records[0]
        then = [known if index == now else record for index, record in enumerate(cells)]
        if settle.can_be_decided(asked, Evidence(cells), Evidence(then)):
            continue
        refused += 1
        for world in completions([cells[now]]):
            ended = [world.records[0] if i == now else record for i, record in enumerate(cells)]
            assert settle.decide(asked, Evidence(ended)) is None, seed
    assert refused >= 5
