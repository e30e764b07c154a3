"""Packed layers: what is packed when, that codes stay, and that decode reads what is stored."""

import itertools
from dataclasses import replace

import pytest
import torch

from repro.errors import UnsupportedCombination
from repro.kernels.paged_attention import dequantize
from repro.kv_cache import LayerShape, NewTokens, patched_kv_cache
from repro.kv_packed import PackedLayer, Packing
from repro.testing import qkv, tiny_subject, token_ids

PER_TOKEN = Packing(k_bits=4, v_bits=2)
KIVI = Packing(k_bits=2, v_bits=4, mode="kivi", group_size=8, residual=16)
BOTH = pytest.mark.parametrize("packing", [PER_TOKEN, KIVI], ids=["per_token", "kivi"])
BITS = list(itertools.product((2, 4, 8), repeat=2))


def make_layer(packing, *, batch=1, dtype=torch.float32, head_dim=32, **options):
    shape = LayerShape(0, batch, 4, 2, head_dim, dtype, torch.device("cpu"))
    return PackedLayer(shape, packing, **options)


def tokens(length, *, batch=1, seed=0):
    q, k, v = qkv(batch=batch, heads=4, kv_heads=2, queries=length, head_dim=32, seed=seed)
    return NewTokens(q, 2 * k, v, 32**-0.5)


def part(new, begin, end, row=None):
    rows = slice(None) if row is None else slice(row, row + 1)
    return NewTokens(*(x[rows, :, begin:end] for x in (new.q, new.k, new.v)), new.scale)


def prefilled(packing, new, length, **options):
    layer = make_layer(packing, **options)
    layer.prefill(0, part(new, 0, length))
    layer.end_prefill()
    return layer


def attention(q, k, v, scale):
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    return torch.softmax(q @ k.mT * scale, -1) @ v


@BOTH
@pytest.mark.parametrize("prompt", [1, 15, 16, 17, 64, 83])
def test_decode_attends_to_what_is_read_back(packing, prompt):
    new = tokens(prompt + 40)
    layer = prefilled(packing, new, prompt)
    for length in range(prompt + 1, prompt + 41):
        out = layer.decode(part(new, length - 1, length))
        whole = part(new, 0, length)
        expected = attention(whole.q[:, :, -1:], *packing.rounded(whole.k, whole.v), new.scale)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def codes(layer):
    """All that is packed of a sequence, in the order of tokens."""
    store, found = layer.store, []
    for pages, lengths in ((store.k, store.k_lengths), (store.v, store.v_lengths)):
        numbers = store._table[0][store._table[0] >= 0].long()
        kept = dequantize(pages, numbers).transpose(0, 1).flatten(1, 2)
        found.append(kept[:, : lengths[0]])
    return found


@BOTH
@pytest.mark.parametrize("prompt", [1, 16, 30, 65])
def test_tokens_one_by_one_are_packed_as_in_a_prompt(packing, prompt):
    new = tokens(96)
    grown = prefilled(packing, new, prompt)
    for length in range(prompt, 96):
        grown.decode(part(new, length, length + 1))
    at_once = prefilled(packing, new, 96)
    assert grown.store.k_lengths == at_once.store.k_lengths == [packing.packed(96)[0]]
    assert grown.store.v_lengths == at_once.store.v_lengths == [packing.packed(96)[1]]
    for ours, theirs in zip(codes(grown), codes(at_once), strict=True):
        assert torch.equal(ours, theirs)


@BOTH
def test_codes_are_never_touched_again(packing):
    new = tokens(120)
    layer = prefilled(packing, new, 50)
    before = codes(layer)
    for length in range(50, 120):
        layer.decode(part(new, length, length + 1))
    for old, now in zip(before, codes(layer), strict=True):
        assert torch.equal(now[:, : old.shape[1]], old)


@pytest.mark.parametrize("residual", [8, 16, 40])
def test_residual_rule(residual):
    packing = replace(KIVI, residual=residual)
    for length in range(1, 130):
        keys, values = packing.packed(length)
        assert length - keys == length % residual
        assert length - values == min(length, residual)
    assert replace(PER_TOKEN, residual=32).packed(77) == (77, 77)


