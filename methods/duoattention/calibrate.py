"""Training of the gates: a student whose heads stream by share, against the dense model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from repro.attention_patch import (
    check_supported,
    dense_causal,
    registered_attention,
    switched_attention,
)
from repro.errors import BadInput, Fault, UnsupportedCombination
from repro.figures import curve, heatmap
from repro.kernels.block_sparse_attention import block_sparse_attention
from repro.kv_cache import make_mask
from repro.method import Artifact
from repro.methods.duoattention import TRAINING, DuoAttentionConfig
from repro.methods.duoattention.documents import Document, training_document
from repro.methods.duoattention.heads import heads_shape
from repro.training import TrainingConfig, train

if TYPE_CHECKING:
    from repro.subjects import Subject

#: Tokens of a block of the student's mask.
BLOCK_SIZE = 128
#: Steps that a kill may cost.
CHECKPOINT_EVERY = 10


class Gates(torch.nn.Module):
    """The gates, and what became of every step so far.

    Attributes:
        values: ``[layers, H_kv]`` fp32, all heads on in the beginning.
        losses: ``[steps]`` fp32, distance and L1 term; NaN where a step has not been made.
        distances: ``[steps]`` fp32, of the hidden states alone.
    """

    def __init__(self, shape: tuple[int, int], steps: int) -> None:
        super().__init__()
        self.values = torch.nn.Parameter(torch.ones(shape))
        self.register_buffer("losses", torch.full((steps,), torch.nan))
        self.register_buffer("distances", torch.full((steps,), torch.nan))


def train_gates(
    subject: Subject,
    config: DuoAttentionConfig,
    *,
    progress: Callable[[int, int], None],
    workdir: Path | None = None,
) -> Artifact:
    """Train the gates of a subject; see ``calibrate``.

    Raises:
        UnsupportedCombination: If the subject has no tokenizer.
        BadInput: If the documents are longer than its positions.
    """
    if subject.tokenizer is None:
        raise UnsupportedCombination(f"duoattention: calibrate: {subject.name} has no tokenizer")
    positions = subject.info.max_length
    if config.longest > positions:
        rule = f"at most the {positions} positions of {subject.name}"
        raise BadInput(Fault("duoattention: calibrate", "longest", rule, config.longest))
    gates = Gates(heads_shape(subject.model), config.steps).to(subject.device)

    def documents(step: int) -> Iterator[tuple[int, Document]]:
        yield step, training_document(subject.tokenizer, config, step)

    def loss(module: torch.nn.Module, batch: tuple[int, Document]) -> torch.Tensor:
        step, document = batch
        with torch.no_grad():
            gates.values.clamp_(0, 1)
        ids = document.ids[None].to(subject.device)
        distance = student_distance(subject.model, ids, document.labels)
        total = distance + config.l1_weight * gates.values.abs().mean()
        gates.distances[step], gates.losses[step] = distance.detach(), total.detach()
        return total

    progress(0, config.steps)
    with distillation(subject.model, gates.values, config):
        train(
            gates,
            documents,
            loss,
            schedule(config),
            folder=workdir,
            hooks=[lambda done: progress(done.step, config.steps)],
        )
    settings: dict[str, Any] = {name: getattr(config, name) for name in TRAINING}
    final = gates.values.detach().clamp(0, 1).cpu()
    tensors = {"gates": final, "losses": gates.losses.cpu(), "distances": gates.distances.cpu()}
    shown = [(step + 1, float(loss)) for step, loss in enumerate(tensors["losses"])]
    figures = [
        heatmap(
            "Gates: 1 is a retrieval head",
            final.tolist(),
            row="layer",
            column="KV head",
            label="gate",
            limits=(0.0, 1.0),
        ),
        curve("Loss of the gates", {"loss": shown}, x="step", y="loss", joined=["loss"]),
    ]
    metadata = settings | {"mean": round(float(final.mean()), 6), "figures": figures}
    return Artifact(tensors=tensors, metadata=metadata)


def schedule(config: DuoAttentionConfig) -> TrainingConfig:
    """Return the paper's training: the rate rises and falls over a fifth each, from and to a tenth.

    Source: arXiv:2410.10819, section 3.1, and the released code.
    """
    fifth = round(config.steps / 5)
    return TrainingConfig(
        steps=config.steps,
        learning_rate=config.learning_rate,
        warmup_steps=fifth,
        decay_steps=fifth,
        floor=0.1,
        betas=(0.9, 0.999),
        clip_norm=math.inf,
        checkpoint_every=CHECKPOINT_EVERY,
    )


def student_distance(model: Any, ids: torch.Tensor, labels: int) -> torch.Tensor:
    """Return the mean over label tokens of the mean squared difference of the last hidden states.

    To be called inside ``distillation``.

    Args:
        model: The patched model.
        ids: ``[B, T]`` int64 without padding.
        labels: First place of the labels; all that follow count.
    """
    hidden = model.get_decoder()(input_ids=ids.repeat(2, 1), use_cache=False).last_hidden_state
    teacher, student = hidden[:, labels:].float().chunk(2)
    return (teacher.detach() - student).square().mean()


@contextmanager
def distillation(model: Any, gates: torch.Tensor, config: DuoAttentionConfig) -> Iterator[None]:
    """Run a model on batches of two halves inside the block: teacher and student of the same texts.

    The teacher's half is dense. Of each KV head the student's half gets ``gate`` times the teacher's
    attention output and ``1 - gate`` times its own streaming attention, as the released code does;
    its own dense attention is never computed. Only ``gates`` get gradients.

    Args:
        model: A decoder of transformers.
        gates: ``[layers, H_kv]``, clamped to [0, 1] here.
        config: Sizes of the student's window.
    """

    def forward(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        check_supported(module, dropout, options)
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        (q, student_q), (k, student_k), (v, student_v) = (x.chunk(2) for x in (query, key, value))
        with torch.no_grad():
            dense = dense_causal(q, k, v, scale)
        streaming = block_sparse_attention(
            student_q,
            student_k,
            student_v,
            lambda_mask(q.shape[2], config, device=q.device),
            block_size=BLOCK_SIZE,
            scale=scale,
        )
        gate = gates[int(module.layer_idx)].clamp(0, 1)  # type: ignore[arg-type]
        gate = gate.repeat_interleave(q.shape[1] // k.shape[1])[None, :, None, None]
        mixed = gate * dense.float() + (1 - gate) * streaming.float()
        return torch.cat([dense, mixed.to(dense.dtype)]).transpose(1, 2), None

    wanted = [(weight, weight.requires_grad) for weight in model.parameters()]
    name = f"repro_duoattention_{id(gates)}"
    with registered_attention(name, forward, make_mask), switched_attention(model, name):
        try:
            for weight, _ in wanted:
                weight.requires_grad_(False)
            with torch.enable_grad():
                yield
        finally:
            for weight, before in wanted:
                weight.requires_grad_(before)


def lambda_mask(
    tokens: int, config: DuoAttentionConfig, *, device: torch.device | None = None
) -> torch.Tensor:
    """Return the blocks that the student sees, ``[1, 1, N, N]`` bool: sinks and latest ones."""
    blocks = torch.arange(-(-tokens // BLOCK_SIZE), device=device)
    sinks, recent = (
        -(-size // BLOCK_SIZE) for size in (config.train_sink_size, config.train_recent_size)
    )
    behind = blocks[:, None] - blocks
    return ((behind >= 0) & ((blocks < sinks) | (behind < recent)))[None, None]
