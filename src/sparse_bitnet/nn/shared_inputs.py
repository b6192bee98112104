"""Packed layers that read the same x, multiplied as one: fewer launches, and a product that fills the GPU better.

The rows of q, k and v, or of gate and up, are joined in one weight, of which the tensors of the layers become views:
the state dict stays what it is, and no byte is held twice. The first of the layers computes for all. Each of the others
takes its columns where it is given the very same tensor, and otherwise (as in cross-attention) computes its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparse_bitnet.nn.packed_linear import PackedLinear

SHARING = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
)  # children of one module, in the order of the calls


@dataclass
class JointProduct:
    """The product of one x with several layers.

    held   while it is shared out, x and each one's columns
    ahead  x and its product, between the norm that makes them (quantizing_norm.py) and the layers
    """

    multiply: Callable[[Tensor], Tensor]
    heights: tuple[int, ...]
    held: tuple[Tensor, tuple[Tensor, ...]] | None = None
    ahead: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., I] -> y [..., O] of all layers, side by side."""
        ahead, self.ahead = self.ahead, None
        return ahead[1] if ahead is not None and ahead[0] is x else self.multiply(x)


@dataclass(frozen=True)
class Share:
    """One layer: x [..., I] -> its y [..., O], a view. x must not be written to between the calls."""

    joint: JointProduct
    index: int
    alone: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        joint = self.joint
        if self.index == 0:
            joint.held = x, joint(x).split(joint.heights, dim=-1)
        held = joint.held  # read once: another thread may be at work with an x of its own
        if held is None or held[0] is not x:
            return self.alone(x)
        if self.index == len(joint.heights) - 1:
            joint.held = None
        return held[1][self.index]


def layers_sharing_inputs(model: nn.Module) -> Iterator[tuple[PackedLinear, ...]]:
    """Groups of packed layers in `model` that by their names read the same x, and whose weights can be joined."""
    for module in model.modules():
        children = dict(module.named_children())
        for names in SHARING:
            layers = tuple(layer for name in names if isinstance(layer := children.get(name), PackedLinear))
            if len(layers) < len(names) or len(set(map(_kind, layers))) > 1:
                continue
            if not layers[0].parts and layers[0].recipe.activations != "none":
                yield layers


def join(layers: Sequence[PackedLinear]) -> PackedLinear:
    """One layer over the rows of all, one part each; the tensors of `layers` become views of its own."""
    first, heights = layers[0], tuple(layer.out_features for layer in layers)
    joint = PackedLinear(
        first.in_features, sum(heights), bias=False, device="meta",
        recipe=first.recipe, format=first.format.name, parts=heights,
    )  # fmt: skip
    joint.weight = torch.cat([layer.weight for layer in layers])
    joint.weight_scale = torch.cat([layer.weight_scale for layer in layers])
    biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
    joint.bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
    for i, (layer, weight) in enumerate(zip(layers, joint.weight.split(heights), strict=True)):
        layer.weight, layer.weight_scale = weight, joint.weight_scale[i : i + 1]
        if joint.bias is not None:
            layer.bias = nn.Parameter(joint.bias.detach().split(heights)[i], requires_grad=False)
    return joint.train(first.training)


def share(product: Callable[[Tensor], Tensor], layers: Sequence[PackedLinear], alone: Sequence[Callable]) -> None:
    """Have `layers` compute by `product`, that of their join; each by its own of `alone` where x is not the first's."""
    joint = JointProduct(product, tuple(layer.out_features for layer in layers))
    for i, layer in enumerate(layers):
        layer.fast = Share(joint, i, alone[i])


def _kind(layer: PackedLinear) -> tuple[object, ...]:
    bias = None if layer.bias is None else layer.bias.dtype
    return layer.in_features, layer.recipe, layer.format.name, layer.parts, layer.weight.device, bias
