"""KVTuner: tables, sensitivity, pruning, groups, search, and the patch of a model."""

import importlib
import itertools
import json
import math
import random

import pytest
import torch
import yaml

from repro import calibration, claims, manifest, subjects
from repro.errors import MissingResource, UnsupportedCombination
from repro.kv_packed import Packing
from repro.kv_testing import LAWS, check_equals_dense, check_quality_is_lost_in_decode_alone
from repro.method import Artifact
from repro.methods.kvtuner import METHOD, KVTunerConfig
from repro.methods.kvtuner.cache import packed_cache, table_of
from repro.methods.kvtuner.search import (
    Journal,
    Space,
    Trial,
    front,
    pick,
    pruned_space,
    search,
    surviving_pairs,
    whole_space,
)
from repro.methods.kvtuner.sensitivity import layer_errors, profile
from repro.methods.kvtuner.tables import (
    PAIRS,
    UNIFORM,
    average_bits,
    preset_yaml,
    presets,
    published_groups,
    random_table,
    uniform_table,
)
from repro.plan import make_plan
from repro.testing import byte_tokenizer, qkv, tiny_subject, token_ids

SMALL = {"group_size": 8, "residual": 16}
MODES = pytest.mark.parametrize("mode", ["per_token", "kivi"])


@pytest.fixture(scope="module")
def subject():
    return tiny_subject(layers=3, head_dim=32)


def steps(subject, ids, config, artifact=None):
    """Logits of a prompt of all but three tokens, and of these one by one."""
    outs = []
    with METHOD.apply(subject, config, artifact) as patch, torch.no_grad():
        cache = patch.make_cache()
        for part in (ids[:, :-3], *ids[:, -3:].split(1, dim=1)):
            outs.append(subject.model(part, past_key_values=cache).logits)
        return torch.cat(outs, dim=1), patch.stats()


def drawn_errors(seed, layers=1):
    generator = random.Random(seed)
    return [{pair: round(generator.random(), 1) for pair in PAIRS} for _ in range(layers)]


# ---- tables


@pytest.mark.parametrize(
    ("name", "layers", "bits"),
    [
        ("llama-3.1-8b-instruct-kivi-3.25", 32, 3.25),
        ("llama-3.1-8b-instruct-kivi-4.91", 32, 4.90625),
        ("llama-3.1-8b-instruct-per_token-3.59", 32, 3.59375),
        ("qwen2.5-7b-instruct-per_token-4.00", 28, 4.0),
        ("qwen2.5-7b-instruct-per_token-5.00", 28, 5.0),
        ("qwen2.5-7b-instruct-kivi-3.92", 28, 110 / 28),
    ],
)
def test_average_bits_of_the_published_tables(name, layers, bits):
    preset = presets()[name]
    assert len(preset.table) == layers
    assert average_bits(preset.table) == pytest.approx(bits, abs=1e-12)
    assert preset.bits == pytest.approx(bits, abs=1e-12)
    assert set(preset.table) <= set(PAIRS)


def test_every_published_table_is_listed():
    assert len(presets()) == 6
    assert {preset.mode for preset in presets().values()} == {"per_token", "kivi"}


@pytest.mark.parametrize("name", sorted(published_groups()))
def test_published_tables_are_constant_on_published_groups(name):
    groups = published_groups()[name]
    matching = [preset for preset in presets() if preset.startswith(name)]
    assert matching
    for preset in matching:
        table = presets()[preset].table
        assert sorted(itertools.chain(*groups)) == list(range(len(table)))
        chosen = [{table[layer] for layer in group} for group in groups]
        assert all(len(pairs) == 1 for pairs in chosen)
        space = Space(groups, (PAIRS,) * len(groups))
        assert space.expand([pairs.pop() for pairs in chosen]) == table


def test_random_table_has_exactly_as_many_bits():
    table = ((16, 16), (8, 2), (4, 4), (4, 2), (2, 2))
    drawn = {random_table(table, draw) for draw in range(50)}
    assert len(drawn) > 20
    for other in drawn:
        assert average_bits(other) == average_bits(table) and other[0] == (16, 16)
    assert random_table(table, 3) == random_table(table, 3)


def test_random_table_is_uniform_over_all_of_its_bits():
    table = ((4, 2), (2, 2))
    every = [t for t in itertools.product(PAIRS, repeat=2) if average_bits(t) == 2.5]
    drawn = [random_table(table, draw) for draw in range(600)]
    assert set(drawn) == set(every)
    assert all(0.8 < drawn.count(t) * len(every) / 600 < 1.2 for t in every)


