"""How a mask follows its scores: one file for each method."""
