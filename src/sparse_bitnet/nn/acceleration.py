"""Packed layers on a GPU: which product is the fastest for how many tokens, measured where it will run.

    packed   packed_linear: 2 bits a weight, unpacked in registers; for few tokens
    sparse   sparse tensor cores: lifted activations, and fragments that are made once; for many

Layers that read the same x are measured, and multiplied, as one (shared_inputs.py).

Shapes: T tokens, O out_features, I in_features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor, nn

from sparse_bitnet.formats import i2
from sparse_bitnet.kernels.packed_linear import PackedLayout, packed_linear
from sparse_bitnet.kernels.packed_product import quantize_and_multiply
from sparse_bitnet.kernels.quantize_lifted import quantize_lifted
from sparse_bitnet.kernels.sparse_product import sparse_product
from sparse_bitnet.kernels.timing import milliseconds
from sparse_bitnet.kernels.tracing import is_traced_with_few_tokens
from sparse_bitnet.kernels.weight_fragments import empty_fragments, write_fragments
from sparse_bitnet.nn.packed_linear import PackedLinear
from sparse_bitnet.nn.shared_inputs import Share, join, layers_sharing_inputs, share
from sparse_bitnet.nn.sparse_forward import Shape, sparse_forward_obstacle, sparse_tensor_core_obstacle
from sparse_bitnet.nn.stored_settings import named_layers
from sparse_bitnet.numerics.ternary import scale_by_row
from sparse_bitnet.recipe import Recipe

TOKENS = (1, 16, 64, 128, 256, 512, 1024, 2048, 8192)
REPEATS = 5
MOST_LAYERS = 16  # of one kind, measured in turn, so that weights come from memory as they do in a model
NEVER = 2**62


@dataclass(frozen=True)
class FastWeight:
    """A packed layer's weight as its products on a GPU take it; called, it is the layer.

    packed       [O, B] uint8 in the format i2: the layer's own bytes where that is its format
    scale        [P] fp32, and row_scale [O] or [1] fp32
    bias         [O] float or None, and row_bias [O] fp32, what it was when this was made; None without fragments too
    fragments    [G, S, 128, 4] int32 (formats/fragments.py); None where the layer has no use for sparse tensor cores
    sparse_from  the number of tokens from which it uses them
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

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., I] -> y [..., O] in x's dtype. Without gradient."""
        return self.multiply_sparse(x) if x.numel() >= self.sparse_from * x.shape[-1] else self.multiply_packed(x)

    def multiply_packed(self, x: Tensor) -> Tensor:
        if is_traced_with_few_tokens(x):
            return quantize_and_multiply(x, self.packed, self.scale, self.bias, self.layout)
        return packed_linear(x, self.packed, self.scale, self.bias, self.layout)

    def multiply_sparse(self, x: Tensor) -> Tensor:
        assert self.fragments is not None
        codes, token_scale = quantize_lifted(x, self.layout.activations, self.m)
        rows = len(self.packed)
        return sparse_product(codes, token_scale, self.fragments, self.row_scale, self.row_bias, rows, x.dtype)

    def by_part(self) -> list[FastWeight]:
        """Each part as a weight of its own, without fragments: views."""
        parts, layout = self.layout.parts, replace(self.layout, parts=())
        biases = [None] * len(parts) if self.bias is None else self.bias.split(parts)
        weights = zip(self.packed.split(parts), self.scale.split(1), biases, strict=True)
        return [FastWeight(packed, layout, scale, bias, None, scale, None, self.m) for packed, scale, bias in weights]


@dataclass(frozen=True)
class Choice:
    """What was measured for the layers of one shape [O, I] and recipe, and chosen.

    microseconds  of each product that can run, by the number of tokens
    refusal       why sparse tensor cores cannot; None where they can
    sparse_from   the number of tokens from which they are used; NEVER
    """

    shape: Shape
    recipe: Recipe
    layers: int
    microseconds: dict[int, dict[str, float]]
    refusal: str | None
    sparse_from: int

    def __str__(self) -> str:
        lines = [f"{self.layers} layers of {self.shape[0]} x {self.shape[1]}, {self.recipe.pattern}"]
        for tokens, times in self.microseconds.items():
            told = ", ".join(f"{name} {time:.1f}" for name, time in times.items())
            lines.append(f"{tokens:>8} tokens: {told} us: {'sparse' if tokens >= self.sparse_from else 'packed'}")
        return "\n".join([*lines, *([f"   no sparse: {self.refusal}"] if self.refusal else [])])


