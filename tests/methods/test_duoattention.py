"""DuoAttention: laws of the two caches, of the weights' order and of the plugin."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from repro import claims, manifest, report, runner
from repro.errors import MissingResource, UnsupportedCombination
from repro.kv_cache import LayerShape, NewTokens
from repro.kv_testing import (
    LAWS,
    check_equals_dense,
    check_quality_is_lost_in_decode_alone,
    prompts,
    stepped,
)
from repro.methods.duoattention import METHOD, DuoAttentionConfig
from repro.methods.duoattention.cache import DuoLayer
from repro.methods.duoattention.heads import (
    reordered,
)
from repro.plan import make_plan
from repro.testing import qkv, tiny_subject, token_ids
from tests.methods.duo_models import TIGHT, WINDOW, artifact_of, logits, make_subject


@pytest.fixture(scope="module")
def subject():
    return make_subject()


def layer_of(config, n_retrieval, *, batch=1, heads=4, kv_heads=2, head_dim=16):
    shape = LayerShape(0, batch, heads, kv_heads, head_dim, torch.float32, torch.device("cpu"))
    return DuoLayer(shape, config, n_retrieval)


def part_of(tensors, begin, end, remaining=0):
    return NewTokens(*(x[:, :, begin:end] for x in tensors), 0.25, remaining)


def dense_under(q, k, v, seen):
    """Dense attention of all tokens under a mask ``[T, T]``."""
    n_rep = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(n_rep, dim=1) for x in (k, v))
    scores = (q @ k.mT * 0.25).masked_fill(~seen, -math.inf)
    return scores.softmax(-1) @ v


def streaming_rule(config, tokens, *, decoded_from=None):
    """Return ``[T, T]``: what each token sees, by the paper's words."""
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    for t in range(tokens):
        stepped_one = decoded_from is not None and t >= decoded_from
        start = t if stepped_one else t - t % config.chunk_size
        for j in range(t + 1):
            recent = j >= start - config.recent_size
            seen[t, j] = start == 0 or j < config.sink_size or recent
    return seen


# The two caches


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 1.0])
def test_law(law, sparsity, subject):
    assert law(METHOD, subject, replace(TIGHT, sparsity=sparsity)) == []


@pytest.mark.parametrize("chunk_size", [1, 7, 64])
def test_all_retrieval_is_dense_for_any_chunk(subject, chunk_size):
    config = replace(TIGHT, sparsity=0.0, chunk_size=chunk_size)
    assert check_equals_dense(METHOD, subject, config, prompts(2, 40)) == []


