"""XAttention itself: the operator on q, k, v, and its patch of an LLM."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from repro.block_controls import oracle_blocks, random_blocks, seed_of
from repro.errors import MissingResource
from repro.kernels.block_selection import causal_blocks, diagonal_blocks, select_blocks
from repro.kernels.block_sparse_attention import block_sparse_attention
from repro.kernels.xattention_scores import xattention_scores
from repro.method import Artifact, Patch
from repro.methods.xattention import XAttentionConfig

if TYPE_CHECKING:
    from repro.attention_patch import AttentionCall
    from repro.subjects import Subject


def xattention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: XAttentionConfig | None = None,
    *,
    threshold: float | torch.Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    key_padding_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend to the blocks that carry most of the estimated mass.

    Args:
        q: ``[B, H, Tq, D]``, fp16, bf16 or fp32.
        k: ``[B, H_kv, Tk, D]``; when causal the queries are the last ``Tq`` of its tokens.
        v: ``[B, H_kv, Tk, D]``.
        config: Options; ``control`` is not looked at here.
        threshold: Instead of the config's: a number or ``[H]``. From 1 on (for every head) the
            result is bit-identical to dense SDPA.
        causal: False for video and image transformers: no block is forced then.
        scale: Softmax scale, ``D ** -0.5`` if None.
        key_padding_mask: ``[B, Tk]`` bool, True for a real key. It may be on any side; padding
            collects no mass.

    Returns:
        ``[B, H, Tq, D]``.

    Source: arXiv:2503.16428, section 2.
    """
    config = config or XAttentionConfig()
    threshold = config.threshold if threshold is None else threshold
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if is_dense(threshold):
        return dense_attention(q, k, v, causal, scale, key_padding_mask)
    block_mask = xattention_mask(
        q, k, config, threshold=threshold, causal=causal, scale=scale, key_padding_mask=key_padding_mask
    )  # fmt: skip
    return block_sparse_attention(
        q,
        k,
        v,
        block_mask,
        block_size=config.block_size,
        causal=causal,
        scale=scale,
        key_padding_mask=key_padding_mask,
    )


