"""The cache of StreamingLLM: constant size, positions counted inside it.

Scores depend on differences of positions alone. Inside the cache the recent tokens are as far from
the query as they really are; only the sinks are nearer. So keys stay rotated by their true position,
and where a sink is compared with a query, the query is turned back by the tokens left out between
them: the same product as after counting anew.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from repro.attention_patch import dense_causal
from repro.errors import UnsupportedCombination
from repro.kernels.paged_attention import merge_attention
from repro.kernels.streaming_attention import streaming_attention
from repro.kv_cache import LayerCache, LayerShape, NewTokens
from repro.kv_window import SinkWindow, visible_slots
from repro.methods.streaming_llm import StreamingLLMConfig
from repro.rotary import turns_halves


def frequencies(model: Any) -> torch.Tensor:
    """Return the angles by which a token turns each pair of channels, ``[D / 2]`` fp32.

    Raises:
        UnsupportedCombination: If the model's positions are not rotations of fixed angles.
    """
    rotary = getattr(model.get_decoder(), "rotary_emb", None)
    kind = getattr(rotary, "rope_type", None)
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise UnsupportedCombination(
            "streaming_llm: reindex needs rotary positions of fixed angles (default, linear, "
            f"llama3 or yarn), got {kind}; set reindex: false"
        )
    if not turns_halves(model):
        raise UnsupportedCombination(
            "streaming_llm: reindex needs rotary positions that turn channel i with i + D / 2 over "
            "the whole head; set reindex: false"
        )
    return rotary.inv_freq.detach().float()


def turned(x: torch.Tensor, tokens: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Return ``x`` as if each token stood so many positions later.

    Args:
        x: ``[B, H, T, D]``, rotated.
        tokens: ``[B or 1, T]`` or ``[T]``, positions to move by.
        rotation: ``[D / 2]`` fp32.
    """
    angle = tokens.to(rotation.device)[..., None].float() * rotation  # [.., T, D / 2]
    cos, sin = angle.cos(), angle.sin()
    if cos.ndim == 3:
        cos, sin = cos[:, None], sin[:, None]
    first, second = x.float().chunk(2, dim=-1)
    both = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return both.to(x.dtype)


class StreamingLayer(LayerCache):
    """One layer; with ``rotation`` None positions are the true ones."""

    def __init__(
        self, shape: LayerShape, config: StreamingLLMConfig, rotation: torch.Tensor | None
    ) -> None:
        self.shape, self.config, self.rotation = shape, config, rotation
        self.window = SinkWindow(shape, sink_size=config.sink_size, recent_size=config.recent_size)
        self._read = self._seen = 0

    def prefill(self, sequence: int, new: NewTokens) -> torch.Tensor:
        before = self.window.lengths[sequence]
        cached_k, cached_v = self.window.ordered(sequence)
        self.window.append(sequence, new.k, new.v)
        k, v = torch.cat([cached_k, new.k], dim=2), torch.cat([cached_v, new.v], dim=2)
        sink, size = self.config.sink_size, self.window.size
        # Queries before the cache is full see everything.
        early = min(max(size - before, 0), new.q.shape[2])
        parts = []
        if early:
            dense = k.shape[2] - new.q.shape[2] + early
            parts.append(
                dense_causal(new.q[:, :, :early], k[:, :, :dense], v[:, :, :dense], new.scale)
            )
        if early < new.q.shape[2]:
            late = new.q[:, :, early:]
            options = {"scale": new.scale, "return_lse": True}
            recent = streaming_attention(
                late,
                k[:, :, sink:],
                v[:, :, sink:],
                sink_size=0,
                window_size=self.config.recent_size,
                **options,
            )
            if sink:
                first = before + early
                positions = torch.arange(first, first + late.shape[2])
                asking = self._as_in_cache(late, positions)
                sinks = _attend(asking, k[:, :, :sink], v[:, :, :sink], new.scale)
                recent = merge_attention(*zip(recent, sinks, strict=True))
            parts.append(recent[0])
        return torch.cat(parts, dim=2)

    def decode(self, new: NewTokens) -> torch.Tensor:
        self.window.append_each(new.k, new.v)
        lengths, window, sink = self.window.lengths, self.window, self.config.sink_size
        held = sum(window.held(row) for row in range(len(lengths)))
        self._read += held
        self._seen += sum(lengths)
        visible = visible_slots(window)
        positions = torch.tensor(lengths)[:, None] - 1
        asking = self._as_in_cache(new.q, positions)
        masks = (None, None) if visible is None else visible.split([sink, window.recent_size], -1)
        parts = [
            _attend(q, window.k[:, :, part], window.v[:, :, part], new.scale, mask)
            for q, part, mask in (
                (asking, slice(0, sink), masks[0]),
                (new.q, slice(sink, None), masks[1]),
            )
            if part != slice(0, 0)
        ]
        return merge_attention(*zip(*parts, strict=True))[0]

    def fill(self, sequence: int, k: torch.Tensor, v: torch.Tensor) -> None:
        self.window.append(sequence, k, v)

    def tensors(self) -> Iterable[torch.Tensor]:
        return self.window.tensors()

    def observed(self) -> tuple[int, int]:
        return self._read, self._seen

    def _as_in_cache(self, q: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return queries at true ``positions`` as they stand inside the cache."""
        left_out = (positions - self.window.size + 1).clamp_min(0)
        if self.rotation is None or not bool(left_out.any()):
            return q
        return turned(q, -left_out, self.rotation)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to few keys; ``[B, H, T, D]`` and the log-sum-exp ``[B, H, T]`` fp32."""
    grouped = q.float().unflatten(1, (k.shape[1], -1))  # [B, H_kv, n_rep, T, D]
    scores = scale * grouped @ k[:, :, None].float().mT
    if mask is not None:
        scores = scores.masked_fill(~mask[:, :, None], -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse[..., None]).nan_to_num(0.0)
    out = (weights @ v[:, :, None].float()).flatten(1, 2).to(q.dtype)
    return out, lse.flatten(1, 2)
