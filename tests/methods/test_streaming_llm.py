"""StreamingLLM: constant size, positions inside the cache, and the laws of its cache."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from repro.errors import UnsupportedCombination
from repro.kv_cache import LayerShape, NewTokens
from repro.kv_testing import LAWS, check_equals_dense, generate, prompts
from repro.methods.streaming_llm import METHOD, StreamingLLMConfig
from repro.methods.streaming_llm.cache import StreamingLayer, frequencies, turned
from repro.testing import tiny_subject

TIGHT = StreamingLLMConfig(sink_size=3, recent_size=9)
TRUE_POSITIONS = StreamingLLMConfig(sink_size=3, recent_size=9, reindex=False)
NO_SINK = StreamingLLMConfig(sink_size=0, recent_size=9)


@pytest.fixture(scope="module")
def subject():
    return tiny_subject()


@pytest.mark.parametrize("config", [TIGHT, TRUE_POSITIONS, NO_SINK], ids=str)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law, config, subject):
    assert law(METHOD, subject, config) == []


@pytest.mark.parametrize("reindex", [True, False])
def test_a_cache_for_everything_is_dense(subject, reindex):
    config = StreamingLLMConfig(sink_size=4, recent_size=48, reindex=reindex)
    assert check_equals_dense(METHOD, subject, config, prompts(2, 40)) == []


def by_definition(q, k, v, rotation, config):
    """Evict and count positions anew for every token; inputs ``[H, T, D]`` are not rotated."""
    outs = []
    for now in range(q.shape[1]):
        kept = [j for j in range(now + 1) if j < config.sink_size or j > now - config.recent_size]
        true = torch.tensor([*kept, now])
        inside = torch.tensor([*range(len(kept)), len(kept) - 1])
        assert int(inside.max()) <= config.sink_size + config.recent_size - 1
        places = inside if config.reindex else true
        keys = turned(k[None, :, kept], places[:-1], rotation)
        query = turned(q[None, :, now : now + 1], places[-1:], rotation)
        weights = (query @ keys.mT * q.shape[-1] ** -0.5).softmax(-1)
        outs.append(weights @ v[None, :, kept])
    return torch.cat(outs, dim=2)


@pytest.mark.parametrize("config", [TIGHT, TRUE_POSITIONS, NO_SINK], ids=str)
@pytest.mark.parametrize("prompt", [1, 5, 12, 30])
def test_prefill_and_decode_count_positions_as_defined(config, prompt):
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 40, 16, generator=random) for _ in range(3))
    rotation = 1.0 / (100.0 ** (torch.arange(8) / 8))
    expected = by_definition(q, k, v, rotation, config)
    shape = LayerShape(0, 1, 2, 2, 16, torch.float32, torch.device("cpu"))
    layer = StreamingLayer(shape, config, rotation if config.reindex else None)
    true = torch.arange(40)
    q, k = (turned(x[None], true, rotation) for x in (q, k))

    def new(begin, end):
        return NewTokens(q[:, :, begin:end], k[:, :, begin:end], v[None, :, begin:end], 0.25)

    parts = [layer.prefill(0, new(0, prompt))]
    parts += [layer.decode(new(now, now + 1)) for now in range(prompt, 40)]
    torch.testing.assert_close(torch.cat(parts, dim=2), expected, atol=1e-5, rtol=1e-4)


def test_turning_is_the_rotation_of_the_model(subject):
    x = torch.randn(1, 2, 5, 32, generator=torch.Generator().manual_seed(0))
    places = torch.arange(3, 8)
    cos, sin = subject.model.model.rotary_emb(x, places[None])
    first, second = x.chunk(2, dim=-1)
    expected = x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
    found = turned(x, places, frequencies(subject.model))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(turned(found, -places, frequencies(subject.model)), x)


SCALED = {
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 512},
}


@pytest.mark.parametrize("kind", SCALED)
def test_turning_follows_the_scaled_positions_of_a_model(kind, monkeypatch):
    """The angles are the model's own, not those of its base and a factor."""
    made = tiny_subject(positions=2048)
    settings = made.model.config
    settings.rope_parameters = {"rope_type": kind, "rope_theta": 1e4, **SCALED[kind]}
    plain, scaled = made.model.model.rotary_emb, LlamaRotaryEmbedding(settings)
    monkeypatch.setattr(made.model.model, "rotary_emb", scaled)
    x = torch.randn(1, 2, 5, 32, generator=torch.Generator().manual_seed(0))
    here, there = (apply_rotary_pos_emb(x, x, *scaled(x, p[None]))[0] for p in PLACES)
    found = turned(here, PLACES[1] - PLACES[0], frequencies(made.model))
    torch.testing.assert_close(found, there, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(scaled.inv_freq, plain.inv_freq)


PLACES = (torch.arange(3, 8), torch.tensor([3, 90, 700, 701, 1500]))


def test_size_is_constant_and_counted(subject):
    sizes = []
    with METHOD.apply(subject, TIGHT, None) as patch:
        for length in (5, 60):
            generate(subject, prompts(1, length), cache=patch.make_cache(), new_tokens=2)
            sizes.append(patch.stats()["kv_bytes"])
        assert patch.stats()["decode_density"] == 12 / 61
    assert sizes == [2 * 2 * 4 * 2 * 12 * 32] * 2  # K and V, layers, bytes, heads, tokens, D


def test_positions_that_are_no_rotation_are_refused(subject, monkeypatch):
    monkeypatch.setattr(subject.model.model.rotary_emb, "rope_type", "dynamic")
    with (
        pytest.raises(UnsupportedCombination, match="got dynamic; set reindex: false"),
        METHOD.apply(subject, TIGHT, None),
    ):
        pass
    with METHOD.apply(subject, TRUE_POSITIONS, None):
        pass


def test_rotations_of_neighbours_are_refused():
    import transformers

    config = transformers.CohereConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=1,
    )
    with pytest.raises(UnsupportedCombination, match="turn channel i with i [+] D / 2"):
        frequencies(transformers.CohereForCausalLM(config))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sink_size": -1}, "sink_size must be at least 0, got -1"),
        ({"recent_size": 0}, "recent_size must be at least 1, got 0"),
    ],
    ids=["sink", "recent"],
)
def test_bad_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        StreamingLLMConfig(**options)
