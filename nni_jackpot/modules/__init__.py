"""PyTorch modules: which parameters can be masked, attributes that are computed, norm statistics, batches."""