@torch.no_grad()
def accelerate(
    model: nn.Module, tokens: Sequence[int] = TOKENS, dtype: torch.dtype = torch.bfloat16, fuse: bool = True
) -> list[Choice]:
    """Measure the products of the packed layers of `model`, on a GPU, and have each layer take the fastest.

    tokens  numbers of them to measure; between two, what was chosen for the lower one is taken
    dtype   of the activations
    fuse    whether q, k and v, and gate and up, are multiplied as one

    Weights in another format than i2 are kept as i2 too, and those that use sparse tensor cores as fragments, which
    take (2 - 4 / m) / 4 bytes a weight. Neither is part of the state dict, and a layer that is moved or loaded anew
    lets them go: call this again. ValueError where there is no packed layer, or one is not on a GPU.
    """
    layers = [layer for _, layer in named_layers(model) if isinstance(layer, PackedLinear)]
    if not layers:
        raise ValueError("the model has no packed layers: call convert(model), or open a packed checkpoint")
    for layer in layers:
        if layer.weight.device.type != "cuda":
            raise ValueError(f"a packed layer is on {layer.weight.device}: move the model to a GPU first")
    groups = list(layers_sharing_inputs(model)) if fuse else []
    joints, joined = [join(group) for group in groups], {id(layer) for group in groups for layer in group}
    apart = [layer for layer in layers if id(layer) not in joined and layer.recipe.activations != "none"]
    choices = [_choose(alike, sorted(tokens), dtype) for alike in _alike([*joints, *apart])]
    for joint, group in zip(joints, groups, strict=True):
        assert isinstance(joint.fast, FastWeight)
        share(joint.fast, group, joint.fast.by_part())
    return choices


def _alike(layers: Sequence[PackedLinear]) -> Iterator[list[PackedLinear]]:
    """The layers by device, shape and recipe."""

    def kind(layer: PackedLinear) -> tuple[str, int, int, str]:
        return str(layer.weight.device), layer.out_features, layer.in_features, layer.recipe.key

    return (list(group) for _, group in groupby(sorted(layers, key=kind), key=kind))


def _choose(layers: Sequence[PackedLinear], tokens: Sequence[int], dtype: torch.dtype) -> Choice:
    first = layers[0]
    shape, recipe, device = (first.out_features, first.in_features), first.recipe, first.weight.device
    refusal = sparse_forward_obstacle(recipe, shape) or sparse_tensor_core_obstacle(device, dtype)
    weights = [fast_weight(layer, has_fragments=refusal is None) for layer in layers]
    measured = weights[:MOST_LAYERS]
    times: dict[int, dict[str, float]] = {}
    for count in tokens:
        x = torch.randn(count, shape[1], device=device, dtype=dtype)
        products = [FastWeight.multiply_packed, *([FastWeight.multiply_sparse] if refusal is None else [])]
        times[count] = {
            product.__name__.removeprefix("multiply_"): 1e3 / len(measured)
            * milliseconds(lambda product=product, x=x: [product(one, x) for one in measured], REPEATS, device)
            for product in products
        }  # fmt: skip
    sparse_from = NEVER
    for count in reversed(tokens):
        if times[count].get("sparse", float("inf")) > times[count]["packed"]:
            break
        sparse_from = count
    for layer, weight in zip(layers, weights, strict=True):
        fragments = None if sparse_from == NEVER else weight.fragments
        layer.fast = replace(weight, fragments=fragments, sparse_from=sparse_from)
    return Choice(shape, recipe, len(layers), times, refusal, sparse_from)


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
