"""The only wing that imports NNI: config lists, wrappers, evaluators, and patches for current PyTorch."""
