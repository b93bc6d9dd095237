"""Data sets: registry, loading and batches."""
