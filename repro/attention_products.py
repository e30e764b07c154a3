"""Attention of few queries to many keys on the CPU: matrix products around an exponential."""

from __future__ import annotations

import functools

import torch

from repro import serial_threads

#: Most keys of a row whose scores are held at once: 4 MiB in bf16 for 128 queries.
_SCORE_KEYS = 16384
#: Largest score of a query that may be rounded as it is.
_SMALL = 6.0


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, *, diagonal: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to all keys: output ``[g, Tq, D]`` in the dtype of ``q`` and fp32 lse ``[g, Tq]``.

    A product is rounded to the dtype of its operands, and an error of a score is one of the weight's
    logarithm. Where scores are large, they are therefore computed twice: first to find the largest of
    each query, then less that one, so that the scores that matter are near 0 and so are their errors.
    With ``diagonal``, query ``i`` sees the last ``Tq`` keys up to the ``i``-th of them.
    """
    hidden = _hidden(q.shape[1]).to(q.dtype) if diagonal else None
    size = max(_SCORE_KEYS, q.shape[1])
    # From the end: the first piece holds the diagonal whole, and a key that every query sees.
    ends = range(k.shape[1], 0, -size)
    found = [
        _piece(q, k[:, begin:end], v[:, begin:end], scale, hidden if end == k.shape[1] else None)
        for begin, end in ((max(0, end - size), end) for end in ends)
    ]
    out, total, reference = found[0]
    for other, its_total, its_reference in found[1:]:
        largest = torch.maximum(reference, its_reference)
        share, its_share = (reference - largest).exp(), (its_reference - largest).exp()
        out = out * share + other * its_share
        total = total * share + its_total * its_share
        reference = largest
    return (out / total).to(q.dtype), (total.log() + reference)[..., 0]


def _piece(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    hidden: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return sums of weighted values ``[g, Tq, D]``, of weights and their reference, fp32.

    A weight is ``exp(score - reference)``; sums of weights and references are ``[g, Tq, 1]``.
    """
    keys = k.transpose(1, 2)
    reference = q.new_zeros(q.shape[0], q.shape[1], 1)
    shape = (q.shape[0], q.shape[1], k.shape[1])
    weights = serial_threads.scratch("attention weights", shape, q.dtype)
    _scores(reference, q, keys, scale, hidden, weights)
    largest = weights.amax(-1, keepdim=True)
    large = (largest.abs() > _SMALL).flatten(1).any(dim=1)
    if bool(large.any()):
        reference = torch.where(large[:, None, None], largest, reference)
        _scores(reference, q, keys, scale, hidden, weights)
    weights.exp_()
    total = weights.sum(-1, keepdim=True, dtype=torch.float32)
    return torch.bmm(weights, v).float(), total, reference.float()


def _scores(
    reference: torch.Tensor,
    q: torch.Tensor,
    keys: torch.Tensor,
    scale: float,
    hidden: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Write the scores ``[g, Tq, Tk]`` less the references, rounded once."""
    torch.baddbmm(-reference, q, keys, alpha=scale, out=out)
    if hidden is not None:
        out[..., -hidden.shape[1] :] += hidden


@functools.cache
def _hidden(size: int) -> torch.Tensor:
    """Return ``[size, size]`` fp32: where a key comes after its query, what no score outweighs."""
    with torch.inference_mode(False):
        return torch.full((size, size), -1e30).triu_(1)


@functools.cache
def are_faster(dtype: torch.dtype) -> bool:
    """Tell whether the products outrun torch's flash kernel for few queries here.

    That kernel cuts them into 32 rows; whole products of 128 rows are faster on AVX-512 with bf16
    (no slower where scores are large and computed twice), and those of 4 rows much. With AMX the
    kernel packs its tiles itself.
    """
    amx = torch.cpu._is_amx_tile_supported()
    return dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported() and not amx
