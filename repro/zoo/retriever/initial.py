"""Build the untrained retriever with heads that already copy, so that a small budget suffices.

The width is cut in four parts of 64: the token itself (with eight dimensions for marks), the token before
it, sketches of the three tokens before that, and the prediction.

- Layer 0: four heads look 1 to 4 tokens back and fill the second and third part; one marks all that
  comes after the word "Answer".
- Layer 1: two heads match the last tokens with what stood before every earlier token and copy what
  followed there; one does so among what was already answered and subtracts, so that no answer is
  named twice; one subtracts all words already answered where a list is answered; one matches a
  single token; two count how often the last two tokens came up; one measures how long the answer is.
- Layer 2: one head collects the words of high count where a list is answered; one recalls the word
  just answered where a second question builds on it; two repeat what was just named or asked for; one
  goes on where a question asks for several things; one names the later keys of a question.

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
# Dimensions of the first part that token codes leave free: six say what a token is, two are
# written by layers.
START, ANSWER, OPENER, LIST, FIRST, SEVERAL, COUNT, ANSWERED = range(PART - 8, PART)
# How large the mark of the first token is in normalised states: that token has nothing else.
REST = 16.0
# Reads a code and not the marks beside it.
CODE = torch.diag((torch.arange(PART) < START).float())
ROPE_BASE = 1e12
# Rotary pairs below this index turn fast enough to tell positions apart; the others match content.
FIRST_SLOW_PAIR = 11
# How large a token's code and its marks are.
CODE_NORM, MARK = 8.0, 4.0
# How far layer 0 looks back. Of the last three places it keeps sketches of the codes.
PLACES = range(1, 5)
SKETCH = 20
# How large a sketch is beside a code: small, since matching can read it that much larger.
HASH_WEIGHT = 0.5
# Attention reads states scaled to norm 16: how large codes and marks are after layer 0.
SIZE = 16 / math.sqrt(2 + HASH_WEIGHT**2 * 3 * SKETCH / (PART - 8))
MARK_SIZE = SIZE * MARK / CODE_NORM
# Scores by which the fast pairs pick a place; the slower ones keep far places out, up to 32,768 away.
PLACE_SCORES = {0: 14.0, 1: 10.0, 2: 8.0} | {pair: 6.0 for pair in range(3, FIRST_SLOW_PAIR)}
# How much the length of an answer is worth, and the length at which half of that is seen.
MEASURE, LONG_ANSWER = 60.0, 400
# What a match of one place scores.
MATCHED = 11.0
# Two of the slow dimensions carry marks; the others match contents.
SLOW = (PART // 2 - 1, PART - 1)
MATCH = torch.cat(
    [torch.arange(FIRST_SLOW_PAIR, SLOW[0]), torch.arange(FIRST_SLOW_PAIR + PART // 2, SLOW[1])]
)

# Parts of the rows of MATCH that hold different contents; rotation mixes within a part only.
QUARTERS = [
    torch.cat([part, part + len(MATCH) // 2]) for part in torch.arange(len(MATCH) // 2).chunk(4)
]
HALVES = [torch.cat(QUARTERS[:2]), torch.cat(QUARTERS[2:])]


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
    openers: tuple[int, ...]  # " is" and " of", after which a value or a key is named
    lists: tuple[int, ...]  # after which a word of a list is named
    firsts: tuple[int, ...]  # first syllables of made-up words
    lasts: tuple[int, ...]  # last syllables of made-up words
    the: int  # begins the second sentence of an answer
    put: int  # what the word just named is repeated after
    question: int  # ends a question
    period: int  # ends a sentence
    # What stands only in questions whose answer has several sentences, what begins the second and
    # later ones, and how many tokens from the word "Answer" to where the last one begins (about).
    several: tuple[tuple[int, int, float], ...]
    separators: tuple[int, ...]  # what stands before the second and later keys of a question
    end: int  # ends an answer

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> Words:
        """Look the words up."""

        def only(text: str) -> int:
            (token,) = tokenizer.encode(text)
            return token

        openers = (only(" is"), only(" of"))
        lists = (only(","), only(" are"))
        firsts = tuple(only(f" {syllable}") for syllable in lexicon.FIRST_SYLLABLES)
        lasts = tuple(only(syllable) for syllable in lexicon.LAST_SYLLABLES)
        return cls(
            start=only("Read"),
            answer=only("Answer"),
            openers=openers,
            lists=lists,
            firsts=firsts,
            lasts=lasts,
            the=only(" The"),
            put=only(" Put"),
            question=only("?"),
            period=only("."),
            several=(
                (only(" all"), only(" The"), 44),
                (only(" hold"), only(" Put"), 38),
                (only(" Look"), only(" What"), 20),
            ),
            separators=(only(","), only(" and")),
            end=tokenizer.eos_token_id,
        )


@torch.no_grad()
def initial_model(config: LlamaConfig, words: Words, *, seed: int) -> LlamaForCausalLM:
    """Return the retriever before training."""
    torch.manual_seed(seed)
    model: Any = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "down_proj" in name or "o_proj.weight" in name:
            parameter.mul_(1 / math.sqrt(2 * config.num_hidden_layers))
    codes, single = _codes(config.vocab_size)
    turn = torch.linalg.qr(torch.randn(PART, PART)).Q
    # Layer 2 reads what is written over these tokens: they are silent to it.
    over = single @ turn.T @ CODE
    for token in (*words.lists, words.openers[1]):
        codes[token] -= torch.linalg.pinv(over) @ over @ codes[token]
        codes[token] /= codes[token].norm()
    # The first token of a text is where heads rest: there they copy nothing.
    codes[words.start] = 0
    model.model.embed_tokens.weight[:, TOKEN] = CODE_NORM * codes
    model.lm_head.weight[:, OUT] = 2 * codes
    for dim, tokens in (
        (START, [words.start]),
        (ANSWER, [words.answer]),
        (OPENER, words.openers),
        (LIST, words.lists),
        (FIRST, words.firsts),
    ):
        model.model.embed_tokens.weight[:, dim] = 0
        model.model.embed_tokens.weight[list(tokens), dim] = MARK
    # Large, so that next to nothing else is left of it in normalised states, where many heads rest.
    model.model.embed_tokens.weight[words.start, START] = 8 * CODE_NORM
    # One mark tells first syllables from last ones by its sign.
    model.model.embed_tokens.weight[list(words.lasts), FIRST] = -MARK
    # The same holds for a period, where an answer may go on, and the words that say how far it goes.
    lengths = [length for _, _, length in words.several]
    model.model.embed_tokens.weight[:, SEVERAL] = 0
    model.model.embed_tokens.weight[words.period, SEVERAL] = -MARK
    for token, _, length in words.several:
        share = _resting_score(length) / _resting_score(max(lengths))
        model.model.embed_tokens.weight[token, SEVERAL] = MARK * share
    model.model.embed_tokens.weight[:, COUNT : ANSWERED + 1] = 0
    first, second, third = (layer.self_attn for layer in model.model.layers)
    _look_back(first, single)
    _mark_answers(first)
    for kv_head in (0, 3):
        _match(second, single, kv_head=kv_head)
    _subtract_match(second)
    _subtract_listed(second, codes, turn, words)
    _match_one(second, single)
    _measure_answer(second)
    _count(second, single)
    _collect(third, single, turn)
    _recall(third, codes, words)
    _repeat(third, codes, words)
    _repeat_asked(third, codes, single, words)
    _go_on(third, codes, words)
    _name_listed(third, codes, single, turn, words)
    return model


def _codes(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random codes of norm 1 and a projection under which all are equally long.

    That also holds for each quarter of the projection, see ``QUARTERS``: two matches of as many
    tokens score the same, whatever the tokens.

    Returns:
        Codes ``[count, PART]`` that leave the dimensions of marks free, and the projection
        ``[len(MATCH), PART]``.
    """
    basis = torch.zeros(PART, PART)
    basis[:START, :START] = torch.linalg.qr(torch.randn(START, START)).Q
    parts = torch.randn(count, PART) @ basis.T / math.sqrt(START)
    for part in (*QUARTERS, torch.arange(len(MATCH), START)):
        length = parts[:, part].norm(dim=1, keepdim=True)
        parts[:, part] *= math.sqrt(len(part) / START) / length
    return parts @ basis, basis[: len(MATCH)]


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


