"""Laws that every KV-cache method keeps; each returns what breaks it, nothing if it holds."""

from __future__ import annotations

from typing import Any

import torch

from repro.errors import UnsupportedCombination
from repro.subjects import Subject


def prompts(batch: int, length: int, seed: int = 0, vocabulary: int = 512) -> torch.Tensor:
    """Return random token ids ``[B, T]`` int64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (batch, length), generator=generator)


@torch.no_grad()
def generate(
    subject: Subject,
    ids: torch.Tensor,
    *,
    cache: Any = None,
    mask: torch.Tensor | None = None,
    new_tokens: int = 12,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Continue greedily; return the new ids ``[B, n]`` and their logits ``[B, n, V]``."""
    out = subject.model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **({} if cache is None else {"past_key_values": cache}),
    )
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, dim=1)


@torch.no_grad()
def stepped(
    subject: Subject, ids: torch.Tensor, cache: Any, *, prompt: int, chunk: int | None = None
) -> torch.Tensor:
    """Return the logits ``[B, T, V]`` of a prompt (in chunks) and then token after token."""
    chunk = chunk or prompt
    ends = [*range(chunk, prompt, chunk), prompt, *range(prompt + 1, ids.shape[1] + 1)]
    begin, parts = 0, []
    for end in ends:
        parts.append(subject.model(ids[:, begin:end], past_key_values=cache).logits)
        begin = end
    return torch.cat(parts, dim=1)


def check_equals_dense(method: Any, subject: Subject, config: Any, ids: torch.Tensor) -> list[str]:
    """A budget that covers the input changes nothing."""
    expected_ids, expected = generate(subject, ids)
    with method.apply(subject, config, None) as patch:
        found_ids, found = generate(subject, ids, cache=patch.make_cache())
    faults = [] if torch.equal(found_ids, expected_ids) else ["other tokens than dense"]
    return faults + _differences("logits against dense", found, expected)


def check_batch_equals_singles(
    method: Any, subject: Subject, config: Any, lengths: tuple[int, ...] = (40, 23, 1)
) -> list[str]:
    """A left-padded prompt gives in a batch what it gives alone."""
    longest = max(lengths)
    ids = prompts(len(lengths), longest, seed=1)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : longest - length] = 0
    faults = []
    with method.apply(subject, config, None) as patch:
        _, together = generate(subject, ids, mask=mask, cache=patch.make_cache())
        for row, length in enumerate(lengths):
            alone = generate(subject, ids[row : row + 1, -length:], cache=patch.make_cache())[1]
            faults += _differences(f"row {row}", together[row : row + 1], alone)
    return faults


def check_chunks_equal_whole(method: Any, subject: Subject, config: Any) -> list[str]:
    """A prompt that comes in chunks gives what it gives at once, in decode too."""
    ids, faults = prompts(1, 56, seed=2), []
    with method.apply(subject, config, None) as patch:
        whole = stepped(subject, ids, patch.make_cache(), prompt=44)
        for chunk in (7, 32):
            cache = patch.make_cache(prompt_length=44)
            parts = stepped(subject, ids, cache, prompt=44, chunk=chunk)
            faults += _differences(f"chunks of {chunk}", parts, whole)
    return faults


@torch.no_grad()
def check_padded_chunks_equal_singles(
    method: Any, subject: Subject, config: Any, lengths: tuple[int, ...] = (44, 23, 2)
) -> list[str]:
    """A left-padded batch whose prompt comes in chunks gives what each prompt gives at once."""
    longest, steps, faults = max(lengths), 6, []
    ids = prompts(len(lengths), longest + steps, seed=4)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : longest - length] = 0
    places = (mask.cumsum(dim=1) - 1).clamp_min(0)
    ends = [*range(13, longest, 13), *range(longest, longest + steps + 1)]
    with method.apply(subject, config, None) as patch:
        cache, begin, parts = patch.make_cache(prompt_length=longest), 0, []
        for end in ends:
            out = subject.model(
                ids[:, begin:end],
                attention_mask=mask[:, :end],
                position_ids=places[:, begin:end],
                past_key_values=cache,
            )
            parts.append(out.logits)
            begin = end
        together = torch.cat(parts, dim=1)
        for row, length in enumerate(lengths):
            first = longest - length
            alone = stepped(subject, ids[row : row + 1, first:], patch.make_cache(), prompt=length)
            faults += _differences(f"row {row}", together[row : row + 1, first:], alone)
    return faults


