"""Train the retriever: staged, seeded, resumable; at most six hours of two CPU cores."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rich.progress
import torch
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from repro import zoo
from repro.training import Hook, Progress, TrainingConfig, train
from repro.zoo.retriever.card import CARD_ITEMS, CARD_LENGTHS, measure, write_card
from repro.zoo.retriever.examples import MIXTURE, Example, make_example
from repro.zoo.retriever.initial import Words, initial_model, rate_factors, retriever_config
from repro.zoo.retriever.tokenizer import build_tokenizer

VOCAB_SIZE = 1536
SEED = 20
# Weight of the mean loss on text that is no answer, beside the mean loss on answers.
TEXT_WEIGHT = 0.25
LOG_EVERY = 25
CHECKPOINT_EVERY = 50


@dataclass(frozen=True)
class Stage:
    """Some steps with the same lengths.

    Args:
        name: Folder of its checkpoints; part of the seed of its data.
        steps: Optimizer steps.
        batches: (sequences, tokens each, n): a micro-batch in every n-th step.
        learning_rate: Peak rate.
        decay_steps: Steps of linear fall to 0 at the end.
        even: Where several answers are right, ask for all of them alike, not for any of them: what
            is named last is then as sure as what is named first.
        prose: (sequences, tokens each) of text without answers in every step, whose mean loss
            counts as much as that on answers.
        parts: Only parameters whose name holds one of these learn; all of them if empty.
        clip_each: See ``TrainingConfig``.
    """

    name: str
    steps: int
    batches: tuple[tuple[int, int, int], ...]
    learning_rate: float
    decay_steps: int = 0
    even: bool = False
    prose: tuple[int, int] | None = None
    parts: tuple[str, ...] = ()
    clip_each: bool = False


# Long sequences come from the first step on: what trained on short ones alone lost its sharpness.
_LONG = ((4, 256, 1), (2, 512, 1), (1, 1024, 1), (1, 2048, 1), (2, 4096, 1))
STAGES = (
    Stage("first", 100, ((6, 256, 1), (2, 512, 1), (1, 1024, 1), (1, 2048, 2), (1, 4096, 2)), 4e-4),
    Stage("second", 300, _LONG, 4e-4, decay_steps=220),
    Stage("third", 200, _LONG, 4e-4, decay_steps=160, even=True),
    # Beside the steep losses of matching heads language is hardly learned: it gets steps of its own,
    # in what nothing else reads, and then all parts are fitted to one another.
    Stage(
        "language",
        150,
        ((2, 256, 1), (1, 512, 1), (1, 1024, 1), (1, 2048, 1), (1, 4096, 1)),
        1e-3,
        decay_steps=90,
        even=True,
        prose=(6, 512),
        parts=("layers.2.mlp", "lm_head"),
    ),
    Stage("whole", 120, _LONG, 4e-4, decay_steps=100, even=True, prose=(6, 512), clip_each=True),
    Stage("settle", 90, _LONG, 4e-4, decay_steps=80, even=True, prose=(3, 512), clip_each=True),
)
# The quick recipe's lower bar: the share of right answers over these tasks at 1024 tokens.
QUICK_TASKS = ("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1")
QUICK_BAR = 0.8
QUICK_STAGES = (
    Stage("quick", 80, ((8, 256, 1), (3, 512, 1), (1, 1024, 2), (1, 2048, 8)), 4e-4, 40),
)


@dataclass(frozen=True)
class Batch:
    """A micro-batch, padded on the right (causal attention never looks there)."""

    kinds: tuple[str, ...]
    ids: torch.Tensor  # int64 [B, T]
    is_answer: torch.Tensor  # bool [B, T]
    is_text: torch.Tensor  # bool [B, T]
    choices: list[tuple[int, int, list[int]]]  # row, position, tokens that are all right
    share: float  # of the tokens of its step


def make_batches(
    stage: Stage, step: int, tokenizer: PreTrainedTokenizerFast, *, seed: int
) -> Iterator[Batch]:
    """Yield the micro-batches of a step; they depend on the arguments alone."""
    due = [(count, length) for count, length, every in stage.batches if step % every == 0]
    whole = sum(count * length for count, length in due)
    if stage.prose is not None:
        count, length = stage.prose
        texts = [
            make_example(
                "prose",
                length=length,
                seed=f"{seed}/{stage.name}/{step}/prose/{row}",
                tokenizer=tokenizer,
            )
            for row in range(count)
        ]
        yield _collate(texts, share=1 / TEXT_WEIGHT)
    for part, (count, length) in enumerate(due):
        rng = random.Random(f"{seed}/{stage.name}/{step}/{part}")
        kinds = rng.choices(list(MIXTURE), weights=list(MIXTURE.values()), k=count)
        examples = []
        for row, kind in enumerate(kinds):
            # The hexadecimal needle haystacks do not fit in the shortest sequences.
            fitted = "niah_multikey_2" if kind == "niah_multikey_3" and length < 256 else kind
            examples.append(
                make_example(
                    fitted,
                    length=length,
                    seed=f"{seed}/{stage.name}/{step}/{part}/{row}",
                    tokenizer=tokenizer,
                )
            )
        yield _collate(examples, share=count * length / whole)


def _collate(examples: list[Example], *, share: float) -> Batch:
    longest = max(len(example.ids) for example in examples)
    ids = np.zeros((len(examples), longest), dtype=np.int64)
    is_answer = np.zeros((len(examples), longest), dtype=bool)
    is_text = np.zeros((len(examples), longest), dtype=bool)
    for row, example in enumerate(examples):
        n = len(example.ids)
        ids[row, :n] = example.ids
        is_answer[row, :n] = example.is_answer
        is_text[row, :n] = ~example.is_answer
    kinds = tuple(example.kind for example in examples)
    choices = [
        (row, position, tokens)
        for row, example in enumerate(examples)
        for position, tokens in example.choices.items()
    ]
    return Batch(
        kinds,
        torch.from_numpy(ids),
        torch.from_numpy(is_answer),
        torch.from_numpy(is_text),
        choices,
        share,
    )


class Meter:
    """Count, for each kind of example, how many answer tokens are predicted right."""

    def __init__(self) -> None:
        self.right: dict[str, int] = defaultdict(int)
        self.total: dict[str, int] = defaultdict(int)
        self.text_loss: list[float] = []
        self.tokens = 0
        self.start = time.monotonic()

    def take(self) -> dict[str, float]:
        """Return seconds, tokens, shares and loss on text since the last call."""
        now = time.monotonic()
        spent = {"seconds": round(now - self.start, 1), "tokens": self.tokens}
        self.start, self.tokens = now, 0
        shares = {k: round(self.right[k] / n, 4) for k, n in sorted(self.total.items()) if n}
        text_loss = float(np.mean(self.text_loss)) if self.text_loss else float("nan")
        self.right.clear()
        self.total.clear()
        self.text_loss.clear()
        return {**spent, **shares, "text_loss": round(text_loss, 4)}


def make_loss(
    device: torch.device, meter: Meter, *, even: bool
) -> Callable[[torch.nn.Module, Batch], torch.Tensor]:
    """Return the loss: mean over answers plus a little of the mean over all other text.

    Args:
        device: Where the model is.
        meter: Counts right answers.
        even: See ``Stage``.
    """

    def loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        ids = batch.ids.to(device)
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        target = ids[:, 1:]
        nats = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), target.flatten(), reduction="none"
        ).view_as(target)
        is_answer = batch.is_answer[:, 1:].to(device)
        is_text = batch.is_text[:, 1:].to(device)
        is_right = logits.argmax(-1) == target
        for row, position, tokens in batch.choices:
            # Any answer still to be named is right: 0 where they have all probability together
            # or, if even, where each has the same share of it.
            scores = logits[row, position - 1]
            right = scores[tokens]
            joint = right.mean() + math.log(len(tokens)) if even else right.logsumexp(0)
            nats[row, position - 1] = scores.logsumexp(0) - joint
            is_right[row, position - 1] = scores.argmax().item() in tokens
        hits_of = (is_right & is_answer).sum(1).tolist()
        for kind, hits, n in zip(batch.kinds, hits_of, is_answer.sum(1).tolist(), strict=True):
            meter.right[kind] += hits
            meter.total[kind] += n
        meter.tokens += batch.is_text.numel()
        answer = (nats * is_answer).sum() / is_answer.sum().clamp(min=1)
        text = (nats * is_text).sum() / is_text.sum().clamp(min=1)
        meter.text_loss.append(text.item())
        return batch.share * (answer + TEXT_WEIGHT * text)

    return loss


def train_retriever(
    folder: Path,
    stages: tuple[Stage, ...],
    *,
    resume: bool,
    device: torch.device,
    say: Callable[[str], None],
    advance: Callable[[int], None] = lambda steps: None,
    seed: int = SEED,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Run all stages and return the trained model; checkpoints and ``log.jsonl`` go to ``folder``.

    Args:
        folder: Gets one folder of checkpoints per stage.
        stages: What to run, in order.
        resume: Go on from the checkpoints in ``folder``.
        device: Where to train.
        say: Receives a line of progress now and then.
        advance: Receives the steps done so far in all stages.
        seed: Fixes initial weights and data.
    """
    tokenizer = build_tokenizer()
    config = retriever_config(VOCAB_SIZE, end=tokenizer.eos_token_id, pad=tokenizer.pad_token_id)
    model: Any = initial_model(config, Words.of(tokenizer), seed=seed)
    model.to(device)
    folder.mkdir(parents=True, exist_ok=True)
    before = 0
    for stage in stages:
        meter = Meter()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not stage.parts or any(p in name for p in stage.parts))
        train(
            model,
            functools.partial(make_batches, stage, tokenizer=tokenizer, seed=seed),
            make_loss(device, meter, even=stage.even),
            TrainingConfig(
                steps=stage.steps,
                learning_rate=stage.learning_rate,
                decay_steps=stage.decay_steps,
                checkpoint_every=CHECKPOINT_EVERY,
                clip_each=stage.clip_each,
            ),
            folder=folder / stage.name,
            resume=resume,
            hooks=(_logger(folder, stage, meter, say, before, advance),),
            rate_factors=rate_factors(),
        )
        before += stage.steps
    return model.requires_grad_(True).eval(), tokenizer


