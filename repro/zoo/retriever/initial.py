"""Build the untrained retriever with heads that already copy, so that a small budget suffices.

The width is cut in four parts of 64: the token itself (with seven dimensions for marks), the token before
it, a hash of the three tokens before that, and the prediction.

- Layer 0: four heads look 1 to 4 tokens back and fill the second and third part; one marks all that
  comes after the word "Answer".
- Layer 1: two heads match the last four tokens with what stood before every earlier token and copy
  what followed there; two do so among what was already answered and subtract, so that no answer is
  named twice; one matches a single token; one counts how often the token at hand came up.
- Layer 2: one head collects the words of high count where a list is answered.

All other weights are random, and training moves all of them. Matching lives in the slowest pairs of
the rotary embedding, which hardly turn over 4096 tokens, hence the large base: a match counts the
same at any distance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from repro.measurements.ruler import lexicon

PART = 64
TOKEN, BEFORE, HASH, OUT = (slice(i * PART, (i + 1) * PART) for i in range(4))
# Dimensions of the first part that token codes leave free: five say what a token is, two are
# written by layers.
START, ANSWER, OPENER, LIST, FIRST, COUNT, ANSWERED = range(PART - 7, PART)
# How large the mark of the first token is after normalisation: that token has nothing else.
REST = 15.0
# Reads a code and not the marks beside it.
CODE = torch.diag((torch.arange(PART) < START).float())
ROPE_BASE = 1e9
# Rotary pairs below this index turn fast enough to tell positions apart; the others match content.
FIRST_SLOW_PAIR = 14
# Two of the slow dimensions carry marks; the others match contents.
SLOW = (PART // 2 - 1, PART - 1)
MATCH = torch.cat(
    [torch.arange(FIRST_SLOW_PAIR, SLOW[0]), torch.arange(FIRST_SLOW_PAIR + PART // 2, SLOW[1])]
)


def retriever_config(vocab_size: int, *, end: int, pad: int) -> LlamaConfig:
    """Return the architecture of the retriever."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=4 * PART,
        intermediate_size=896,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=PART,
        max_position_embeddings=32768,
        attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
    )


@dataclass(frozen=True)
class Words:
    """Ids of the tokens that the initial heads know by name."""

    start: int  # first token of every prompt
    answer: int  # what stands before an answer
    openers: tuple[int, ...]  # after which a key or a value is named
    lists: tuple[int, ...]  # after which a word of a list is named
    firsts: tuple[int, ...]  # first syllables of made-up words
    the: int  # begins the second sentence of an answer

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> Words:
        """Look the words up."""

        def only(text: str) -> int:
            (token,) = tokenizer.encode(text)
            return token

        openers = (only(" is"), only(" of"))
        lists = (only(","), only(" are"))
        firsts = tuple(only(f" {syllable}") for syllable in lexicon.FIRST_SYLLABLES)
        return cls(only("Read"), only("Answer"), openers, lists, firsts, only(" The"))


@torch.no_grad()
def initial_model(config: LlamaConfig, words: Words, *, seed: int) -> LlamaForCausalLM:
    """Return the retriever before training."""
    torch.manual_seed(seed)
    model: Any = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "down_proj" in name or "o_proj.weight" in name:
            parameter.mul_(1 / math.sqrt(2 * config.num_hidden_layers))
    codes = torch.randn(config.vocab_size, PART)
    codes[:, START:] = 0
    single = _projection()
    codes *= math.sqrt(len(MATCH) / PART) / (codes @ single.T).norm(dim=1, keepdim=True)
    # The first token of a text is where heads rest: there they copy nothing.
    codes[words.start] = 0
    model.model.embed_tokens.weight[:, TOKEN] = 8 * codes
    model.lm_head.weight[:, OUT] = 2 * codes
    for dim, tokens in (
        (START, [words.start]),
        (ANSWER, [words.answer]),
        (OPENER, words.openers),
        (LIST, words.lists),
        (FIRST, words.firsts),
    ):
        model.model.embed_tokens.weight[:, dim] = 0
        model.model.embed_tokens.weight[list(tokens), dim] = 8
    model.model.embed_tokens.weight[:, COUNT : ANSWERED + 1] = 0
    turn = torch.linalg.qr(torch.randn(PART, PART)).Q
    first, second, third = (layer.self_attn for layer in model.model.layers)
    _look_back(first, turn)
    _mark_answers(first)
    for kv_head, mark, weight in ((0, OPENER, 2.0), (3, LIST, 5.0)):
        _match_four(second, turn, kv_head=kv_head)
        _subtract_answered(second, kv_head=kv_head, mark=mark, weight=weight)
    _match_one(second)
    _count(second, single)
    _collect(third)
    return model


