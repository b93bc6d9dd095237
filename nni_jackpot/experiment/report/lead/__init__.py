"""What a report leads with: one sentence, and one picture of accuracy against cost."""
