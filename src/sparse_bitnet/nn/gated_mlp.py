"""down(silu(gate(x)) * up(x)) of packed layers on a GPU, with all that stands between the products in one kernel.

A model writes silu(gate), then its product with up, and down quantises that: each a launch, and a reading of the widest
tensors that there are. Here one kernel reads gate and up, and writes what sparse tensor cores take.

Shapes: T tokens, H hidden size, I in_features of down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_bitnet.kernels.quantize_lifted import quantize_gated
from sparse_bitnet.nn.choosing import NEVER, Times, grouped, lowest_from, microseconds_of_a_layer, told
from sparse_bitnet.nn.fast_weight import FastWeight, fast_weight
from sparse_bitnet.nn.packed_linear import PackedLinear
from sparse_bitnet.nn.shared_inputs import Share
from sparse_bitnet.nn.sparse_forward import Shape, sparse_forward_obstacle, sparse_tensor_core_obstacle
from sparse_bitnet.recipe import Recipe

NAMES = ("gate_proj", "up_proj", "down_proj")
WAYS = ("one kernel", "apart")
SAMPLE = 16  # tokens by which it is seen that a module computes what its names say
CLOSE = 0.02  # of the largest value; a code now and then may be the one beside


@dataclass
class GatedMLP:
    """The forward of `module`, in place of its own, as long as its layers compute by what they did when it was made.

    gate_and_up  x [..., H] -> [..., 2 I], side by side
    down         with fragments
    from_tokens  below this number of them the module computes as ever
    """

    module: nn.Module
    gate_and_up: Callable[[Tensor], Tensor]
    down: FastWeight
    from_tokens: int

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., H] -> y [..., H]."""
        is_enough = x.numel() >= self.from_tokens * x.shape[-1]
        if is_enough and self.is_current() and not (torch.is_grad_enabled() and x.requires_grad):
            return self.finish(self.gate_and_up(x))
        return type(self.module).forward(self.module, x)

    def finish(self, gate_and_up: Tensor) -> Tensor:
        codes, token_scale = quantize_gated(gate_and_up, self.down.layout.activations, self.down.m)
        return self.down.multiply_lifted(codes, token_scale, gate_and_up.dtype)

    def is_current(self) -> bool:
        gate, _, down = _projections(self.module)
        return down.fast is self.down and isinstance(gate.fast, Share) and gate.fast.joint.multiply is self.gate_and_up


@dataclass(frozen=True)
class GateChoice:
    """What was measured from gate and up to y for the MLPs with a down of one shape [H, I] and recipe, and chosen."""

    shape: Shape
    recipe: Recipe
    modules: int
    microseconds: Times

    def __str__(self) -> str:
        lines = [f"{self.modules} gates before {self.shape[0]} x {self.shape[1]}, {self.recipe.pattern}"]
        lines += [f"{tokens:>8} tokens: {told(self.microseconds, tokens, *WAYS)}" for tokens in self.microseconds]
        return "\n".join(lines)


def fuse_gates(model: nn.Module, tokens: Sequence[int], dtype: torch.dtype) -> list[GateChoice]:
    """Have the MLPs of an accelerated `model` compute by one kernel between products where that is the faster."""
    choices = []
    found = {id(_projections(one.module)[2]): one for one in gated_mlps(model, dtype)}
    for downs in grouped([_projections(one.module)[2] for one in found.values()]):
        alike = [found[id(down)] for down in downs]
        shape, device = (downs[0].out_features, downs[0].in_features), downs[0].weight.device
        times: Times = {}
        for count in tokens:
            gate_and_up = torch.randn(count, 2 * shape[1], device=device, dtype=dtype)
            times[count] = microseconds_of_a_layer(ways_of(gate_and_up), alike, device)
        from_tokens = lowest_from(times, *WAYS)
        for one, down in zip(alike, downs, strict=True):
            if from_tokens != NEVER:
                down.fast = one.down  # the same, with fragments
                one.module.forward = replace(one, from_tokens=from_tokens)
        choices.append(GateChoice(shape, downs[0].recipe, len(alike), times))
    return choices


def ways_of(gate_and_up: Tensor) -> dict[str, Callable[[GatedMLP], Tensor]]:
    """What there is to choose from for gate and up [T, 2 I]."""

    def apart(one: GatedMLP) -> Tensor:
        gate, up = gate_and_up.chunk(2, dim=-1)
        return one.down(F.silu(gate) * up)

    return dict(zip(WAYS, (lambda one: one.finish(gate_and_up), apart), strict=True))


def gated_mlps(model: nn.Module, dtype: torch.dtype) -> Iterator[GatedMLP]:
    """Those of an accelerated `model`: modules with the layers of one that compute as one, if down can be sparse."""
    for module in model.modules():
        layers = [getattr(module, name, None) for name in NAMES]
        if not all(isinstance(layer, PackedLinear) for layer in layers):
            continue
        gate, _, down = _projections(module)
        if not isinstance(gate.fast, Share) or not isinstance(down.fast, FastWeight):
            continue
        if gate.fast.joint.heights != (down.in_features, down.in_features) or "forward" in vars(module):
            continue
        shape, device = (down.out_features, down.in_features), down.weight.device
        if sparse_forward_obstacle(down.recipe, shape) or sparse_tensor_core_obstacle(device, dtype):
            continue
        weight = down.fast
        if weight.fragments is None:
            made = fast_weight(down, has_fragments=True)
            weight = replace(weight, fragments=made.fragments, row_bias=made.row_bias)
        found = GatedMLP(module, gate.fast.joint.multiply, weight, 0)
        if _computes(module, found, torch.randn(SAMPLE, gate.in_features, device=device, dtype=dtype)):
            yield found


def _computes(module: nn.Module, found: GatedMLP, x: Tensor) -> bool:
    expected, y = module(x), found.finish(found.gate_and_up(x))
    return bool((y - expected).abs().max() <= CLOSE * expected.abs().max())


def _projections(module: Any) -> tuple[PackedLinear, PackedLinear, PackedLinear]:
    return module.gate_proj, module.up_proj, module.down_proj
