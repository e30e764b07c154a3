import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repro import budget, executors, manifest, measurements, runner
from repro.budget import Allowance, Budget
from repro.errors import BadInput
from repro.plan import PlannedCell, make_plan
from repro.progress import Quiet

PARTS = {"measurements": "[{noop: {tasks: [ok, nan], items: 40}}]"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", Budget(90)),
        ("90s", Budget(90)),
        ("10m", Budget(600)),
        ("1.5h", Budget(5400)),
        ("2gpu-h", Budget(7200, of_gpus=True)),
        ("0.5 gpu-min", Budget(30, of_gpus=True)),
    ],
)
def test_durations(text, expected):
    assert budget.parse(text) == expected


@pytest.mark.parametrize("text", ["", "0m", "ten", "5d", "-3s", "2gpuh", "gpu-h"])
def test_bad_durations(text):
    with pytest.raises(BadInput, match="--budget: the budget must be a duration above 0"):
        budget.parse(text)


def test_gpu_time_needs_gpus(plugins, write_manifest, tmp_path):
    with pytest.raises(BadInput, match="where a run has no GPU, such as 10m, got GPU time on cpu"):
        runner.run(write_manifest(), profile="p", runs=tmp_path, device="cpu", budget="2gpu-h")


def noop():
    return measurements.get("noop")


@pytest.fixture
def make(plugins, write_manifest, monkeypatch):
    """Plans of 4 cells of 40 items that are estimated at a second each."""
    measurement = noop()
    monkeypatch.setitem(
        vars(measurement), "estimate_seconds", lambda options, info: float(options["items"])
    )
    checked = manifest.load(write_manifest(**PARTS))
    return lambda items=None: make_plan(checked, "p", device="cpu", items=items)


@given(seconds=st.floats(1, 1000))
def test_as_many_items_as_fit(seconds):
    def plan(items):
        cells = [PlannedCell(key=str(i), cell={}, estimate_seconds=items) for i in range(4)]
        return type("Plan", (), {"cells": cells})()

    found = budget.fit(plan, seconds, largest=40)
    steps = [*(items for items in budget.LADDER if items < 40), 40]
    assert found in steps
    assert 4 * found <= seconds or found == steps[0]
    assert all(4 * items > seconds for items in steps if items > found)


def test_a_cell_asks_at_most_so_many_items(make):
    assert [cell.items for cell in make().cells] == [40] * 4
    fewer = make(16)
    assert [cell.items for cell in fewer.cells] == [16] * 4
    assert all(cell.cell["measurement"]["options"]["items"] == 16 for cell in fewer.cells)
    assert {cell.key for cell in fewer.cells}.isdisjoint(cell.key for cell in make().cells)
    assert [cell.key for cell in make(99).cells] == [cell.key for cell in make().cells]


@pytest.fixture
def run(make, write_manifest, tmp_path, capsys):
    def call(text, **options):
        outcome = runner.run(
            write_manifest(**PARTS),
            profile="p",
            runs=tmp_path / "runs",
            device="cpu",
            quiet=True,
            budget=text,
            **options,
        )
        items = {len(record["items"]["keys"]) for record in outcome.records if "items" in record}
        return items, outcome.counts, capsys.readouterr().err

    return call


def test_a_run_asks_what_fits_and_says_what_that_shows(run):
    items, counts, said = run("75s")  # nine tenths of it for 4 cells: 16 items
    assert (items, counts) == ({16}, {"ok": 2, "numerical": 2})
    assert "budget: the first 16 of 40 items a cell (subset first-16-of-40-" in said
    # Two of 16 pairs differ: 0.365 of spread, and six flips one way are what exact McNemar needs.
    assert "a difference of 37.5 points in a task and of " in said


def test_the_subset_is_settled_with_the_run(run, tmp_path):
    assert run("75s")[0] == {16}
    (path,) = (tmp_path / "runs").rglob("cpu.subset")
    name = json.loads(path.read_text())["name"]
    # Now that its pace is known, more would fit; that would be choosing after seeing results.
    items, counts, said = run("10h")
    assert (items, counts) == ({16}, {"cached": 4})
    assert name in said
    assert run("10h", fresh=True)[0] == {40}
    assert run("75s")[:2] == ({40}, {"cached": 4})


