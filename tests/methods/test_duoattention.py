"""DuoAttention: laws of the split, of the two caches, of the weights' order and of the training."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from repro import claims, manifest, report, runner
from repro.errors import BadInput, MissingResource, UnsupportedCombination
from repro.kv_cache import LayerShape, NewTokens
from repro.kv_testing import LAWS, check_equals_dense, prompts, stepped
from repro.method import Artifact
from repro.methods.duoattention import METHOD, TRAINING, DuoAttentionConfig
from repro.methods.duoattention.cache import DuoLayer
from repro.methods.duoattention.calibrate import (
    distillation,
    lambda_mask,
    rate_factor,
    student_distance,
)
from repro.methods.duoattention.documents import (
    KINDS,
    document_lengths,
    passkey_document,
    training_documents,
)
from repro.methods.duoattention.heads import (
    choose_heads,
    read_pattern,
    reordered,
    retrieval_count,
    split_heads,
    write_pattern,
)
from repro.plan import make_plan
from repro.testing import byte_tokenizer, qkv, tiny_subject, token_ids

TIGHT = DuoAttentionConfig(control="random", sink_size=3, recent_size=5, chunk_size=12)
WINDOW = TIGHT.sink_size + TIGHT.recent_size
QUICK = DuoAttentionConfig(
    steps=3, shortest=512, longest=1024, lengths=2, passkeys=2, learning_rate=0.1
)
GATES = torch.tensor([[0.9, 0.1], [0.2, 0.7], [0.4, 0.3]])


@pytest.fixture(scope="module")
def subject():
    """A random model of three layers whose attention is peaked, with biases as the retriever's."""
    made = tiny_subject(layers=3, heads=4, kv_heads=2, head_dim=16)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in made.model.model.layers:
            attention = layer.self_attn
            attention.q_proj.weight *= 12
            attention.k_proj.weight *= 12
            for name in "qkvo":
                part = getattr(attention, f"{name}_proj")
                bias = torch.randn(part.out_features, generator=generator)
                part.bias = torch.nn.Parameter(0.1 * bias)
    made.tokenizer = byte_tokenizer()
    return made


@torch.no_grad()
def logits(subject, ids, **options):
    return subject.model(ids, **options).logits


def artifact_of(gates, config=None):
    metadata = {name: getattr(config or DuoAttentionConfig(), name) for name in TRAINING}
    return Artifact(tensors={"gates": gates}, metadata=metadata)


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


# ---- the two caches


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 1.0])
def test_law(law, sparsity, subject):
    law(METHOD, subject, replace(TIGHT, sparsity=sparsity))


@pytest.mark.parametrize("chunk_size", [1, 7, 64])
def test_all_retrieval_is_dense_for_any_chunk(subject, chunk_size):
    config = replace(TIGHT, sparsity=0.0, chunk_size=chunk_size)
    check_equals_dense(METHOD, subject, config, prompts(2, 40))


@pytest.mark.parametrize("chunk_size", [1, 5, 64])
def test_short_inputs_are_dense_for_all_heads(subject, chunk_size):
    # The longest token of the last step is the 28th: 27 before it and itself.
    config = DuoAttentionConfig(sparsity=1.0, sink_size=7, recent_size=20, chunk_size=chunk_size)
    check_equals_dense(METHOD, subject, config, prompts(2, 16))


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


# ---- the order of the weights


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


# ---- which heads


@pytest.mark.parametrize(
    ("heads", "sparsity", "kept"),
    [(256, 0.5, 128), (256, 0.75, 64), (256, 0.0, 256), (256, 1.0, 0), (11, 0.7, 4), (12, 0.5, 6)],
)
def test_number_of_retrieval_heads(heads, sparsity, kept):
    gates = torch.rand(heads, 1, generator=torch.Generator().manual_seed(0))
    assert retrieval_count(heads, sparsity) == kept
    split = split_heads(gates, DuoAttentionConfig(sparsity=sparsity))
    assert sum(map(sum, split.retrieval)) == kept
    if 0 < sparsity < 1:
        values = gates.flatten().double()
        chosen = torch.tensor(split.retrieval).flatten()
        assert torch.equal(chosen, values >= torch.quantile(values, sparsity))
        expected = values[chosen].min() - values[~chosen].max()
        assert split.margin == pytest.approx(expected.item()) and split.margin > 0


