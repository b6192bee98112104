"""down(silu(gate(x)) * up(x)) of packed layers on a GPU, with all that stands between the products in one kernel.

A model writes silu(gate), then its product with up, and down quantises that: each a launch, and a reading of the widest
tensors that there are. Here one kernel reads gate and up, and writes what sparse tensor cores take, or for few tokens
under torch.compile what packed products take. The compiler's own kernel for that reads gate and up twice, in one of two
ways between which its tuner cannot tell; of the two, one takes 10 us longer for 64 tokens in a CUDA graph on an H100.

Shapes: T tokens, H hidden size, I in_features of down.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_bitnet.kernels.quantize_lifted import quantize_gated
from sparse_bitnet.kernels.quantize_planes import quantize_gated_planes
from sparse_bitnet.kernels.tracing import is_traced_with_few_tokens
from sparse_bitnet.nn.choosing import NEVER, Choice, Times, grouped, microseconds_of_a_layer
from sparse_bitnet.nn.fast_weight import FastWeight, fast_weight
from sparse_bitnet.nn.packed_linear import PackedLinear
from sparse_bitnet.nn.shared_inputs import Share
from sparse_bitnet.nn.sparse_forward import sparse_forward_obstacle, sparse_tensor_core_obstacle

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
FORWARD = "self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))"
SILU = ("SiLU", "SiLUActivation")  # of torch, of transformers
WAYS = ("one kernel", "apart")


class GatedMLP(nn.Module):
    """In the place of an MLP of transformers, of which it takes the layers, under their names.

    from_tokens  the number of tokens from which one kernel stands between the products, but for the few that
                 torch.compile sees, where it always does; for as long as its layers compute as `accelerate` made them
    """

    def __init__(self, mlp: Any, from_tokens: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.act_fn = mlp.act_fn
        self.from_tokens = from_tokens
        self.train(mlp.training)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., H] -> y [..., H]."""
        products = gated_products(self)
        needs_gradient = torch.is_grad_enabled() and x.requires_grad
        if products is None or needs_gradient or not self.is_one_kernel_for(x, products[1]):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        gate_and_up, down = products
        return finish(gate_and_up(x), down)

    def is_one_kernel_for(self, x: Tensor, down: FastWeight) -> bool:
        if is_traced_with_few_tokens(x):
            return down.layout.activations == "int8"  # as one kernel has them
        return x.numel() >= self.from_tokens * x.shape[-1]


def finish(gate_and_up: Tensor, down: FastWeight) -> Tensor:
    """y [..., H] of [..., 2 I], gate and up side by side."""
    if is_traced_with_few_tokens(gate_and_up) and not down.is_sparse_for(gate_and_up):
        planes = quantize_gated_planes(gate_and_up, down.layout.activations)
        return down.multiply_planes(*planes, gate_and_up.dtype).view(*gate_and_up.shape[:-1], len(down.packed))
    codes, token_scale = quantize_gated(gate_and_up, down.layout.activations, down.m)
    return down.multiply_lifted(codes, token_scale, gate_and_up.dtype)


def gated_products(mlp: Any) -> tuple[Callable[[Tensor], Tensor], FastWeight] | None:
    """By which an accelerated `mlp` computes gate and up at once, and down on sparse tensor cores; None if not."""
    layers: list[Any] = [getattr(mlp, name) for name in PROJECTIONS]
    one, other, last = (getattr(layer, "fast", None) for layer in layers)
    if not isinstance(one, Share) or not isinstance(other, Share) or one.joint is not other.joint:
        return None
    if not isinstance(last, FastWeight) or last.fragments is None or len(one.joint.heights) != 2:
        return None
    if any(layer._forward_hooks or layer._forward_pre_hooks for layer in [*layers, mlp.act_fn]):
        return None
    return one.joint, last


