"""Runs that search block by block, and comparators that prune without training."""
