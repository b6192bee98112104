"""Packed layers on a GPU: which product is the fastest for how many tokens, measured where it will run.

    packed   packed_linear: 2 bits a weight, unpacked in registers; for few tokens
    sparse   sparse tensor cores: lifted activations, and fragments that are made once; for many

Layers that read the same x are measured, and multiplied, as one (shared_inputs.py). Of few tokens torch.compile joins
the quantisation to what stands before it: for it the products are measured alone, or with the lift, which it does not
join.

Shapes: T tokens, O out_features, I in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor, nn

from sparse_bitnet.formats import i2
from sparse_bitnet.formats.windows import lift_activation
from sparse_bitnet.kernels.packed_linear import PackedLayout, packed_linear
from sparse_bitnet.kernels.packed_product import packed_product, quantize_planes
from sparse_bitnet.kernels.quantize_lifted import quantize_lifted
from sparse_bitnet.kernels.sparse_product import sparse_product
from sparse_bitnet.kernels.timing import milliseconds
from sparse_bitnet.kernels.tracing import MOST_TOKENS, is_traced_with_few_tokens
from sparse_bitnet.kernels.weight_fragments import empty_fragments, write_fragments
from sparse_bitnet.nn.packed_linear import PackedLinear
from sparse_bitnet.nn.shared_inputs import Share, join, layers_sharing_inputs, share
from sparse_bitnet.nn.sparse_forward import Shape, sparse_forward_obstacle, sparse_tensor_core_obstacle
from sparse_bitnet.nn.stored_settings import named_layers
from sparse_bitnet.numerics.activation import quantize_activation
from sparse_bitnet.numerics.ternary import scale_by_row
from sparse_bitnet.recipe import Recipe

TOKENS = (1, 16, 64, 128, 256, 512, 1024, 2048, 8192)
REPEATS = 5
MOST_LAYERS = 16  # of one kind, measured in turn, so that weights come from memory as they do in a model
NEVER = 2**62

Times = dict[int, dict[str, float]]  # microseconds by tokens and product


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
        sparse_from = self.compiled_sparse_from if is_traced_with_few_tokens(x) else self.sparse_from
        return self.multiply_sparse(x) if x.numel() >= sparse_from * x.shape[-1] else self.multiply_packed(x)

    def multiply_packed(self, x: Tensor) -> Tensor:
        if is_traced_with_few_tokens(x):
            y = self.multiply_planes(*quantize_planes(x, self.layout), x.dtype)
            return y.view(*x.shape[:-1], len(self.packed))
        return packed_linear(x, self.packed, self.scale, self.bias, self.layout)

    def multiply_planes(self, codes: Tensor, total: Tensor, token_scale: Tensor, dtype: torch.dtype) -> Tensor:
        """y [T, O] of what `quantize_planes` gives."""
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


Product = Callable[[FastWeight], Tensor]


@dataclass(frozen=True)
class Choice:
    """What was measured for the layers of one shape [O, I] and recipe, and chosen.

    microseconds           of each product that can run, by the number of tokens
    compiled_microseconds  of few tokens under torch.compile, the quantisation left out
    refusal                why sparse tensor cores cannot; None where they can
    sparse_from, compiled_sparse_from   the number of tokens from which they are used; NEVER
    """

    shape: Shape
    recipe: Recipe
    layers: int
    microseconds: Times
    compiled_microseconds: Times
    refusal: str | None

    @property
    def sparse_from(self) -> int:
        return _sparse_from(self.microseconds)

    @property
    def compiled_sparse_from(self) -> int:
        return _sparse_from(self.compiled_microseconds)

    def __str__(self) -> str:
        lines = [f"{self.layers} layers of {self.shape[0]} x {self.shape[1]}, {self.recipe.pattern}"]
        for tokens in self.microseconds:
            line = f"{tokens:>8} tokens: {_told(self.microseconds, tokens)}"
            is_few = tokens in self.compiled_microseconds
            lines.append(line + (f"; compiled {_told(self.compiled_microseconds, tokens)}" if is_few else ""))
        return "\n".join([*lines, *([f"   no sparse: {self.refusal}"] if self.refusal else [])])


def _told(times: Times, tokens: int) -> str:
    told = ", ".join(f"{name} {time:.1f}" for name, time in times[tokens].items())
    return f"{told} us: {'sparse' if tokens >= _sparse_from(times) else 'packed'}"


def _sparse_from(times: Times) -> int:
    """The lowest number of tokens from which on sparse tensor cores are never the slower; NEVER."""
    lowest = NEVER
    for tokens in sorted(times, reverse=True):
        if times[tokens].get("sparse", float("inf")) > times[tokens]["packed"]:
            break
        lowest = tokens
    return lowest


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

    def times(products: dict[str, Product]) -> dict[str, float]:
        """Microseconds of a layer, by each of those that can run."""
        able = {name: product for name, product in products.items() if name == "packed" or refusal is None}
        return {
            name: 1e3 / len(measured)
            * milliseconds(lambda product=product: [product(one) for one in measured], REPEATS, device)
            for name, product in able.items()
        }  # fmt: skip

    seen: Times = {}
    compiled: Times = {}
    for count in tokens:
        x = torch.randn(count, shape[1], device=device, dtype=dtype)
        seen[count] = times(products_of(x))
        if count <= MOST_TOKENS:
            compiled[count] = times(compiled_products(x, measured[0]))
    choice = Choice(shape, recipe, len(layers), seen, compiled, refusal)
    sparse_from = {"sparse_from": choice.sparse_from, "compiled_sparse_from": choice.compiled_sparse_from}
    for layer, weight in zip(layers, weights, strict=True):
        fragments = None if min(sparse_from.values()) == NEVER else weight.fragments
        layer.fast = replace(weight, fragments=fragments, **sparse_from)
    return choice


def products_of(x: Tensor) -> dict[str, Product]:
    """What there is to choose from for x [T, I]."""
    return {"packed": lambda one: one.multiply_packed(x), "sparse": lambda one: one.multiply_sparse(x)}


def compiled_products(x: Tensor, weight: FastWeight) -> dict[str, Product]:
    """What torch.compile leaves of them for few tokens, with weights like `weight`."""
    planes = quantize_planes(x, weight.layout)
    codes, token_scale = quantize_activation(x, weight.layout.activations)

    def sparse(one: FastWeight) -> Tensor:
        return one.multiply_lifted(lift_activation(codes, one.m).contiguous(), token_scale, x.dtype)

    return {"packed": lambda one: one.multiply_planes(*planes, x.dtype), "sparse": sparse}


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
