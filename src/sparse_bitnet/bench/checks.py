"""No speed is told of a kernel that is wrong: each is compared with the reference on what is about to be timed."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from sparse_bitnet.kernels import effective_weight, packed_linear, quantize_activation
from sparse_bitnet.kernels.effective_weight import empty_scale
from sparse_bitnet.kernels.effective_weight import reference as effective_weight_reference
from sparse_bitnet.kernels.packed_linear import PackedLayout
from sparse_bitnet.kernels.packed_linear import reference as packed_linear_reference
from sparse_bitnet.numerics.activation import fake_quantize_activation
from sparse_bitnet.recipe import Recipe


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
