"""One search in time: recipe, clock, sparsity schedule, initial masks, checkpoint, and the loop."""
