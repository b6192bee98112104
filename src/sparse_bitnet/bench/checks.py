"""No speed is told of a kernel that is wrong: each is compared with the reference on what is about to be timed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sparse_bitnet.kernels import effective_weight, packed_linear, quantize_activation
from sparse_bitnet.kernels.dispatch import FORCE_VARIABLE
from sparse_bitnet.kernels.effective_weight import empty_scale
from sparse_bitnet.kernels.effective_weight import reference as effective_weight_reference
from sparse_bitnet.kernels.packed_linear import PackedLayout
from sparse_bitnet.kernels.packed_linear import reference as packed_linear_reference
from sparse_bitnet.kernels.quantize_lifted import gated
from sparse_bitnet.nn.gated_mlp import GatedMLP, finish_packed, finish_sparse, gated_products
from sparse_bitnet.nn.packed_linear import PackedLinear
from sparse_bitnet.nn.quantizing_norm import QuantizingNorm
from sparse_bitnet.nn.stored_settings import named_layers
from sparse_bitnet.numerics.activation import fake_quantize_activation
from sparse_bitnet.recipe import Recipe

CLOSE = 0.02  # of the largest value: an activation now and then may round to the code beside
LEAST_LIKENESS = 0.98
"""What the logits of a compiled model must correlate with the reference's, layers apart, which are checked one by one:
in bf16, sums round anew where kernels are fused. 36 packed layers of width 256 in bf16 and in fp32 gave 0.996, with the
o_proj of one of them upside down 0.96, with an attention that sees later tokens 0.1."""


def check_kernels(shapes: Iterable[tuple[int, int]], recipe: Recipe, dtype: torch.dtype, device: torch.device) -> None:
    """ValueError where, on random weights of these shapes [O, I], the chosen backends leave their contract."""
    for shape in sorted(set(shapes)):
        weight = torch.randn(shape, device=device)
        arguments = ([weight], recipe, [()])
        results = []
        for run in (effective_weight.OPERATOR.run, effective_weight_reference.run):
            out, scale = torch.full_like(weight, 7, dtype=dtype), empty_scale([weight], [()])
            run(*arguments, [out], scale)
            results.append((out, scale))
        (out, scale), (expected, expected_scale) = results
        if not (torch.equal(out, expected) and torch.equal(scale, expected_scale)):
            raise ValueError(f"effective_weight is wrong on weights of {shape}: no speed is told, run its tests")
        x = torch.randn(256, shape[1], device=device).to(dtype)
        fake = quantize_activation.OPERATOR.run(x, recipe.activations, dtype)
        expected_fake = fake_quantize_activation(x, recipe.activations, dtype)
        if not torch.allclose(fake, expected_fake, rtol=torch.finfo(dtype).eps, atol=0):
            raise ValueError(f"quantize_activation is wrong on {tuple(x.shape)}: no speed is told, run its tests")


def check_packed_linear(weight: torch.Tensor, layout: PackedLayout, tokens: Iterable[int]) -> None:
    """ValueError where the chosen backend is not equal to the reference on this packed weight [O, B]."""
    for count in tokens:
        x = torch.randn(count, layout.in_features, device=weight.device)
        arguments = (x, weight, torch.ones(1, device=weight.device), None, layout)
        if not torch.equal(packed_linear.OPERATOR.run(*arguments), packed_linear_reference.run(*arguments)):
            shape = (count, layout.in_features, weight.shape[0])
            raise ValueError(f"packed_linear is wrong on {layout.format} and {shape}: no speed is told, run its tests")


@contextmanager
def by_reference(model: nn.Module) -> Iterator[None]:
    """Within it packed layers compute by the reference, each for itself."""
    layers = [layer for _, layer in named_layers(model) if isinstance(layer, PackedLinear)]
    fast, forced = [layer.fast for layer in layers], os.environ.get(FORCE_VARIABLE)
    os.environ[FORCE_VARIABLE] = "reference"
    try:
        for layer in layers:
            layer.fast = None
        yield
    finally:
        for layer, one in zip(layers, fast, strict=True):
            layer.fast = one
        os.environ.pop(FORCE_VARIABLE)
        if forced is not None:
            os.environ[FORCE_VARIABLE] = forced


def check_layers(model: nn.Module, tokens: Iterable[int], dtype: torch.dtype) -> None:
    """ValueError where a packed layer leaves the reference by more than the rounding of its result to `dtype`.

    So it is where a gate that is opened by one kernel, or a norm that multiplies ahead, leaves what the layers compute.
    """
    for count in tokens:
        inputs: dict[int, Tensor] = {}  # by width: layers that share their input take the same tensor
        for name, layer in named_layers(model):
            if not isinstance(layer, PackedLinear):
                continue
            width = layer.in_features
            if width not in inputs:
                inputs[width] = torch.randn(count, width, device=layer.weight.device, dtype=dtype)
            y = layer(inputs[width])
            with by_reference(layer):
                expected = layer(inputs[width])
            if not torch.allclose(y, expected, rtol=2 * torch.finfo(dtype).eps, atol=0):
                raise ValueError(f"{name} with {count} tokens is not the reference's: no speed is told")
        for name, module in model.named_modules():
            if isinstance(module, GatedMLP) and (products := gated_products(module)) is not None:
                gate_and_up, down = products[0](inputs[module.gate_proj.in_features]), products[1]
                apart, found = down(gated(gate_and_up)), [finish_packed(gate_and_up, down)]
                if down.fragments is not None:
                    found.append(finish_sparse(gate_and_up, down))
            elif isinstance(module, QuantizingNorm) and (joint := module.joint()) is not None:
                x = inputs[len(module.weight)]
                normed = module(x)
                module.multiply_ahead(x, normed)
                apart, found = joint.multiply(normed), [joint(normed)]
            else:
                continue
            if not all((one - apart).abs().max() <= CLOSE * apart.abs().max() for one in found):
                raise ValueError(f"{name} with {count} tokens is not its layers: no speed is told")


def check_likeness(logits: Tensor, expected: Tensor) -> float:
    """The least correlation of a row of `logits` [S, V] with `expected`; ValueError where it is another model's."""
    pairs = zip(logits.float(), expected.float(), strict=True)
    likeness = min(float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in pairs)
    if not likeness >= LEAST_LIKENESS:
        raise ValueError(f"the logits correlate with the reference's by {likeness:.4f} alone: no speed is told")
    return likeness
