"""The shared attention patch: what methods are given, that dense stays dense, exact restoration."""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, StaticCache

from repro.attention_patch import AttentionCall, patched_attention
from repro.errors import UnsupportedCombination
from repro.testing import tiny_subject, token_ids


@pytest.fixture(scope="module")
def model():
    return tiny_subject(heads=4, kv_heads=2, head_dim=16).model


def decline(call):
    return None


def dense(call: AttentionCall):
    """Dense attention as a method would supply it, the mask built by hand."""
    offset = call.k.shape[2] - call.q.shape[2]
    n_rep = call.q.shape[1] // call.k.shape[1]
    k, v = (x.repeat_interleave(n_rep, dim=1) for x in (call.k, call.v))
    scores = (call.q @ k.mT) * call.scale
    hidden = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1 + offset)
    return torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1) @ v


class Recorder:
    def __init__(self, attend=dense):
        self.attend = attend
        self.calls = []

    def __call__(self, call):
        self.calls.append(call)
        return self.attend(call)


def padded(lengths, side="left"):
    """Token ids and attention mask of prompts of the given lengths."""
    longest = max(lengths)
    positions = torch.arange(longest)
    rows = []
    for length in lengths:
        rows.append(positions >= longest - length if side == "left" else positions < length)
    mask = torch.stack(rows).long()
    return token_ids(len(lengths), longest) * mask, mask


def test_declined_calls_are_bit_identical(model):
    ids = token_ids(2, 40)
    with torch.no_grad():
        before = model(ids).logits
        with patched_attention(model, decline):
            assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("side", ["left", "right"])
def test_declined_calls_under_padding_are_bit_identical(model, side):
    ids, mask = padded([40, 23, 1], side)
    with torch.no_grad():
        before = model(ids, attention_mask=mask).logits
        with patched_attention(model, decline):
            assert torch.equal(model(ids, attention_mask=mask).logits, before)


def test_logits_and_config_are_restored(model):
    ids = token_ids(1, 24)
    config, implementation = model.config.to_dict(), model.config._attn_implementation
    with torch.no_grad():
        before = model(ids).logits
        with patched_attention(model, lambda call: dense(call) * 0):
            assert not torch.equal(model(ids).logits, before)
        assert torch.equal(model(ids).logits, before)
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == implementation


def test_restored_after_an_exception(model):
    ids = token_ids(1, 24)
    keys = set(AttentionInterface().keys()), set(AttentionMaskInterface().keys())

    def fail(call):
        raise RuntimeError("inside")

    with torch.no_grad():
        before = model(ids).logits
        with pytest.raises(RuntimeError, match="inside"), patched_attention(model, fail):
            model(ids)
        assert torch.equal(model(ids).logits, before)
    assert (set(AttentionInterface().keys()), set(AttentionMaskInterface().keys())) == keys


def test_blocks_nest(model):
    outer, inner = Recorder(), Recorder()
    ids = token_ids(1, 8)
    with torch.no_grad(), patched_attention(model, outer):
        with patched_attention(model, inner):
            model(ids)
        assert (len(outer.calls), len(inner.calls)) == (0, 2)
        model(ids)
    assert (len(outer.calls), len(inner.calls)) == (2, 2)


