"""XAttention: laws of the operator, of the patch, of the controls and of the calibration."""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from repro import manifest, report, runner
from repro.errors import BadInput, MissingResource
from repro.kernels.block_selection import causal_blocks
from repro.method import Artifact
from repro.methods.xattention import METHOD, XAttentionConfig
from repro.methods.xattention.attention import estimator_chunk, xattention, xattention_mask
from repro.methods.xattention.calibrate import needed_share
from repro.plan import make_plan
from repro.testing import qkv, tiny_subject, token_ids

SMALL = {"stride": 4, "block_size": 16}


@pytest.fixture(scope="module")
def subject():
    """A random model whose attention is peaked, so that blocks differ."""
    made = tiny_subject(heads=4, kv_heads=2, head_dim=16)
    with torch.no_grad():
        for layer in made.model.model.layers:
            layer.self_attn.q_proj.weight *= 12
            layer.self_attn.k_proj.weight *= 12
    return made


def logits(subject, ids, **options):
    with torch.no_grad():
        return subject.model(ids, **options).logits


def dense_under(q, k, v, block_mask, block_size, *, causal=True, real=None):
    """Dense attention with -inf on every token of a dropped block."""
    n_rep = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(n_rep, dim=1) for x in (k, v))
    seen = block_mask.repeat_interleave(block_size, 2).repeat_interleave(block_size, 3)
    seen = seen[:, :, : q.shape[2], : k.shape[2]]
    if causal:
        seen = seen & torch.ones(seen.shape[2:], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    if real is not None:
        seen = seen & real[:, None, None, :]
    scores = (q @ k.mT * q.shape[3] ** -0.5).masked_fill(~seen, -math.inf)
    return torch.softmax(scores, -1).nan_to_num(0.0) @ v


# ---- the operator


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("queries", [96, 90, 33])
def test_output_is_dense_attention_over_kept_blocks(queries, causal):
    q, k, v = qkv(queries=queries, keys=96, heads=4, kv_heads=2, head_dim=16, batch=2)
    q = q * 4
    config = XAttentionConfig(**SMALL, threshold=0.6)
    mask = xattention_mask(q, k, config, threshold=0.6, causal=causal)
    assert 0 < mask.float().mean() < 0.9
    expected = dense_under(q, k, v, mask, 16, causal=causal)
    actual = xattention(q, k, v, config, causal=causal)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_threshold_one_is_sdpa_to_the_bit(causal):
    q, k, v = qkv(queries=70, head_dim=16, dtype=torch.bfloat16)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.25)
    for threshold in (1.0, torch.ones(4)):
        config = XAttentionConfig(**SMALL)
        assert torch.equal(xattention(q, k, v, config, threshold=threshold, causal=causal), dense)


def test_stride_one_mask_is_the_oracle_mask():
    q, k, _ = qkv(queries=96, head_dim=16)
    q = q * 3
    mask = xattention_mask(q, k, XAttentionConfig(stride=1, block_size=16), threshold=0.7)
    scores = (q @ k.mT * 0.25).masked_fill(torch.ones(96, 96).triu(1).bool(), -math.inf)
    exact = torch.softmax(scores, -1).unflatten(3, (-1, 16)).unflatten(2, (-1, 16)).sum((3, 5))
    for head in range(4):
        for row in range(6):
            masses = exact[0, head, row].tolist()
            kept = {0, row}
            for n in sorted(set(range(row + 1)) - kept, key=lambda n: -masses[n]):
                if sum(masses[i] for i in kept) >= 0.7 * sum(masses):
                    break
                kept.add(n)
            assert set(mask[0, head, row].nonzero().flatten().tolist()) == kept


def test_mask_grows_with_threshold():
    q, k, _ = qkv(queries=160, head_dim=16)
    config = XAttentionConfig(**SMALL)
    masks = [xattention_mask(q, k, config, threshold=t) for t in (0.0, 0.3, 0.6, 0.9, 1.0)]
    for smaller, larger in itertools.pairwise(masks):
        assert not (smaller & ~larger).any()
    forced = torch.eye(10, dtype=torch.bool) | (torch.arange(10) == 0)
    assert torch.equal(masks[0], forced.expand_as(masks[0]))
    assert torch.equal(masks[-1], causal_blocks(10, 10, block_size=16).expand_as(masks[-1]))


