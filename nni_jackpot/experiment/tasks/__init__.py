"""What a network of a run computes: its loss with labels, and how good its outputs are."""
