"""Masks from what layers see: statistics of inputs, criteria and swaps that use them."""
