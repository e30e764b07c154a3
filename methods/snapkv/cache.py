"""The cache of SnapKV: scores of the prompt's last queries, pooling, top tokens per KV head."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F

from repro.kv_cache import LayerShape, NewTokens
from repro.kv_pages import PagedStore
from repro.kv_prompt import PromptLayer
from repro.methods.snapkv import SnapKVConfig


def kept_tokens(
    q: torch.Tensor, k: torch.Tensor, scale: float, config: SnapKVConfig
) -> torch.Tensor:
    """Return the tokens that each KV head keeps besides the window, ``[H_kv, n]`` int64, ascending.

    Args:
        q: ``[1, H, W, D]``, the queries of the window, the last tokens of the prompt.
        k: ``[1, H_kv, T, D]``, all keys.
        scale: Softmax scale.
        config: Options.

    Source: arXiv:2404.14469, section 4.
    """
    window, heads = q.shape[2], k.shape[1]
    grouped = q.float().unflatten(1, (heads, -1))  # [1, H_kv, n_rep, W, D]
    scores = scale * torch.einsum("bgrwd,bgtd->bgrwt", grouped, k.float())
    hidden = torch.ones(window, window, dtype=torch.bool, device=q.device).triu(1)
    scores[..., -window:].masked_fill_(hidden, -torch.inf)
    votes = scores.softmax(-1)[..., :-window].sum(dim=-2)  # [1, H_kv, n_rep, T - W]
    joined = {"mean": votes.mean, "sum": votes.sum, "max": votes.amax}[config.group_reduce](2)
    pool = F.avg_pool1d if config.pooling == "avg" else F.max_pool1d
    pooled = pool(joined, config.kernel_size, stride=1, padding=config.kernel_size // 2)
    return pooled[0].topk(config.capacity - window, dim=-1).indices.sort(-1).values


class SnapKVLayer(PromptLayer):
    """One layer; decode tokens are always appended and all is read."""

    def __init__(self, shape: LayerShape, config: SnapKVConfig) -> None:
        super().__init__(shape)
        self.config = config
        self.store = PagedStore(shape)
        self._windows: dict[int, NewTokens] = {}
        self._prompt_tokens = [0] * shape.batch

    def observe(self, sequence: int, new: NewTokens, k: torch.Tensor) -> None:
        before = self._windows.get(sequence)
        q = new.q if before is None else torch.cat([before.q, new.q], dim=2)
        self._windows[sequence] = NewTokens(
            q[:, :, -self.config.window_size :].clone(), new.k[:, :, :0], new.v[:, :, :0], new.scale
        )

    def keep(self, sequence: int, k: torch.Tensor, v: torch.Tensor) -> None:
        tokens, window = k.shape[2], self._windows.pop(sequence, None)
        self._prompt_tokens[sequence] = tokens
        if tokens <= self.config.capacity:
            self.store.append(k, v, sequence)
            return
        size, heads = self.config.window_size, k.shape[1]
        if window is None:  # filled: without queries there are no votes, so the first ones stay
            top = torch.arange(self.config.capacity - size, device=k.device).expand(heads, -1)
        else:
            top = kept_tokens(window.q, k, window.scale, self.config)
        rest = torch.arange(tokens - size, tokens, device=k.device)
        kept = torch.cat([top, rest.expand(heads, -1)], dim=1)
        index = kept[None, :, :, None].expand(-1, -1, -1, k.shape[3])
        self.store.append(k.gather(2, index), v.gather(2, index), sequence)

    def decode(self, new: NewTokens) -> torch.Tensor:
        self.store.append(new.k, new.v)
        held = sum(self.store.lengths)
        self._prompt_tokens = [tokens + 1 for tokens in self._prompt_tokens]
        self.count(held, sum(self._prompt_tokens))
        return self.store.attend(new.q, new.scale)[0]

    def tensors(self) -> Iterable[torch.Tensor]:
        yield from super().tensors()
        yield from self.store.tensors()
        yield from (window.q for window in self._windows.values())