def test_equal_gates_go_by_layer_and_head():
    gates = torch.tensor([[0.5, 2.0], [0.5, 0.5], [-0.1, 0.5]])
    split = split_heads(gates, DuoAttentionConfig(sparsity=0.5))
    assert split.retrieval == ((True, True), (True, False), (False, False))
    assert split.margin == 0.0


def test_controls_keep_as_many_heads():
    sets = {}
    for control, draw in (
        ("none", 0),
        ("inverted", 0),
        ("random", 0),
        ("random", 0),
        ("random", 1),
    ):
        config = DuoAttentionConfig(sparsity=0.5, control=control, draw=draw)
        split = split_heads(GATES, config)
        assert sum(map(sum, split.retrieval)) == 3
        if (control, draw) in sets:
            assert sets[control, draw] == split.retrieval
        sets[control, draw] = split.retrieval
    assert sets["none", 0] == ((True, False), (False, True), (True, False))
    assert sets["inverted", 0] == ((False, True), (True, False), (False, True))
    draws = {
        split_heads(GATES, DuoAttentionConfig(control="random", draw=draw)).retrieval
        for draw in range(10)
    }
    assert len(draws) > 5


def test_published_patterns_survive_writing_and_reading(tmp_path, subject):
    gates = GATES.clone()
    gates[0, 1] = -1e-9  # as in the published files
    write_pattern(tmp_path / "made", gates, {"sink_size": 128, "recent_size": 256})
    for path in (tmp_path / "made", tmp_path / "made" / "full_attention_heads.tsv"):
        found, settings = read_pattern(path)
        assert torch.equal(found, GATES.where(gates >= 0, torch.zeros(())))
        assert settings == {"sink_size": 128, "recent_size": 256}
    config = DuoAttentionConfig(pattern=str(tmp_path / "made"))
    assert not METHOD.needs_artifact(config)
    assert choose_heads(subject.model, config, None).facts()["retrieval_heads"] == [1, 1, 1]
    (tmp_path / "one.tsv").write_text("1.0e+00\t-2.5e-09\n")
    assert read_pattern(tmp_path / "one.tsv")[0].tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\t0\n", r"gates must be \[layers, KV heads\] = \[3, 2\] for this model, got \[1, 2\]"),
        ("a\tb\n", "must be a table of numbers"),
        ("nan\t1\n", "must hold finite numbers"),
        (None, "must be full_attention_heads.tsv or a folder"),
    ],
    ids=["shape", "text", "nan", "missing"],
)
def test_bad_patterns_are_named(subject, tmp_path, text, message):
    path = tmp_path / "gates.tsv"
    if text is not None:
        path.write_text(text)
    with (
        pytest.raises(MissingResource, match=message),
        METHOD.apply(subject, DuoAttentionConfig(pattern=str(path)), None),
    ):
        pass


@pytest.mark.parametrize(
    ("artifact", "message"),
    [
        (None, "trained first or given as pattern"),
        (artifact_of(torch.ones(2, 2)), r"= \[3, 2\] for this model, got \[2, 2\]"),
        (artifact_of(GATES, QUICK), "trained with steps 2000, got 3"),
    ],
    ids=["none", "shape", "settings"],
)
def test_wrong_artifacts_are_named(subject, artifact, message):
    with (
        pytest.raises(MissingResource, match=message),
        METHOD.apply(subject, DuoAttentionConfig(), artifact),
    ):
        pass


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({}, True),
        ({"control": "inverted"}, True),
        ({"control": "random"}, False),
        ({"sparsity": 0.0}, False),
        ({"sparsity": 1.0}, False),
        ({"pattern": "somewhere"}, False),
    ],
    ids=str,
)
def test_what_needs_an_artifact(options, needed):
    assert METHOD.needs_artifact(DuoAttentionConfig(**options)) == needed


# ---- training of the gates


def distance(subject, gates, ids, config=QUICK, labels=0):
    with distillation(subject.model, gates, config):
        return student_distance(subject.model, ids, labels)


