"""Choice of the fewest blocks that collect a share of each row's mass."""

from repro.kernels.block_selection.api import causal_blocks, diagonal_blocks, select_blocks

__all__ = ["causal_blocks", "diagonal_blocks", "select_blocks"]