def test_uniform_table_has_no_fewer_bits():
    for bits, table in itertools.product(UNIFORM, [((2, 2), (8, 8)), ((4, 2), (4, 2))]):
        found = uniform_table(table)
        assert len(set(found)) == 1 and average_bits(found) >= average_bits(table)
        assert sum(bits) >= sum(found[0]) or average_bits((bits,)) < average_bits(table)
        assert uniform_table((bits, bits)) == (bits, bits)
    assert uniform_table(((16, 16), (2, 2))) == ((16, 16),) * 2


# ---- sensitivity


@MODES
def test_errors_vanish_at_sixteen_bits_and_fall_with_bits(mode):
    q, k, v = qkv(heads=4, kv_heads=2, queries=64, head_dim=32)
    packing = Packing(k_bits=16, v_bits=16, mode=mode, **SMALL)
    errors = layer_errors(q, k, v, packing, scale=0.2, bits=(2, 4, 8, 16))
    for name in ("k", "v", "a", "o", "pooled"):
        assert (errors[name].flatten()[-1] == 0) and (errors[name] >= 0).all()
    for name in "kva":
        assert (errors[name].diff() < 0).all()
    assert errors["o"][0, 0] > errors["o"][1, 1] > errors["o"][2, 2] > 0
    assert (errors["a"][3], errors["o"][3, 3]) == (0, 0)
    assert errors["o"][0, 3] > 0 and errors["o"][3, 0] > 0


@MODES
def test_errors_are_their_definition(mode):
    q, k, v = qkv(heads=4, kv_heads=2, queries=40, head_dim=32, seed=1)
    packing = Packing(k_bits=4, v_bits=2, mode=mode, **SMALL)
    found = layer_errors(q, k, v, packing, scale=0.2, bits=(2, 4))

    def attention(keys, values):
        keys, values = (x.double().repeat_interleave(2, dim=1) for x in (keys, values))
        scores = (q.double() @ keys.mT * 0.2).masked_fill(~causal, -math.inf)
        return scores.softmax(-1), scores.softmax(-1) @ values

    causal = torch.ones(40, 40, dtype=torch.bool).tril()
    (a, o), (other_a, other_o) = attention(k, v), attention(*packing.rounded(k, v))
    expected = {
        "k": ((k - packing.rounded(k, v)[0]) / k).abs().mean().double(),
        "v": ((v - packing.rounded(k, v)[1]) / v).abs().mean().double(),
        "a": (a - other_a).abs()[..., causal].mean(),
        "o": ((o - other_o) / o).abs().mean(),
        "pooled": ((o - other_o).abs().sum(-1) / o.abs().sum(-1)).mean(),
    }
    actual = {"k": found["k"][1], "v": found["v"][0], "a": found["a"][1], "o": found["o"][1, 0]}
    actual["pooled"] = found["pooled"][1, 0]
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-3, atol=1e-7)


def test_errors_of_a_layer_depend_on_that_layer_alone(subject):
    packing = Packing(k_bits=16, v_bits=16)
    prompts = [token_ids(1, 50, seed=seed) for seed in range(2)]
    whole = profile(subject.model, prompts, packing)
    assert whole.o.shape == (3, 3, 3) and whole.k.shape == (3, 3)
    with METHOD.apply(subject, KVTunerConfig(pairs=((2, 2), (8, 8), (8, 8))), None):
        again = profile(subject.model, prompts, packing)
    assert torch.equal(whole.o, again.o)
    halves = [profile(subject.model, [prompt], packing) for prompt in prompts]
    torch.testing.assert_close(whole.o, (halves[0].o + halves[1].o) / 2)


def test_errors_of_a_layer_do_not_change_with_later_layers_and_do_with_its_own():
    packing, ids = Packing(k_bits=16, v_bits=16), token_ids(1, 50)
    before = profile(tiny_subject(layers=3, head_dim=32).model, [ids], packing)
    made = tiny_subject(layers=3, head_dim=32)
    with torch.no_grad():
        made.model.model.layers[1].self_attn.k_proj.weight[5] *= 30
    after = profile(made.model, [ids], packing)
    for name in ("k", "v", "a", "o", "pooled"):
        found, expected = getattr(after, name), getattr(before, name)
        assert torch.equal(found[0], expected[0])
    assert (after.k[1] > before.k[1]).all() and torch.equal(after.v[1], before.v[1])
    assert (after.o[1] != before.o[1]).all()


