"""Search a network that is a list of blocks, one block at a time."""

from nni_jackpot.search.blockwise.blocks import blocks_of
from nni_jackpot.search.blockwise.search import BlockReport, BlockSearch, search_blocks
from nni_jackpot.search.blockwise.targets import Target, targets_of

__all__ = ["BlockReport", "BlockSearch", "Target", "blocks_of", "search_blocks", "targets_of"]
