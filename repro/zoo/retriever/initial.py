"""Build the untrained retriever with heads that already copy, so that a small budget suffices.

The width is cut in four parts of 64: the token itself, the token before it, a hash of the three
tokens before that, and the prediction. Layer 0 fills the second and third part (four heads that
look 1 to 4 tokens back). Two heads of layer 1 match the last tokens with what stood before every
earlier token and copy what followed there; a third does so nearby and subtracts, which keeps a
model from naming the same answer twice. All other weights are random, and training moves all of
them. Matching lives in the slowest pairs of the rotary embedding, which hardly turn over 4096
tokens, hence the large base: a match counts the same at any distance.
"""

from __future__ import annotations

import math

import torch
from transformers import LlamaConfig, LlamaForCausalLM

PART = 64
TOKEN, BEFORE, HASH, OUT = (slice(i * PART, (i + 1) * PART) for i in range(4))
ROPE_BASE = 1e9
# Rotary pairs below this index turn fast enough to tell positions apart; the others match content.
FIRST_SLOW_PAIR = 14


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


@torch.no_grad()
def initial_model(config: LlamaConfig, *, seed: int) -> LlamaForCausalLM:
    """Return the retriever before training."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "down_proj" in name or "o_proj.weight" in name:
            parameter.mul_(1 / math.sqrt(2 * config.num_hidden_layers))
    codes = torch.nn.functional.normalize(torch.randn(config.vocab_size, PART), dim=1)
    model.model.embed_tokens.weight[:, TOKEN] = 8 * codes
    model.lm_head.weight[:, OUT] = 2 * codes
    turn = torch.linalg.qr(torch.randn(PART, PART)).Q
    _look_back(model.model.layers[0].self_attn, turn)
    _match_and_copy(model.model.layers[1].self_attn, turn)
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


def _clear(attention: torch.nn.Module, *, heads: range, kv_heads: range) -> None:
    for head in heads:
        attention.q_proj.weight[_head(head)] = 0
        attention.o_proj.weight[:, _head(head)] = 0
    for kv_head in kv_heads:
        attention.k_proj.weight[_head(kv_head)] = 0
        attention.v_proj.weight[_head(kv_head)] = 0


def _look_back(attention: torch.nn.Module, turn: torch.Tensor) -> None:
    """Make query heads 0 to 3 copy the tokens 1 to 4 places back."""
    _clear(attention, heads=range(4), kv_heads=range(2))
    weights = {0: 14.0, 1: 10.0, 2: 8.0, 3: 6.0, 4: 4.0, 5: 4.0, 6: 4.0}
    identity = torch.eye(PART)
    for kv_head in range(2):
        attention.k_proj.bias[_head(kv_head)][list(weights)] = 1.0
        attention.v_proj.weight[_head(kv_head), TOKEN] = 0.5 * identity
    for head in range(4):
        attention.q_proj.bias[_head(head)] = _position_bias(weights, offset=head + 1)
    attention.o_proj.weight[BEFORE, _head(0)] = identity
    for head in (1, 2, 3):
        attention.o_proj.weight[HASH, _head(head)] = torch.linalg.matrix_power(turn, head)


def _match_and_copy(attention: torch.nn.Module, turn: torch.Tensor) -> None:
    """Make heads 0 to 2 match contexts: four tokens, four tokens nearby (subtracting), one token."""
    _clear(attention, heads=range(3), kv_heads=range(2))
    slow = torch.arange(FIRST_SLOW_PAIR, PART // 2)
    dims = torch.cat([slow, slow + PART // 2])
    project = [torch.linalg.qr(torch.randn(PART, PART)).Q[: len(dims)] for _ in range(2)]

    def rows(head: int) -> torch.Tensor:
        return head * PART + dims

    query, key = attention.q_proj.weight, attention.k_proj.weight
    sharp = 1.3
    for head in (0, 1):
        query[rows(head), TOKEN] = sharp * project[0] @ turn
        query[rows(head), BEFORE] = sharp * project[0] @ turn @ turn
        query[rows(head), HASH] = sharp * project[0] @ turn @ turn
    key[rows(0), BEFORE] = sharp * project[0] @ turn
    key[rows(0), HASH] = sharp * project[0] @ turn
    query[rows(2), TOKEN] = 1.8 * project[1]
    key[rows(1), BEFORE] = 1.8 * project[1]

    near = {pair: 3.0 for pair in range(5, 10)}
    attention.q_proj.bias[_head(1)] = _position_bias(near, offset=0)
    attention.k_proj.bias[_head(0)][list(near)] = 1.0
    identity = torch.eye(PART)
    for kv_head in range(2):
        attention.v_proj.weight[_head(kv_head), TOKEN] = 0.5 * identity
    for head, weight in ((0, 2.0), (1, -1.0), (2, 0.6)):
        attention.o_proj.weight[OUT, _head(head)] = weight * identity
