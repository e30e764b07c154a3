"""Latency cells on a tiny subject with a stand-in method; no assertion on times."""

from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from repro import prompts, timing
from repro.errors import UnsupportedCombination
from repro.measurements import latency
from repro.measurements.latency import LatencyOptions, cell, work
from repro.method import Method, Patch
from repro.testing import cell_context, tiny_subject


@dataclass(frozen=True)
class WindowConfig:
    recent_size: int = 64


class WindowPatch(Patch):
    def __init__(self):
        self.calls = 0

    def stats(self):
        return {
            "density": 0.5,
            "decode_density": 0.75,
            "selection_seconds": 1e-6 * self.calls,
            "fallback_share": 0.0,
        }

    def reset(self):
        self.calls = 0


@contextmanager
def window(subject, config, artifact=None):
    """A stand-in: every query sees the first keys only, so that outputs differ from dense."""
    from repro.operator_inputs import wrapped_attention

    patch = WindowPatch()

    def wrap(inner):
        def attention(module, q, k, v, mask, **options):
            patch.calls += 1
            size = min(config.recent_size, k.shape[2]) if q.shape[2] > 1 else k.shape[2]
            options.pop("is_causal", None)
            n_rep = q.shape[1] // k.shape[1]
            k, v = (x[:, :, :size].repeat_interleave(n_rep, 1) for x in (k, v))
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            return out.transpose(1, 2), None

        return attention

    with wrapped_attention(subject.model, "repro_standin", wrap):
        yield patch


METHOD = Method(
    slug="standin",
    title="Stand-in",
    arxiv="",
    kind="attention",
    config=WindowConfig,
    apply=window,
)


@pytest.fixture(scope="module")
def subject():
    return tiny_subject()


@pytest.fixture
def trained(subject):
    """The same weights, claimed to be trained: only names change."""
    return replace(subject, info=replace(subject.info, trained=True), extra={})


def run(subject, method=METHOD, **options):
    chosen = LatencyOptions(**({"lengths": (256,), "min_seconds": 0.02} | options))
    (values,) = latency.expand(chosen)
    context = cell_context(subject, values, method=method, config=WindowConfig())
    return latency.run(context)


@pytest.mark.parametrize("phase", ["prefill", "decode", "end_to_end"])
def test_model_phases_give_the_full_record(subject, phase):
    body = run(subject, phases=(phase,), new_tokens=3)
    assert body["status"] in ("ok", "invalid") and "output check" not in body["message"]
    metrics = body["metrics"]
    assert set(metrics) == {"ratio", "dense_ms", "method_ms", "density", "selection_ms"}
    assert metrics["ratio"]["low"] <= metrics["ratio"]["value"] <= metrics["ratio"]["high"]
    assert metrics["density"]["value"] == (0.75 if phase == "decode" else 0.5)
    told = body["explanation"]
    assert 0 < told["attention_share"] <= 1
    share = told["attention_share"]
    kept = share * told["density"]
    assert told["amdahl_bound"] == pytest.approx(1 / ((1 - share) + kept), rel=1e-2)
    assert told["roofline_bound"] > 0 and 0 < told["selection_share"]
    assert told["peak_tflops"] > 0
    assert len(body["raw"]["dense_ms"]) == len(body["raw"]["method_ms"]) >= 10


@pytest.mark.parametrize("inputs", ["gaussian", "structured"])
def test_attention_phase_names_its_inputs(subject, inputs):
    body = run(subject, phases=("attention",), inputs=(inputs,))
    assert "output check" not in body["message"]
    assert body["explanation"]["attention_share"] == 1.0
    assert body["explanation"]["amdahl_bound"] == pytest.approx(2.0)
    word = {"gaussian": "normal", "structured": "stripes"}[inputs]
    assert word in body["explanation"]["notes"][0]


def test_attention_phase_on_captured_inputs(trained):
    body = run(trained, phases=("attention",), inputs=("captured",))
    assert body["raw"]["inputs"].startswith("captured from layers 0, 1")


def test_captured_inputs_of_random_weights_are_refused(subject):
    with pytest.raises(UnsupportedCombination, match="weights are random"):
        run(subject, phases=("attention",))


def test_paper_protocol_times_dense_without_the_mask(subject):
    body = run(subject, phases=("attention",), inputs=("gaussian",), protocols=("paper",))
    assert body["explanation"]["amdahl_bound"] == pytest.approx(4.0)
    assert any("without the causal mask" in note for note in body["explanation"]["notes"])
    options = {"phase": "attention", "length": 64, "inputs": "gaussian", "batch": 1}
    outputs = []
    for protocol in ("fair", "paper"):
        made = work.make_work(cell_context(subject, options | {"protocol": protocol}))
        outputs.append(made.dense_call(Patch(), made.pool[0], None))
    # The last query sees every key either way, the first does not.
    torch.testing.assert_close(outputs[0][:, -1], outputs[1][:, -1])
    assert not torch.allclose(outputs[0][:, 0], outputs[1][:, 0])