@torch.no_grad()
def check_refuses_another_batch(method: Any, subject: Subject, config: Any) -> list[str]:
    """A cache of two sequences refuses one or three, says so, and goes on with its own."""
    ids, faults = prompts(3, 44, seed=5), []
    with method.apply(subject, config, None) as patch:
        expected = stepped(subject, ids[:2], patch.make_cache(), prompt=40)
        for prompt_length, taken in ((None, 40), (40, 30)):  # after the prompt, and within it
            cache = patch.make_cache(prompt_length=prompt_length)
            subject.model(ids[:2, :taken], past_key_values=cache)
            for batch in (1, 3):
                try:
                    subject.model(ids[:batch, taken : taken + 1], past_key_values=cache)
                    faults.append(f"took {batch} sequences after {taken} tokens")
                except UnsupportedCombination as error:
                    if f"must be the 2 sequences that the cache holds, got {batch};" in str(error):
                        continue
                    faults.append(f"told of {batch} sequences: {error}")
            rest = [] if taken == 40 else [subject.model(ids[:2, 30:40], past_key_values=cache)]
            rest += [
                subject.model(ids[:2, place : place + 1], past_key_values=cache)
                for place in range(40, 44)
            ]
            found = torch.cat([out.logits for out in rest], dim=1)
            faults += _differences(f"after {taken} tokens", found, expected[:, taken:])
    return faults


def check_generate_equals_steps(method: Any, subject: Subject, config: Any) -> list[str]:
    """``generate`` gives what feeding its tokens one by one gives."""
    ids = prompts(1, 40, seed=3)
    with method.apply(subject, config, None) as patch:
        new, logits = generate(subject, ids, cache=patch.make_cache())
        given = torch.cat([ids, new[:, :-1]], dim=1)
        steps = stepped(subject, given, patch.make_cache(), prompt=40)
    return _differences("steps against generate", steps[:, 39:], logits)


def check_quality_is_lost_in_decode_alone(method: Any, subject: Subject, config: Any) -> list[str]:
    """A prompt that comes at once is prefilled densely; with a tight budget decode is not dense."""
    ids = prompts(1, 56, seed=2)
    with torch.no_grad():
        expected = subject.model(ids).logits
    with method.apply(subject, config, None) as patch:
        found = stepped(subject, ids, patch.make_cache(), prompt=44)
    faults = _differences("prefill against dense", found[:, :44], expected[:, :44])
    far = float((found[:, 44:] - expected[:, 44:]).abs().max())
    return faults + ([] if far > 0.01 else [f"decode is within {far} of dense: nothing was tested"])


@torch.no_grad()
def check_undoes_itself(method: Any, subject: Subject, config: Any) -> list[str]:
    """The model is bit-identical afterwards, also after an exception."""
    ids = prompts(2, 20)
    before, settings = subject.model(ids).logits, subject.model.config.to_dict()
    faults = []
    for fails in (False, True):
        try:
            with method.apply(subject, config, None) as patch:
                subject.model(ids, past_key_values=patch.make_cache())
                if fails:
                    raise KeyError("on purpose")
        except KeyError:
            pass
        when = "after an exception" if fails else "afterwards"
        if not torch.equal(subject.model(ids).logits, before):
            faults.append(f"other logits {when}")
        if subject.model.config.to_dict() != settings:
            faults.append(f"another configuration {when}")
    return faults


def _differences(what: str, found: torch.Tensor, expected: torch.Tensor) -> list[str]:
    """Return what differs by more than rounding in fp32."""
    try:
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    except AssertionError as error:
        return [f"{what}: {error}"]
    return []


LAWS = (
    check_batch_equals_singles,
    check_chunks_equal_whole,
    check_padded_chunks_equal_singles,
    check_refuses_another_batch,
    check_generate_equals_steps,
    check_undoes_itself,
)
