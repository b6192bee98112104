"""Packed layers on a GPU: which product is the fastest for how many tokens, measured where it will run.

    packed   packed_linear: 2 bits a weight, unpacked in registers; for few tokens
    sparse   sparse tensor cores: lifted activations, and fragments that are made once; for many

Layers that read the same x are measured, and multiplied, as one (shared_inputs.py). Of few tokens torch.compile joins
the quantisation to what stands before it, or one of our kernels does it with the norm or the gates (quantizing_norm.py,
gated_mlp.py), where layers are fused and codes are int8: for it the products are measured alone.

Shapes: T tokens, O out_features, I in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from sparse_bitnet.kernels.quantize_lifted import quantize_lifted
from sparse_bitnet.kernels.quantize_planes import quantize_planes
from sparse_bitnet.kernels.tracing import MOST_TOKENS
from sparse_bitnet.nn.choosing import NEVER, Choice, Times, grouped, microseconds_of_a_layer
from sparse_bitnet.nn.fast_weight import FastWeight, fast_weight
from sparse_bitnet.nn.gated_mlp import open_gates
from sparse_bitnet.nn.packed_linear import PackedLinear
from sparse_bitnet.nn.quantizing_norm import quantize_in_norms
from sparse_bitnet.nn.shared_inputs import join, layers_sharing_inputs, share
from sparse_bitnet.nn.sparse_forward import sparse_forward_obstacle, sparse_tensor_core_obstacle
from sparse_bitnet.nn.stored_settings import named_layers

TOKENS = (1, 16, 64, 128, 256, 512, 1024, 2048, 8192)
WAYS = ("sparse", "packed")

Product = Callable[[FastWeight], Tensor]


@torch.no_grad()
def accelerate(
    model: nn.Module, tokens: Sequence[int] = TOKENS, dtype: torch.dtype = torch.bfloat16, fuse: bool = True
) -> list[Choice]:
    """Measure the products of the packed layers of `model`, on a GPU, and have each layer take the fastest.

    tokens  numbers of them to measure; between two, what was chosen for the lower one is taken
    dtype   of the activations
    fuse    whether q, k and v, and gate and up, are multiplied as one, and MLPs and RMS norms of transformers are
            replaced by a GatedMLP (gated_mlp.py) and a QuantizingNorm (quantizing_norm.py), with the same tensors

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
    tokens = sorted(tokens)
    choices = [_choose(alike, tokens, dtype) for alike in grouped([*joints, *apart], lambda layer: layer)]
    for joint, group in zip(joints, groups, strict=True):
        assert isinstance(joint.fast, FastWeight)
        share(joint.fast, group, joint.fast.by_part())
    if not fuse:
        return choices
    quantize_in_norms(model)
    return [*choices, *open_gates(model, tokens, dtype)]


def _choose(layers: Sequence[PackedLinear], tokens: Sequence[int], dtype: torch.dtype) -> Choice:
    first = layers[0]
    shape, recipe, device = (first.out_features, first.in_features), first.recipe, first.weight.device
    refusal = sparse_forward_obstacle(recipe, shape) or sparse_tensor_core_obstacle(device, dtype)
    has_sparse = refusal is None
    weights = [fast_weight(layer, has_sparse) for layer in layers]

    seen: Times = {}
    compiled: Times = {}
    for count in tokens:
        x = torch.randn(count, shape[1], device=device, dtype=dtype)
        seen[count] = microseconds_of_a_layer(products_of(x, has_sparse), weights, device)
        if count <= MOST_TOKENS:
            products = compiled_products(x, weights[0], has_sparse)
            compiled[count] = microseconds_of_a_layer(products, weights, device)
    subject = f"{len(layers)} layers of {shape[0]} x {shape[1]}, {recipe.pattern}"
    choice = Choice(subject, WAYS, seen, compiled, refusal)
    sparse_from = {"sparse_from": choice.taken_from, "compiled_sparse_from": choice.compiled_taken_from}
    for layer, weight in zip(layers, weights, strict=True):
        weight = replace(weight, **sparse_from)
        layer.fast = weight if min(sparse_from.values()) < NEVER else replace(weight, fragments=None, row_bias=None)
    return choice


def products_of(x: Tensor, has_sparse: bool) -> dict[str, Product]:
    """What there is to choose from for x [T, I]."""
    products: dict[str, Product] = {"packed": lambda one: one.multiply_packed(x)}
    if has_sparse:
        products["sparse"] = lambda one: one.multiply_sparse(x)
    return products


def compiled_products(x: Tensor, weight: FastWeight, has_sparse: bool) -> dict[str, Product]:
    """What torch.compile leaves of them for few tokens, with weights like `weight`."""
    planes = quantize_planes(x, weight.layout.activations)
    products: dict[str, Product] = {"packed": lambda one: one.multiply_planes(*planes, x.dtype)}
    if has_sparse:
        lifted = quantize_lifted(x, weight.layout.activations, weight.m)
        products["sparse"] = lambda one: one.multiply_lifted(*lifted, x.dtype)
    return products
