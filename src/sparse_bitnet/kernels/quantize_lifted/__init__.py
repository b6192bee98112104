"""Activations x [..., I] -> lifted integer codes [..., K] int8 and scale [..., 1] fp32, for sparse tensor cores.

A backend takes x, activations, m, `codes`, room [..., I] int8 for the codes before the lift, empty where none ask, and
`before`, what is done to x before it is quantised: GATE, silu of the first half of x [..., 2 I] multiplied by
the second; a Norm, which is taken; or None.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor
from torch.nn.functional import silu

from sparse_bitnet.formats.windows import WINDOW, lift_activation, lifted_width
from sparse_bitnet.kernels.dispatch import Backend, Operator
from sparse_bitnet.kernels.tracing import is_traced_with_few_tokens
from sparse_bitnet.numerics.activation import quantize_activation
from sparse_bitnet.recipe import Activations

WIDEST_FUSED = 4096
OPERATOR = Operator(
    __name__,
    (Backend("gpu_cuda", needs=("cuda.bindings",)), Backend("gpu_triton", needs=("triton",)), Backend("reference")),
)


@dataclass(frozen=True)
class Norm:
    """`numerics.norm.rms_norm` by a weight [I]."""

    weight: Tensor
    epsilon: float


GATE = "gate"
Before = Norm | Literal["gate"] | None


def quantize_lifted(x: Tensor, activations: Activations, m: int) -> tuple[Tensor, Tensor]:
    """`numerics.activation.quantize_activation` with its codes lifted for groups of m; see formats/windows.py.

    m = 4 is no lift at all. Without gradient.
    """
    lifted, scale, _ = quantize_and_lift(x, activations, m, keep=False)
    return lifted, scale


def quantize_and_lift(x: Tensor, activations: Activations, m: int, keep: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """The same, and the codes [..., I] before the lift, which a backward pass needs; they mean nothing without `keep`.

    torch.compile sees plain mathematics where that is the faster: in training, and for few tokens that need no lift. It
    fuses it with the norm before, and does it once for the layers that share x. Many wide tokens it would read twice,
    and the lift it would make a kernel of its own.
    """
    is_fused = keep and torch.compiler.is_compiling() and x.shape[-1] <= WIDEST_FUSED
    if is_fused or (m == WINDOW and is_traced_with_few_tokens(x)):
        codes, scale = quantize_activation(x, activations)
        return lift_activation(codes, m).contiguous(), scale, codes
    lifted, scale, codes = _quantize_lifted(x, activations, m, keep)
    return lifted, scale, lifted if m == WINDOW else codes


def quantize_gated(x: Tensor, activations: Activations, m: int) -> tuple[Tensor, Tensor]:
    """`quantize_lifted` of silu(gate) * up, for x [..., 2 I], which is gate and up side by side.

    Both operations are rounded to x's dtype, as PyTorch rounds them. ValueError where there are no halves.
    """
    halves(x)
    lifted, scale, _ = _quantize_lifted(x, activations, m, is_gated=True)
    return lifted, scale


def quantize_normed(x: Tensor, norm: Norm, activations: Activations, m: int) -> tuple[Tensor, Tensor]:
    """`quantize_lifted` of the norm of x, rounded to its dtype, which is that of the norm's weight: else ValueError.

    The mean of squares is of sums in another order than PyTorch's, so that a code now and then is the one beside.
    """
    if norm.weight.dtype != x.dtype or norm.weight.shape != x.shape[-1:]:
        told = f"{norm.weight.dtype} {tuple(norm.weight.shape)}"
        raise ValueError(f"a norm whose weight is {told} does not fit activations {x.dtype} {tuple(x.shape)}")
    lifted, scale, _ = _quantize_lifted(x, activations, m, norm_weight=norm.weight.contiguous(), epsilon=norm.epsilon)
    return lifted, scale


def halves(gate_and_up: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up [..., I] of [..., 2 I]; ValueError where there are no halves."""
    if gate_and_up.shape[-1] % 2:
        raise ValueError(f"gate and up are not halves of {gate_and_up.shape[-1]} columns")
    gate, up = gate_and_up.chunk(2, dim=-1)
    return gate, up


def gated(gate_and_up: Tensor) -> Tensor:
    """silu(gate) * up [..., I], both rounded to the dtype: what `quantize_gated` quantises."""
    gate, up = halves(gate_and_up)
    return silu(gate) * up


def width_of(x: Tensor, before: Before) -> int:
    """How many columns are quantised."""
    return x.shape[-1] // 2 if before == GATE else x.shape[-1]


@torch.library.custom_op("sparse_bitnet::quantize_lifted", mutates_args=())
def _quantize_lifted(
    x: Tensor, activations: str, m: int, keep: bool = False, is_gated: bool = False,
    norm_weight: Tensor | None = None, epsilon: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The codes come third where they are to be kept and are others than the lifted ones; else nothing does."""
    codes = torch.empty(_kept_shape(x, m, keep), dtype=torch.int8, device=x.device)
    before = Norm(norm_weight, epsilon) if norm_weight is not None else GATE if is_gated else None
    lifted, scale = OPERATOR.run(x, cast(Activations, activations), m, codes, before)
    return lifted, scale, codes


@_quantize_lifted.register_fake
def _(
    x: Tensor, activations: str, m: int, keep: bool = False, is_gated: bool = False,
    norm_weight: Tensor | None = None, epsilon: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    lifted = x.new_empty(*x.shape[:-1], lifted_width(x.shape[-1] // (1 + is_gated), m), dtype=torch.int8)
    scale = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    return lifted, scale, x.new_empty(_kept_shape(x, m, keep), dtype=torch.int8)


def _kept_shape(x: Tensor, m: int, keep: bool) -> tuple[int, ...]:
    """Of the codes that are written beside the lifted ones; nobody keeps those of gates."""
    return tuple(x.shape) if keep and m != WINDOW else (0,)