@pytest.mark.parametrize("size", [7, 39])
def test_all_retrieval_is_dense_in_passes_of_any_size(subject, size):
    ids = prompts(2, 44)
    with METHOD.apply(subject, replace(TIGHT, sparsity=0.0), None) as patch:
        cache = patch.make_cache(prompt_length=40)
        found = stepped(subject, ids, cache, prompt=40, chunk=size)
    torch.testing.assert_close(found, logits(subject, ids), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk_size", [1, 5, 64])
def test_short_inputs_are_dense_for_all_heads(subject, chunk_size):
    # The longest token of the last step is the 28th: 27 before it and itself.
    config = DuoAttentionConfig(sparsity=1.0, sink_size=7, recent_size=20, chunk_size=chunk_size)
    assert check_equals_dense(METHOD, subject, config, prompts(2, 16)) == []


def test_first_chunk_is_dense_and_decode_is_not(subject):
    config = replace(TIGHT, chunk_size=44)
    assert check_quality_is_lost_in_decode_alone(METHOD, subject, config) == []


def test_one_chunk_prefills_densely_and_decode_streams(subject):
    ids = prompts(1, 40)
    config = replace(TIGHT, sparsity=1.0, chunk_size=64)
    with METHOD.apply(subject, config, None) as patch:
        cache = patch.make_cache()
        whole = logits(subject, ids[:, :39], past_key_values=cache)
        after = logits(subject, ids[:, 39:], past_key_values=cache)
    before = logits(subject, ids)
    torch.testing.assert_close(whole, before[:, :39], atol=2e-4, rtol=1e-4)
    assert (after - before[:, 39:]).abs().max() > 1e-2


@pytest.mark.parametrize("n_retrieval", [0, 1, 2])
@pytest.mark.parametrize("cuts", [(45,), (12, 24, 36, 45), (5, 13, 30, 45)], ids=str)
def test_heads_see_what_the_rule_says(n_retrieval, cuts):
    """Streaming heads: chunks, then steps; retrieval heads: everything. Whatever the passes."""
    tensors = qkv(queries=60, heads=4, kv_heads=2, head_dim=16)
    layer, begin, parts = layer_of(TIGHT, n_retrieval), 0, []
    for end in cuts:
        parts.append(layer.prefill(0, part_of(tensors, begin, end, 45 - end)))
        begin = end
    layer.end_prefill()
    parts += [layer.decode(part_of(tensors, t, t + 1)) for t in range(45, 60)]
    out = torch.cat(parts, dim=2)
    full = dense_under(*tensors, torch.ones(60, 60, dtype=torch.bool).tril())
    streaming = dense_under(*tensors, streaming_rule(TIGHT, 60, decoded_from=45))
    rows = 2 * n_retrieval
    torch.testing.assert_close(out[:, :rows], full[:, :rows], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out[:, rows:], streaming[:, rows:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("chunk_size", [1, 3, 7, WINDOW, WINDOW + 1])
@pytest.mark.parametrize("cuts", [(45,), (5, 13, 30, 45)], ids=str)
def test_chunks_about_as_small_as_the_window_see_what_the_rule_says(chunk_size, cuts):
    tensors = qkv(queries=60, heads=4, kv_heads=2, head_dim=16)
    config = replace(TIGHT, chunk_size=chunk_size)
    layer, begin, parts = layer_of(config, 0), 0, []
    for end in cuts:
        parts.append(layer.prefill(0, part_of(tensors, begin, end, 45 - end)))
        begin = end
        held = layer.streaming.window.k.shape[2]
        assert held == WINDOW and layer.streaming.held() <= WINDOW
    layer.end_prefill()
    parts += [layer.decode(part_of(tensors, t, t + 1)) for t in range(45, 60)]
    expected = dense_under(*tensors, streaming_rule(config, 60, decoded_from=45))
    torch.testing.assert_close(torch.cat(parts, dim=2), expected, atol=1e-5, rtol=1e-4)


def test_rows_beyond_one_call_see_the_same(monkeypatch):
    from repro.methods.duoattention import cache

    tensors = qkv(queries=60, heads=4, kv_heads=2, head_dim=16)
    config = replace(TIGHT, chunk_size=20)
    outs = []
    for rows in (1024, 7):
        monkeypatch.setattr(cache, "_ROWS", rows)
        layer = layer_of(config, 1)
        first = layer.prefill(0, part_of(tensors, 0, 25, 35))
        outs.append(torch.cat([first, layer.prefill(0, part_of(tensors, 25, 60))], dim=2))
    torch.testing.assert_close(*outs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cuts", [(45,), (20, 45), (42, 45)], ids=str)
@pytest.mark.parametrize("steps", [4, 50])
def test_last_tokens_can_be_treated_as_decode(cuts, steps):
    tensors = qkv(queries=45, heads=4, kv_heads=2, head_dim=16)
    config = replace(TIGHT, simulated_decode=steps)
    layer, begin, parts = layer_of(config, 0), 0, []
    for end in cuts:
        parts.append(layer.prefill(0, part_of(tensors, begin, end, 45 - end)))
        begin = end
    rule = streaming_rule(TIGHT, 45, decoded_from=max(45 - steps, 0))
    expected = dense_under(*tensors, rule)
    torch.testing.assert_close(torch.cat(parts, dim=2), expected, atol=1e-5, rtol=1e-4)


def test_simulated_decode_counts_from_the_end_of_the_prompt(subject):
    ids, config = prompts(1, 40), replace(TIGHT, simulated_decode=6)
    with METHOD.apply(subject, config, None) as patch:
        whole = stepped(subject, ids, patch.make_cache(), prompt=40)
        parts = stepped(subject, ids, patch.make_cache(prompt_length=40), prompt=40, chunk=9)
    torch.testing.assert_close(parts, whole, atol=2e-4, rtol=1e-4)
    with METHOD.apply(subject, TIGHT, None) as patch:
        steps = stepped(subject, ids, patch.make_cache(), prompt=34)
        torch.testing.assert_close(whole, steps, atol=2e-4, rtol=1e-4)
        chunks = stepped(subject, ids, patch.make_cache(), prompt=40)
    assert (chunks - whole).abs().max() > 1e-2


def test_cache_holds_sinks_and_recent_tokens_and_no_more():
    q, k, v = qkv(queries=60, heads=4, kv_heads=2, head_dim=16)
    k[..., 0] = v[..., 0] = torch.arange(60.0)  # a token's number is its first channel
    layer = layer_of(TIGHT, 0)

    def held():
        tensors = list(layer.tensors())
        assert [x.shape[2] for x in tensors] == [WINDOW, WINDOW]
        return [sorted(x[0, 0, :, 0].tolist()) for x in tensors]

    def expected(tokens):
        recent = range(tokens - TIGHT.recent_size, tokens)
        return [[*map(float, range(TIGHT.sink_size)), *map(float, recent)]] * 2

    for begin in range(0, 48, 12):
        layer.prefill(0, part_of((q, k, v), begin, begin + 12, 48 - begin - 12))
        assert held() == expected(begin + 12)
    layer.end_prefill()
    for token in range(48, 60):
        layer.decode(part_of((q, k, v), token, token + 1))
        assert held() == expected(token + 1)


def test_an_unfinished_chunk_is_held_until_it_ends():
    tensors = qkv(queries=60, heads=4, kv_heads=2, head_dim=16)
    layer = layer_of(TIGHT, 0)
    layer.prefill(0, part_of(tensors, 0, 29, 31))
    assert [x.shape[2] for x in layer.tensors()] == [WINDOW, WINDOW, 5, 5]
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in layer.tensors())
    layer.prefill(0, part_of(tensors, 29, 37, 23))
    assert [x.shape[2] for x in layer.tensors()] == [WINDOW, WINDOW, 1, 1]
    layer.end_prefill()
    assert [x.shape[2] for x in layer.tensors()] == [WINDOW, WINDOW]


@pytest.mark.parametrize("batch", [1, 3])
def test_bytes_are_those_of_the_formula(subject, batch):
    length, pages = 128, 128 // 64
    with METHOD.apply(subject, TIGHT, None) as patch:
        logits(subject, prompts(batch, length), past_key_values=patch.make_cache())
        stats = patch.stats()
    retrieval = stats["retrieval_heads"]
    assert sum(retrieval) == 3
    tokens = sum(n * length + (2 - n) * WINDOW for n in retrieval)
    # Besides: for each sequence the numbers of its pages, and its lengths of keys and values.
    lists = sum(4 * (pages + 2) for n in retrieval if n)
    assert stats["kv_bytes"] == batch * (2 * 4 * 16 * tokens + lists)


def test_decode_density_counts_what_is_read():
    tensors = qkv(queries=40, heads=4, kv_heads=2, head_dim=16)
    layer = layer_of(TIGHT, 1)
    layer.prefill(0, part_of(tensors, 0, 39))
    layer.end_prefill()
    layer.decode(part_of(tensors, 39, 40))
    assert layer.observed() == (40 + WINDOW + 1, 2 * 40)


def test_filled_cache_equals_prefilled():
    tensors = qkv(queries=60, heads=4, kv_heads=2, head_dim=16)
    prefilled, filled = layer_of(TIGHT, 1), layer_of(TIGHT, 1)
    prefilled.prefill(0, part_of(tensors, 0, 50))
    filled.fill(0, tensors[1][:, :, :50], tensors[2][:, :, :50])
    for layer in (prefilled, filled):
        layer.end_prefill()
    new = part_of(tensors, 50, 51)
    assert torch.equal(filled.decode(new), prefilled.decode(new))
    filled.fill(0, *(x[:, :, 51:60] for x in tensors[1:]))  # after the prompt: nothing is open
    assert {x.shape[2] for x in filled.streaming.tensors()} == {WINDOW}


def test_ragged_batch_decodes_as_singles():
    tensors = qkv(queries=60, heads=4, kv_heads=2, head_dim=16, batch=3)
    lengths = (50, 4, 17)
    together = layer_of(TIGHT, 1, batch=3)
    alone = [layer_of(TIGHT, 1) for _ in lengths]
    for row, length in enumerate(lengths):
        own = [x[row : row + 1] for x in tensors]
        together.prefill(row, part_of(own, 0, length))
        alone[row].prefill(0, part_of(own, 0, length))
    for layer in (together, *alone):
        layer.end_prefill()
    for token in range(50, 60):
        out = together.decode(part_of(tensors, token, token + 1))
        for row, layer in enumerate(alone):
            own = [x[row : row + 1] for x in tensors]
            single = layer.decode(part_of(own, token, token + 1))
            torch.testing.assert_close(out[row : row + 1], single, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("prompt", [24, 31])
def test_decode_equals_prefill_of_the_prefix_with_the_same_chunks(subject, prompt):
    """A token by decode sees what it sees as the first of a chunk after the same tokens."""
    ids = prompts(1, 40)
    with METHOD.apply(subject, TIGHT, None) as patch:
        steps = stepped(subject, ids, patch.make_cache(), prompt=prompt)
        for end in range(prompt + 1, 41):
            again = stepped(
                subject,
                ids[:, :end],
                patch.make_cache(prompt_length=prompt),
                prompt=prompt,
                chunk=12,
            )
            torch.testing.assert_close(again, steps[:, :end], atol=2e-4, rtol=1e-4)


def test_the_pool_has_a_limit(subject):
    config = replace(TIGHT, max_tokens=64)
    with METHOD.apply(subject, config, None) as patch:
        logits(subject, prompts(1, 64), past_key_values=patch.make_cache())
        with pytest.raises(MissingResource, match="pool of 64 tokens, got 65"):
            logits(subject, prompts(1, 65), past_key_values=patch.make_cache())
        cache = patch.make_cache()
        logits(subject, prompts(1, 64), past_key_values=cache)
        with pytest.raises(MissingResource, match="got 65 for one of 1 sequences; raise max_tok"):
            logits(subject, prompts(1, 1), past_key_values=cache)
        with pytest.raises(MissingResource, match="got 40 for one of 2 sequences"):
            logits(subject, prompts(2, 40), past_key_values=patch.make_cache())


def test_streaming_heads_take_nothing_of_the_pool(subject):
    config = replace(TIGHT, max_tokens=1, sparsity=1.0)
    with METHOD.apply(subject, config, None) as patch:
        logits(subject, prompts(1, 65), past_key_values=patch.make_cache())
        assert patch.stats()["kv_bytes"] == 3 * 2 * 4 * 2 * 16 * WINDOW


# The order of the weights


def test_reordered_weights_give_the_same_logits_and_come_back(subject):
    ids = token_ids(1, 60)
    before = logits(subject, ids)
    parameters = {name: (x, x.clone()) for name, x in subject.model.named_parameters()}
    split = ((False, True), (True, False), (False, True))
    for fails in (False, True):
        try:
            with reordered(subject.model, split):
                changed = [n for n, (x, copy) in parameters.items() if not torch.equal(x, copy)]
                assert sorted({name.split(".")[2] for name in changed}) == ["0", "2"]
                assert not any("o_proj.bias" in name for name in changed)
                assert sum("bias" in name for name in changed) == 2 * 3
                torch.testing.assert_close(logits(subject, ids), before, atol=1e-4, rtol=1e-4)
                if fails:
                    raise KeyError
        except KeyError:
            pass
        for name, parameter in subject.model.named_parameters():
            assert parameter is parameters[name][0]
            assert torch.equal(parameter, parameters[name][1])
        assert torch.equal(logits(subject, ids), before)


def test_an_order_that_is_not_its_own_inverse_comes_back():
    made = tiny_subject(layers=1, heads=8, kv_heads=4, head_dim=8)
    before = {name: x.clone() for name, x in made.model.named_parameters()}
    ids = token_ids(1, 30)
    expected = logits(made, ids)
    with reordered(made.model, ((False, False, True, True),)):
        weight, old = (
            found["model.layers.0.self_attn.k_proj.weight"]
            for found in (dict(made.model.named_parameters()), before)
        )
        assert torch.equal(weight, torch.cat([old[16:], old[:16]]))
        torch.testing.assert_close(logits(made, ids), expected, atol=1e-4, rtol=1e-4)
    with reordered(made.model, ((False, True, False, False),)), pytest.raises(RuntimeError):
        raise RuntimeError
    with reordered(made.model, ((False, False, True, False),)):
        torch.testing.assert_close(logits(made, ids), expected, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(x, before[name]) for name, x in made.model.named_parameters())


def test_each_head_keeps_its_own_cache(subject):
    """Streaming exactly one head equals masking exactly that head of the model as it is."""
    ids = token_ids(1, 60)
    outs = []
    for head in range(2):
        gates = torch.ones(3, 2)
        gates[1, head] = 0.0
        config = DuoAttentionConfig(sparsity=0.2, sink_size=3, recent_size=5, chunk_size=12)
        with METHOD.apply(subject, config, artifact_of(gates)) as patch:
            assert patch.stats()["retrieval_heads"] == [2, 1, 2]
            outs.append(logits(subject, ids, past_key_values=patch.make_cache()))
        expected = _masked_head(subject, ids, layer=1, head=head, rule=streaming_rule(config, 60))
        torch.testing.assert_close(outs[-1], expected, atol=2e-4, rtol=1e-4)
    assert (outs[0] - outs[1]).abs().max() > 1e-2


def _masked_head(subject, ids, *, layer, head, rule):
    """Logits of the dense model, one KV head of one layer under a mask."""
    from repro.attention_patch import patched_attention

    def attend(call):
        causal = torch.ones(60, 60, dtype=torch.bool).tril()
        seen = causal.expand(call.q.shape[1], 60, 60).clone()
        if call.layer == layer:
            seen[2 * head : 2 * head + 2] = rule
        return dense_under(call.q, call.k, call.v, seen)

    with patched_attention(subject.model, attend):
        return logits(subject, ids)


def test_other_projections_are_refused(subject):
    attention = subject.model.model.layers[1].self_attn
    part = attention.o_proj
    attention.o_proj = torch.nn.Sequential(part)
    try:
        with (
            pytest.raises(UnsupportedCombination, match="linear q_proj, k_proj"),
            METHOD.apply(subject, TIGHT, None),
        ):
            pass
    finally:
        attention.o_proj = part
    attention.q_norm = torch.nn.RMSNorm(64)
    try:
        with (
            pytest.raises(UnsupportedCombination, match="one vector for all heads, got .64."),
            METHOD.apply(subject, TIGHT, None),
        ):
            pass
    finally:
        del attention.q_norm


# The plugin


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.5}, "sparsity must be in .0, 1., got 1.5"),
        ({"sparsity": -0.1}, "sparsity must be in .0, 1., got -0.1"),
        ({"sparsity": math.nan}, "sparsity must be in .0, 1., got nan"),
        ({"sink_size": -1}, "sink_size must be at least 0, got -1"),
        ({"recent_size": 0}, "recent_size must be at least 1, got 0"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"pattern": ""}, "pattern must be a path, or null"),
        ({"control": "oracle"}, "control must be one of none, random, inverted, got oracle"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, or null, got 0"),
        ({"simulated_decode": -1}, "simulated_decode must be at least 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"l1_weight": -0.1}, "l1_weight must be at least 0"),
        ({"shortest": 100}, "shortest must be at least 256"),
        ({"longest": 500}, "longest must be at least shortest 1000, got 500"),
        ({"steps": 0, "passkeys": 0}, "steps must be .*; passkeys must be"),
    ],
    ids=str,
)
def test_bad_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        DuoAttentionConfig(**options)


def test_import_is_free_of_torch():
    code = "import sys, repro.methods.duoattention; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


MANIFEST = Path(__file__).parents[2] / "manifests" / "duoattention.yaml"


@pytest.mark.parametrize("profile", ["embedded", "embedded-full"])
def test_the_manifest_plans_every_comparison(profile):
    plan = make_plan(manifest.load(MANIFEST, profile=profile), profile, device="cpu")
    assert not plan.missing
    ours = [p for p in plan.cells if p.cell["method"]["slug"] == "duoattention"]
    controls = {planned.cell["method"]["config"]["control"] for planned in ours}
    assert controls == {"none", "random", "inverted"}
    # One training serves every configuration that needs gates.
    assert len({json.dumps(p.artifact["id"]) for p in ours if p.artifact}) == 1


def test_claims_speak_of_configurations_that_run():
    paper = claims.for_method("duoattention")
    proxies = [claim for claim in paper.claims if claim.proxy]
    assert len(paper.claims) > 60 and len(proxies) >= 5
    known = set(DuoAttentionConfig.__dataclass_fields__)
    for claim in paper.claims:
        if claim.query and claim.query.method == "duoattention":
            assert set(claim.query.config) <= known
            DuoAttentionConfig(
                **{n: v for n, v in claim.query.config.items() if not isinstance(v, tuple)}
            )


def test_a_run_trains_once_for_the_method_and_its_control(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(
        "paper: duoattention\n"
        "profiles:\n"
        "  small:\n"
        "    subjects: [zoo:retriever]\n"
        "    methods:\n"
        "      - duoattention: &trained\n"
        "          {sparsity: 0.5, chunk_size: 128, steps: 2, shortest: 512, longest: 512}\n"
        "      - duoattention: {<<: *trained, control: inverted}\n"
        "      - duoattention: {<<: *trained, control: random}\n"
        "    measurements:\n"
        "      - ruler: {tasks: [niah_single_1], lengths: [512], samples: 2, batch_size: 2}\n"
    )
    runs, results = tmp_path / "runs", tmp_path / "results"
    outcome = runner.run(
        path, profile="small", runs=runs, executor="inline", device="cpu", quiet=True
    )
    assert outcome.counts == {"ok": 4}
    assert len(list((runs / "artifacts" / "keys").iterdir())) == 1
    ours = [r["patch"] for r in outcome.records if r["cell"]["method"]["slug"] == "duoattention"]
    assert [sum(patch["retrieval_heads"]) for patch in ours] == [6, 6, 6]
    assert all(0 < patch["decode_density"] < 1 for patch in ours)
    report.write(["duoattention"], runs=runs, results=results)
    page = (results / "duoattention" / "small.md").read_text()
    assert "Gates: 1 is a retrieval head" in page