@BOTH
@pytest.mark.parametrize("length", [64, 70])  # a multiple of the residual, and not
def test_prefill_attends_to_exact_keys_unless_forced(packing, length):
    new = tokens(length)
    exact = make_layer(packing).prefill(0, new)
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    k, v = (x.repeat_interleave(2, dim=1) for x in (new.k, new.v))
    dense = torch.nn.functional.scaled_dot_product_attention(
        new.q, k, v, attn_mask=mask, scale=new.scale
    )
    torch.testing.assert_close(exact, dense)
    forced = make_layer(packing, force_quantized=True).prefill(0, new)
    k, v = (x.repeat_interleave(2, dim=1) for x in packing.rounded(new.k, new.v))
    dense = torch.nn.functional.scaled_dot_product_attention(
        new.q, k, v, attn_mask=mask, scale=new.scale
    )
    torch.testing.assert_close(forced, dense)
    assert not torch.allclose(forced, exact)


@BOTH
def test_sequences_of_a_batch_are_what_they_are_alone(packing):
    lengths = (5, 33, 16)
    new = tokens(80, batch=3)
    together = make_layer(packing, batch=3)
    alone = []
    for row, length in enumerate(lengths):
        together.prefill(row, part(new, 0, length, row))
        single = make_layer(packing)
        single.prefill(0, part(new, 0, length, row))
        single.end_prefill()
        alone.append(single)
    together.end_prefill()
    for step in range(40):
        places = [length + step for length in lengths]
        rows = [part(new, place, place + 1, row) for row, place in enumerate(places)]
        joined = NewTokens(
            *(torch.cat([getattr(row, name) for row in rows]) for name in "qkv"), new.scale
        )
        out = together.decode(joined)
        for row, (single, own) in enumerate(zip(alone, rows, strict=True)):
            torch.testing.assert_close(out[row : row + 1], single.decode(own))


@BOTH
def test_padding_enters_no_group(packing):
    subject = tiny_subject(layers=2, head_dim=32)
    ids = token_ids(2, 70)
    mask = torch.ones_like(ids)
    mask[0, :23] = 0
    outs = []
    for rows, start in ((slice(0, 2), 0), (slice(0, 1), 23)):
        with (
            torch.no_grad(),
            patched_kv_cache(subject.model, lambda s: PackedLayer(s, packing)) as patch,
        ):
            cache, step = patch.make_cache(), token_ids(2, 1, seed=3)[rows]
            own = mask[rows, start:]
            positions = (own.cumsum(1) - 1).clamp_min(0)
            subject.model(
                ids[rows, start:], attention_mask=own, position_ids=positions, past_key_values=cache
            )
            own = torch.cat([own, torch.ones_like(own[:, :1])], dim=1)
            last = own.sum(1, keepdim=True) - 1
            out = subject.model(
                step, attention_mask=own, position_ids=last, past_key_values=cache
            ).logits
            outs.append(out[0])
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("k_bits", "v_bits"), BITS)
@pytest.mark.parametrize("mode", ["per_token", "kivi"])
def test_error_is_at_most_half_a_step_and_rounding_twice_is_rounding_once(mode, k_bits, v_bits):
    packing = Packing(k_bits=k_bits, v_bits=v_bits, mode=mode, group_size=8, residual=16)
    new = tokens(64)
    keys, values = packing.rounded(new.k, new.v)
    for x, read, form, count in zip(
        (new.k, new.v),
        (keys, values),
        (packing.k_format, packing.v_format),
        packing.packed(64),
        strict=True,
    ):
        x, read, tail, exact = x[:, :, :count], read[:, :, :count], read[:, :, count:], x
        assert torch.equal(tail, exact[:, :, count:])
        dim = -1 if form.axis == "token" else -2
        grouped, back = (t.unflatten(dim, (-1, form.group_size or 32)) for t in (x, read))
        low, high = grouped.amin(dim, keepdim=True), grouped.amax(dim, keepdim=True)
        step = (high - low) / (2**form.bits - 1)
        assert ((grouped - back).abs() <= step / 2 + 1e-5).all()
        assert torch.equal(back.amin(dim, keepdim=True), low)
        torch.testing.assert_close(back.amax(dim, keepdim=True), high)
    again = packing.rounded(keys, values)
    torch.testing.assert_close(again[0], keys)
    torch.testing.assert_close(again[1], values)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_value_changes_its_own_group_alone(bits):
    """Keys of ``kivi`` share a channel and consecutive tokens, all else channels of one token."""
    new = tokens(64)
    for mode, k_group, v_group in (
        ("kivi", (slice(16, 24), slice(5, 6)), (slice(19, 20), slice(0, 8))),
        ("per_token", (slice(19, 20), slice(0, 32)), (slice(19, 20), slice(0, 32))),
    ):
        packing = Packing(k_bits=bits, v_bits=bits, mode=mode, group_size=8, residual=16)
        before = packing.rounded(new.k, new.v)
        k, v = new.k.clone(), new.v.clone()
        k[0, 1, 19, 5] = v[0, 1, 19, 5] = 1e4
        for read, old, (rows, channels) in zip(
            packing.rounded(k, v), before, (k_group, v_group), strict=True
        ):
            same = read == old
            # Beside it all others of the group are its minimum.
            assert len(read[0, 1, rows, channels].unique()) == 2
            same[0, 1, rows, channels] = True
            assert same.all()


