"""The same mathematics at speed: an op is a folder with its contract, a slow reference and one file a backend."""

from sparse_bitnet.kernels import effective_weight, packed_linear, quantize_activation

OPERATORS = (effective_weight.OPERATOR, quantize_activation.OPERATOR, packed_linear.OPERATOR)
