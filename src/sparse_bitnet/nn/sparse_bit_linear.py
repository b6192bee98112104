"""The trainable layer: a latent weight that is masked and ternarised anew in every forward pass.

Shapes: T tokens (any leading dimensions), O out_features, I in_features, P parts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_bitnet.kernels.quantize_activation import fake_quantize_activation
from sparse_bitnet.nn.layer import LatentLayer, product_dtype
from sparse_bitnet.nn.sparse_forward import sparse_linear
from sparse_bitnet.numerics.ternary import Parts, check_parts
from sparse_bitnet.recipe import Recipe


class SparseBitLinear(LatentLayer, nn.Linear):
    """`nn.Linear` over the effective weight of its latent `weight` [O, I]; parameters and state dict keys are the same.

    Quantisation reads the weight in the dtype in which the layer holds it, so keep fp32 masters (autocast leaves them
    alone): a bf16 copy ranks and rounds about 0.1 % of the weights differently.
    """

    step_fragments: Tensor | None = None  # instead of `step_weight`, for sparse tensor cores
    step_row_scale: Tensor | None = None  # and [O] or [1] fp32

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        recipe: Recipe | None = None,
        parts: Parts = (),
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.recipe = recipe or Recipe()
        self.parts = tuple(parts)
        self.recipe.pattern.check_width(in_features, type(self).__name__)
        check_parts(self.parts, out_features, type(self).__name__)

    @classmethod
    def from_linear(cls, linear: nn.Linear, recipe: Recipe, parts: Parts = ()) -> SparseBitLinear:
        """A layer that shares the parameters of `linear`, on whatever device they are."""
        layer = cls(linear.in_features, linear.out_features, bias=False, device="meta", recipe=recipe, parts=parts)
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        dtype = product_dtype(self.weight, input)
        fragments, row_scale = self.step_fragments, self.step_row_scale
        if fragments is not None and row_scale is not None and self.uses_codes_of_step(dtype, self.training):
            return sparse_linear(input, self.weight, fragments, row_scale, self.bias, self.recipe, self.parts, dtype)
        weight = self.effective_weight(dtype, self.training)
        return F.linear(fake_quantize_activation(input, self.recipe.activations, dtype), weight, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pattern={self.recipe.pattern}, values={self.recipe.values}"