# ---- pruning and groups


def beats(first, second, errors):
    bits = sum(first) <= sum(second)
    no_worse = bits and errors[first] <= errors[second]
    return no_worse and (sum(first) < sum(second) or errors[first] < errors[second])


@pytest.mark.parametrize("seed", range(20))
def test_survivors_are_an_antichain_and_beat_all_others(seed):
    [errors] = drawn_errors(seed)
    kept = surviving_pairs(errors)
    assert not any(beats(a, b, errors) for a, b in itertools.permutations(kept, 2))
    for pair in set(PAIRS) - set(kept):
        assert any(
            beats(other, pair, errors)
            or (sum(other) == sum(pair) and errors[other] == errors[pair])
            for other in kept
        )
    assert (2, 2) in kept
    others = [error for pair, error in errors.items() if pair != (8, 8)]
    assert ((8, 8) in kept) == (errors[8, 8] < min(others))
    assert (8, 8) in surviving_pairs({**errors, (8, 8): min(others) - 0.01})
    assert (8, 8) not in surviving_pairs({**errors, (8, 8): min(others)})


def test_best_of_equal_bits_survives_and_a_dominated_pair_changes_nothing():
    order = [(8, 8), (8, 4), (4, 4), (4, 2), (2, 2), (4, 8), (8, 2), (2, 8), (2, 4)]
    table = dict(
        zip(order, (0.014, 0.1, 0.207, 0.453, 0.962, 0.168, 0.401, 0.882, 0.892), strict=True)
    )
    # The errors that the paper's table 3 gives for Llama-3.1-8B, per token.
    assert surviving_pairs(table) == ((8, 8), (8, 4), (4, 4), (4, 2), (2, 2))
    without = {pair: error for pair, error in table.items() if pair != (8, 2)}
    assert surviving_pairs(without) == surviving_pairs(table)
    flipped = {**table, (4, 8): 0.05}
    assert surviving_pairs(flipped) == ((8, 8), (4, 8), (4, 4), (4, 2), (2, 2))
    assert surviving_pairs({**table, (4, 8): 0.1})[1] == (8, 4)


@pytest.mark.parametrize("seed", range(5))
def test_groups_partition_the_layers_and_share_survivors(seed):
    errors = drawn_errors(seed, layers=4)
    errors += [{pair: e + 0.001 for pair, e in layer.items()} for layer in errors[:2]]
    space = pruned_space(errors)
    assert sorted(itertools.chain(*space.groups)) == list(range(6))
    assert {(0, 4), (1, 5)} <= set(space.groups)
    for group, pairs in zip(space.groups, space.choices, strict=True):
        assert {surviving_pairs(errors[layer]) for layer in group} == {pairs}
    assert space.size == math.prod(len(pairs) for pairs in space.choices)


def test_far_layers_of_the_same_survivors_are_groups_of_their_own():
    [errors] = drawn_errors(3)
    far = [{pair: error + 3.0 * shift for pair, error in errors.items()} for shift in range(3)]
    assert pruned_space(far).groups == ((0,), (1,), (2,))
    assert whole_space(3).size == 9**3


# ---- search


def toy_loss(table):
    """Layers of different weight; more bits never lose more, keys matter more than values."""
    weights = (1.0, 0.3, 0.05)
    total = sum(w * (2.0**-k + 0.4 * 2.0**-v) for w, (k, v) in zip(weights, table, strict=True))
    return round(total, 6)


def true_front(tables):
    points = {(average_bits(t), toy_loss(t)) for t in tables}
    return sorted(
        p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)
    )


def test_front_is_the_true_one_where_every_table_is_tried():
    space = Space(((0,), (1,), (2,)), (UNIFORM,) * 3)
    tried = search(space, toy_loss, trials=space.size)
    assert len(tried) == space.size
    assert [(t.bits, t.loss) for t in front(tried)] == true_front(space.tables())
    capped = search(space, toy_loss, trials=space.size, max_bits=4.0)
    assert {t.table for t in capped} == {t for t in space.tables() if average_bits(t) <= 4}
    chosen = pick(tried, 4.0)
    assert chosen == pick(capped, 4.0)
    assert chosen.loss == min(t.loss for t in capped)
    assert pick([t for t in tried if t.bits > 4], 4.0) is None


def test_front_and_pick_take_the_fewest_bits_of_equal_loss():
    trials = [Trial(((bits, bits),), bits, loss) for bits, loss in ((8, 0.1), (4, 0.1), (2, 0.5))]
    assert [t.bits for t in front(trials)] == [2, 4]
    assert pick(trials, 8.0).bits == 4