@pytest.mark.parametrize("mode", ["per_token", "kivi"])
def test_equal_values_round_trip_exactly(mode):
    packing = Packing(k_bits=2, v_bits=2, mode=mode, group_size=8, residual=16)
    x = torch.full((1, 2, 40, 32), 0.3)
    keys, values = packing.rounded(x, x)
    assert torch.equal(keys, x) and torch.equal(values, x)


def test_sixteen_bits_are_the_values_themselves():
    for mode in ("per_token", "kivi"):
        packing = Packing(k_bits=16, v_bits=16, mode=mode, group_size=8, residual=16)
        new = tokens(50)
        assert all(map(torch.equal, packing.rounded(new.k, new.v), (new.k, new.v)))
        layer = prefilled(packing, new, 49)
        out = layer.decode(part(new, 49, 50))
        torch.testing.assert_close(
            out, attention(new.q[:, :, -1:], new.k, new.v, new.scale), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    ("packing", "bits"),
    [
        (Packing(k_bits=4, v_bits=2), 3.25),  # 32 bits on 128 channels
        (Packing(k_bits=4, v_bits=2, mode="kivi", residual=32), 4.0),  # 32 bits on 32 values
        (Packing(k_bits=16, v_bits=2, mode="kivi", residual=32), 9.5),
    ],
)
def test_stored_bits_count_scales_and_minima(packing, bits):
    assert packing.stored_bits(128) == bits


@BOTH
def test_memory_is_what_the_bits_say(packing):
    length, head_dim, kv_heads = 4096, 32, 2
    new = tokens(length)
    layer = prefilled(packing, new, length, dtype=torch.float32)
    held = sum(x.nbytes for x in layer.tensors())
    form_bits = packing.k_bits + packing.v_bits
    codes_only = length * kv_heads * head_dim * form_bits / 8
    groups = length * kv_heads * head_dim * 8  # scale and minimum in fp32 here
    groups *= 2 / 32 if packing.mode == "per_token" else 2 / 8
    assert codes_only + groups <= held * 1.01 and held <= 1.05 * (codes_only + groups) + 20000


def test_groups_that_do_not_divide_a_head_are_refused():
    with pytest.raises(UnsupportedCombination, match="head_dim must be a multiple"):
        make_layer(KIVI, head_dim=36)
    with pytest.raises(UnsupportedCombination, match="whole bytes"):
        make_layer(PER_TOKEN, head_dim=6)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"k_bits": 3}, "k_bits must be one of"),
        ({"v_bits": 0}, "v_bits must be one of"),
        ({"mode": "channel"}, "mode must be one of"),
        ({"group_size": 24}, "residual must be a positive multiple of group_size 24"),
    ],
)
def test_broken_rules_are_named(options, text):
    with pytest.raises(ValueError, match=text):
        Packing(**{"k_bits": 4, "v_bits": 4, **options})