def test_the_operator_is_what_the_model_runs(subject):
    """Captured q, k, v through the operator give the output that the layer computed."""
    from repro.operator_inputs import capture, wrapped_attention

    ids = torch.arange(100)[None] % 512
    (item,) = capture(subject, ids, [1], source="counting")
    seen = {}

    def wrap(inner):
        def watch(module, *arguments, **options):
            result = inner(module, *arguments, **options)
            seen[module.layer_idx] = result[0]
            return result

        return watch

    with wrapped_attention(subject.model, "repro_watch", wrap), torch.inference_mode():
        subject.model(ids, use_cache=False)
    options = {"phase": "attention", "length": 100, "inputs": "gaussian", "protocol": "fair"}
    made = work.make_work(cell_context(subject, options | {"batch": 1}))
    assert torch.equal(made.call(Patch(), item, None), seen[1])


def test_dense_cell_is_compared_with_itself(subject):
    body = run(subject, method=None)
    assert "density" not in body["metrics"] and body["patch"] == {}
    assert body["explanation"]["density"] is None


def test_timing_leaves_the_model_as_it_was(subject):
    ids = torch.arange(64)[None]
    before = subject.model(ids).logits
    config = subject.model.config.to_dict()
    run(subject, phases=("decode",), new_tokens=2)
    assert torch.equal(subject.model(ids).logits, before)
    assert subject.model.config.to_dict() == config


def test_a_stale_output_is_found(subject):
    made = work.make_work(cell_context(subject, latency.expand(LatencyOptions(lengths=(64,)))[0]))
    arm = cell._PatchedArm("dense", made, made.call, lambda: window(subject, WindowConfig()))
    check = cell._OutputCheck({"dense": arm}, made)
    with torch.inference_mode():
        assert check("dense", 0, arm.once(made.pool[0])) is None
        assert "differs by" in check("dense", 1, arm.once(made.pool[0]))
        assert "not finite" in check("dense", 0, arm.once(made.pool[0]) * float("nan"))


def test_drift_stamps_the_record_invalid(subject, monkeypatch):
    real = timing.compare

    def drifting(*arms, **options):
        result = real(*arms, **options)
        result.status, result.message = "invalid", "drift: made up"
        return result

    monkeypatch.setattr(timing, "compare", drifting)
    body = run(subject)
    assert body["status"] == "invalid" and body["message"] == "drift: made up"


def test_positions_of_the_model_are_respected():
    small = tiny_subject(positions=128)
    with pytest.raises(UnsupportedCombination, match="exceed the 128 positions"):
        run(small, phases=("end_to_end",), lengths=(120,), new_tokens=16)


def test_made_inputs_may_be_longer_than_the_model():
    options = LatencyOptions(phases=("attention",), lengths=(256,), inputs=("gaussian",))
    (values,) = latency.expand(options)
    made = work.make_work(cell_context(tiny_subject(positions=128), values))
    assert made.pool[0].q.shape[2] == 256


def test_operator_of_another_kind_of_method_is_refused(subject):
    with pytest.raises(UnsupportedCombination, match="kind linear"):
        run(subject, method=replace(METHOD, kind="linear"), phases=("attention",))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"phases": ("prefil",)}, "phases must be one or more different of prefill"),
        ({"phases": ()}, "got none"),
        ({"lengths": (64, 64)}, "lengths must be"),
        ({"lengths": (8,)}, "lengths must be"),
        ({"inputs": ("noise",)}, "inputs must be"),
        ({"protocols": ("fair", "fair")}, "protocols must be"),
        ({"blocks": 5}, "blocks must be at least 10, got 5"),
        ({"new_tokens": 1}, "new_tokens must be at least 2"),
        ({"min_seconds": float("nan")}, "min_seconds must be"),
    ],
)
def test_options_validate_themselves(change, text):
    with pytest.raises(ValueError, match=text):
        LatencyOptions(**change)


@given(
    phases=st.lists(st.sampled_from(latency.PHASES), min_size=1, unique=True),
    lengths=st.lists(st.integers(16, 10**6), min_size=1, max_size=4, unique=True),
    inputs=st.lists(st.sampled_from(latency.INPUTS), min_size=1, unique=True),
    protocols=st.lists(st.sampled_from(latency.PROTOCOLS), min_size=1, unique=True),
)
def test_expand_gives_each_combination_once(phases, lengths, inputs, protocols):
    options = LatencyOptions(
        phases=tuple(phases),
        lengths=tuple(lengths),
        inputs=tuple(inputs),
        protocols=tuple(protocols),
    )
    cells = latency.expand(options)
    assert len({tuple(sorted(found.items())) for found in cells}) == len(cells)
    operator = len(inputs) * len(protocols) if "attention" in phases else 0
    others = len(set(phases) - {"attention"})
    assert len(cells) == len(lengths) * (operator + others)


def test_prompts_are_exact_repeatable_and_named(subject):
    first, source = prompts.timing_prompts(subject, length=300, batch=2, count=3)
    assert [tuple(p.shape) for p in first] == [(2, 300)] * 3
    assert source == "random token ids with recurring stretches"
    subject.extra.clear()
    again, _ = prompts.timing_prompts(subject, length=300, batch=2, count=3)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({tuple(p[0].tolist()) for p in first}) == 3
