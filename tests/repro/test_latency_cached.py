"""The attention phase of KV-cache methods, with a cache that keeps the latest tokens alone."""

from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch

from repro.errors import UnsupportedCombination
from repro.kv_cache import LayerCache, patched_kv_cache
from repro.kv_pages import PagedStore
from repro.measurements import latency
from repro.measurements.latency import LatencyOptions, cached, work
from repro.method import Method, Patch
from repro.testing import cell_context, tiny_subject


@dataclass(frozen=True)
class LatestConfig:
    kept: int = 64


class Latest(LayerCache):
    """Forgets all but the last tokens of a prompt."""

    def __init__(self, shape, config):
        self.store, self.config, self.seen = PagedStore(shape), config, 0

    def fill(self, sequence, k, v):
        self.seen = k.shape[2]
        self.store.append(*(x[:, :, -self.config.kept :] for x in (k, v)), sequence)

    def prefill(self, sequence, new):
        raise AssertionError("the attention phase must not prefill")

    def decode(self, new):
        self.store.append(new.k, new.v)
        self.seen += 1
        return self.store.attend(new.q, new.scale)[0]

    def observed(self):
        return sum(self.store.lengths), self.seen * len(self.store.lengths)

    def tensors(self):
        return self.store.tensors()


@contextmanager
def latest(subject, config, artifact=None):
    with patched_kv_cache(subject.model, lambda shape: Latest(shape, config)) as patch:
        yield patch


METHOD = Method(
    slug="latest", title="", arxiv="", kind="kv_cache", config=LatestConfig, apply=latest
)


@pytest.fixture(scope="module")
def subject():
    return tiny_subject()


def context(subject, method=METHOD, **options):
    chosen = {"phases": ("attention",), "lengths": (256,), "inputs": ("gaussian",)}
    chosen = LatencyOptions(**(chosen | {"min_seconds": 0.02} | options))
    (values,) = latency.expand(chosen)
    return cell_context(subject, values, method=method, config=LatestConfig())


def test_a_record_like_any_other(subject):
    body = latency.run(context(subject))
    assert "output check" not in body["message"]
    assert set(body["metrics"]) == {"ratio", "dense_ms", "method_ms", "density"}
    density = (64 + cached.STEPS) / 256
    assert body["metrics"]["density"]["value"] == pytest.approx(density)
    assert body["raw"]["per_call_tokens"] == cached.STEPS
    assert "; dense is " in body["raw"]["inputs"]


@pytest.mark.parametrize("batch", [1, 3])
def test_all_dense_ways_are_dense_attention(subject, batch, monkeypatch):
    outs = []
    for place in range(3):
        monkeypatch.setattr(cached, "_fastest", lambda calls, *_, place=place: calls[place])
        with torch.inference_mode():
            made = work.make_work(context(subject, batch=batch))
            layers = made.pool[0]
            outs.append(made.dense_call(Patch(), layers, made.state("dense", Patch(), layers)))
    expected = torch.stack(
        [
            torch.nn.functional.scaled_dot_product_attention(
                item.q[:, :, -1:], *(x.repeat_interleave(2, 1) for x in (item.k, item.v))
            ).transpose(1, 2)
            for item in layers
        ]
    )
    assert [item.layer for item in layers] == list(range(subject.model.config.num_hidden_layers))
    for out in outs:
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_every_call_starts_from_the_same_cache(subject):
    made = work.make_work(context(subject))
    item = made.pool[0]
    with torch.inference_mode(), latest(subject, LatestConfig()) as patch:
        first, second = (
            made.call(patch, item, made.state("method", patch, item)) for _ in range(2)
        )
    assert torch.equal(first, second)


def test_the_papers_protocol_of_prefill_is_refused(subject):
    with pytest.raises(UnsupportedCombination, match="use fair for a KV-cache method"):
        work.make_work(context(subject, protocols=("paper",)))


def test_a_cache_that_cannot_be_filled_is_refused(subject):
    class Other(Patch):
        def make_cache(self):
            return object()

    made = work.make_work(context(subject))
    with pytest.raises(UnsupportedCombination, match="object cannot be filled without a prefill"):
        made.state("method", Other(), made.pool[0])


def test_other_kinds_are_refused(subject):
    with pytest.raises(UnsupportedCombination, match="latest is of kind linear"):
        work.make_work(context(subject, method=replace(METHOD, kind="linear")))