def test_head_threshold_equals_scalar():
    q, k, _ = qkv(queries=96, head_dim=16)
    config = XAttentionConfig(**SMALL)
    shares = torch.tensor([0.0, 0.4, 0.8, 0.95], dtype=torch.float64)
    together = xattention_mask(q, k, config, threshold=shares)
    for head, share in enumerate(shares.tolist()):
        one = slice(head, head + 1)
        alone = xattention_mask(q[:, one], k[:, one], config, threshold=share)
        assert torch.equal(together[:, one], alone)


def test_grouped_heads_equal_expanded_keys():
    q, k, v = qkv(queries=80, heads=4, kv_heads=2, head_dim=16)
    config = XAttentionConfig(**SMALL, threshold=0.5)
    wide = [x.repeat_interleave(2, dim=1) for x in (k, v)]
    torch.testing.assert_close(xattention(q, k, v, config), xattention(q, *wide, config))


@pytest.mark.parametrize("chunk", [16, 32, 64])
def test_chunks_of_whole_blocks_give_rows_of_the_whole_mask(chunk):
    q, k, v = qkv(queries=128, head_dim=16)
    config = XAttentionConfig(**SMALL, threshold=0.6)
    mask = xattention_mask(q, k, config, threshold=0.6)
    whole = xattention(q, k, v, config)
    for first in range(0, 128, chunk):
        last = first + chunk
        part = (q[:, :, first:last], k[:, :, :last])
        rows = xattention_mask(*part, config, threshold=0.6)
        assert torch.equal(rows, mask[:, :, first // 16 : last // 16, : last // 16])
        out = xattention(*part, v[:, :, :last], config)
        torch.testing.assert_close(out, whole[:, :, first:last], rtol=1e-4, atol=1e-5)


def test_independent_of_estimator_chunk():
    q, k, _ = qkv(queries=256, head_dim=16)
    masks = [
        xattention_mask(q, k, XAttentionConfig(**SMALL, estimator_chunk=chunk), threshold=0.7)
        for chunk in (None, 64, 128, 256)
    ]
    assert all(torch.equal(mask, masks[0]) for mask in masks)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_real_block(causal, side):
    q, k, v = qkv(queries=96, head_dim=16, seed=1)
    junk = qkv(queries=48, head_dim=16, seed=2)
    config = XAttentionConfig(**SMALL, threshold=0.6)
    alone = xattention_mask(q, k, config, threshold=0.6, causal=causal)
    order = slice(None) if side == "right" else slice(None, None, -1)
    wide = [
        torch.cat([x, 5 * other][order], dim=2) for x, other in zip((q, k, v), junk, strict=True)
    ]
    real = torch.tensor([True] * 96 + [False] * 48)[None]
    real = real if side == "right" else real.flip(1)
    options = {"causal": causal, "key_padding_mask": real}
    mask = xattention_mask(*wide[:2], config, threshold=0.6, **options)
    inner = slice(0, 6) if side == "right" else slice(3, 9)
    assert torch.equal(mask[:, :, inner, inner], alone)
    out = xattention(*wide, config, **options)[:, :, real[0]]
    torch.testing.assert_close(
        out, xattention(q, k, v, config, causal=causal), rtol=1e-4, atol=1e-5
    )


def test_first_chunk_quirk_ends_with_the_first_chunk():
    q, k, _ = qkv(queries=256, head_dim=16)
    clean = xattention_mask(q, k, XAttentionConfig(**SMALL), threshold=0.5)
    quirk_config = XAttentionConfig(**SMALL, first_chunk_quirk=True, estimator_chunk=128)
    quirk = xattention_mask(q, k, quirk_config, threshold=0.5)
    more = quirk.sum(-1) - clean.sum(-1)
    assert (more[:, :, 8:] == 0).all()
    assert more[:, :, :8].max() > 0 and more.min() >= 0 and more.max() <= 2


@pytest.mark.parametrize(
    ("tokens", "chunk"),
    [(2048, 2048), (16384, 16384), (16385, 8192), (32768, 8192), (131072, 2048)],
)
def test_estimator_chunk_formula(tokens, chunk):
    assert estimator_chunk(XAttentionConfig(), tokens) == chunk


# ---- the patch of a model


def test_logits_and_config_restored_also_after_an_exception(subject):
    ids = token_ids(1, 200)
    before, config = logits(subject, ids), subject.model.config.to_dict()
    options = XAttentionConfig(**SMALL, threshold=0.3)
    with METHOD.apply(subject, options, None):
        assert not torch.equal(logits(subject, ids), before)
    assert torch.equal(logits(subject, ids), before)
    with pytest.raises(RuntimeError), METHOD.apply(subject, options, None):
        raise RuntimeError
    assert torch.equal(logits(subject, ids), before)
    assert subject.model.config.to_dict() == config


@pytest.mark.parametrize("batch", [False, True], ids=["single", "padded batch"])
def test_threshold_one_is_bit_identical(subject, batch):
    ids = token_ids(2 if batch else 1, 100)
    options = {}
    if batch:
        options["attention_mask"] = torch.ones_like(ids)
        options["attention_mask"][0, :37] = 0
    before = logits(subject, ids, **options)
    with METHOD.apply(subject, XAttentionConfig(**SMALL, threshold=1.0), None) as patch:
        assert torch.equal(logits(subject, ids, **options), before)
        assert patch.stats()["density"] == 1.0
        assert patch.stats()["sparse_calls"] == 0


def test_left_padded_batch_equals_singles(subject):
    lengths = [150, 97, 61]
    ids = token_ids(3, 150)
    mask = (torch.arange(150) >= 150 - torch.tensor(lengths)[:, None]).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with METHOD.apply(subject, XAttentionConfig(**SMALL, threshold=0.5), None) as patch:
        together = logits(subject, ids, attention_mask=mask, position_ids=positions)
        batch_density = patch.stats()["density"]
        patch.reset()
        for row, length in enumerate(lengths):
            alone = logits(subject, ids[row : row + 1, -length:])[0]
            torch.testing.assert_close(together[row, -length:], alone, rtol=1e-3, atol=1e-4)
        assert patch.stats()["density"] == pytest.approx(batch_density, abs=1e-3)
    assert batch_density < 0.9


def test_prefill_in_chunks_equals_whole(subject):
    ids = token_ids(1, 160)
    with METHOD.apply(subject, XAttentionConfig(**SMALL, threshold=0.5), None):
        whole = logits(subject, ids)
        cache, parts = None, []
        with torch.no_grad():
            for first, last in ((0, 64), (64, 128), (128, 160)):
                out = subject.model(ids[:, first:last], past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-3, atol=1e-4)


def test_generates_with_and_without_cache(subject):
    ids = token_ids(1, 120)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with METHOD.apply(subject, XAttentionConfig(**SMALL, threshold=0.5), None) as patch:
        with torch.no_grad():
            cached = subject.model.generate(ids, **options)
        stats = patch.stats()
        assert (stats["sparse_calls"], stats["decode_calls"]) == (2, 2 * 3)
        assert stats["dense_calls"] == 6 and stats["fallback_share"] == 0
        patch.reset()
        with torch.no_grad():
            fresh = subject.model.generate(ids, use_cache=False, **options)
        assert patch.stats()["sparse_calls"] == 2 * 4
    assert cached.shape == fresh.shape == (1, 124)


def test_stats_agree_with_the_mask(subject, monkeypatch):
    from repro.methods.xattention import attention

    masks = []

    def spy(*arguments, **options):
        masks.append(xattention_mask(*arguments, **options))
        return masks[-1]

    monkeypatch.setattr(attention, "xattention_mask", spy)
    with METHOD.apply(subject, XAttentionConfig(**SMALL, threshold=0.4), None) as patch:
        logits(subject, token_ids(2, 90))
        stats = patch.stats()
    computable = causal_blocks(6, 6, block_size=16).sum()
    heads = [mask.sum((0, 2, 3)) / (2 * computable) for mask in masks]
    torch.testing.assert_close(torch.tensor(stats["density_per_head"]), torch.stack(heads))
    assert stats["density"] == pytest.approx(torch.stack(heads).mean().item())
    assert stats["density_per_layer"] == pytest.approx([x.mean().item() for x in heads])
    assert stats["selection_seconds"] > 0


def test_prompts_below_min_tokens_and_of_two_blocks_are_dense(subject):
    before = logits(subject, token_ids(1, 40))
    for config in (
        XAttentionConfig(**SMALL, threshold=0.1, min_tokens=41),
        XAttentionConfig(stride=4, block_size=32, threshold=0.1),
    ):
        with METHOD.apply(subject, config, None) as patch:
            assert torch.equal(logits(subject, token_ids(1, 40)), before)
            stats = patch.stats()
        assert (stats["density"], stats["sparse_calls"], stats["dense_calls"]) == (1.0, 0, 2)


# ---- controls


def kept_rows(subject, config, monkeypatch, ids):
    """Return the block masks that reach the sparse kernel."""
    from repro.methods.xattention import attention

    masks = []
    kernel = attention.block_sparse_attention

    def spy(q, k, v, block_mask, **options):
        masks.append(block_mask.clone())
        return kernel(q, k, v, block_mask, **options)

    with monkeypatch.context() as patched:
        patched.setattr(attention, "block_sparse_attention", spy)
        with METHOD.apply(subject, config, None) as patch:
            logits(subject, ids)
            return masks, patch.stats()["density"]


@pytest.mark.parametrize("control", ["random", "oracle"])
def test_controls_keep_the_density_of_the_method(subject, monkeypatch, control):
    ids = token_ids(1, 150)
    own, _ = kept_rows(subject, XAttentionConfig(**SMALL, threshold=0.4), monkeypatch, ids)
    config = XAttentionConfig(**SMALL, threshold=0.4, control=control)
    masks, _ = kept_rows(subject, config, monkeypatch, ids)
    # The first layer sees the same input; deeper ones see the control's.
    assert torch.equal(masks[0].sum(-1), own[0].sum(-1))
    assert masks[0].diagonal(dim1=-2, dim2=-1).all() and masks[0][..., 0].all()
    assert not torch.equal(masks[0], own[0])


def test_random_control_is_fixed_by_draw_and_call(subject, monkeypatch):
    ids = token_ids(1, 150)

    def masks(draw):
        config = XAttentionConfig(**SMALL, threshold=0.4, control="random", draw=draw)
        return kept_rows(subject, config, monkeypatch, ids)[0]

    first, again, other = masks(0), masks(0), masks(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    config = XAttentionConfig(**SMALL, threshold=0.4, control="random")
    with METHOD.apply(subject, config, None) as patch:
        runs = []
        for _ in range(3):
            runs.append(logits(subject, ids))
            if len(runs) == 2:
                patch.reset()
    assert not torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


# ---- calibration


def test_calibration_is_deterministic_and_used(subject):
    config = XAttentionConfig(**SMALL, per_head=True)
    texts = [token_ids(1, 150, seed=seed) for seed in (1, 2)]
    seen = []
    artifact = METHOD.calibrate(
        subject, config, texts, progress=lambda done, total: seen.append((done, total))
    )
    again = METHOD.calibrate(subject, config, texts)
    table = artifact.tensors["threshold"]
    assert torch.equal(table, again.tensors["threshold"]) and artifact.metadata == again.metadata
    assert table.shape == (2, 4) and (table > 0).all() and (table <= 1).all()
    assert seen == [(0, 2), (1, 2), (2, 2)]
    singles = [METHOD.calibrate(subject, config, [text]).tensors["threshold"] for text in texts]
    assert torch.equal(table, torch.maximum(*singles))
    ids = token_ids(1, 150, seed=5)
    with METHOD.apply(subject, config, artifact) as patch:
        logits(subject, ids)
        full = patch.stats()["density"]
    lower = Artifact(tensors={"threshold": table * 0.2}, metadata=artifact.metadata)
    with METHOD.apply(subject, config, lower) as patch:
        logits(subject, ids)
        assert patch.stats()["density"] < full


def test_calibration_leaves_the_model_alone(subject):
    ids = token_ids(1, 100)
    before = logits(subject, ids)
    METHOD.calibrate(subject, XAttentionConfig(**SMALL), [ids])
    assert torch.equal(logits(subject, ids), before)


def test_artifact_survives_the_store(subject, tmp_path):
    from repro.artifacts import ArtifactStore

    config = XAttentionConfig(**SMALL, per_head=True)
    made = METHOD.calibrate(subject, config, [token_ids(1, 100)])
    store = ArtifactStore(tmp_path)
    for _ in range(2):
        kept = store.get_or_make("key", lambda: made)
        assert torch.equal(kept.tensors["threshold"], made.tensors["threshold"])
        assert kept.metadata == made.metadata


def test_needed_share_of_a_known_case():
    """With stride 1 the estimate is exact: the share is what the needed blocks hold."""
    q, k, _ = qkv(queries=64, heads=2, head_dim=16)
    q = q * 5
    config = XAttentionConfig(stride=1, block_size=16)
    share = needed_share(q, k, config, scale=0.25)
    scores = (q @ k.mT * 0.25).masked_fill(torch.ones(64, 64).triu(1).bool(), -math.inf)
    exact = torch.softmax(scores, -1).unflatten(3, (-1, 16)).unflatten(2, (-1, 16)).sum((3, 5))
    for head in range(2):
        covered = 0.0
        for row in exact[0, head]:
            taken = 0.0
            for value in row.sort(descending=True).values.tolist():
                if taken >= 0.9 * row.sum().item():
                    break
                taken += value
            covered += taken
        assert share[head].item() == pytest.approx(covered / 64, rel=1e-4)


def test_calibration_needs_texts(subject):
    with pytest.raises(BadInput, match="at least one text"):
        METHOD.calibrate(subject, XAttentionConfig(**SMALL), [])


@pytest.mark.parametrize(
    ("artifact", "message"),
    [
        (None, "calibrated first"),
        (Artifact(tensors={"threshold": torch.ones(3, 4)}), "layers, heads"),
        (
            Artifact(tensors={"threshold": torch.ones(2, 4)}, metadata={"stride": 8}),
            "calibrated for stride 4",
        ),
    ],
)
def test_wrong_artifacts_are_named(subject, artifact, message):
    config = XAttentionConfig(**SMALL, per_head=True)
    with (
        pytest.raises(MissingResource, match=message),
        METHOD.apply(subject, config, artifact),
    ):
        pass


# ---- the plugin


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.5}, "threshold must be in .0, 1., got 1.5"),
        ({"stride": 24}, "stride must be a divisor of 128, got 24"),
        ({"block_size": 100}, "block_size must be"),
        ({"estimator_chunk": 100}, "estimator_chunk must be"),
        ({"pattern": "slash"}, "pattern must be"),
        ({"control": "best"}, "control must be"),
        ({"draw": -1}, "draw must be"),
        ({"min_tokens": -1}, "min_tokens must be"),
        ({"threshold": 2.0, "draw": -1}, "threshold .*; draw"),
    ],
)
def test_config_checks_itself(options, message):
    with pytest.raises(ValueError, match=message):
        XAttentionConfig(**options)


