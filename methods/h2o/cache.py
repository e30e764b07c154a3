"""The cache of H2O: a fixed number of slots per KV head, each with the attention it received."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from repro.kv_cache import LayerShape, NewTokens
from repro.kv_prompt import PromptLayer
from repro.methods.h2o import H2OConfig

_QUERIES = 256  # of a prompt, whose probabilities are held at once


def received_attention(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """Return the probability that each token received, ``[H_kv, Tk]`` fp32, summed over queries.

    The query heads of a KV head add up. Probabilities are formed for some queries at a time.

    Args:
        q: ``[1, H, Tq, D]``, the last ``Tq`` of the tokens.
        k: ``[1, H_kv, Tk, D]``.
        scale: Softmax scale.

    Source: arXiv:2306.14048, section 4.
    """
    tokens_k, kv_heads = k.shape[2], k.shape[1]
    offset = tokens_k - q.shape[2]
    keys, places = k[0].float(), torch.arange(tokens_k, device=k.device)
    total = torch.zeros(kv_heads, tokens_k, device=k.device)
    for first in range(0, q.shape[2], _QUERIES):
        part = q[0, :, first : first + _QUERIES].float().unflatten(0, (kv_heads, -1))
        visible = offset + first + part.shape[2]
        rows = offset + first + torch.arange(part.shape[2], device=k.device)
        scores = scale * torch.einsum("grqd,gtd->grqt", part, keys[:, :visible])
        scores.masked_fill_(places[:visible] > rows[:, None], -torch.inf)
        total[:, :visible] += scores.softmax(-1).sum(dim=(1, 2))
    return total


class H2OLayer(PromptLayer):
    """One layer. A slot that nothing is in has the position -1."""

    def __init__(self, shape: LayerShape, config: H2OConfig) -> None:
        super().__init__(shape)
        self.config = config
        # One more for the token of a step, which makes another one leave.
        slots = config.heavy_size + config.recent_size + 1
        per_slot = (shape.batch, shape.kv_heads, slots)
        values = {"dtype": shape.dtype, "device": shape.device}
        self._k, self._v = (torch.zeros(*per_slot, shape.head_dim, **values) for _ in range(2))
        self._score = torch.zeros(per_slot, device=shape.device)
        self._position = torch.full(per_slot, -1, dtype=torch.int32, device=shape.device)
        self._tokens = torch.zeros(shape.batch, 1, 1, dtype=torch.int32, device=shape.device)
        self._received: dict[int, torch.Tensor] = {}
        self._lengths = [0] * shape.batch

    def observe(self, sequence: int, new: NewTokens, k: torch.Tensor) -> None:
        received = received_attention(new.q, k, new.scale)
        before = self._received.get(sequence)
        if before is not None:
            received[:, : before.shape[1]] += before
        self._received[sequence] = received

    def keep(self, sequence: int, k: torch.Tensor, v: torch.Tensor) -> None:
        tokens, config = k.shape[2], self.config
        received = self._received.pop(sequence, torch.zeros(k.shape[1], tokens, device=k.device))
        kept = torch.arange(tokens, device=k.device).expand(k.shape[1], -1)
        if tokens > config.heavy_size + config.recent_size:
            old = tokens - config.recent_size
            heavy = received[:, :old].topk(config.heavy_size, dim=-1).indices.sort(-1).values
            kept = torch.cat([heavy, kept[:, old:]], dim=1)
        count, index = kept.shape[1], kept[None, :, :, None].expand(-1, -1, -1, k.shape[3])
        self._k[sequence, :, :count] = k.gather(2, index)[0]
        self._v[sequence, :, :count] = v.gather(2, index)[0]
        self._score[sequence, :, :count] = received.gather(1, kept)
        self._position[sequence, :, :count] = kept.to(torch.int32)
        self._tokens[sequence] = tokens
        self._lengths[sequence] = tokens

    def decode(self, new: NewTokens) -> torch.Tensor:
        slot = self._position.argmin(dim=-1, keepdim=True)  # one that is free
        index = slot[..., None].expand(-1, -1, -1, self.shape.head_dim)
        self._k.scatter_(2, index, new.k)
        self._v.scatter_(2, index, new.v)
        self._score.scatter_(2, slot, 0.0)
        self._position.scatter_(2, slot, self._tokens.expand_as(slot))
        self._tokens += 1
        out, probabilities = self._attend(new)
        self._score += probabilities
        self._evict()
        self._lengths = [tokens + 1 for tokens in self._lengths]
        most = self.config.heavy_size + self.config.recent_size + 1
        self.count(sum(min(tokens, most) for tokens in self._lengths), sum(self._lengths))
        return out

    def _attend(self, new: NewTokens) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output and the probability that each slot received, ``[B, H_kv, slots]``."""
        q = new.q.float().unflatten(1, (self.shape.kv_heads, -1))[:, :, :, 0]
        scores = new.scale * q @ self._k.float().mT  # [B, H_kv, n_rep, slots]
        scores.masked_fill_(self._position[:, :, None] < 0, -torch.inf)
        weights = scores.softmax(-1)
        out = weights @ self._v.float()
        return out.flatten(1, 2)[:, :, None].to(new.q.dtype), weights.sum(dim=2)

    def _evict(self) -> None:
        """Free the slot of the older token that received least, where all slots are taken."""
        older = (self._position < self._tokens - self.config.recent_size) & (self._position >= 0)
        score = self._score.masked_fill(~older, torch.inf)
        least = score.argmin(dim=-1, keepdim=True)
        full = (self._position >= 0).all(dim=-1, keepdim=True)
        freed = torch.where(full, -1, self._position.gather(2, least))
        self._position.scatter_(2, least, freed)

    def tensors(self) -> Iterable[torch.Tensor]:
        yield from super().tensors()
        yield from (self._k, self._v, self._score, self._position, self._tokens)
        yield from self._received.values()
