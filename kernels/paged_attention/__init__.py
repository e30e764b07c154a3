"""Decode attention over a paged cache of K and V, packed or not."""

from repro.kernels.paged_attention.pages import Format, Pages

__all__ = ["Format", "Pages"]
