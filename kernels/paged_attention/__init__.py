"""Decode attention over a paged cache of K and V, packed or not."""

from repro.kernels.paged_attention.api import paged_attention
from repro.kernels.paged_attention.merge import merge_attention
from repro.kernels.paged_attention.pages import Format, Pages, dequantize
from repro.kernels.paged_attention.reference import paged_attention_reference

__all__ = [
    "Format",
    "Pages",
    "dequantize",
    "merge_attention",
    "paged_attention",
    "paged_attention_reference",
]
