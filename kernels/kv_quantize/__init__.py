"""Quantisation of K and V in groups, and appending to the pages of a cache."""

from repro.kernels.kv_quantize.api import append, quantize
from repro.kernels.kv_quantize.reference import append_reference, quantize_reference

__all__ = ["append", "append_reference", "quantize", "quantize_reference"]
