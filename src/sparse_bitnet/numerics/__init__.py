"""The specification: what mask, scale, codes, effective weight and activations are, in plain PyTorch."""