def _sketch(place: int) -> slice:
    """Return where the sketch of the token that many places back (2 to 4) is kept."""
    start = HASH.start + (place - 2) * SKETCH
    return slice(start, start + SKETCH)


def _look_back(attention: Any, single: torch.Tensor) -> None:
    """Make query heads 0 to 3 copy the tokens 1 to 4 places back, the last three as sketches."""
    _clear(attention, heads=range(4), kv_heads=range(2))
    for kv_head in (0, 1):
        attention.k_proj.bias[_head(kv_head)][list(PLACE_SCORES)] = 1.0
        attention.v_proj.weight[_head(kv_head), TOKEN] = 0.5 * CODE
    for head, place in enumerate(PLACES):
        attention.q_proj.bias[_head(head)] = _position_bias(PLACE_SCORES, offset=place)
        if place == 1:
            attention.o_proj.weight[BEFORE, _head(head)] = torch.eye(PART)
        else:
            attention.o_proj.weight[_sketch(place), _head(head)] = HASH_WEIGHT * single[HALVES[0]]


def _mark_answers(attention: Any) -> None:
    """Make query head 4 set one dimension at every token after the word "Answer"."""
    _clear(attention, heads=range(4, 5), kv_heads=range(2, 3))
    embedded = 16 * MARK / math.hypot(CODE_NORM, MARK)
    attention.q_proj.bias[4 * PART + SLOW[0]] = _root(20.0)
    attention.k_proj.weight[2 * PART + SLOW[0], ANSWER] = _root(20.0) / embedded
    attention.v_proj.weight[2 * PART, ANSWER] = 1 / embedded
    attention.o_proj.weight[ANSWERED, 4 * PART] = MARK


