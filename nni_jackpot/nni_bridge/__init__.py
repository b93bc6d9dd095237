"""What knows NNI: config lists, wrappers, target spaces, and repairs of NNI for the PyTorch of today."""
