"""Memory cells: known allocations are seen, dense and method are kept apart."""

import contextlib

import pytest
import torch

from repro.errors import UnsupportedCombination
from repro.measurements import memory
from repro.measurements.memory import MemoryOptions
from repro.method import Method, Patch
from repro.testing import cell_context, tiny_subject

MIB = 1 << 20


@contextlib.contextmanager
def hungry(subject, config=None, artifact=None):
    """A stand-in method that touches 64 MiB more in every forward pass of more than one token."""

    def allocate(module, arguments, options):
        if options["input_ids"].shape[1] > 1:
            torch.ones(64 * MIB // 4)

    handle = subject.model.register_forward_pre_hook(allocate, with_kwargs=True)
    try:
        yield Patch()
    finally:
        handle.remove()


METHOD = Method(
    slug="hungry", title="Hungry", arxiv="", kind="attention", config=object, apply=hungry
)


@pytest.fixture(scope="module")
def subject():
    return tiny_subject()


def run(subject, method=METHOD, **options):
    (values,) = memory.expand(MemoryOptions(**({"lengths": (256,), "repeats": 2} | options)))
    return memory.run(cell_context(subject, values, method=method))


def meters():
    yield memory.SamplingMeter()
    best = memory.meter_for(torch.device("cpu"))
    if not isinstance(best, memory.SamplingMeter):
        yield best


@pytest.mark.parametrize("meter", meters(), ids=lambda meter: meter.name)
def test_a_known_allocation_is_seen_and_forgotten(meter):
    idle = meter.current()
    with meter.peak() as peak:
        block = torch.ones(128 * MIB // 4)
        # Long enough for the sampling thread to look.
        for _ in range(20):
            block += 1
        del block
    assert 0.9 * 128 * MIB < peak[0] - idle < 1.5 * 128 * MIB
    assert meter.current() - idle < 32 * MIB
    with meter.peak() as quiet:
        pass
    assert quiet[0] - idle < 32 * MIB


def test_dense_and_method_are_kept_apart(subject):
    body = run(subject)
    metrics = body["metrics"]
    extra = metrics["prefill_peak_bytes"]["value"] - metrics["dense_prefill_peak_bytes"]["value"]
    assert extra > 32 * MIB
    assert metrics["ratio"]["value"] < 1
    assert metrics["decode_peak_bytes"]["value"] < 32 * MIB
    assert body["raw"]["meter"] and len(body["raw"]["dense"]) == 2


def test_weights_are_counted_once_per_tensor(subject):
    expected = sum(t.nbytes for t in (*subject.model.parameters(), *subject.model.buffers()))
    metrics = run(subject, method=None)["metrics"]
    assert metrics["weight_bytes"]["value"] == metrics["dense_weight_bytes"]["value"] == expected


def test_a_method_may_state_its_own_weight_bytes(subject):
    class Packed(Patch):
        def stats(self):
            return {"weight_bytes": 1234}

    method = Method(
        slug="packed",
        title="",
        arxiv="",
        kind="linear",
        config=object,
        apply=lambda *arguments: contextlib.nullcontext(Packed()),
    )
    assert run(subject, method=method)["metrics"]["weight_bytes"]["value"] == 1234


def test_the_model_is_left_as_it_was(subject):
    ids = torch.arange(32)[None]
    before = subject.model(ids).logits
    run(subject)
    assert torch.equal(subject.model(ids).logits, before)


def test_positions_are_respected(subject):
    with pytest.raises(UnsupportedCombination, match="exceed the 32768 positions"):
        run(subject, lengths=(32768,))


@pytest.mark.parametrize("change", [{"lengths": ()}, {"batch": 0}, {"repeats": 0}])
def test_options_validate_themselves(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))} must be"):
        MemoryOptions(**change)


def test_without_the_kernel_file_the_resident_set_is_sampled(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "none" / "clear_refs")
    assert isinstance(memory.meter_for(torch.device("cpu")), memory.SamplingMeter)