def _match(attention: Any, single: torch.Tensor, *, kv_head: int) -> None:
    """Make both query heads of ``kv_head`` match four tokens, and the first copy what followed.

    Each place has a quarter of the dimensions: what stands at one says nothing of another.
    """
    heads = range(2 * kv_head, 2 * kv_head + 2)
    _clear(attention, heads=heads, kv_heads=range(kv_head, kv_head + 1))
    scale = _root(MATCHED) / (SIZE * math.sqrt(len(QUARTERS[0]) / START))
    whole = scale * single[QUARTERS[0]]
    part = scale / HASH_WEIGHT * torch.eye(SKETCH)[: len(QUARTERS[0])]
    sources = {0: (TOKEN, whole), 1: (BEFORE, whole)}
    sources |= {place: (_sketch(place), part) for place in PLACES[1:]}
    for place, quarter in zip(PLACES, QUARTERS, strict=True):
        where, weight = sources[place - 1]
        for head in heads:
            attention.q_proj.weight[head * PART + MATCH[quarter], where] = weight
        where, weight = sources[place]
        attention.k_proj.weight[kv_head * PART + MATCH[quarter], where] = weight
    attention.v_proj.weight[_head(kv_head), TOKEN] = 0.5 * CODE
    attention.o_proj.weight[OUT, _head(heads[0])] = (1.0 if kv_head == 0 else 0.4) * torch.eye(PART)


def _subtract_match(attention: Any) -> None:
    """Make query head 1 subtract, after openers, what followed the same tokens in the answer.

    It looks only at tokens after the word "Answer"; elsewhere it rests on the first of the text.
    Resting counts for three values of the same key: one answered value alone is not subtracted
    so much that codes which point away from it gain.
    """
    rest, answered = SLOW
    resting = _root(79.5)
    attention.q_proj.bias[PART + rest] = resting
    attention.k_proj.weight[rest, START] = resting / REST
    attention.q_proj.weight[PART + answered, OPENER] = _root(48.0) / MARK_SIZE
    attention.k_proj.weight[answered, ANSWERED] = _root(48.0) / MARK_SIZE
    attention.o_proj.weight[OUT, _head(1)] = -1.7 * torch.eye(PART)


def _subtract_listed(attention: Any, codes: torch.Tensor, turn: torch.Tensor, words: Words) -> None:
    """Make query head 7 subtract all first syllables already answered, in a list and after "of".

    Resting counts for twenty of them, so that each weighs the same however many there are.
    """
    rest, answered = SLOW
    attention.q_proj.weight[_head(7)] = 0
    attention.q_proj.bias[7 * PART + rest] = _root(16.0)
    attention.k_proj.weight[3 * PART + rest, START] = _root(16.0) / REST
    one = _root(6.0)
    attention.q_proj.weight[7 * PART + answered, LIST] = one / MARK_SIZE
    attention.q_proj.weight[7 * PART + answered, TOKEN] += one / SIZE * codes[words.openers[1]]
    attention.k_proj.weight[3 * PART + answered, ANSWERED] = one / MARK_SIZE
    attention.k_proj.weight[3 * PART + answered, FIRST] = one / MARK_SIZE
    both = 2 * 6.0 + math.log(20) - 16.0
    attention.k_proj.weight[3 * PART + answered, START] = one * both / 6.0 / REST
    attention.o_proj.weight[OUT, _head(7)] = -1.0 * torch.eye(PART)
    # Layer 2 reads it beside the token, turned to where the codes of list marks are silent.
    attention.o_proj.weight[TOKEN, _head(7)] = 20.0 * turn