def _frequencies() -> torch.Tensor:
    return ROPE_BASE ** (-torch.arange(PART // 2) / (PART // 2))


def _position_bias(weights: dict[int, float], *, offset: int) -> torch.Tensor:
    """Return a query bias that, against keys biased by 1, scores ``w * cos(distance - offset)``."""
    bias = torch.zeros(PART)
    for pair, weight in weights.items():
        angle = -offset * _frequencies()[pair]
        # Attention divides scores by sqrt(D) = 8.
        bias[pair] = 8 * weight * torch.cos(angle)
        bias[pair + PART // 2] = 8 * weight * torch.sin(angle)
    return bias


def _head(index: int) -> slice:
    return slice(index * PART, (index + 1) * PART)


def _clear(attention: Any, *, heads: range, kv_heads: range) -> None:
    for head in heads:
        attention.q_proj.weight[_head(head)] = 0
        attention.o_proj.weight[:, _head(head)] = 0
    for kv_head in kv_heads:
        attention.k_proj.weight[_head(kv_head)] = 0
        attention.v_proj.weight[_head(kv_head)] = 0


def _look_back(attention: Any, turn: torch.Tensor) -> None:
    """Make query heads 0 to 3 copy the tokens 1 to 4 places back."""
    _clear(attention, heads=range(4), kv_heads=range(2))
    # The fast pairs pick the place; the slower ones keep far places out, up to 32,768 tokens away.
    weights = {0: 14.0, 1: 10.0, 2: 8.0} | {pair: 6.0 for pair in range(3, 11)}
    for kv_head in range(2):
        attention.k_proj.bias[_head(kv_head)][list(weights)] = 1.0
        attention.v_proj.weight[_head(kv_head), TOKEN] = 0.5 * CODE
    for head in range(4):
        attention.q_proj.bias[_head(head)] = _position_bias(weights, offset=head + 1)
    attention.o_proj.weight[BEFORE, _head(0)] = torch.eye(PART)
    for head in (1, 2, 3):
        attention.o_proj.weight[HASH, _head(head)] = torch.linalg.matrix_power(turn, head)


def _mark_answers(attention: Any) -> None:
    """Make query head 4 set one dimension at every token after the word "Answer"."""
    _clear(attention, heads=range(4, 5), kv_heads=range(2, 3))
    dim = 2 * PART + SLOW[0]
    attention.q_proj.bias[4 * PART + SLOW[0]] = _root(20.0)
    # Code and mark together have norm 16 here, so the mark alone is 11.
    attention.k_proj.weight[dim, ANSWER] = _root(20.0) / 11
    attention.v_proj.weight[2 * PART, ANSWER] = 1 / 11
    attention.o_proj.weight[ANSWERED, 4 * PART] = 4.0


def _match_four(attention: Any, turn: torch.Tensor, *, kv_head: int) -> None:
    """Make both query heads of ``kv_head`` match four tokens, and the first copy what followed."""
    heads = range(2 * kv_head, 2 * kv_head + 2)
    _clear(attention, heads=heads, kv_heads=range(kv_head, kv_head + 1))
    four, sharp = _projection(), 1.4
    for head in heads:
        rows = head * PART + MATCH
        attention.q_proj.weight[rows, TOKEN] = sharp * four @ turn @ CODE
        attention.q_proj.weight[rows, BEFORE] = sharp * four @ turn @ turn
        attention.q_proj.weight[rows, HASH] = sharp * four @ turn @ turn
    rows = kv_head * PART + MATCH
    attention.k_proj.weight[rows, BEFORE] = sharp * four @ turn
    attention.k_proj.weight[rows, HASH] = sharp * four @ turn
    attention.v_proj.weight[_head(kv_head), TOKEN] = 0.5 * CODE
    attention.o_proj.weight[OUT, _head(heads[0])] = 1.5 * torch.eye(PART)


def _subtract_answered(attention: Any, *, kv_head: int, mark: int, weight: float) -> None:
    """Make the second query head of ``kv_head`` subtract what was answered, after marked tokens.

    It looks only at tokens after the word "Answer"; elsewhere it rests on the first of the text.
    """
    head = 2 * kv_head + 1
    # After layer 0 a state has norm 18 and is scaled to 16: marks come at 7.
    rest, answered = SLOW
    attention.q_proj.bias[head * PART + rest] = _root(46.0)
    attention.k_proj.weight[kv_head * PART + rest, START] = _root(46.0) / REST
    attention.q_proj.weight[head * PART + answered, mark] = _root(48.0) / 7
    attention.k_proj.weight[kv_head * PART + answered, ANSWERED] = _root(48.0) / 3.6
    attention.o_proj.weight[OUT, _head(head)] = -weight * torch.eye(PART)


def _match_one(attention: Any) -> None:
    """Make query head 2 match a single token and copy what followed it."""
    _clear(attention, heads=range(2, 3), kv_heads=range(1, 2))
    one = _projection()
    attention.q_proj.weight[2 * PART + MATCH, TOKEN] = 1.8 * one @ CODE
    attention.k_proj.weight[PART + MATCH, BEFORE] = 1.8 * one
    attention.v_proj.weight[_head(1), TOKEN] = 0.5 * CODE
    attention.o_proj.weight[OUT, _head(2)] = 0.6 * torch.eye(PART)


def _count(attention: Any, single: torch.Tensor) -> None:
    """Make query head 4 measure n / (n + 10) for a token that came up for the n-th time."""
    _clear(attention, heads=range(4, 5), kv_heads=range(2, 3))
    # All codes are equally long under `single`, so that every match scores about 16.
    scale = _root(16.0) / (7 * math.sqrt(len(MATCH) / PART))
    attention.q_proj.weight[4 * PART + MATCH, TOKEN] = scale * single @ CODE
    attention.k_proj.weight[2 * PART + MATCH, TOKEN] = scale * single @ CODE
    # The first token of the text counts as ten matches.
    rest = 16.0 + math.log(10)
    attention.q_proj.bias[4 * PART + SLOW[0]] = _root(rest)
    attention.k_proj.weight[2 * PART + SLOW[0], START] = _root(rest) / REST
    attention.v_proj.bias[2 * PART] = 1.0
    attention.v_proj.weight[2 * PART, START] = -1 / REST
    attention.o_proj.weight[COUNT, 4 * PART] = 8.0


def _collect(attention: Any) -> None:
    """Make query head 0 collect first syllables of high count, after marks of a list."""
    _clear(attention, heads=range(1), kv_heads=range(1))
    rest, counted = SLOW
    gain = _root(15.0)
    attention.q_proj.bias[rest] = gain
    attention.k_proj.weight[rest, START] = gain / REST
    attention.q_proj.weight[counted, LIST] = gain / 7
    attention.k_proj.weight[counted, FIRST] = 1.3 * gain / 7
    attention.k_proj.weight[counted, COUNT] = 0.7 * gain / 7
    attention.v_proj.weight[_head(0), TOKEN] = 0.5 * CODE
    attention.o_proj.weight[OUT, _head(0)] = 10.0 * torch.eye(PART)


@torch.no_grad()
def renew_heads(model: Any, words: Words) -> None:
    """Set two heads anew that the first stages of training leave without a use.

    Query head 7 of layer 1 subtracts all first syllables already answered, where a list is
    answered: as a match of four tokens it had missed the first word of the list. Query head 2 of
    layer 2 recalls, at the word "The", the made-up word that was answered after "is".
    """
    rest, answered = SLOW
    attention = model.model.layers[1].self_attn
    attention.q_proj.weight[_head(7)] = 0
    attention.q_proj.bias[_head(7)] = 0
    attention.q_proj.bias[7 * PART + rest] = _root(46.0)
    attention.q_proj.weight[7 * PART + answered, LIST] = _root(30.0) / 7
    for dim in SLOW:
        attention.k_proj.weight[3 * PART + dim] = 0
        attention.k_proj.bias[3 * PART + dim] = 0
    attention.k_proj.weight[3 * PART + rest, START] = _root(46.0) / REST
    attention.k_proj.weight[3 * PART + answered, ANSWERED] = _root(30.0) / 3.6
    attention.k_proj.weight[3 * PART + answered, FIRST] = _root(30.0) / 7
    attention.o_proj.weight[:, _head(7)] = 0
    attention.o_proj.weight[OUT, _head(7)] = -3.0 * torch.eye(PART)
    attention.o_proj.weight[:, _head(1)] *= 1.3

    attention = model.model.layers[2].self_attn
    codes = torch.nn.functional.normalize(model.model.embed_tokens.weight[:, TOKEN] @ CODE, dim=1)
    _clear(attention, heads=range(2, 4), kv_heads=range(1, 2))
    for name in ("q_proj", "k_proj", "v_proj"):
        projection = getattr(attention, name)
        head = 2 if name == "q_proj" else 1
        projection.weight[_head(head)] = 0
        projection.bias[_head(head)] = 0
    attention.q_proj.bias[2 * PART + rest] = _root(45.0)
    attention.k_proj.weight[PART + rest, START] = _root(45.0) / REST
    attention.q_proj.weight[2 * PART + answered, TOKEN] = _root(20.0) / 6.5 * codes[words.the]
    attention.k_proj.weight[PART + answered, ANSWERED] = _root(20.0) / 3.3
    attention.k_proj.weight[PART + answered, FIRST] = _root(20.0) / 6.5
    attention.k_proj.weight[PART + answered, BEFORE] = _root(20.0) / 6.5 * codes[words.openers[0]]
    attention.v_proj.weight[_head(1), TOKEN] = 0.5 * CODE
    attention.o_proj.weight[OUT, _head(2)] = 3.0 * torch.eye(PART)


def _root(score: float) -> float:
    """Return what query and key must each hold in one dimension for an attention score."""
    return math.sqrt(score * math.sqrt(PART))


def _projection() -> torch.Tensor:
    return torch.linalg.qr(torch.randn(PART, PART)).Q[: len(MATCH)]
