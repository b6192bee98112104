"""What the layers of this package have in common, whether one is a module of its own or a stack of experts.

Shapes: O out_features, I in_features, P parts, B bytes a row. The weights of a mixture's experts are one layer, with
all its shapes behind a leading [E].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparse_bitnet.formats import Format, choose_format
from sparse_bitnet.kernels import effective_weight as op
from sparse_bitnet.numerics.ternary import Parts, add_residual, quantize_weight
from sparse_bitnet.recipe import Recipe

LARGEST_SCALE = float(torch.finfo(torch.float16).max)
SCALE = "_scale"  # ends the name of every scale


class LatentLayer:
    """A trainable layer: `weight` [..., O, I] is masked and ternarised anew in every forward pass."""

    weight: Tensor
    recipe: Recipe
    parts: Parts
    in_features: int
    out_features: int
    step_dtype: torch.dtype | None = None  # in which it has its effective weight of this step, see step_weights.py
    step_weight: Tensor | None = None  # [..., O, I] in that dtype
    step_read: tuple[int, int] | None = None  # where the latent weight lay that it was made from, and its version

    residual: Tensor | None = None  # [] fp32, share of the latent weight that training adds, see swap.set_residual

    def effective_weight(self, dtype: torch.dtype, training: bool) -> Tensor:
        """What multiplies, [..., O, I] in `dtype`, with the recipe's gradient to the latent weight."""
        if self.step_weight is not None and self._has_step(dtype, training):
            weight = op.with_latent_gradient(self.step_weight, self.weight, self.recipe, self.parts)
        else:
            weight = op.effective_weight(self.weight, self.recipe, self.parts, dtype)
        return weight if self.residual is None or not training else add_residual(weight, self.weight, self.residual)

    def uses_codes_of_step(self, dtype: torch.dtype, training: bool) -> bool:
        """Whether this forward pass multiplies with just the codes made at the beginning of the optimizer step.

        With a residual the weight is not one of codes.
        """
        return self.residual is None and self._has_step(dtype, training)

    def _has_step(self, dtype: torch.dtype, training: bool) -> bool:
        if not training or self.step_dtype != dtype:
            return False
        return torch.compiler.is_compiling() or (self.weight.data_ptr(), self.weight._version) == self.step_read

    @torch.no_grad()
    def quantize_weight(self) -> tuple[Tensor, Tensor]:
        """Codes [..., O, I] int8, 0 where masked, and scale [..., P] fp32: those of the next forward pass, and of the
        export."""
        return quantize_weight(self.weight, self.recipe, self.parts)

    def pack_weight(self, format: str, name: str) -> tuple[Format, Tensor, Tensor]:
        """The format, the codes packed [..., O, B] uint8 and the scale [..., P] fp32, its values fit for fp16.

        ValueError, with `name`, where a weight or a scale cannot be.
        """
        if not bool(torch.isfinite(self.weight).all()):
            raise ValueError(f"{name}: the weight holds NaN or infinity and cannot be packed")
        if self.residual is not None:
            raise ValueError(
                f"{name}: it trains with {float(self.residual):.3g} of its latent weight added, which codes do not "
                f"hold: train until that is 0, or call set_residual(model, 0)"
            )
        layout = choose_format(self.recipe, format)
        codes, scale = self.quantize_weight()
        if float(scale.max()) > LARGEST_SCALE:
            raise ValueError(f"{name}: scale {float(scale.max()):.3g} is beyond fp16, which ends at {LARGEST_SCALE}")
        return layout, layout.pack(codes), scale.half().float()


class PackedLayer:
    """A layer for inference: `weight` [..., O, B] uint8 in `format`, `weight_scale` [..., P] fp32."""

    weight: Tensor
    weight_scale: Tensor
    recipe: Recipe
    format: Format
    parts: Parts
    in_features: int
    out_features: int

    def codes(self) -> Tensor:
        """Codes [..., O, I] int8."""
        return self.format.unpack(self.weight, self.in_features)


class Fp32Scales(nn.Module):
    """A module whose buffers called ..._scale stay fp32 when the model is cast."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fp32Scales:
        scales = {name: tensor for name, tensor in self.named_buffers(recurse=False) if name.endswith(SCALE)}
        super()._apply(fn, recurse)
        for name, scale in scales.items():
            moved = self.get_buffer(name)
            if moved.dtype != torch.float32:  # a cast: keep the value, follow the device
                setattr(self, name, scale.to(moved.device))
        return self


def product_dtype(weight: Tensor, input: Tensor) -> torch.dtype:
    """In which a layer with this latent weight computes: its own dtype, or that of autocast."""
    device = input.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # torch refuses to say for meta
        return torch.get_autocast_dtype(device)
    return weight.dtype