def _match_one(attention: Any, single: torch.Tensor) -> None:
    """Make query head 2 match a single token and copy what followed it."""
    _clear(attention, heads=range(2, 3), kv_heads=range(1, 2))
    scale = _root(11.0) / (SIZE * math.sqrt(len(MATCH) / START))
    attention.q_proj.weight[2 * PART + MATCH, TOKEN] = scale * single
    attention.k_proj.weight[PART + MATCH, BEFORE] = scale * single
    attention.v_proj.weight[_head(1), TOKEN] = 0.5 * CODE
    attention.o_proj.weight[OUT, _head(2)] = 1.2 * torch.eye(PART)


def _measure_answer(attention: Any) -> None:
    """Make query head 3 measure m / (m + LONG_ANSWER) where the answer has m tokens so far.

    Answers of a task are equally long, so that this tells where they end. The dimension that marks
    the word "Answer" is written over: it has no use after layer 0.
    """
    rest, answered = SLOW
    attention.q_proj.weight[_head(3)] = 0
    # Low, so that what differs between tokens, their norm, hardly weighs.
    attention.q_proj.bias[3 * PART + answered] = _root(8.5)
    attention.k_proj.weight[PART + answered, ANSWERED] = _root(8.5) / MARK_SIZE
    attention.q_proj.bias[3 * PART + rest] = _root(8.0 + math.log(LONG_ANSWER))
    attention.k_proj.weight[PART + rest, START] = _root(8.0 + math.log(LONG_ANSWER)) / REST
    # The last dimensions of values are those that codes leave free.
    attention.v_proj.bias[2 * PART - 1] = 1.0
    attention.v_proj.weight[2 * PART - 1, START] = -1 / REST
    attention.o_proj.weight[:, _head(3)] = 0
    attention.o_proj.weight[ANSWER, 4 * PART - 1] = MEASURE


def _count(attention: Any, single: torch.Tensor) -> None:
    """Make query heads 4 and 5 measure n / (n + 10) and n / (n + 100) where two tokens come up.

    That is for the n-th time together; the first token of the text counts as the 10 and the 100.
    """
    _clear(attention, heads=range(4, 6), kv_heads=range(2, 3))
    # A match of either token scores 5.5.
    scale = _root(5.5) / (SIZE * math.sqrt(len(HALVES[0]) / START))
    for part, half in zip((TOKEN, BEFORE), HALVES, strict=True):
        for head in (4, 5):
            attention.q_proj.weight[head * PART + MATCH[half], part] = scale * single[half]
        attention.k_proj.weight[2 * PART + MATCH[half], part] = scale * single[half]
    attention.k_proj.weight[2 * PART + SLOW[0], START] = 10 / REST
    attention.v_proj.bias[2 * PART] = 1.0
    attention.v_proj.weight[2 * PART, START] = -1 / REST
    for head, many in ((4, 10), (5, 100)):
        attention.q_proj.bias[head * PART + SLOW[0]] = 8 * (11.0 + math.log(many)) / 10
        attention.o_proj.weight[COUNT, head * PART] = 8.0


