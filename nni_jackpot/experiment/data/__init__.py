"""Data sets: what they are, how they are read, and in which batches."""