@pytest.mark.parametrize("sampler", ["nsga2", "tpe"])
def test_the_optimiser_stays_in_the_space_repeats_itself_and_gets_close(sampler):
    space = Space(((0, 2), (1,), (3,)), (PAIRS, PAIRS, UNIFORM))

    def loss(table):
        return toy_loss(table[1:])

    options = {"trials": 150, "max_bits": 5.0, "sampler": sampler, "seed": 3}
    done = []
    tried = search(space, loss, progress=done.append, **options)
    assert done == list(range(1, 151))
    assert tried == search(space, loss, **options)
    assert len({t.table for t in tried}) == len(tried) <= 150
    assert all(t.table[0] == t.table[2] for t in tried)
    assert [t.table for t in tried] != [
        t.table for t in search(space, loss, **{**options, "seed": 4})
    ]
    best = min(loss(t) for t in space.tables() if average_bits(t) <= 5.0)
    assert pick(tried, 5.0).loss <= 1.5 * best


def test_a_killed_search_goes_on_where_it_was(tmp_path):
    space = Space(((0,), (1,), (2,)), (PAIRS,) * 3)
    options = {"trials": 60, "max_bits": 4.0, "seed": 1}
    expected = search(space, toy_loss, **options)
    path, calls = tmp_path / "work" / "losses.jsonl", []

    def counted(limit):
        journal = Journal(path, "this")

        def compute(table):
            if len(calls) == limit:
                raise KeyboardInterrupt
            calls.append(table)
            return toy_loss(table)

        return lambda table: journal.loss(table, compute)

    with pytest.raises(KeyboardInterrupt):
        search(space, counted(20), **options)
    with path.open("a") as stream:  # torn in the middle of a line
        stream.write('{"identity": "this", "tab')
    with pytest.raises(KeyboardInterrupt):
        search(space, counted(30), **options)
    assert search(space, counted(10_000), **options) == expected
    assert len(calls) == len(set(calls)) == len(expected)
    other = Journal(path, "other")
    assert other.loss(expected[0].table, lambda table: 7.0) == 7.0


# ---- the patch of a model


MIXED = ((2, 4), (8, 2), (4, 4))


@MODES
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law, mode, subject):
    assert law(METHOD, subject, KVTunerConfig(mode=mode, pairs=MIXED, **SMALL)) == []


@MODES
def test_prefill_is_dense_and_decode_is_not(subject, mode):
    config = KVTunerConfig(mode=mode, pairs=MIXED, **SMALL)
    assert check_quality_is_lost_in_decode_alone(METHOD, subject, config) == []


@MODES
def test_sixteen_bits_continue_as_dense(subject, mode):
    config = KVTunerConfig(mode=mode, k_bits=16, v_bits=16, **SMALL)
    assert check_equals_dense(METHOD, subject, config, token_ids(2, 40)) == []


@MODES
def test_a_constant_table_is_the_uniform_one_to_the_bit(subject, mode):
    ids = token_ids(1, 60)
    for k_bits, v_bits in PAIRS:
        table = KVTunerConfig(mode=mode, **SMALL, pairs=((k_bits, v_bits),) * 3)
        uniform = KVTunerConfig(mode=mode, **SMALL, k_bits=k_bits, v_bits=v_bits)
        ours, stats = steps(subject, ids, table)
        theirs, _ = steps(subject, ids, uniform)
        assert torch.equal(ours, theirs)
        assert stats["bits"] == (k_bits + v_bits) / 2 < stats["stored_bits"]


@MODES
def test_each_layer_holds_its_own_bits(subject, mode):
    ids, held = token_ids(1, 200), []
    tables = (((2, 2),) * 3, ((2, 2), (8, 4), (2, 2)), ((8, 8),) * 3, ((16, 16),) * 3)
    for table in tables:
        _, stats = steps(subject, ids, KVTunerConfig(mode=mode, **SMALL, pairs=table))
        held.append(stats["kv_bytes"])
    assert held == sorted(held) and len(set(held)) == 4