def test_calls_are_unpadded_and_not_expanded(model):
    ids, mask = padded([40, 23])
    recorder = Recorder()
    with torch.no_grad(), patched_attention(model, recorder):
        model(ids, attention_mask=mask)
    shapes = [(call.layer, *call.q.shape, call.k.shape[1]) for call in recorder.calls]
    assert shapes == [(layer, 1, 4, length, 16, 2) for layer in (0, 1) for length in (40, 23)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_equals_singles(model, side):
    lengths = [40, 23, 31]
    ids, mask = padded(lengths, side)
    with torch.no_grad(), patched_attention(model, dense):
        logits = model(ids, attention_mask=mask, position_ids=positions(mask)).logits
        for row in range(3):
            real = mask[row].bool()
            alone = model(ids[row, real][None]).logits[0]
            torch.testing.assert_close(logits[row, real], alone, rtol=1e-4, atol=1e-5)


def positions(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_prefill_in_chunks_equals_whole(model, side):
    ids, mask = padded([40, 23], side)
    recorder = Recorder()
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=positions(mask)).logits
        with patched_attention(model, recorder):
            cache, parts = None, []
            for first, last in ((0, 16), (16, 29), (29, 40)):
                out = model(
                    ids[:, first:last],
                    attention_mask=mask[:, :last],
                    position_ids=positions(mask)[:, first:last],
                    past_key_values=cache,
                    use_cache=True,
                )
                cache = out.past_key_values
                parts.append(out.logits)
    chunked = torch.cat(parts, dim=1)
    torch.testing.assert_close(chunked[mask.bool()], whole[mask.bool()], rtol=1e-4, atol=1e-5)
    sizes = {(call.q.shape[2], call.k.shape[2]) for call in recorder.calls}
    assert (13, 29) in sizes and (11, 40) in sizes


def test_chunks_without_a_mask(model):
    ids = token_ids(1, 40)
    with torch.no_grad():
        whole = model(ids).logits
        for attend in (dense, decline):
            with patched_attention(model, attend):
                first = model(ids[:, :16], use_cache=True)
                second = model(ids[:, 16:], past_key_values=first.past_key_values)
            torch.testing.assert_close(second.logits, whole[:, 16:], rtol=1e-4, atol=1e-5)


def test_static_cache(model):
    ids = token_ids(1, 30)
    with torch.no_grad():
        whole = model(ids).logits
        for attend in (dense, decline):
            cache = StaticCache(config=model.config, max_cache_len=64)
            with patched_attention(model, attend):
                parts = [
                    model(ids[:, first:last], past_key_values=cache).logits
                    for first, last in ((0, 20), (20, 29), (29, 30))
                ]
            torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


def test_decode_is_dense_and_counted(model):
    steps = []
    recorder = Recorder()
    ids, mask = padded([20, 13])
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        before = model.generate(ids, attention_mask=mask, **options)
        with patched_attention(model, recorder, observe_decode=lambda: steps.append(1)):
            assert torch.equal(model.generate(ids, attention_mask=mask, **options), before)
    assert len(recorder.calls) == 2 * 2
    assert len(steps) == 2 * 4


def test_generate_without_cache(model):
    ids = token_ids(1, 20)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "use_cache": False}
    with torch.no_grad():
        before = model.generate(ids, **options)
        with patched_attention(model, dense):
            assert torch.equal(model.generate(ids, **options), before)


def test_custom_mask_is_refused(model):
    ids = token_ids(1, 12)
    mask = torch.ones(12, 12, dtype=torch.bool).tril()
    mask[8, 3] = False
    with (
        torch.no_grad(),
        patched_attention(model, dense),
        pytest.raises(UnsupportedCombination, match="not causality with padding"),
    ):
        model(ids, attention_mask=mask[None, None])


def test_plain_causal_4d_mask_is_read(model):
    ids = token_ids(1, 12)
    mask = torch.ones(12, 12, dtype=torch.bool).tril()[None, None]
    with torch.no_grad(), patched_attention(model, dense):
        expected = model(ids).logits
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, expected)


def test_each_4d_mask_is_read_afresh(model):
    ids = token_ids(1, 12)
    causal = torch.ones(12, 12, dtype=torch.bool).tril()[None, None]
    padded_mask = causal.clone()
    padded_mask[..., :4] = False
    recorder = Recorder()
    with torch.no_grad(), patched_attention(model, recorder):
        model(ids, attention_mask=causal)
        model(ids, attention_mask=padded_mask)
    assert [call.q.shape[2] for call in recorder.calls] == [12, 12, 8, 8]


def test_holes_in_a_row_are_refused(model):
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[0, 5] = 0
    with (
        torch.no_grad(),
        patched_attention(model, dense),
        pytest.raises(UnsupportedCombination, match="ends of a row"),
    ):
        model(token_ids(1, 12), attention_mask=mask)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"softcap": 30.0}, "soft-capped"),
        ({"s_aux": torch.zeros(4)}, "sinks"),
        ({"position_bias": torch.zeros(1)}, "position bias"),
        ({"dropout": 0.1}, "dropout"),
        ({"is_causal": False}, "not causal"),
        ({"output_attentions": True}, "weights"),
    ],
)
def test_undefined_options_are_refused(model, options, reason):
    module = model.model.layers[0].self_attn
    q, k = torch.zeros(1, 4, 8, 16), torch.zeros(1, 2, 8, 16)
    with patched_attention(model, dense):
        forward = AttentionInterface()[model.config._attn_implementation]
        with pytest.raises(UnsupportedCombination, match=reason):
            forward(module, q, k, k, None, **options)


def test_sliding_window_shorter_than_prompt_is_refused():
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=512,
        sliding_window=16,
    )
    model = MistralForCausalLM(config).eval()
    with torch.no_grad(), patched_attention(model, dense):
        model(token_ids(1, 12))
        with pytest.raises(UnsupportedCombination, match="sliding"):
            model(token_ids(1, 40))


def test_model_without_attention_interface_is_refused():
    with (
        pytest.raises(UnsupportedCombination, match="Linear"),
        patched_attention(torch.nn.Linear(2, 2), dense),
    ):
        pass
