"""What a model's rotary embedding does to the channels of a head."""

from __future__ import annotations

import sys
from typing import Any


def turns_halves(model: Any) -> bool:
    """Tell whether channel ``i`` turns together with ``i + D / 2``, over the whole head.

    Other models turn neighbours (``2 i`` and ``2 i + 1``), or only the first channels of a head.
    The model's own function is tried: its classes do not say which they are.
    """
    import torch

    decoder = model.get_decoder()
    rotary = getattr(decoder, "rotary_emb", None)
    attention = getattr(decoder.layers[0], "self_attn", None)
    module = sys.modules[type(attention).__module__]
    rotate = getattr(module, "apply_rotary_pos_emb", None)
    inv_freq, head_dim = getattr(rotary, "inv_freq", None), getattr(attention, "head_dim", None)
    if rotary is None or rotate is None or inv_freq is None or 2 * inv_freq.numel() != head_dim:
        return False
    # Pairs of different lengths: one that turns keeps its own, up to a factor common to all.
    lengths = torch.arange(1.0, inv_freq.numel() + 1, device=inv_freq.device)
    x = torch.cat([lengths, lengths])[None, None, None]  # [1, 1, 1, D]
    with torch.no_grad():
        cos, sin = rotary(x, torch.ones(1, 1, dtype=torch.long, device=x.device))
        first, second = rotate(x, x, cos, sin)[0].flatten().chunk(2)
    ratio = torch.hypot(first, second) / lengths
    return bool(torch.allclose(ratio, ratio[:1].expand_as(ratio), rtol=1e-3))
