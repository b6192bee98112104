"""A packed layer's weight in the forms that its products on a GPU take.

Shapes: T tokens, O out_features, I in_features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_bitnet.formats import i2
from sparse_bitnet.kernels.packed_linear import PackedLayout, packed_linear
from sparse_bitnet.kernels.packed_product import packed_product
from sparse_bitnet.kernels.quantize_lifted import quantize_lifted
from sparse_bitnet.kernels.quantize_planes import quantize_planes
from sparse_bitnet.kernels.sparse_product import sparse_product
from sparse_bitnet.kernels.tracing import is_traced_with_few_tokens
from sparse_bitnet.kernels.weight_fragments import empty_fragments, write_fragments
from sparse_bitnet.nn.choosing import NEVER
from sparse_bitnet.nn.packed_linear import PackedLinear
from sparse_bitnet.nn.shared_inputs import Share
from sparse_bitnet.numerics.ternary import scale_by_row


@dataclass(frozen=True)
class FastWeight:
    """A packed layer's weight as its products on a GPU take it; called, it is the layer.

    packed       [O, B] uint8 in the format i2: the layer's own bytes where that is its format
    scale        [P] fp32, and row_scale [O] or [1] fp32
    bias         [O] float or None, and row_bias [O] fp32, what it was when this was made; None without fragments too
    fragments    [G, S, 128, 4] int32 (formats/fragments.py); None where the layer has no use for sparse tensor cores
    sparse_from  the number of tokens from which it uses them, and compiled_sparse_from among the few that torch.compile
                 sees (kernels/tracing.py)
    """

    packed: Tensor
    layout: PackedLayout
    scale: Tensor
    bias: Tensor | None
    fragments: Tensor | None
    row_scale: Tensor
    row_bias: Tensor | None
    m: int
    sparse_from: int = NEVER
    compiled_sparse_from: int = NEVER

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., I] -> y [..., O] in x's dtype. Without gradient."""
        return self.multiply_sparse(x) if self.is_sparse_for(x) else self.multiply_packed(x)

    def is_sparse_for(self, x: Tensor) -> bool:
        """Whether it uses sparse tensor cores for as many tokens as x [..., any] has."""
        sparse_from = self.compiled_sparse_from if is_traced_with_few_tokens(x) else self.sparse_from
        return x.numel() >= sparse_from * x.shape[-1]

    def multiply_packed(self, x: Tensor) -> Tensor:
        if is_traced_with_few_tokens(x):
            return self.multiply_planes(*quantize_planes(x, self.layout.activations), x.dtype)
        return packed_linear(x, self.packed, self.scale, self.bias, self.layout)

    def multiply_planes(self, codes: Tensor, total: Tensor, token_scale: Tensor, dtype: torch.dtype) -> Tensor:
        """y [..., O] of what `quantize_planes` gives."""
        weight, parts = self.packed, list(self.layout.parts)
        return packed_product(codes, total, token_scale, weight, self.scale, self.bias, parts, dtype)

    def multiply_sparse(self, x: Tensor) -> Tensor:
        return self.multiply_lifted(*quantize_lifted(x, self.layout.activations, self.m), x.dtype)

    def multiply_lifted(self, codes: Tensor, token_scale: Tensor, dtype: torch.dtype) -> Tensor:
        """y [..., O] of what `quantize_lifted` gives."""
        assert self.fragments is not None
        rows = len(self.packed)
        return sparse_product(codes, token_scale, self.fragments, self.row_scale, self.row_bias, rows, dtype)

    def by_part(self) -> list[FastWeight]:
        """Each part as a weight of its own, without fragments: views."""
        parts, layout = self.layout.parts, replace(self.layout, parts=())
        biases = [None] * len(parts) if self.bias is None else self.bias.split(parts)
        weights = zip(self.packed.split(parts), self.scale.split(1), biases, strict=True)
        return [FastWeight(packed, layout, scale, bias, None, scale, None, self.m) for packed, scale, bias in weights]


def i2_weight(layer: PackedLinear) -> Tensor | None:
    """The weight [O, B] uint8 of `layer` in the format i2, where it holds one: by its format, or since `accelerate`."""
    fast = layer.fast.alone if isinstance(layer.fast, Share) else layer.fast
    if isinstance(fast, FastWeight):
        return fast.packed
    return layer.weight if layer.format.name == "i2" else None


def fast_weight(layer: PackedLinear, has_fragments: bool) -> FastWeight:
    """What `layer` holds, in i2, and as fragments where these are wanted."""
    is_i2, m, fragments = layer.format.name == "i2", layer.recipe.pattern.m, None
    codes = None if is_i2 and not has_fragments else layer.codes()
    packed = layer.weight if is_i2 or codes is None else i2.pack(codes)
    if has_fragments and codes is not None:
        fragments = empty_fragments(codes, m)
        write_fragments([codes], m, [fragments])
    scale, parts = layer.weight_scale, layer.parts
    row_scale = scale_by_row(scale, parts, layer.out_features).flatten().contiguous() if parts else scale
    layout = PackedLayout("i2", layer.in_features, layer.recipe.activations, parts)
    row_bias = layer.bias.float() if fragments is not None and layer.bias is not None else None
    return FastWeight(packed, layout, scale, layer.bias, fragments, row_scale, row_bias, m)
