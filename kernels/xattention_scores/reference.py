"""The definition of the block mass: eager, fp32, the whole score map at once."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


@torch.autocast("cpu", enabled=False)
@torch.autocast("cuda", enabled=False)
def xattention_scores_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    order: torch.Tensor,
    block_size: int,
    causal: bool,
    scale: float,
    real_q: torch.Tensor | None,
    real_k: torch.Tensor | None,
) -> torch.Tensor:
    """Return the block mass ``[B, H, Nq, Nk]`` fp32; see ``xattention_scores``.

    Args:
        q: ``[B, H, Tq, D]``.
        k: ``[B, H_kv, Tk, D]``.
        order: ``[stride]`` int64; the query of a group that meets key ``s`` of a group.
        block_size: Tokens a block.
        causal: Whether groups beyond the diagonal are hidden.
        scale: Softmax scale of the attention.
        real_q: ``[B, Tq]`` bool or None, True for a real query.
        real_k: ``[B, Tk]`` bool or None, True for a real key.
    """
    stride = len(order)
    offset = k.shape[2] - q.shape[2]
    n_rep = q.shape[1] // k.shape[1]
    queries, row_real = _groups(q, real_q, stride)
    keys, column_real = _groups(k.repeat_interleave(n_rep, dim=1), real_k, stride)
    scores = torch.einsum("bhisd,bhjsd->bhij", queries[:, :, :, order], keys)
    scores = scores * (scale / stride)
    visible = column_real[:, None, None, :]
    if causal:
        rows = torch.arange(scores.shape[2], device=q.device)[:, None]
        columns = torch.arange(scores.shape[3], device=q.device)[None, :]
        # A key group is visible as soon as its first key is, to the last query of the group.
        visible = visible & (columns * stride <= offset + rows * stride + stride - 1)
    mass = torch.softmax(scores.masked_fill(~visible, -math.inf), dim=-1)
    # A row without any visible column is 0 / 0.
    mass = mass.masked_fill(~(visible & row_real[:, None, :, None]), 0.0)
    per_block = block_size // stride
    mass = F.pad(mass, (0, -mass.shape[3] % per_block, 0, -mass.shape[2] % per_block))
    cells = mass.unflatten(3, (-1, per_block)).unflatten(2, (-1, per_block))
    return cells.sum(dim=(3, 5))


def _groups(
    x: torch.Tensor, real: torch.Tensor | None, stride: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``x`` as groups ``[B, H, n, stride, D]`` fp32 and which groups hold a real token."""
    x = x.float()
    if real is None:
        real = torch.ones(x.shape[0], x.shape[2], dtype=torch.bool, device=x.device)
    x = x.masked_fill(~real[:, None, :, None], 0.0)
    tail = -x.shape[2] % stride
    groups = F.pad(x, (0, 0, 0, tail)).unflatten(2, (-1, stride))
    return groups, F.pad(real, (0, tail)).unflatten(1, (-1, stride)).any(dim=-1)
