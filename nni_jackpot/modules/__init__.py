"""PyTorch modules: maskable parameters, computed attributes, norm statistics, calls with batches."""