def test_gates_of_one_leave_no_distance(subject):
    ids = token_ids(1, 700)
    gates = torch.ones(3, 2, requires_grad=True)
    assert distance(subject, gates, ids).item() < 1e-10
    assert distance(subject, torch.zeros(3, 2), ids).item() > 1e-4


def test_gradient_is_zero_where_streaming_sees_everything(subject):
    gates = torch.full((3, 2), 0.5, requires_grad=True)
    short = distance(subject, gates, token_ids(1, 384))
    assert short.item() < 1e-10
    (gradient,) = torch.autograd.grad(short, gates)
    assert gradient.abs().max() < 1e-6
    (gradient,) = torch.autograd.grad(distance(subject, gates, token_ids(1, 700)), gates)
    assert (gradient.abs() > 1e-6).all()


def test_gradient_is_that_of_differences(subject):
    ids = token_ids(1, 520)
    gates = torch.full((3, 2), 0.5, requires_grad=True)
    (gradient,) = torch.autograd.grad(distance(subject, gates, ids), gates)
    with torch.no_grad():
        for place in ((0, 1), (2, 0)):
            ends = []
            for step in (0.02, -0.02):
                moved = gates.detach().clone()
                moved[place] += step
                ends.append(distance(subject, moved, ids).item())
            assert gradient[place].item() == pytest.approx((ends[0] - ends[1]) / 0.04, rel=0.05)


def test_loss_does_not_depend_on_the_order_of_texts(subject):
    ids, gates = token_ids(3, 520), torch.rand(3, 2)
    found = distance(subject, gates, ids, labels=400)
    other = distance(subject, gates, ids[[2, 0, 1]], labels=400)
    torch.testing.assert_close(found, other)
    singles = [distance(subject, gates, ids[row : row + 1], labels=400) for row in range(3)]
    torch.testing.assert_close(found, torch.stack(singles).mean())


def test_distance_is_over_label_tokens(subject):
    ids, gates = token_ids(2, 520), torch.zeros(3, 2)
    with distillation(subject.model, gates, QUICK), torch.no_grad():
        both = subject.model.model(ids.repeat(2, 1), use_cache=False).last_hidden_state
        squares = (both[:2] - both[2:]).square().mean(-1)[:, 400:]
    expected = squares.sum() / squares.numel()
    torch.testing.assert_close(distance(subject, gates, ids, labels=400), expected)


def test_teacher_is_the_model_itself(subject):
    ids = token_ids(1, 520)
    with torch.no_grad():
        expected = subject.model.model(ids).last_hidden_state
    with distillation(subject.model, torch.zeros(3, 2), QUICK), torch.no_grad():
        both = subject.model.model(ids.repeat(2, 1), use_cache=False).last_hidden_state
    torch.testing.assert_close(both[:1], expected, atol=1e-5, rtol=1e-4)
    assert (both[1:] - expected).abs().max() > 1e-2


def test_student_sees_sink_blocks_and_local_blocks():
    config = DuoAttentionConfig(train_sink_size=100, train_recent_size=129)
    mask = lambda_mask(5 * 128 + 1, config)[0, 0]
    expected = [[j <= i and (j < 1 or i - j < 2) for j in range(6)] for i in range(6)]
    assert mask.tolist() == expected


def test_rate_rises_and_falls():
    steps = 2000
    found = [rate_factor(step, steps) for step in range(steps)]
    assert found[:40] == [0.1] * 39 + [pytest.approx(0.1)]
    assert found[199] == pytest.approx(0.5) and found[399] == found[1600] == 1.0
    assert found[1800] == pytest.approx(0.5) and found[-1] == 0.1


