"""Scores and masks of one network, as tensors: top-k selection, grains, budgets, criteria, methods."""