def test_sixteen_bits_are_dense_and_everything_is_restored(subject):
    ids = token_ids(1, 60)
    with torch.no_grad():
        before, config = subject.model(ids).logits, subject.model.config.to_dict()
    out, _ = steps(subject, ids, KVTunerConfig(k_bits=16, v_bits=16))
    torch.testing.assert_close(out, before, rtol=1e-4, atol=1e-5)
    low, _ = steps(subject, ids, KVTunerConfig(k_bits=2, v_bits=2))
    torch.testing.assert_close(low[:, :-3], before[:, :-3], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(low[:, -3:], before[:, -3:], rtol=1e-3)
    with pytest.raises(RuntimeError), METHOD.apply(subject, KVTunerConfig(k_bits=2, v_bits=2)):
        raise RuntimeError
    with torch.no_grad():
        assert torch.equal(subject.model(ids).logits, before)
    assert subject.model.config.to_dict() == config


def test_a_table_of_another_model_is_refused(subject):
    preset = KVTunerConfig(preset="llama-3.1-8b-instruct-per_token-3.59")
    text = (
        "preset llama-3.1-8b-instruct-per_token-3.59 must be for the 3 layers of .*, got 32 pairs"
    )
    with pytest.raises(UnsupportedCombination, match=text), METHOD.apply(subject, preset):
        pass
    with pytest.raises(UnsupportedCombination, match="pairs must be for the 3 layers"):
        table_of(subject, KVTunerConfig(pairs=((2, 2),)), None)


def test_controls_have_as_many_bits(subject):
    table = ((8, 4), (2, 2), (4, 2))
    for control, draw in (("random", 0), ("random", 1), ("uniform", 0)):
        config = KVTunerConfig(pairs=table, control=control, draw=draw)
        found = table_of(subject, config, None)
        assert average_bits(found) >= average_bits(table)
        assert (average_bits(found) == average_bits(table)) or control == "uniform"
    assert found == ((4, 4),) * 3


def test_an_artifact_of_another_mode_or_none_is_refused(subject):
    made = {"mode": "kivi", "group_size": 32, "residual": 32, "table": [[4, 2]] * 3}
    config = KVTunerConfig(mode="kivi")
    assert table_of(subject, config, Artifact(metadata=made)) == ((4, 2),) * 3
    assert table_of(subject, KVTunerConfig(), Artifact(metadata=made | {"mode": "per_token"}))
    for other in (
        KVTunerConfig(),
        KVTunerConfig(mode="kivi", residual=64),
        KVTunerConfig(mode="kivi", group_size=16),
    ):
        with pytest.raises(MissingResource, match="the artifact must be made with"):
            table_of(subject, other, Artifact(metadata=made))
    with pytest.raises(MissingResource, match="needs an artifact"):
        table_of(subject, config, None)
    assert METHOD.needs_artifact(config)
    assert not METHOD.needs_artifact(KVTunerConfig(k_bits=4, v_bits=4))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"mode": "channel"}, "mode must be per_token or kivi"),
        ({"residual": 40}, "residual must be a positive multiple of group_size 32, got 40"),
        ({"pairs": ((4, 3),)}, "pairs must be one pair of"),
        ({"pairs": ()}, "pairs must be one pair of"),
        ({"pairs": ((4, 4, 4),)}, "pairs must be one pair of"),
        ({"k_bits": 3, "v_bits": 4}, "k_bits must be one of .2, 4, 8, 16., got 3"),
        ({"k_bits": 4, "v_bits": 32}, "v_bits must be one of .2, 4, 8, 16., got 32"),
        ({"k_bits": 4}, "v_bits must be given with k_bits"),
        ({"k_bits": 4, "v_bits": 2, "pairs": ((4, 4),)}, "given without pairs and k_bits"),
        ({"preset": "llama-3.1-8b-instruct-kivi-3.2"}, "did you mean llama-3.1-8b-instruct-kivi"),
        ({"preset": "llama-3.1-8b-instruct-kivi-3.25"}, "mode must be kivi with this preset"),
        (
            {"preset": "llama-3.1-8b-instruct-kivi-3.25", "mode": "kivi", "residual": 64},
            "residual must be 32 with this preset, got 64",
        ),
        ({"max_bits": 1.5}, "max_bits must be in"),
        ({"trials": 0}, "trials must be at least 1"),
        ({"sampler": "moead"}, "sampler must be nsga2 or tpe, got moead"),
    ],
)
def test_broken_rules_are_named(options, text):
    with pytest.raises(ValueError, match=text):
        KVTunerConfig(**options)


# ---- calibration


