"""The inference layer: codes packed into bytes.

Shapes: T tokens (any leading dimensions), O out_features, I in_features, P parts, B bytes a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparse_bitnet.formats import Format, choose_format
from sparse_bitnet.kernels.packed_linear import PackedLayout, packed_linear
from sparse_bitnet.nn.layer import Fp32Scales, PackedLayer
from sparse_bitnet.nn.sparse_bit_linear import SparseBitLinear
from sparse_bitnet.numerics.ternary import Parts, dequantize_weight
from sparse_bitnet.recipe import Recipe


class PackedLinear(PackedLayer, Fp32Scales):
    """A linear layer over packed codes; not trainable, but gradients pass through it to layers below.

    weight        [O, B] uint8, codes in `format`. The usual name, so that a reader that does not know the format
                  stops at the wrong shape and dtype instead of going on with random weights
    weight_scale  [P] fp32, each value representable in fp16, so that every export holds the same scale; stays fp32
                  when the model is cast
    bias          [O] float, or None
    """

    fast: Callable[[Tensor], Tensor] | None = None  # see acceleration.py; without gradient

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        recipe: Recipe | None = None,
        format: str = "i2",
        parts: Parts = (),
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.recipe = recipe or Recipe()
        self.format = choose_format(self.recipe, format)
        self.parts = tuple(parts)
        width = self.format.bytes_per_row(in_features)
        self.register_buffer("weight", torch.zeros(out_features, width, dtype=torch.uint8, device=device))
        self.register_buffer("weight_scale", torch.ones(max(1, len(self.parts)), dtype=torch.float32, device=device))
        empty_bias = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self.bias = None if empty_bias is None else nn.Parameter(empty_bias, requires_grad=False)

    @classmethod
    def from_latent(cls, layer: SparseBitLinear, format: str = "auto", name: str = "SparseBitLinear") -> PackedLinear:
        """The codes and the scale of `layer`, packed; ValueError, with `name`, where a weight or scale cannot be."""
        layout, codes, scale = layer.pack_weight(format, name)
        packed = cls(
            layer.in_features,
            layer.out_features,
            bias=False,
            device="meta",
            recipe=layer.recipe,
            format=layout.name,
            parts=layer.parts,
        )
        packed.weight, packed.weight_scale = codes, scale
        if layer.bias is not None:
            packed.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
        return packed.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        if self.fast is not None and not (torch.is_grad_enabled() and input.requires_grad):
            return self.fast(input)
        layout = PackedLayout(self.format.name, self.in_features, self.recipe.activations, self.parts)
        return packed_linear(input, self.weight, self.weight_scale, self.bias, layout)

    def to_linear(self, dtype: torch.dtype) -> nn.Linear:
        """`nn.Linear` over the effective weight in `dtype`; its activations are no longer quantised."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        weight = dequantize_weight(self.codes(), self.weight_scale, self.parts, dtype)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.to(dtype), requires_grad=False)
        return linear

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.fast = None  # it holds what was made of the tensors before
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        self.fast = None
        super()._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self.format.name}, pattern={self.recipe.pattern}, values={self.recipe.values}"
        )


def check_stored(name: str, weight: Tensor, scale: Tensor, format: Format) -> None:
    """ValueError where tensors that were read, [..., O, B] uint8 and [..., P] fp32, are not what `pack` writes."""
    if not bool(torch.isfinite(scale).all() and (scale > 0).all()):
        raise ValueError(f"{name}.weight_scale is not a positive number: the checkpoint is damaged, convert it again")
    if format.has_invalid_codes(weight):
        raise ValueError(f"{name}.weight is not of format {format.name}: the checkpoint is damaged, convert it again")
