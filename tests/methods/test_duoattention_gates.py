"""DuoAttention: which heads retrieve, and the training of the gates."""

from dataclasses import replace

import pytest
import torch

from repro.errors import BadInput, MissingResource, UnsupportedCombination
from repro.methods.duoattention import METHOD, DuoAttentionConfig
from repro.methods.duoattention.calibrate import (
    distillation,
    lambda_mask,
    schedule,
    student_distance,
)
from repro.methods.duoattention.documents import (
    KINDS,
    document_lengths,
    passkey_document,
    training_document,
)
from repro.methods.duoattention.heads import (
    choose_heads,
    read_pattern,
    retrieval_count,
    split_heads,
    write_pattern,
)
from repro.testing import byte_tokenizer, tiny_subject, token_ids
from tests.methods.duo_models import GATES, QUICK, artifact_of, logits, make_subject


@pytest.fixture(scope="module")
def subject():
    return make_subject()


# Which heads


@pytest.mark.parametrize(
    ("heads", "sparsity", "kept"),
    [(256, 0.5, 128), (256, 0.75, 64), (256, 0.0, 256), (256, 1.0, 0), (11, 0.7, 4), (12, 0.5, 6)],
)
def test_number_of_retrieval_heads(heads, sparsity, kept):
    gates = torch.rand(heads, 1, generator=torch.Generator().manual_seed(0))
    assert retrieval_count(heads, sparsity) == kept
    given = gates.clone()
    split = split_heads(gates, DuoAttentionConfig(sparsity=sparsity))
    assert torch.equal(gates, given)
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
    with METHOD.apply(subject, replace(config, sink_size=3, recent_size=5), None) as patch:
        cache = patch.make_cache()
        logits(subject, token_ids(1, 20), past_key_values=cache)
        # The sizes beside the gates are those of their training, not of the cache.
        assert {layer.streaming.window.size for layer in cache.held()} == {8}
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


# Training of the gates


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
    made = schedule(replace(QUICK, steps=steps, learning_rate=1.0))
    found = [made.rate(step) for step in range(steps)]
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


def test_killed_training_ends_with_the_same_bits(subject, tmp_path, monkeypatch):
    monkeypatch.setattr("repro.methods.duoattention.calibrate.CHECKPOINT_EVERY", 2)
    config, seen = replace(QUICK, steps=5), []
    whole = METHOD.calibrate(subject, config, [])

    def killed(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        METHOD.calibrate(subject, config, [], progress=killed, workdir=tmp_path)
    resumed = METHOD.calibrate(
        subject, config, [], progress=lambda *pair: seen.append(pair), workdir=tmp_path
    )
    assert seen == [(0, 5), (3, 5), (4, 5), (5, 5)]  # the third is made again
    assert whole.tensors["losses"].isfinite().all()
    for name, values in whole.tensors.items():
        assert torch.equal(resumed.tensors[name], values), name


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
    made = [training_document(byte_tokenizer(), config, step) for step in range(8)]
    assert len({tuple(document.ids.tolist()) for document in made}) == 8
    for half in (made[:4], made[4:]):
        sizes = sorted(len(document.ids) for document in half)
        for size, length in zip(sizes, document_lengths(config), strict=True):
            assert 0.8 * length < size <= length
    with pytest.raises(ValueError, match="shortest must leave room"):
        passkey_document(byte_tokenizer(), length=100, passkeys=1, kind=0, seed="1")
