"""Profiling of per-head thresholds: how much estimated mass the blocks that matter carry."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from repro.attention_patch import AttentionCall, patched_attention
from repro.block_controls import exact_block_mass
from repro.errors import BadInput, Fault
from repro.kernels.block_selection import select_blocks
from repro.kernels.xattention_scores import xattention_scores
from repro.method import Artifact, CalibrationData
from repro.methods.xattention import XAttentionConfig

if TYPE_CHECKING:
    from repro.subjects import Subject

#: Share of the exact mass that the blocks taken as needed cover.
TARGET = 0.9


def profile_thresholds(
    subject: Subject,
    config: XAttentionConfig,
    data: CalibrationData,
    *,
    progress: Callable[[int, int], None],
) -> Artifact:
    """Profile every layer and head during dense prefills; see ``calibrate``.

    Per text the share of estimated mass that covers the needed blocks; the maximum over texts.

    Raises:
        BadInput: If there is no text.
    """
    if not data:
        raise BadInput(Fault("xattention: calibrate", "data", "at least one text", "none"))
    settings = subject.model.config.get_text_config()
    shape = (settings.num_hidden_layers, settings.num_attention_heads)
    table = torch.zeros(shape, dtype=torch.float64)

    def observe(call: AttentionCall) -> None:
        needed = needed_share(call.q, call.k, config, scale=call.scale).cpu()
        table[call.layer] = torch.maximum(table[call.layer], needed)

    progress(0, len(data))
    with torch.inference_mode(), patched_attention(subject.model, observe):
        for done, ids in enumerate(data, start=1):
            subject.model(ids.to(subject.device), use_cache=False, logits_to_keep=1)
            progress(done, len(data))
    metadata = {
        "stride": config.stride,
        "block_size": config.block_size,
        "pattern": config.pattern,
        "target": TARGET,
        "texts": len(data),
        "longest": max(ids.shape[1] for ids in data),
        "mean": round(float(table.mean()), 6),
    }
    return Artifact(tensors={"threshold": table.float()}, metadata=metadata)


def needed_share(
    q: torch.Tensor, k: torch.Tensor, config: XAttentionConfig, *, scale: float
) -> torch.Tensor:
    """Return the share of estimated mass that covers the blocks a head needs, ``[H]`` fp64.

    Needed in a row are the fewest blocks with 0.9 of its exact mass. Every block whose estimate
    reaches that of the least estimated among them counts; the share is theirs, over all rows.

    Args:
        q: ``[B, H, Tq, D]``.
        k: ``[B, H_kv, Tk, D]``.
        config: Options of the estimate.
        scale: Softmax scale.
    """
    # In fp32: two profiles of one text must not differ by the rounding of a matmul.
    q, k = q.float(), k.float()
    exact = exact_block_mass(q, k, scale=scale, block_size=config.block_size)
    estimate = xattention_scores(
        q,
        k,
        stride=config.stride,
        block_size=config.block_size,
        scale=scale,
        pattern=config.pattern,
        seed=config.draw,
    ).double()
    needed = select_blocks(
        exact,
        TARGET,
        query_offset=k.shape[2] - q.shape[2],
        block_size=config.block_size,
        keep_sink=False,
        keep_recent=False,
    )
    least = estimate.masked_fill(~needed, torch.inf).amin(dim=-1, keepdim=True)
    covered = estimate.masked_fill(estimate < least, 0.0).sum(dim=(0, 2, 3))
    return covered / estimate.sum(dim=(0, 2, 3))
