"""Run a seeded, resumable training: optimizer, schedule, clipping, checkpoints, hooks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long and how fast to train.

    Args:
        steps: Optimizer steps in all.
        learning_rate: Peak rate.
        warmup_steps: Steps of linear rise from 0.
        decay_steps: Steps of linear fall to 0 at the end; between the two the rate is constant.
        floor: Least share of the peak rate, at both ends.
        weight_decay: Decoupled decay of matrices; vectors are not decayed.
        betas: Averaging factors of Adam.
        clip_norm: Largest norm of the gradient.
        clip_each: Clip the gradient of each parameter for itself: a few with steep losses else take
            the step from all others.
        checkpoint_every: Steps between checkpoints; 0 keeps only the last.
    """

    steps: int
    learning_rate: float
    warmup_steps: int = 50
    decay_steps: int = 0
    floor: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.98)
    clip_norm: float = 1.0
    clip_each: bool = False
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"TrainingConfig: steps must be at least 1, got {self.steps}")
        if self.learning_rate <= 0:
            raise ValueError(
                f"TrainingConfig: learning_rate must be above 0, got {self.learning_rate}"
            )

    def rate(self, step: int) -> float:
        """Return the learning rate of ``step`` (0-based)."""
        rise = min(1.0, (step + 1) / max(self.warmup_steps, 1))
        fall = min(1.0, (self.steps - step) / max(self.decay_steps, 1))
        return self.learning_rate * max(self.floor, rise * fall)


@dataclass(frozen=True)
class Progress:
    """What a hook sees after a step."""

    step: int  # steps done
    loss: float
    gradient_norm: float
    learning_rate: float
    model: torch.nn.Module


Hook = Callable[[Progress], None]


def train(
    model: torch.nn.Module,
    batches: Callable[[int], Iterable[Any]],
    loss: Callable[[torch.nn.Module, Any], torch.Tensor],
    config: TrainingConfig,
    *,
    folder: Path | None = None,
    resume: bool = True,
    hooks: Sequence[Hook] = (),
    wrap_optimizer: Callable[[torch.optim.Optimizer], torch.optim.Optimizer] | None = None,
    rate_factors: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Train ``model`` in place; interrupted and resumed, it ends with the same bits.

    Args:
        model: Trained in place, on its own device.
        batches: The micro-batches of a step, a function of the step number alone.
        loss: The loss of one micro-batch; those of a step are added up.
        config: Length, rates and clipping.
        folder: Where the checkpoint is kept; nothing is written if None.
        resume: Go on from the checkpoint in ``folder`` if there is one.
        hooks: Called after each step.
        wrap_optimizer: Lets a method put its own optimizer around AdamW.
        rate_factors: Name of a parameter -> factors in [0, 1] on the rate of its elements, of a
            shape that broadcasts to it; 1 where a name is absent.
    """
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(
        _groups(model, config.weight_decay), lr=config.learning_rate, betas=config.betas
    )
    if wrap_optimizer is not None:
        optimizer = wrap_optimizer(optimizer)
    first = 0
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        if resume and (folder / CHECKPOINT).exists():
            first = _load(folder / CHECKPOINT, model, optimizer)
    parameters = dict(model.named_parameters())
    factors = {name: f.to(parameters[name].device) for name, f in (rate_factors or {}).items()}
    model.train()
    for step in range(first, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.rate(step)
        total = 0.0
        for batch in batches(step):
            value = loss(model, batch)
            value.backward()
            total += value.item()
        norm = _clip(model, config)
        if not math.isfinite(total) or not math.isfinite(norm.item()):
            raise RuntimeError(f"train: loss must stay finite, got {total} at step {step}")
        before = {name: parameters[name].detach().clone() for name in factors}
        optimizer.step()
        with torch.no_grad():
            for name, value in before.items():
                parameters[name].copy_(torch.lerp(value, parameters[name], factors[name]))
        optimizer.zero_grad(set_to_none=True)
        done = step + 1
        due = config.checkpoint_every and done % config.checkpoint_every == 0
        if folder is not None and (due or done == config.steps):
            _save(folder / CHECKPOINT, model, optimizer, done)
        for hook in hooks:
            hook(Progress(done, total, norm.item(), config.rate(step), model))


def _clip(model: torch.nn.Module, config: TrainingConfig) -> torch.Tensor:
    """Clip the gradients in place and return the norm of all of them before."""
    if not config.clip_each:
        return torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
    norms = [
        torch.nn.utils.clip_grad_norm_([parameter], config.clip_norm)
        for parameter in model.parameters()
        if parameter.grad is not None
    ]
    return torch.stack(norms).norm()


def _groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def _save(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{name}": value for name, value in state.items()}
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"step": str(step)})
    partial.replace(path)


def _load(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    states: dict[int, dict[str, torch.Tensor]] = {}
    weights = {}
    with safe_open(path, framework="pt") as file:
        step = int(file.metadata()["step"])
        for name in file.keys():  # noqa: SIM118 - not a dictionary
            kind, _, rest = name.partition("/")
            if kind == "model":
                weights[rest] = file.get_tensor(name)
            else:
                index, _, part = rest.partition("/")
                states.setdefault(int(index), {})[part] = file.get_tensor(name)
    model.load_state_dict(weights)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": states, "param_groups": groups})
    return step
