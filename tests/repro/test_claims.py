"""Claims: the schema with file:line, the expansion of rows, and every number of XAttention."""

import pytest

from repro import claims
from repro.errors import BadInput

HEAD = "paper: demo\ntitle: Demo\nclaims:\n"
ROW = """  - id: speed
    what: speed-up
    unit: x
    model: M
    source: table 1
    direction: at_least
    needs: a GPU
    each: options.length
    values: [{at: 8192, value: 1.7}, {at: 16384, value: 2.2, where: {config: {stride: 4}}}]
    query: {measurement: latency, metric: ratio, config: {stride: 8}, options: {phase: attention}}
"""


def write(tmp_path, text):
    path = tmp_path / "paper.yaml"
    path.write_text(text)
    return path


def test_a_row_becomes_one_claim_per_value(tmp_path):
    first, second = claims.load(write(tmp_path, HEAD + ROW)).claims
    assert (first.id, first.value, first.at) == ("speed@8192", 1.7, "8192")
    assert first.query.options == {"phase": "attention", "length": 8192}
    assert first.query.config == {"stride": 8}
    assert first.query.method == "demo"
    assert second.query.config == {"stride": 4}
    assert second.where.endswith("paper.yaml:12")


def test_defaults_reach_every_row_and_null_takes_them_out(tmp_path):
    text = (
        "paper: demo\ntitle: Demo\n"
        "defaults: {model: M, unit: x, query: {measurement: latency, device: cuda}}\n"
        "claims:\n"
        "  - {id: a, what: w, source: s, values: [{value: 1}], query: {metric: ratio}}\n"
        "  - {id: b, what: w, source: s, values: [{value: 1}], needs: n, query: null}\n"
    )
    first, second = claims.load(write(tmp_path, text)).claims
    assert (first.query.device, first.query.metric) == ("cuda", "ratio")
    assert second.query is None and second.needs == "n"


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("direction: at_least", "direction: more", 9, "'at_least', 'at_most', 'equal' or 'holds'"),
        ("    unit: x\n", "", 4, "unit must be given"),
        ("    unit: x\n", "    units: x\n    unit: x\n", 6, "did you mean unit"),
        ("value: 1.7", "value: fast", 12, "number"),
        ("metric: ratio", "metrics: ratio", 13, "did you mean metric"),
        ("each: options.length", "each: length", 11, "each"),
        ("direction: at_least", "direction: holds", 4, "holds needs margin and min_items"),
        ("needs: a GPU", "needs: a GPU\n    tolerance: 1.5", 11, "less than 1"),
        ("at: 16384", "at: 8192", 12, "unique"),
        ("    values: [", "    values: []\n    note: [", 12, "note"),
    ],
)
def test_faults_carry_file_and_line(tmp_path, old, new, line, said):
    assert old in ROW
    path = write(tmp_path, HEAD + ROW.replace(old, new, 1))
    with pytest.raises(BadInput) as caught:
        claims.load(path)
    text = str(caught.value)
    assert said in text
    assert f"{path}:{line}: " in text


def test_all_faults_come_at_once(tmp_path):
    bad = ROW.replace("unit: x", "unit: [1]").replace("value: 1.7", "value: fast")
    with pytest.raises(BadInput) as caught:
        claims.load(write(tmp_path, HEAD + bad))
    assert len(caught.value.faults) == 2


def test_a_file_of_another_form_is_refused(tmp_path):
    with pytest.raises(BadInput, match="paper.yaml:1"):
        claims.load(write(tmp_path, "- just\n- a list\n"))
    with pytest.raises(BadInput, match="title must be given"):
        claims.load(write(tmp_path, "paper: demo\nclaims: []\n"))


def test_a_method_without_claims_has_none():
    assert claims.for_method("no_such_method").claims == ()


# Every number of the sheet, by row: how many, and a checksum of their values.
XATTENTION_ROWS = {
    "speedup_headline": (2, 27.0),
    "speedup_s8": (6, 28.3),
    "speedup_s8_fair": (6, 28.3),
    "speedup_s16": (6, 42.7),
    "speedup_s16_fair": (6, 42.7),
    "time_split": (9, 259.9),
    "search_speedup": (2, 30.8),
    "ruler_dense": (7, 612.69),
    "ruler_s8": (7, 619.68),
    "ruler_s16": (7, 616.57),
    "ruler_baselines": (3, 244.05),
    "density_s4": (6, 156.84),
    "density_s8": (6, 162.26),
    "density_s16": (6, 174.41),
    "ablation_threshold_score": (6, 523.74),
    "ablation_threshold_density": (6, 147.54),
    "ablation_stride_score": (4, 346.65),
    "ablation_stride_density": (4, 109.87),
    "ablation_pattern_score_32k": (3, 249.75),
    "ablation_pattern_score": (3, 252.01),
    "ablation_pattern_density": (3, 73.01),
    "ablation_selection_score": (1, 88.47),
    "ablation_selection_density": (1, 20.97),
    "ablation_selection_others_score": (2, 169.55),
    "ablation_selection_others_density": (2, 40.92),
    "longbench": (2, 81.86),
    "longbench_baselines": (2, 73.1),
    "videomme_overall": (8, 527.1),
    "videomme_long": (4, 231.3),
    "video_psnr": (2, 45.0),
    "video_ssim": (2, 1.589),
    "video_lpips": (2, 0.37),
    "video_density": (2, 79.9),
}


def test_xattention_has_every_number():
    paper = claims.for_method("xattention")
    rows = {}
    for claim in paper.claims:
        if not claim.proxy:
            rows.setdefault(claim.row, []).append(claim.value)
    assert set(rows) == set(XATTENTION_ROWS)
    for name, values in rows.items():
        count, total = XATTENTION_ROWS[name]
        assert (len(values), round(sum(values), 3)) == (count, total), name


def test_xattention_marks_what_has_no_hardware_as_unconfirmed():
    for claim in claims.for_method("xattention").claims:
        if claim.hardware == "not stated" and not claim.proxy:
            assert claim.proxy or not claim.confirmed or claim.query is None, claim.id


def test_xattention_proxies_ask_for_enough_items():
    for claim in claims.for_method("xattention").claims:
        if claim.proxy and claim.query.compare == "minus_dense":
            assert claim.direction == "holds" and claim.min_items >= 100
        assert claim.needs