def test_training_is_deterministic_and_leaves_the_model_alone(subject):
    ids, seen = token_ids(1, 60), []
    before = logits(subject, ids)
    flags = [x.requires_grad for x in subject.model.parameters()]
    made, again = (
        METHOD.calibrate(
            subject, QUICK, [], progress=lambda done, total: seen.append((done, total))
        )
        for _ in range(2)
    )
    assert torch.equal(logits(subject, ids), before)
    assert [x.requires_grad for x in subject.model.parameters()] == flags
    assert all(x.grad is None for x in subject.model.parameters())
    assert seen == [(step, 3) for step in range(4)] * 2
    assert torch.equal(made.tensors["gates"], again.tensors["gates"])
    gates = made.tensors["gates"]
    assert gates.shape == (3, 2) and gates.min() >= 0 and gates.max() < 1
    assert made.tensors["losses"].shape == (3,)
    assert made.tensors["losses"][0] == pytest.approx(QUICK.l1_weight, abs=1e-5)
    assert [figure["kind"] for figure in made.metadata["figures"]] == ["heatmap", "curve"]
    with METHOD.apply(subject, QUICK, made) as patch:
        assert sum(patch.stats()["retrieval_heads"]) == 3


def test_artifact_survives_the_store(subject, tmp_path):
    from repro.artifacts import ArtifactStore

    made = METHOD.calibrate(subject, replace(QUICK, steps=1), [])
    kept = ArtifactStore(tmp_path).get_or_make("key", lambda: made)
    assert torch.equal(kept.tensors["gates"], made.tensors["gates"])
    config = replace(QUICK, steps=1)
    assert choose_heads(subject.model, config, kept) == choose_heads(subject.model, config, made)


def test_training_keeps_heads_that_matter():
    """A head whose streaming output is all wrong stays; one that streams without loss goes."""
    made = tiny_subject(layers=1, heads=2, kv_heads=2, head_dim=16)
    made.tokenizer = byte_tokenizer()
    attention = made.model.model.layers[0].self_attn
    with torch.no_grad():
        attention.o_proj.weight *= 20
        attention.v_proj.weight *= 5
        attention.v_proj.weight[16:] = 0  # the second head says nothing
    config = replace(QUICK, steps=12, l1_weight=1e-3)
    gates = METHOD.calibrate(made, config, []).tensors["gates"]
    assert gates[0, 0] > gates[0, 1] + 0.1


def test_calibration_needs_a_tokenizer_and_positions(subject):
    with pytest.raises(UnsupportedCombination, match="has no tokenizer"):
        METHOD.calibrate(tiny_subject(), QUICK, [])
    with pytest.raises(BadInput, match="longest must be at most the 32768 positions"):
        METHOD.calibrate(subject, replace(QUICK, longest=40000), [])


@pytest.mark.parametrize("kind", range(len(KINDS)))
@pytest.mark.parametrize("length", [512, 3000])
def test_documents_hide_and_ask_passkeys(kind, length):
    tokenizer = byte_tokenizer()
    made = passkey_document(tokenizer, length=length, passkeys=4, kind=kind, seed="1")
    assert 0.8 * length < len(made.ids) <= length
    text = tokenizer.decode(made.ids[: made.labels])
    asked = tokenizer.decode(made.ids[made.labels :]).split("</s>")
    assert asked[-1] == "" and asked[0].startswith("\nQuestion: What is the secret")
    assert 1 <= len(asked) - 1 <= 4 and (length < 3000 or len(asked) == 5)
    for answer in asked[:-1]:
        sentence = answer.partition("Answer: ")[2]
        assert sentence and sentence in text
    again = passkey_document(tokenizer, length=length, passkeys=4, kind=kind, seed="1")
    assert torch.equal(made.ids, again.ids)


def test_documents_come_in_every_length_before_any_again():
    config = replace(QUICK, steps=8, shortest=600, longest=1200, lengths=4)
    assert document_lengths(config) == [600, 800, 1000, 1200]
    made = list(training_documents(byte_tokenizer(), config))
    assert len({tuple(document.ids.tolist()) for document in made}) == 8
    for half in (made[:4], made[4:]):
        sizes = sorted(len(document.ids) for document in half)
        for size, length in zip(sizes, document_lengths(config), strict=True):
            assert 0.8 * length < size <= length
    with pytest.raises(ValueError, match="shortest must leave room"):
        passkey_document(byte_tokenizer(), length=100, passkeys=1, kind=0, seed="1")


# ---- the plugin


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.5}, "sparsity must be in .0, 1., got 1.5"),
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