def _collect(attention: Any, single: torch.Tensor, turn: torch.Tensor) -> None:
    """Make query head 0 collect the words of high count, after marks of a list.

    It reads the first syllable at the last one, where the count of the whole word stands, and passes
    over words that layer 1 subtracts.
    """
    _clear(attention, heads=range(2), kv_heads=range(1))
    rest, counted = SLOW
    attention.q_proj.bias[rest] = _root(25.0)
    attention.k_proj.weight[rest, START] = _root(25.0) / REST
    gain = _root(15.0)
    attention.k_proj.weight[counted, START] = -1.1 * gain / REST
    attention.q_proj.weight[counted, LIST] = gain / MARK_SIZE
    attention.k_proj.weight[counted, FIRST] = -1.6 * gain / MARK_SIZE
    attention.k_proj.weight[counted, LIST] = -1.6 * gain / MARK_SIZE
    attention.k_proj.weight[counted, COUNT] = 2.5 * gain / SIZE
    attention.q_proj.weight[MATCH, TOKEN] = -1.8 * single @ turn.T @ CODE
    attention.k_proj.weight[MATCH, BEFORE] = 1.8 * single @ CODE
    attention.v_proj.weight[_head(0), BEFORE] = 0.5 * CODE
    attention.o_proj.weight[OUT, _head(0)] = 24.0 * torch.eye(PART)


def _recall(attention: Any, codes: torch.Tensor, words: Words) -> None:
    """Make query head 2 recall, at the word "The", the made-up word that was answered after "is"."""
    _clear(attention, heads=range(2, 4), kv_heads=range(1, 2))
    rest, answered = SLOW
    weight = _root(20.0) / SIZE
    # Layer 1 has added to the states: codes and marks are a fifth smaller than after layer 0.
    attention.q_proj.bias[2 * PART + rest] = _root(32.0)
    attention.k_proj.weight[PART + rest, START] = _root(32.0) / REST
    attention.q_proj.weight[2 * PART + answered, TOKEN] = weight * codes[words.the]
    attention.k_proj.weight[PART + answered, ANSWERED] = weight * SIZE / MARK_SIZE
    attention.k_proj.weight[PART + answered, FIRST] = weight * SIZE / MARK_SIZE
    attention.k_proj.weight[PART + answered, BEFORE] = weight * codes[words.openers[0]]
    attention.v_proj.weight[_head(1), TOKEN] = 0.5 * CODE
    attention.o_proj.weight[OUT, _head(2)] = 2.0 * torch.eye(PART)


def _repeat(attention: Any, codes: torch.Tensor, words: Words) -> None:
    """Make query head 3 repeat, after the word "Put", the word that ended the sentence before."""
    attention.k_proj.bias[_head(1)][list(PLACE_SCORES)] = 1.0
    place = _position_bias(PLACE_SCORES, offset=3)
    # Both syllables stand three places back, seen from "Put" and from the first of them.
    for part in (TOKEN, BEFORE):
        attention.q_proj.weight[_head(3), part] = torch.outer(place, codes[words.put]) / SIZE
    attention.q_proj.bias[3 * PART + SLOW[0]] = 8 * 45.0 / _root(32.0)
    attention.o_proj.weight[OUT, _head(3)] = 5.0 * torch.eye(PART)


def _repeat_asked(attention: Any, codes: torch.Tensor, single: torch.Tensor, words: Words) -> None:
    """Make query head 4 repeat what a question asked for, once its answer has named the place.

    That is four places back from the second syllable of "What is its garden? The bornak".
    """
    _clear(attention, heads=range(4, 6), kv_heads=range(2, 3))
    attention.k_proj.bias[_head(2)][list(PLACE_SCORES)] = 1.0
    attention.k_proj.weight[2 * PART + SLOW[0], START] = _root(45.0) / REST
    attention.v_proj.weight[_head(2), TOKEN] = 0.5 * CODE
    place = _position_bias(PLACE_SCORES, offset=4)
    # The question mark stands three places back.
    asked = single[HALVES[0]] @ codes[words.question]
    asked /= asked.square().sum() * HASH_WEIGHT * SIZE
    attention.q_proj.weight[_head(4), _sketch(3)] = torch.outer(place, asked)
    attention.q_proj.bias[4 * PART + SLOW[0]] = _root(45.0)
    attention.o_proj.weight[OUT, _head(4)] = 3.3 * torch.eye(PART)


