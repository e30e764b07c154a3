"""Block-sparse attention: softmax attention over the kept blocks of keys only."""

from repro.kernels.block_sparse_attention.api import block_sparse_attention
from repro.kernels.block_sparse_attention.reference import block_sparse_attention_reference

__all__ = ["block_sparse_attention", "block_sparse_attention_reference"]
