"""The same mathematics at speed: an op is a folder with its contract, a slow reference and one file a backend."""

from sparse_bitnet.kernels import (
    decoder_step,
    dequantize_fragments,
    effective_weight,
    packed_linear,
    packed_product,
    quantize_activation,
    quantize_lifted,
    quantize_planes,
    sparse_product,
    weight_fragments,
)

OPERATORS = tuple(
    op.OPERATOR
    for op in (
        effective_weight,
        quantize_activation,
        weight_fragments,
        dequantize_fragments,
        quantize_lifted,
        quantize_planes,
        sparse_product,
        packed_linear,
        packed_product,
        decoder_step,
    )
)
