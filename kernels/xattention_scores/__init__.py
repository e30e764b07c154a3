"""Mass of every attention block, estimated from strided antidiagonals of the score matrix."""

from repro.kernels.xattention_scores.api import xattention_scores

__all__ = ["xattention_scores"]
