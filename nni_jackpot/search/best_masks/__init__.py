"""The best masks of a search, and the losses by which they are compared."""
