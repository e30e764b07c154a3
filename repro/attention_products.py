"""Attention of few queries to many keys on the CPU: two matrix products around an exponential."""

from __future__ import annotations

import functools
import math

import torch

#: Most keys of a row whose scores are held at once: 2 MiB in bf16 for 128 queries.
_SCORE_KEYS = 8192
#: Keys from which a query's scores are guessed, at least; every 16th of a shorter row's ...
_PROBES = 128
#: ... and where its log-sum-exp is so far off, the guess missed the keys that matter.
_FAR = 4.0


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, *, diagonal: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to all keys: output ``[g, Tq, D]`` in the dtype of ``q`` and fp32 lse ``[g, Tq]``.

    The product of q and k is rounded to their dtype, so what is rounded is the score less a
    reference: the mean score under the query's own weights, guessed from some keys. The scores that
    matter are near 0 then, and so are their errors. A row whose guess turns out to be far off is
    done again with scores in fp32. With ``diagonal``, query ``i`` sees the last ``Tq`` keys up to
    the ``i``-th of them.
    """
    hidden = _hidden(q.shape[1]) if diagonal else None
    reference, guess = _guess(q, k, scale, hidden)
    outs, totals = [], []
    size = max(_SCORE_KEYS, q.shape[1])
    # From the end: the first piece holds the diagonal whole.
    for end in range(k.shape[1], 0, -size):
        piece = slice(max(0, end - size), end)
        weights = torch.baddbmm(-reference, q, k[:, piece].transpose(1, 2), alpha=scale)
        if hidden is not None and end == k.shape[1]:
            weights[..., -q.shape[1] :] += hidden.to(q.dtype)
        weights.exp_()
        outs.append(torch.bmm(weights, v[:, piece]).float())
        totals.append(weights.float().sum(-1, keepdim=True))
    total = functools.reduce(torch.add, totals)
    lse = total.log() + reference.float()
    out = (functools.reduce(torch.add, outs) / total).to(q.dtype)
    far = ~((lse - guess).abs() < _FAR).flatten(1).all(dim=1)  # NaN is far, too
    lse = lse[..., 0]
    if bool(far.any()):
        out[far], lse[far] = _in_fp32(q[far], k[far], v[far], scale, hidden)
    return out, lse


def _guess(
    q: torch.Tensor, k: torch.Tensor, scale: float, hidden: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Guess each query's mean score, in the dtype of ``q``, and lse in fp32, ``[g, Tq, 1]`` both.

    The first key takes part and is visible to every query.
    """
    step = max(16, k.shape[1] // _PROBES)
    scores = _scores(q.float(), k[:, ::step].float(), scale)
    if hidden is not None:
        first = k.shape[1] - q.shape[1]
        scores[..., -(-first // step) :] += hidden[:, -first % step :: step]
    weights = scores.softmax(-1)
    # weight = exp(score - lse); the largest one cannot underflow.
    lse = scores.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log() + math.log(step)
    return weights.mul_(scores).sum(-1, keepdim=True).to(q.dtype), lse


def _in_fp32(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, hidden: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what ``attend`` does with unrounded scores, in about twice the time."""
    scores = _scores(q.float(), k.float(), scale)
    if hidden is not None:
        scores[..., -q.shape[1] :] += hidden
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp_().to(v.dtype)
    return torch.bmm(weights, v), lse


def _scores(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.bmm(q * scale, k.transpose(1, 2))


@functools.cache
def _hidden(size: int) -> torch.Tensor:
    """Return ``[size, size]`` fp32: where a key comes after its query, what no score outweighs."""
    with torch.inference_mode(False):
        return torch.full((size, size), -1e30).triu_(1)


@functools.cache
def are_faster(dtype: torch.dtype) -> bool:
    """Tell whether the two products outrun torch's flash kernel for few queries here.

    That kernel cuts them into 32 rows; whole products of 128 rows are 1.3 (D = 64) to 1.7 times
    (D = 128) as fast on AVX-512 with bf16, and those of 4 rows about three times. With AMX the
    kernel packs its tiles itself.
    """
    amx = torch.cpu._is_amx_tile_supported()
    return dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported() and not amx