def open_gates(model: nn.Module, tokens: Sequence[int], dtype: torch.dtype) -> list[Choice]:
    """Have the MLPs of an accelerated `model` compute by one kernel between products from where that is the faster."""
    places = [
        (parent, name) for parent in model.modules() for name, child in parent.named_children()
        if computes_as_named(child) and _can_be_sparse(child.down_proj, dtype)
    ]  # fmt: skip
    choices = []
    for alike in grouped(places, lambda place: _down(*place)):
        downs = [_down(*place) for place in alike]
        weights = [_with_fragments(down) for down in downs]
        width, device = downs[0].in_features, downs[0].weight.device
        times: Times = {}
        for count in tokens:
            gate_and_up = torch.randn(count, 2 * width, device=device, dtype=dtype)
            times[count] = microseconds_of_a_layer(ways_of(gate_and_up), weights, device)
        subject = f"{len(alike)} gates before {downs[0].out_features} x {width}, {downs[0].recipe.pattern}"
        choice = Choice(subject, WAYS, times)
        for (parent, name), down, weight in zip(alike, downs, weights, strict=True):
            mlp = getattr(parent, name)
            if choice.taken_from != NEVER:
                down.fast = weight
                setattr(parent, name, GatedMLP(mlp, choice.taken_from))
            elif isinstance(mlp, GatedMLP):
                mlp.from_tokens = NEVER
        choices.append(choice)
    return choices


def ways_of(gate_and_up: Tensor) -> dict[str, Callable[[FastWeight], Tensor]]:
    """What there is to choose from for gate and up [T, 2 I], given down's weight."""
    gate, up = gate_and_up.chunk(2, dim=-1)
    ways = (lambda down: finish(gate_and_up, down)), (lambda down: down(F.silu(gate) * up))
    return dict(zip(WAYS, ways, strict=True))


def computes_as_named(module: nn.Module) -> bool:
    """Whether it is an MLP of packed layers that share an x, whose forward is FORWARD and nothing else."""
    if isinstance(module, GatedMLP):
        return all(isinstance(getattr(module, name), PackedLinear) for name in PROJECTIONS)
    children = dict(module.named_children())
    if set(children) != {*PROJECTIONS, "act_fn"} or type(children["act_fn"]).__name__ not in SILU:
        return False
    if not all(isinstance(children[name], PackedLinear) for name in PROJECTIONS) or "forward" in vars(module):
        return False
    return module._forward_hooks == module._forward_pre_hooks == {} and _returns(type(module).forward, FORWARD)


def _returns(function: Callable[..., object], expression: str) -> bool:
    """Whether `function` of self and x is no more than that, given a name or not."""
    try:
        source = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):
        return False
    if not isinstance(source, ast.FunctionDef) or len(source.args.args) != 2 or source.decorator_list:
        return False
    argument, body = source.args.args[1].arg, source.body
    wanted = ast.dump(ast.parse(expression.replace("(x)", f"({argument})"), mode="eval").body)
    if len(body) == 2 and isinstance(body[0], ast.Assign) and isinstance(body[1], ast.Return):
        names = [target.id for target in body[0].targets if isinstance(target, ast.Name)]
        is_that = isinstance(body[1].value, ast.Name) and names == [body[1].value.id]
        return is_that and ast.dump(body[0].value) == wanted
    returned = body[0].value if len(body) == 1 and isinstance(body[0], ast.Return) else None
    return returned is not None and ast.dump(returned) == wanted


def _can_be_sparse(down: Any, dtype: torch.dtype) -> bool:
    shape = down.out_features, down.in_features
    return (
        isinstance(down.fast, FastWeight)
        and not sparse_forward_obstacle(down.recipe, shape)
        and not sparse_tensor_core_obstacle(down.weight.device, dtype)
    )


def _with_fragments(down: PackedLinear) -> FastWeight:
    weight = down.fast
    assert isinstance(weight, FastWeight)
    if weight.fragments is not None:
        return weight
    made = fast_weight(down, has_fragments=True)
    return replace(weight, fragments=made.fragments, row_bias=made.row_bias)


def _down(parent: nn.Module, name: str) -> PackedLinear:
    return getattr(parent, name).down_proj