def test_import_is_free_of_torch():
    code = "import sys, repro.methods.xattention; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("pattern", ["diagonal", "random"])
def test_patterns_choose_other_blocks(pattern):
    q, k, _ = qkv(queries=256, head_dim=16)
    q = q * 4
    own = xattention_mask(q, k, XAttentionConfig(**SMALL), threshold=0.5)
    config = XAttentionConfig(**SMALL, pattern=pattern)
    assert not torch.equal(xattention_mask(q, k, config, threshold=0.5), own)


# ---- the whole suite around it

MANIFEST = Path(__file__).parents[2] / "manifests" / "xattention.yaml"


@pytest.mark.parametrize("profile", ["embedded", "embedded-full"])
def test_the_manifest_plans_every_comparison(profile):
    plan = make_plan(manifest.load(MANIFEST, profile=profile), profile, device="cpu")
    assert not plan.missing
    cells = [planned.cell for planned in plan.cells]
    assert {"ruler", "latency"} <= {cell["measurement"]["name"] for cell in cells}
    controls = {cell["method"]["config"].get("control") for cell in cells}
    assert {"none", "random"} <= controls


def test_a_run_measures_dense_method_and_control(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(
        "paper: xattention\n"
        "profiles:\n"
        "  small:\n"
        "    subjects: [zoo:retriever]\n"
        "    methods:\n"
        "      - xattention: {threshold: 0.5, block_size: 32, stride: 8}\n"
        "      - xattention: {threshold: 0.5, block_size: 32, stride: 8, control: random}\n"
        "    measurements:\n"
        "      - ruler: {tasks: [niah_single_1], lengths: [512], samples: 2, batch_size: 2}\n"
    )
    runs, results = tmp_path / "runs", tmp_path / "results"
    outcome = runner.run(
        path, profile="small", runs=runs, executor="inline", device="cpu", quiet=True
    )
    assert outcome.counts == {"ok": 3}
    density = [(r.get("patch") or {}).get("density") for r in outcome.records]
    dense, *sparse = density
    assert dense in (None, 1.0) and 0 < sparse[0] < 0.9
    # The control keeps as many blocks.
    assert sparse[1] == pytest.approx(sparse[0], rel=0.02)
    report.write(["xattention"], runs=runs, results=results)
    page = (results / "xattention" / "small.md").read_text()
    assert "stride=8" in page or "S = 8" in page
