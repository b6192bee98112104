"""The trainable layer: a latent weight that is masked and ternarised anew in every forward pass.

Shapes: T tokens (any leading dimensions), O out_features, I in_features, P parts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_bitnet.kernels.effective_weight import effective_weight, with_latent_gradient
from sparse_bitnet.kernels.quantize_activation import fake_quantize_activation
from sparse_bitnet.nn.sparse_forward import sparse_linear
from sparse_bitnet.numerics.ternary import Parts, add_residual, quantize_weight
from sparse_bitnet.recipe import Recipe


class SparseBitLinear(nn.Linear):
    """`nn.Linear` over the effective weight of its latent `weight` [O, I]; parameters and state dict keys are the same.

    Quantisation reads the weight in the dtype in which the layer holds it, so keep fp32 masters (autocast leaves them
    alone): a bf16 copy ranks and rounds about 0.1 % of the weights differently.
    """

    recipe: Recipe
    parts: Parts
    step_dtype: torch.dtype | None = (
        None  # in which the layer has its effective weight of this step, see step_weights.py
    )
    step_weight: Tensor | None = None  # [O, I] in that dtype
    step_fragments: Tensor | None = None  # or this instead, for sparse tensor cores
    step_row_scale: Tensor | None = None  # and [O] or [1] fp32
    step_version: int = -1  # of the latent weight that it was made from
    residual: Tensor | None = None  # [] fp32, share of the latent weight that training adds, see swap.set_residual

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
        if self.parts and out_features % sum(self.parts):
            raise ValueError(f"out_features={out_features} is not a multiple of the parts {self.parts}")

    @classmethod
    def from_linear(cls, linear: nn.Linear, recipe: Recipe, parts: Parts = ()) -> SparseBitLinear:
        """A layer that shares the parameters of `linear`, on whatever device they are."""
        layer = cls(linear.in_features, linear.out_features, bias=False, device="meta", recipe=recipe, parts=parts)
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        dtype, device = self.weight.dtype, input.device.type
        if device != "meta" and torch.is_autocast_enabled(device):  # torch refuses to say for meta
            dtype = torch.get_autocast_dtype(device)
        has_step_weight = self.training and self.step_dtype == dtype and self._is_unchanged()
        residual = self.residual if self.training else None
        fragments, row_scale = self.step_fragments, self.step_row_scale
        if has_step_weight and fragments is not None and row_scale is not None and residual is None:
            return sparse_linear(input, self.weight, fragments, row_scale, self.bias, self.recipe, self.parts, dtype)
        if has_step_weight and self.step_weight is not None:
            weight = with_latent_gradient(self.step_weight, self.weight, self.recipe, self.parts)
        else:
            weight = effective_weight(self.weight, self.recipe, self.parts, dtype)
        if residual is not None:  # with it the weight is no longer of codes: no sparse tensor cores above
            weight = add_residual(weight, self.weight, residual)
        return F.linear(fake_quantize_activation(input, self.recipe.activations, dtype), weight, self.bias)

    def _is_unchanged(self) -> bool:
        return torch.compiler.is_compiling() or self.weight._version == self.step_version

    @torch.no_grad()
    def quantize_weight(self) -> tuple[Tensor, Tensor]:
        """Codes [O, I] int8, 0 where masked, and scale [P] fp32: those of the next forward pass, and of the export."""
        return quantize_weight(self.weight, self.recipe, self.parts)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pattern={self.recipe.pattern}, values={self.recipe.values}"
