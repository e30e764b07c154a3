"""Laws of the queue: every cell once, chains in order, a model loads as seldom as can be."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repro.plan import PlannedCell
from repro.scheduling import Queue


def cell(subject, family, length, seconds):
    return PlannedCell(
        key=f"{subject}-{family}-{length}",
        cell={"subject": subject, "family": f"{subject}/{family}", "length": length},
        estimate_seconds=seconds,
    )


def queue(cells, *, longest_first=True):
    return Queue(cells, chain_of=lambda c: c.cell["family"], longest_first=longest_first)


cells_of_a_plan = st.lists(
    st.tuples(st.sampled_from("ab"), st.integers(0, 4), st.integers(1, 9), st.floats(0, 100)),
    max_size=30,
    unique_by=lambda entry: entry[:3],
).map(lambda entries: [cell(*entry) for entry in sorted(entries)])


@settings(deadline=None, max_examples=60)
@given(cells=cells_of_a_plan, workers=st.integers(1, 5), seed=st.integers(0, 99))
def test_every_cell_is_taken_once_though_workers_die(cells, workers, seed):
    rng = random.Random(seed)
    waiting, busy, done = queue(cells), {}, []
    while len(done) < len(cells):
        for worker in range(workers):
            if worker not in busy and (taken := waiting.take(None)) is not None:
                busy[worker] = taken
        worker = rng.choice(sorted(busy))
        taken = busy.pop(worker)
        if rng.random() < 0.3:
            waiting.put_back(taken)
        else:
            done.append(taken.key)
            waiting.release(taken)
    assert sorted(done) == sorted(c.key for c in cells)
    assert len(waiting) == 0 and waiting.take("a") is None


def test_one_chain_stays_on_one_worker_as_long_as_there_is_other_work():
    cells = [cell("a", family, length, length) for family in (1, 2) for length in (1, 2, 3)]
    waiting = queue(cells)
    first, second = waiting.take(None), waiting.take("a")
    assert {c.cell["family"] for c in (first, second)} == {"a/1", "a/2"}
    waiting.release(first)
    third = waiting.take("a")
    assert (third.cell["family"], third.cell["length"]) == (first.cell["family"], 2)
    # A third worker has nothing but the rest of a chain that is being run.
    assert waiting.take("a").cell["length"] in (2, 3)


@pytest.mark.parametrize(("longest_first", "order"), [(True, [3, 2, 1]), (False, [1, 2, 3])])
def test_order_of_chains(longest_first, order):
    waiting = queue([cell("a", n, 1, n) for n in (1, 2, 3)], longest_first=longest_first)
    taken = []
    while (now := waiting.take("a")) is not None:
        taken.append(now.estimate_seconds)
        waiting.release(now)
    assert taken == order


def test_a_worker_keeps_its_subject_until_nothing_is_left_of_it():
    waiting = queue([cell(s, n, 1, 10 if s == "b" else 1) for s in "ab" for n in range(3)])
    held, subjects = "a", []
    while (now := waiting.take(held)) is not None:
        held = now.cell["subject"]
        subjects.append(held)
    assert "".join(subjects) == "aaabbb"


def test_a_fresh_worker_takes_the_subject_with_the_most_work():
    waiting = queue([cell("a", 1, 1, 5), cell("b", 1, 1, 3), cell("b", 2, 1, 3)])
    assert waiting.take(None).cell["subject"] == "b"


def test_what_is_put_back_comes_before_the_rest_of_its_chain():
    waiting = queue([cell("a", 1, length, 1) for length in (1, 2)])
    first = waiting.take("a")
    waiting.put_back(first)
    assert len(waiting) == 2
    assert waiting.take("a") is first


def test_the_given_order_holds_over_all_subjects():
    given = [cell(subject, n, 1, 9 * n) for n in (1, 2) for subject in "ab"]
    waiting = queue(given, longest_first=False)
    taken, held = [], None
    while (one := waiting.take(held)) is not None:
        taken.append(one)
        held = one.cell["subject"]
        waiting.release(one)
    assert taken == given


def test_in_the_given_order_a_chain_does_not_run_ahead():
    # A budget may end any time: the comparison of short cells comes before long cells of one arm.
    given = [
        cell("a", family, length, 1.0) for length in (1, 2, 3) for family in ("dense", "method")
    ]
    waiting = queue(given, longest_first=False)
    taken = []
    while (one := waiting.take("a")) is not None:
        taken.append(one)
        waiting.release(one)
    assert taken == given