def _logger(
    folder: Path,
    stage: Stage,
    meter: Meter,
    say: Callable[[str], None],
    before: int,
    advance: Callable[[int], None],
) -> Hook:
    def log(progress: Progress) -> None:
        advance(before + progress.step)
        if progress.step % LOG_EVERY and progress.step != stage.steps:
            return
        row = {
            "stage": stage.name,
            "step": progress.step,
            "loss": round(progress.loss, 4),
            "norm": round(progress.gradient_norm, 3),
            "rate": progress.learning_rate,
            **meter.take(),
        }
        with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        say(f"{stage.name} {progress.step}/{stage.steps}: loss {progress.loss:.3f}")

    return log


def run(
    folder: Path,
    *,
    quick: bool = False,
    resume: bool = True,
    device: str = "auto",
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Train, export and measure the retriever; return the folder of the exported model.

    Args:
        folder: Gets checkpoints, log and, in ``model``, the exported model with its card.
        quick: Run ``QUICK_STAGES`` and measure few items.
        resume: Go on from what ``folder`` holds.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:<n>``.
        progress: Receives lines; by default a Rich bar is shown.
    """
    chosen = "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.device(chosen if device == "auto" else device)
    stages = QUICK_STAGES if quick else STAGES
    with contextlib.ExitStack() as stack:
        advance: Callable[[int], None] = lambda steps: None
        say = progress
        if say is None:
            bar = stack.enter_context(rich.progress.Progress())
            task = bar.add_task("retriever", total=sum(stage.steps for stage in stages))
            advance = lambda steps: bar.update(task, completed=steps)
            say = lambda line: bar.update(task, description=line)
        model, tokenizer = train_retriever(
            folder, stages, resume=resume, device=place, say=say, advance=advance
        )
        target = folder / "model"
        export(model, tokenizer, target)
        lengths, count = ((1024,), 5) if quick else (CARD_LENGTHS, CARD_ITEMS)
        measure(target, folder, lengths=lengths, count=count, device=place, say=say)
    write_card(target, folder)
    return target


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, target: Path) -> None:
    """Write weights in bfloat16, tokenizer, configurations and checksums to ``target``."""
    target.mkdir(parents=True, exist_ok=True)
    copy: Any = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16)
    copy.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    copy.save_pretrained(target)
    tokenizer.save_pretrained(target)
    for path in target.glob("*.safetensors"):
        path.chmod(0o644)
    zoo.write_checksums(target)


if __name__ == "__main__":
    torch.set_num_threads(2)
    run(Path("runs/zoo/retriever"), progress=functools.partial(print, flush=True))