def xattention_mask(
    q: torch.Tensor,
    k: torch.Tensor,
    config: XAttentionConfig,
    *,
    threshold: float | torch.Tensor,
    causal: bool = True,
    scale: float | None = None,
    key_padding_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the blocks that XAttention keeps, ``[B, H, Nq, Nk]`` bool; see ``xattention``."""
    chunk = estimator_chunk(config, k.shape[2])
    mass = xattention_scores(
        q,
        k,
        stride=config.stride,
        block_size=config.block_size,
        causal=causal,
        scale=scale,
        key_padding_mask=key_padding_mask,
        pattern=config.pattern,
        seed=config.draw,
        chunk_size=config.estimator_chunk,
    )
    real_blocks = None
    if key_padding_mask is not None:
        tail = -k.shape[2] % config.block_size
        padded = torch.nn.functional.pad(key_padding_mask, (0, tail))
        real_blocks = padded.unflatten(1, (-1, config.block_size)).any(dim=-1)
    offset = k.shape[2] - q.shape[2]
    quirk = config.first_chunk_quirk and causal and offset == 0
    return select_blocks(
        mass,
        threshold,
        causal=causal,
        query_offset=offset if causal else 0,
        block_size=config.block_size,
        keep_sink=config.keep_sink,
        keep_recent=config.keep_recent,
        real_blocks=real_blocks,
        quirk_rows=chunk // config.block_size if quirk else 0,
    )


def estimator_chunk(config: XAttentionConfig, tokens: int) -> int:
    """Return the query tokens of one estimator chunk: the config's, or the released formula."""
    if config.estimator_chunk is not None:
        return config.estimator_chunk
    power = 1 << max(tokens - 1, 1).bit_length()
    return max(2048, min(max(2048, power), 2**28 // power))


def is_dense(threshold: float | torch.Tensor) -> bool:
    """Whether every head keeps everything."""
    if isinstance(threshold, torch.Tensor):
        return bool((threshold >= 1).all())
    return threshold >= 1


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    scale: float,
    key_padding_mask: torch.Tensor | None,
) -> torch.Tensor:
    """Return dense SDPA, bottom-right aligned when causal."""
    mask = None
    if key_padding_mask is not None:
        mask = key_padding_mask[:, None, None, :]
    if causal and (mask is not None or q.shape[2] != k.shape[2]):
        visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        visible = visible.tril(k.shape[2] - q.shape[2])
        mask = visible if mask is None else visible & mask
    return torch.nn.functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=causal and mask is None,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )


class XAttentionPatch(Patch):
    """Selection, controls and observations of one patched model."""

    def __init__(self, config: XAttentionConfig, thresholds: torch.Tensor | None) -> None:
        self.config = config
        # Read once: a look at a GPU tensor in every layer would stall it.
        self._thresholds = None if thresholds is None else list(thresholds)
        self._dense = [is_dense(row) for row in self._thresholds or ()]
        self.reset()

    def reset(self) -> None:
        """Forget the observations and the number of calls that the random draws depend on."""
        self._kept: dict[int, torch.Tensor] = {}
        self._computable: dict[int, int] = {}
        self._sparse_calls = self._dense_prefills = self._decode_calls = 0
        self._calls: dict[int, int] = {}
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def attend(self, call: AttentionCall) -> torch.Tensor | None:
        """Return the sparse attention of one prefill, None where the method itself is dense."""
        config, q, k = self.config, call.q, call.k
        block_size = config.block_size
        n_blocks = -(-k.shape[2] // block_size)
        threshold = config.threshold if self._thresholds is None else self._thresholds[call.layer]
        dense = threshold >= 1 if self._thresholds is None else self._dense[call.layer]
        forced_all = n_blocks <= 2 and config.keep_sink and config.keep_recent
        if dense or forced_all or k.shape[2] < config.min_tokens:
            self._dense_prefills += 1
            self._observe(call, None)
            return None
        with self._timed(q.device):
            block_mask = xattention_mask(q, k, config, threshold=threshold, scale=call.scale)
        if config.control != "none":
            block_mask = self._control(block_mask, call)
        self._sparse_calls += 1
        self._observe(call, block_mask)
        return block_sparse_attention(
            q, k, call.v, block_mask, block_size=block_size, causal=True, scale=call.scale
        )

    def observe_decode(self) -> None:
        """Count a decode step, which the method leaves dense."""
        self._decode_calls += 1

    def stats(self) -> dict[str, Any]:
        """Return the observations since ``reset``; names as in ``repro.method.Patch``.

        ``density`` counts every prefill, the dense ones as 1; decode steps are in ``dense_calls``
        (and ``decode_calls``) and in no other number. ``selection_seconds`` leaves controls out.
        """
        per_head = [
            (self._kept[layer] / self._computable[layer]).tolist() for layer in sorted(self._kept)
        ]
        per_layer = [sum(heads) / len(heads) for heads in per_head]
        total = sum(self._computable.values())
        weighted = [
            density * self._computable[layer]
            for density, layer in zip(per_layer, sorted(self._kept), strict=True)
        ]
        if self._events:
            torch.cuda.synchronize()
            self._seconds += sum(start.elapsed_time(end) for start, end in self._events) / 1000
            self._events = []
        return {
            "density": sum(weighted) / total if total else None,
            "density_per_layer": per_layer,
            "density_per_head": per_head,
            "fallback_share": 0.0,
            "sparse_calls": self._sparse_calls,
            "dense_calls": self._dense_prefills + self._decode_calls,
            "decode_calls": self._decode_calls,
            "selection_seconds": self._seconds,
        }

    def _observe(self, call: AttentionCall, block_mask: torch.Tensor | None) -> None:
        """Add up kept blocks per head; no value is read back from the device."""
        batch, heads = call.q.shape[:2]
        computable = batch * _causal_count(call.q.shape[2], call.k.shape[2], self.config.block_size)
        if block_mask is None:
            kept = torch.full((heads,), computable, dtype=torch.int64, device=call.q.device)
        else:
            kept = block_mask.sum(dim=(0, 2, 3))
        before = self._kept.get(call.layer)
        self._kept[call.layer] = kept if before is None else before + kept
        self._computable[call.layer] = self._computable.get(call.layer, 0) + computable

    def _control(self, block_mask: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        """Replace the chosen blocks by as many of the configured control."""
        config, q, k = self.config, call.q, call.k
        grid = {
            "query_offset": k.shape[2] - q.shape[2],
            "block_size": config.block_size,
            "device": q.device,
        }
        shape = block_mask.shape[2:]
        computable = causal_blocks(*shape, **grid)
        forced = torch.zeros_like(computable)
        if config.keep_recent:
            forced |= diagonal_blocks(*shape, **grid)
        if config.keep_sink:
            forced[:, 0] = True
        limits = {"forced": forced, "computable": computable}
        if config.control == "oracle":
            return oracle_blocks(
                block_mask, q, k, **limits, scale=call.scale, block_size=config.block_size
            )
        number = self._calls.get(call.layer, 0)
        self._calls[call.layer] = number + 1
        seed = seed_of(config.draw, call.layer, number, *q.shape, *k.shape)
        return random_blocks(block_mask, **limits, seed=seed)

    @contextmanager
    def _timed(self, device: torch.device) -> Iterator[None]:
        """Add the block's time to the selection; on a GPU without waiting for it."""
        if device.type == "cuda":
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            pair[0].record()
            yield
            pair[1].record()
            self._events.append(pair)
            return
        started = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - started


def _causal_count(tokens_q: int, tokens_k: int, block_size: int) -> int:
    """Return the number of blocks that the causal rule leaves."""
    count_q, count_k = -(-tokens_q // block_size), -(-tokens_k // block_size)
    first = tokens_k - tokens_q
    return sum(
        min(count_k, (first + (row + 1) * block_size - 1) // block_size + 1)
        for row in range(count_q)
    )


@contextmanager
def patched(
    subject: Subject, config: XAttentionConfig, artifact: Artifact | None
) -> Iterator[XAttentionPatch]:
    """Patch the subject's model; see ``repro.methods.xattention.apply``."""
    from repro.attention_patch import patched_attention

    thresholds = _thresholds(subject, config, artifact) if config.per_head else None
    patch = XAttentionPatch(config, thresholds)
    with patched_attention(subject.model, patch.attend, observe_decode=patch.observe_decode):
        yield patch


def _thresholds(
    subject: Subject, config: XAttentionConfig, artifact: Artifact | None
) -> torch.Tensor:
    """Return the calibrated thresholds ``[layers, H]`` fp64 on the subject's device."""
    where = "xattention: per_head"
    if artifact is None or "threshold" not in artifact.tensors:
        raise MissingResource(f"{where}: thresholds must be calibrated first, got no artifact")
    table = artifact.tensors["threshold"]
    settings = subject.model.config.get_text_config()
    shape = (settings.num_hidden_layers, settings.num_attention_heads)
    if tuple(table.shape) != shape:
        raise MissingResource(
            f"{where}: thresholds must be [layers, heads] = {list(shape)}, got {list(table.shape)}"
        )
    for name in ("stride", "block_size", "pattern"):
        made_for = artifact.metadata.get(name, getattr(config, name))
        if made_for != getattr(config, name):
            raise MissingResource(
                f"{where}: thresholds must be calibrated for {name} {getattr(config, name)}, got "
                f"{made_for}"
            )
    return table.to(device=subject.device, dtype=torch.float64)
