import numpy as np

from repro.evidence import Evidence


def record(control, draw, samples, scores, *, slug="m"):
    config = {"stride": 8, "control": control, "draw": draw} if slug != "dense" else {}
    return {
        "cell": {
            "subject": "s",
            "method": {"slug": slug, "config": config},
            "measurement": {"name": "ruler", "options": {"task": "t", "samples": samples}},
        },
        "status": "ok",
        "items": {"keys": [f"k{i}" for i in range(len(scores))], "scores": scores},
    }


def test_controls_on_fewer_items_are_paired_by_item():
    method = record("none", 0, 4, [1.0, 1.0, 0.0, 1.0])
    dense = record("none", 0, 4, [1.0, 1.0, 1.0, 1.0], slug="dense")
    draws = [record("random", draw, 2, [0.0, float(draw)]) for draw in range(2)]
    found = Evidence([dense, method, *draws])
    deltas = found.minus_control([method], "random")
    assert np.array_equal(deltas, [[1.0, 1.0], [1.0, 0.0]])
    [(before, after)] = found.pairs([draws[0]])
    assert (before.tolist(), after.tolist()) == ([1.0, 1.0], [0.0, 0.0])


def test_a_draw_that_saw_fewer_items_than_the_others_is_left_out():
    method = record("none", 0, 4, [1.0] * 4)
    draws = [record("random", draw, 2 + draw, [0.0] * (2 + draw)) for draw in range(2)]
    found = Evidence([method, *draws]).minus_control([method], "random")
    assert np.array_equal(found, [[1.0, 1.0, 1.0]])


def test_the_larger_dense_cell_is_taken():
    dense = [record("none", 0, n, [1.0] * n, slug="dense") for n in (2, 4, 3)]
    method = record("none", 0, 4, [1.0] * 4)
    assert len(Evidence([*dense, method]).dense_of(method)["items"]["keys"]) == 4
