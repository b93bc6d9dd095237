"""The optimizer of the scores, and its step in one pass over memory."""
