"""Searches inside the training loops of other libraries, each of which is imported by its own file only."""
