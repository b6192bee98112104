"""down(silu(gate(x)) * up(x)) of packed layers on a GPU, with all that stands between the products in one kernel.

A model writes silu(gate), then its product with up, and down quantises that: each a launch, and a reading of the widest
tensors that there are. Here one kernel reads gate and up, and writes what sparse tensor cores take, or for few tokens
under torch.compile what packed products take. The compiler's own kernel for that reads gate and up twice, and its tuner
chooses between two of them; see docs/explanation/performance.md for what that did to a step.

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

from sparse_bitnet.kernels.quantize_lifted import gated, quantize_gated
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
    """In the place of an MLP of transformers, of which it takes the layers, under their names, and what else it has.

    from_tokens  the number of tokens from which one kernel stands between the products, and down is multiplied on
                 sparse tensor cores; for the few that torch.compile sees, one kernel always does. Both for as long as
                 its layers compute as `accelerate` made them.
    """

    def __init__(self, mlp: Any, from_tokens: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.act_fn = mlp.act_fn
        self.from_tokens = from_tokens
        vars(self).update({name: value for name, value in vars(mlp).items() if name not in vars(self)})
        self.train(mlp.training)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., H] -> y [..., H]."""
        products = gated_products(self)
        if products is not None and not (torch.is_grad_enabled() and x.requires_grad):
            gate_and_up, down = products
            if is_traced_with_few_tokens(x):
                way = finish_sparse if down.is_sparse_for(x) else finish_packed
                return way(gate_and_up(x), down)
            if down.fragments is not None and x.numel() >= self.from_tokens * x.shape[-1]:
                return finish_sparse(gate_and_up(x), down)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def finish_sparse(gate_and_up: Tensor, down: FastWeight) -> Tensor:
    """y [..., H] of [..., 2 I], gate and up side by side, on sparse tensor cores."""
    codes, token_scale = quantize_gated(gate_and_up, down.layout.activations, down.m)
    return down.multiply_lifted(codes, token_scale, gate_and_up.dtype)


def finish_packed(gate_and_up: Tensor, down: FastWeight) -> Tensor:
    """The same by the packed product."""
    planes = quantize_gated_planes(gate_and_up, down.layout.activations)
    return down.multiply_planes(*planes, gate_and_up.dtype)


def gated_products(mlp: Any) -> tuple[Callable[[Tensor], Tensor], FastWeight] | None:
    """By which an accelerated `mlp` computes gate and up at once, and the weight of down; None where it does not."""
    layers: list[Any] = [getattr(mlp, name) for name in PROJECTIONS]
    one, other, last = (getattr(layer, "fast", None) for layer in layers)
    if not isinstance(one, Share) or not isinstance(other, Share) or one.joint is not other.joint:
        return None
    if not isinstance(last, FastWeight) or len(one.joint.heights) != 2 or type(mlp.act_fn).__name__ not in SILU:
        return None
    if any(layer._forward_hooks or layer._forward_pre_hooks for layer in [*layers, mlp.act_fn]):
        return None
    return one.joint, last


def open_gates(model: nn.Module, tokens: Sequence[int], dtype: torch.dtype) -> list[Choice]:
    """Have the MLPs of an accelerated `model` compute by one kernel between products: those of few compiled tokens, and
    from where that is the faster."""
    places = [
        (parent, name) for parent in model.modules() for name, child in parent.named_children()
        if isinstance(child, GatedMLP) or computes_as_named(child)
    ]  # fmt: skip
    places = [place for place in places if _can_be_one_kernel(getattr(*place), dtype)]
    choices = []
    for alike in grouped(places, lambda place: getattr(*place).down_proj):
        mlps = [getattr(*place) for place in alike]
        first = mlps[0].down_proj
        from_tokens = NEVER
        if not sparse_forward_obstacle(first.recipe, (first.out_features, first.in_features)):
            weights = [_with_fragments(mlp.down_proj) for mlp in mlps]
            choice = _choose(first, weights, tokens, dtype)
            choices.append(choice)
            from_tokens = choice.taken_from
        for (parent, name), mlp in zip(alike, mlps, strict=True):
            if isinstance(mlp, GatedMLP):
                mlp.from_tokens = from_tokens
            else:
                setattr(parent, name, GatedMLP(mlp, from_tokens))
        if from_tokens != NEVER:
            for mlp, weight in zip(mlps, weights, strict=True):
                mlp.down_proj.fast = weight
    return choices


def _choose(down: PackedLinear, weights: Sequence[FastWeight], tokens: Sequence[int], dtype: torch.dtype) -> Choice:
    width, device = down.in_features, down.weight.device
    times: Times = {}
    for count in tokens:
        gate_and_up = torch.randn(count, 2 * width, device=device, dtype=dtype)
        times[count] = microseconds_of_a_layer(ways_of(gate_and_up), weights, device)
    return Choice(f"{len(weights)} gates before {down.out_features} x {width}, {down.recipe.pattern}", WAYS, times)


def ways_of(gate_and_up: Tensor) -> dict[str, Callable[[FastWeight], Tensor]]:
    """What there is to choose from for gate and up [T, 2 I], given down's weight."""
    ways = (lambda down: finish_sparse(gate_and_up, down)), (lambda down: down(gated(gate_and_up)))
    return dict(zip(WAYS, ways, strict=True))


def computes_as_named(module: nn.Module) -> bool:
    """Whether it is an MLP of packed layers whose forward is FORWARD and nothing else."""
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
    if not isinstance(source, ast.FunctionDef) or source.decorator_list or hasattr(function, "__wrapped__"):
        return False
    if list(inspect.signature(function).parameters) != ["self", "x"]:
        return False
    body, wanted = source.body, ast.dump(ast.parse(expression, mode="eval").body)
    if len(body) == 2 and isinstance(body[0], ast.Assign) and isinstance(body[1], ast.Return):
        names = [target.id for target in body[0].targets if isinstance(target, ast.Name)]
        is_that = isinstance(body[1].value, ast.Name) and names == [body[1].value.id]
        return is_that and ast.dump(body[0].value) == wanted
    returned = body[0].value if len(body) == 1 and isinstance(body[0], ast.Return) else None
    return returned is not None and ast.dump(returned) == wanted


def _can_be_one_kernel(mlp: Any, dtype: torch.dtype) -> bool:
    if gated_products(mlp) is None or mlp.down_proj.recipe.activations != "int8":
        return False
    return not sparse_tensor_core_obstacle(mlp.down_proj.weight.device, dtype)


def _with_fragments(down: PackedLinear) -> FastWeight:
    weight = down.fast
    assert isinstance(weight, FastWeight)
    if weight.fragments is not None:
        return weight
    made = fast_weight(down, has_fragments=True)
    return replace(weight, fragments=made.fragments, row_bias=made.row_bias)