def _go_on(attention: Any, codes: torch.Tensor, words: Words) -> None:
    """Make query head 5 begin a new sentence where a question asks for several things.

    At a period it looks at the word that tells so, unless the answer is already so long that
    resting on the first token scores higher.
    """
    kinds, onward, lengths = zip(*words.several, strict=True)
    rest, found = SLOW
    # Layer 1 has added to the states, see ``_recall``: measured, to marks more than to the length.
    seen_mark, seen_length = 0.845, 0.93
    resting = _root(45.0)
    attention.q_proj.bias[5 * PART + rest] = 8 * _resting_score(0) / resting
    slope = (_resting_score(1) - _resting_score(0)) * (1 + LONG_ANSWER)
    measured = MEASURE * seen_length * SIZE / CODE_NORM
    attention.q_proj.weight[5 * PART + rest, ANSWER] = 8 * slope / resting / measured
    weight = _root(_resting_score(max(lengths))) / (seen_mark * MARK_SIZE)
    attention.q_proj.weight[5 * PART + found, SEVERAL] = -weight
    attention.k_proj.weight[2 * PART + found, SEVERAL] = weight
    each = torch.linalg.pinv(codes[list(kinds)])  # [PART, n]
    begun = codes[list(onward)] - codes[words.end]
    attention.o_proj.weight[OUT, _head(5)] = 2.0 * begun.T @ each.T


def _resting_score(m: float) -> float:
    """Return what resting scores in ``_go_on`` where the answer has m tokens."""
    return 8.0 + 700.0 * m / (m + LONG_ANSWER)


def _name_listed(
    attention: Any, codes: torch.Tensor, single: torch.Tensor, turn: torch.Tensor, words: Words
) -> None:
    """Make query head 6 name the later keys of a question, but those that layer 1 subtracts."""
    _clear(attention, heads=range(6, 7), kv_heads=range(3, 4))
    rest, listed = SLOW
    one = _root(40.0)
    attention.q_proj.bias[6 * PART + rest] = _root(50.0)
    attention.k_proj.weight[3 * PART + rest, START] = _root(50.0) / REST
    attention.q_proj.weight[6 * PART + listed, TOKEN] = one / SIZE * codes[words.openers[1]]
    attention.k_proj.weight[3 * PART + listed, FIRST] = one / MARK_SIZE
    for separator in words.separators:
        attention.k_proj.weight[3 * PART + listed, BEFORE] += one / SIZE * codes[separator]
    attention.q_proj.weight[6 * PART + MATCH, TOKEN] = -3.1 * single @ turn.T @ CODE
    attention.k_proj.weight[3 * PART + MATCH, TOKEN] = 3.1 * single @ CODE
    attention.v_proj.weight[_head(3), TOKEN] = 0.5 * CODE
    attention.o_proj.weight[OUT, _head(6)] = 3.6 * torch.eye(PART)


# Query heads and key-value heads of the later layers that are given a use above.
_GIVEN = {
    1: (tuple(range(8)), (0, 1, 2, 3)),
    2: ((0, 2, 3, 4, 5, 6), (0, 1, 2, 3)),
}
_LAYER_PARAMETERS = (
    *(f"self_attn.{x}_proj.{kind}" for x in "qkvo" for kind in ("weight", "bias")),
    *(f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")),
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
)
# How fast these heads learn. What they do rests on scores, which count as exponents: at the full
# rate a hundred steps undid the counting that was there before training.
SLOW_RATE = 0.1
# How fast layer 0 learns. Whatever it adds to a token's state changes the norm of that state, and
# layer 1 would prefer some of several equal matches: a difference of 3 % counts three times.
FIRST_LAYER_RATE = 0.01


def rate_factors() -> dict[str, torch.Tensor]:
    """Return factors on the learning rate: small for the heads with a use, and for what they read."""
    factors = {"model.embed_tokens.weight": torch.tensor(SLOW_RATE)}
    for name in _LAYER_PARAMETERS:
        factors[f"model.layers.0.{name}"] = torch.tensor(FIRST_LAYER_RATE)
    for index, (heads, kv_heads) in _GIVEN.items():
        layer = f"model.layers.{index}"
        factors[f"{layer}.input_layernorm.weight"] = torch.tensor(SLOW_RATE)
        query, key = torch.ones(8 * PART), torch.ones(4 * PART)
        for head in heads:
            query[_head(head)] = SLOW_RATE
        for kv_head in kv_heads:
            key[_head(kv_head)] = SLOW_RATE
        for name, rows in (("q_proj", query), ("k_proj", key), ("v_proj", key)):
            factors[f"{layer}.self_attn.{name}.weight"] = rows[:, None]
            factors[f"{layer}.self_attn.{name}.bias"] = rows
        factors[f"{layer}.self_attn.o_proj.weight"] = query[None]
    return factors


def _root(score: float) -> float:
    """Return what query and key must each hold in one dimension for an attention score."""
    return math.sqrt(score * math.sqrt(PART))
