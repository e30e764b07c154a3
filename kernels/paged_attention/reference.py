"""The definition of paged decode attention: one sequence and KV head at a time, fp32."""

from __future__ import annotations

import torch

from repro.kernels.paged_attention.pages import Pages, dequantize


def paged_attention_reference(
    q: torch.Tensor,
    k: Pages,
    v: Pages,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    *,
    selected: torch.Tensor | None = None,
    scale: float | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to the tokens of the selected pages; see ``paged_attention``.

    Args:
        q: ``[n_seq, H, D]``.
        k: Pages of keys.
        v: Pages of values.
        page_table: ``[n_seq, n_pages_max]`` int32.
        lengths: ``[n_seq]`` int32.
        selected: ``[n_seq, H_kv, n_selected]`` int32 logical pages, or None for all.
        scale: Factor on the scores, ``D ** -0.5`` if None.
        compute_dtype: Of scores, weights and the dequantised values.

    Returns:
        Output ``[n_seq, H, D]`` in the dtype of ``q`` and log-sum-exps ``[n_seq, H]`` in the
        compute dtype; 0 and ``-inf`` where nothing is attended.
    """
    n_seq, heads, dim = q.shape
    n_rep = heads // k.kv_heads
    scale = dim**-0.5 if scale is None else scale
    out = torch.zeros(q.shape, dtype=compute_dtype, device=q.device)
    lse = torch.full((n_seq, heads), -torch.inf, dtype=compute_dtype, device=q.device)
    for i in range(n_seq):
        length = int(lengths[i])
        count = -(-length // k.page_size)
        token = torch.arange(count * k.page_size, device=q.device)
        pages = page_table[i, :count].long()
        keys, values = (
            dequantize(x, pages).to(compute_dtype).transpose(0, 1).flatten(1, 2) for x in (k, v)
        )  # [H_kv, count * page_size, D]
        for head in range(k.kv_heads):
            seen = token < length
            if selected is not None:
                seen &= torch.isin(token // k.page_size, selected[i, head])
            if not seen.any():
                continue
            rows = slice(head * n_rep, (head + 1) * n_rep)
            scores = q[i, rows].to(compute_dtype) @ keys[head, seen].T * scale
            out[i, rows] = scores.softmax(dim=-1) @ values[head, seen]
            lse[i, rows] = scores.logsumexp(dim=-1)
    return out.to(q.dtype), lse
