"""Figures of calibrations: from an artifact's metadata to the page."""

import pytest

from repro.claims import for_method
from repro.figures import curve, heatmap
from repro.report import page
from repro.report.testing import record

GATES = heatmap(
    "Gates", [[0.0, 1.0], [0.5, 0.25]], row="layer", column="KV head", label="gate", limits=(0, 1)
)
FRONT = curve("Front", {"tried": [(2, 0.5), (4, 0.1), (3, 0.9)], "front": []}, x="bits", y="loss")


def built(*records, images=True):
    return page.build(for_method("xattention"), "embedded", list(records), images=images)


def measured(threshold, figures):
    config = {"threshold": threshold, "control": "none"}
    metrics = {"loss": {"value": 1.0, "low": None, "high": None, "n": 1, "unit": ""}}
    options = {"length": 64}
    return record("perplexity", options, config=config, metrics=metrics, figures=figures)


def test_each_is_drawn_once_in_its_section():
    other = {**GATES, "values": [[1.0]]}
    made = built(
        measured(0.9, [GATES, FRONT]), measured(0.4, [GATES, FRONT]), measured(0.5, [other])
    )
    (section,) = [s for s in made.machines[0].sections if s.title == "Calibration"]
    assert len(section.plots) == 3
    assert set(section.plots) <= set(made.machines[0].images)
    assert all(made.machines[0].images[file][:4] == b"\x89PNG" for file in section.plots)
    text = made.markdown()
    assert text.count("Gates](plots/") == 2 and text.count("Front](plots/") == 1


def test_the_bytes_depend_on_the_figure_alone():
    first, second = (built(measured(0.9, [GATES, FRONT])).machines[0].images for _ in range(2))
    assert first == second


def test_without_figures_there_is_no_section():
    for made in (built(measured(0.9, [])), built(measured(0.9, [GATES]), images=False)):
        assert "Calibration" not in [section.title for section in made.machines[0].sections]


def test_a_kind_that_this_version_does_not_know_is_left_out():
    made = built(measured(0.9, [{"kind": "hologram", "title": "x"}]))
    assert made.machines[0].images == {}
    assert "Calibration" not in made.markdown()


def test_a_large_matrix_is_drawn_too():
    values = [[float(row * column) for column in range(40)] for row in range(64)]
    figure = heatmap("Large", values, row="layer", column="head", label="x")
    assert len(built(measured(0.9, [figure])).machines[0].images) == 1


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match=r"rows must be equally long, none empty, got \[1, 2\]"):
        heatmap("x", [[1.0], [1.0, 2.0]], row="", column="", label="")
    with pytest.raises(ValueError, match="joined must name series, got b"):
        curve("x", {"a": []}, x="", y="", joined=["b"])
