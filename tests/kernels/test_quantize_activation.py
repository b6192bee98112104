"""The op `fake_quantize_activation` against `numerics`: forward equal, gradient straight through."""

from __future__ import annotations

import pytest
import torch

from sparse_bitnet.kernels.quantize_activation import fake_quantize_activation
from sparse_bitnet.numerics import activation

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
KINDS = ["int8", "int4", "none"]


def random_activations(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)


@pytest.mark.parametrize("result", FLOATS, ids=str)
@pytest.mark.parametrize("given", FLOATS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_numerics(kind: str, given: torch.dtype, result: torch.dtype) -> None:
    for shape in [(1, 1), (5, 33), (2, 3, 16), (0, 8)]:
        x = random_activations(*shape, dtype=given)
        fake = fake_quantize_activation(x, kind, result)
        assert (fake.dtype, fake.shape) == (result, x.shape)
        assert torch.equal(fake, activation.fake_quantize_activation(x, kind, result))


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_passes_straight_through_clipped_values_too(kind: str) -> None:
    x = random_activations(4, 64)
    x[:, 0] = 1e3  # int4 clips it
    x.requires_grad_()
    upstream = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    fake_quantize_activation(x, kind, torch.float32).backward(upstream)
    assert x.grad is not None and torch.equal(x.grad, upstream)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_has_the_dtype_of_the_input(kind: str) -> None:
    x = random_activations(4, 16).requires_grad_()
    upstream = torch.randn(4, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    fake_quantize_activation(x, kind, torch.bfloat16).backward(upstream)
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert torch.equal(x.grad, upstream.float())


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_op_keeps_the_rules_of_torch_library(kind: str) -> None:
    op = torch.ops.sparse_bitnet.fake_quantize_activation.default
    torch.library.opcheck(op, (random_activations(2, 3, 16).requires_grad_(), kind, torch.float32))
    torch.library.opcheck(op, (random_activations(3, 16), kind, torch.bfloat16))
    torch.library.opcheck(op, (random_activations(3, 16).T, kind, torch.float32))
