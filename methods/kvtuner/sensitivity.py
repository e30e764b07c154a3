"""How much quantised keys and values change the attention of one layer, pair by pair.

Every layer is looked at by itself: its q, k and v come from the unquantised model, so that no error
of an earlier layer is in them. Source: arXiv:2502.04420, section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from repro.attention_patch import AttentionCall, patched_attention
from repro.kv_packed import Packing
from repro.methods.kvtuner.tables import BITS, Pair

#: Least denominator of a relative error.
GUARD = 1e-6


@dataclass(frozen=True)
class Sensitivity:
    """Errors of every layer, fp64 tensors.

    Attributes:
        k: ``[layers, n]``, mean ``|k - k'| / |k|``, by bits of keys.
        v: ``[layers, n]``, the same of values.
        a: ``[layers, n]``, mean ``|a - a'|`` over visible pairs of tokens, by bits of keys.
        o: ``[layers, n, n]``, mean ``|o - o'| / |o|``, by bits of keys and of values.
        pooled: ``[layers, n, n]``, the same with both absolute values summed over a head's channels
            first: channels near 0 do not decide alone.
        bits: The ``n`` numbers of bits.
    """

    k: torch.Tensor
    v: torch.Tensor
    a: torch.Tensor
    o: torch.Tensor
    pooled: torch.Tensor
    bits: tuple[int, ...] = BITS

    def of_layer(self, layer: int, *, pooled: bool = False) -> dict[Pair, float]:
        """Return pair -> error of the attention output of one layer."""
        errors = self.pooled if pooled else self.o
        return {
            (kb, vb): float(errors[layer, i, j])
            for i, kb in enumerate(self.bits)
            for j, vb in enumerate(self.bits)
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the errors by the names of the paper, fp32."""
        named = {"e_k": self.k, "e_v": self.v, "e_a": self.a, "e_o": self.o}
        return {name: x.float() for name, x in {**named, "e_o_pooled": self.pooled}.items()}


def layer_errors(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    packing: Packing,
    *,
    scale: float,
    bits: Sequence[int] = BITS,
) -> dict[str, torch.Tensor]:
    """Return ``k``, ``v``, ``a`` ``[n]``, ``o``, ``pooled`` ``[n, n]`` fp64 of one attention.

    Args:
        q: ``[1, H, T, D]``.
        k: ``[1, H_kv, T, D]``, rotated.
        v: ``[1, H_kv, T, D]``.
        packing: Mode, groups and residual; its bits are not looked at.
        scale: Softmax scale.
        bits: Numbers of bits to try, of keys and of values.
    """
    q, k, v = q.float(), k.float(), v.float()
    n, kv_heads, tokens = len(bits), k.shape[1], k.shape[2]
    read = [replace(packing, k_bits=b, v_bits=b).rounded(k, v) for b in bits]
    found = {
        "k": torch.tensor(
            [_mean_ratio((k - x).abs(), k.abs()) for x, _ in read], dtype=torch.float64
        ),
        "v": torch.tensor(
            [_mean_ratio((v - x).abs(), v.abs()) for _, x in read], dtype=torch.float64
        ),
        "a": torch.zeros(n, dtype=torch.float64),
        "o": torch.zeros(n, n, dtype=torch.float64),
        "pooled": torch.zeros(n, n, dtype=torch.float64),
    }
    hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1)
    pairs = q.shape[1] * tokens * (tokens + 1) / 2
    for head in range(kv_heads):  # one at a time: weights are tokens x tokens
        queries = q[0].unflatten(0, (kv_heads, -1))[head]  # [n_rep, T, D]

        def weights(keys: torch.Tensor, queries: torch.Tensor = queries) -> torch.Tensor:
            scores = (queries @ keys.mT * scale).masked_fill_(hidden, -torch.inf)
            return scores.softmax(-1)

        exact = weights(k[0, head])
        out = exact @ v[0, head]
        for i, (keys, _) in enumerate(read):
            rounded = weights(keys[0, head])
            found["a"][i] += (rounded - exact).abs_().sum(dtype=torch.float64).cpu() / pairs
            for j, (_, values) in enumerate(read):
                difference = (out - rounded @ values[0, head]).abs_()
                found["o"][i, j] += _mean_ratio(difference, out.abs()) / kv_heads
                sums = difference.sum(-1), out.abs().sum(-1)
                found["pooled"][i, j] += _mean_ratio(*sums) / kv_heads
    return found


def _mean_ratio(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x / y.clamp_min(GUARD)).mean(dtype=torch.float64))


def profile(
    model: Any,
    prompts: Sequence[torch.Tensor],
    packing: Packing,
    *,
    progress: Callable[[int], None] = lambda done: None,
) -> Sensitivity:
    """Return the errors of every layer of a model, the mean over prompts.

    Args:
        model: A decoder of transformers.
        prompts: Token ids ``[1, T]`` each, ``T > 1``.
        packing: Mode, groups and residual.
        progress: Gets the number of prompts done.
    """
    sums: dict[int, dict[str, torch.Tensor]] = {}

    def observe(call: AttentionCall) -> None:
        errors = layer_errors(call.q, call.k, call.v, packing, scale=call.scale)
        known = sums.setdefault(call.layer, {})
        for name, error in errors.items():
            known[name] = known.get(name, 0) + error / len(prompts)

    with torch.inference_mode(), patched_attention(model, observe):
        for done, ids in enumerate(prompts, start=1):
            model(ids.to(model.device), use_cache=False, logits_to_keep=1)
            progress(done)
    layers = [sums[layer] for layer in sorted(sums)]
    return Sensitivity(**{name: torch.stack([one[name] for one in layers]) for name in layers[0]})