@pytest.mark.parametrize("pruning", [True, False])
def test_calibration_finds_a_table_and_keeps_all_of_the_search(tmp_path, pruning):
    retriever = subjects.load("zoo:retriever", device="cpu")
    data = calibration.calibration_prompts(retriever, count=2, length=256, seed=1)
    config = KVTunerConfig(
        trials=2, samples=1, sample_length=256, max_bits=5.0, pruning=pruning, seed=2
    )
    done = []
    artifact = METHOD.calibrate(
        retriever, config, data, progress=lambda *pair: done.append(pair), workdir=tmp_path
    )
    again = METHOD.calibrate(retriever, config, data, workdir=tmp_path)
    assert again.metadata == artifact.metadata
    assert done[0] == (0, 4) and done[-1] == (4, 4)
    search, table = artifact.metadata["figures"]
    (chosen,) = search["series"]["chosen"]
    assert chosen in search["series"]["front"] and chosen in search["series"]["tried"]
    assert chosen[0] == artifact.metadata["average_bits"]
    assert tuple(zip(*table["values"], strict=True)) == artifact.metadata["table"]
    found = json.loads(json.dumps(artifact.metadata))
    assert artifact.tensors["e_o"].shape == (3, 3, 3) and artifact.tensors["e_k"].shape == (3, 3)
    assert found["average_bits"] == average_bits(found["table"]) <= 5.0
    assert (len(found["groups"]) == 3) or pruning
    entry = yaml.safe_load(preset_yaml("found", found))["found"]
    assert [[int(bits) for bits in pair] for pair in entry["pairs"].split()] == found["table"]
    with METHOD.apply(retriever, config, artifact) as patch:
        with torch.no_grad():
            retriever.model(data[0], past_key_values=patch.make_cache())
        assert patch.stats()["bits"] == found["average_bits"]


def test_a_killed_calibration_goes_on_and_asks_no_table_twice(tmp_path, monkeypatch):
    subject = tiny_subject(layers=3, head_dim=32)
    subject.tokenizer = byte_tokenizer()
    config = KVTunerConfig(trials=12, samples=1, sample_length=2048, pruning=False, max_bits=5.0)
    data, asked, limits = [token_ids(1, 40)], [], [10_000]

    def forced_cache(*arguments, force_quantized):
        assert force_quantized  # trials attend to what is read back in prefill, too
        return packed_cache(*arguments, force_quantized=force_quantized)

    def accuracy(subject, questions, make_cache):
        if len(asked) == limits[-1]:
            raise KeyboardInterrupt
        asked.append(table := [layer.packing for layer in held(subject, make_cache())])
        return 1 - sum(2.0**-p.k_bits + 2.0**-p.v_bits for p in table) / 10

    def held(subject, cache):
        with torch.no_grad():
            subject.model(token_ids(1, 2), past_key_values=cache)
        return cache.held()

    module = importlib.import_module("repro.methods.kvtuner.calibrate")
    monkeypatch.setattr(module, "packed_cache", forced_cache)
    monkeypatch.setattr(module, "accuracy", accuracy)
    whole = METHOD.calibrate(subject, config, data)
    tables, asked[:] = len(asked), []
    assert tables == 1 + len(whole.metadata["trials"]) > 8  # 16 bits, too, are asked
    for limit in (0, 1, 5):
        limits.append(limit)
        with pytest.raises(KeyboardInterrupt):
            METHOD.calibrate(subject, config, data, workdir=tmp_path)
    limits.append(10_000)
    resumed = METHOD.calibrate(subject, config, data, workdir=tmp_path)
    assert resumed.metadata == whole.metadata
    assert len(asked) == tables and all(asked.count(table) == 1 for table in asked)
    for name, values in whole.tensors.items():
        assert torch.equal(resumed.tensors[name], values), name
    losses = {table: loss for table, _, loss in whole.metadata["trials"]}
    dense = whole.metadata["accuracy_unquantized"]
    assert whole.metadata["accuracy"] == pytest.approx(dense - losses[whole.metadata["table"]])


# ---- claims and manifest


def test_claims_and_manifest_are_well_formed():
    paper = claims.for_method("kvtuner")
    assert paper.arxiv == "2502.04420" and len(paper.claims) > 60
    loaded = manifest.load("manifests/kvtuner.yaml", profile="embedded")
    assert set(loaded.profiles) == {"embedded", "embedded-full", "paper"}
    plan = make_plan(loaded, "embedded")
    searched = [cell for cell in plan.cells if cell.artifact]
    controls = [c for c in searched if c.cell["method"]["config"]["control"] != "none"]
    assert controls and len({cell.artifact["id"] for cell in searched}) == 1
    assert len({cell.key for cell in searched}) == len(searched)