def test_some_cells_alone_do_not_settle_the_subset_of_all(run, tmp_path):
    assert run("75s", only="noop ok")[0] == {16}
    assert run("10h", only="noop ok", fresh=True)[0] == {16}


def test_a_manifest_that_asks_for_less_lowers_nothing_for_later(make, write_manifest, tmp_path):
    from repro.store import RunStore

    def plan(items):
        path = write_manifest(measurements=f"[{{noop: {{tasks: [ok, nan], items: {items}}}}}]")
        checked = manifest.load(path)
        made = lambda most=None: make_plan(checked, "p", device="cpu", items=most)
        said = []
        options = {"store": RunStore(tmp_path / "runs"), "machine": "m", "say": said.append}
        cells = budget.choose(made, Budget(75), **options).cells
        return {cell.items for cell in cells}, len(said)

    assert [plan(items) for items in (40, 10, 40)] == [({16}, 1), ({10}, 0), ({16}, 1)]


def test_an_unreadable_subset_is_settled_anew(run, tmp_path):
    run("75s")
    (path,) = (tmp_path / "runs").rglob("cpu.subset")
    path.write_text("{torn")
    run("10h")
    assert json.loads(path.read_text())["items"] == 40


def test_without_a_budget_everything_is_asked(run):
    run("75s")
    assert run(None) == ({40}, {"ok": 2, "numerical": 2}, "")


def test_subsets_are_named_by_what_they_hold(make):
    first, same, other = (budget._subset(make(n), n, 40) for n in (16, 16, 20))
    assert first == same
    assert first.name.startswith("first-16-of-40-") and first.name != other.name
    assert first.in_the_mean < first.in_a_task


def test_pace_is_what_was_measured(run, make, tmp_path):
    from repro.store import RunStore

    store = RunStore(tmp_path / "runs")
    assert budget.pace_of(store, make(), "nowhere") == 1.0
    run("10h")
    (machine,) = {path.parent.name for path in (tmp_path / "runs").rglob("record.json")}
    # 40 estimated seconds take a few milliseconds; NaN cells are no measure.
    assert 0 < budget.pace_of(store, make(), machine) < 0.01


class TestAllowance:
    def test_of_the_clock(self, monkeypatch):
        clock = iter([100.0, 130.0, 170.0])
        monkeypatch.setattr(budget.time, "monotonic", lambda: next(clock))
        allowance = Allowance(Budget(60), _began=budget.time.monotonic())
        allowance.reserve("a", 1000.0)
        assert [allowance.left(), allowance.left()] == [30.0, -10.0]

    def test_of_gpus_counts_what_all_workers_take(self):
        allowance = Allowance(Budget(100, of_gpus=True))
        allowance.reserve("a", 40.0)
        allowance.reserve("b", 40.0)
        assert allowance.left() == 20.0
        allowance.spend("a", 10.0)
        assert allowance.left() == 50.0
        # A second try of a cell does not compete with its own first one.
        allowance.spend("b", 15.0)
        allowance.reserve("b", 40.0)
        assert allowance.left() == 35.0

    @pytest.mark.parametrize(
        ("gpus", "alone", "held"), [(2, False, 2), (0.25, False, 0.25), (0.25, True, 1)]
    )
    def test_a_session_reserves_and_spends_what_a_cell_holds(self, make, gpus, alone, held):
        plan = dataclasses.replace(make(), device="cuda", resources={"gpus": gpus})
        measurement = noop()
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(vars(measurement), "alone", alone)
            allowance = Allowance(Budget(100, of_gpus=True))
            session = executors.Session(plan, (), None, {}, Quiet(), allowance=allowance)
            planned = dataclasses.replace(plan.cells[0], estimate_seconds=30.0)
            assert not session.settled_without_running(planned)
            assert allowance.left() == 100 - 30 * held
            session.finish(planned, {"status": "ok", "seconds": 45.0, "environment": {}})
            assert allowance.left() == 100 - 45 * held and session.pace() == 1.5
