"""The Triton kernels against `numerics`: on a GPU, and without one in Triton's interpreter, which runs the same code.

Codes, masks and scales are equal, bit for bit, and so are effective weights; a fake-quantised activation is an ulp of
fp32 away at most, since it is multiplied by 1 / scale.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from numerics.recipes import all_recipes
from sparse_bitnet.kernels.effective_weight import OPERATOR as EFFECTIVE_WEIGHT
from sparse_bitnet.kernels.effective_weight import empty_scale, reference
from sparse_bitnet.kernels.quantize_activation import OPERATOR as QUANTIZE_ACTIVATION
from sparse_bitnet.kernels.quantize_lifted import reference as quantize_lifted_reference
from sparse_bitnet.numerics.activation import fake_quantize_activation
from sparse_bitnet.recipe import Recipe

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RECIPES = [*all_recipes("6:8", ("int8",)), *all_recipes("3:5", ("int8",))]
HALF = torch.float16 if INTERPRETED else torch.bfloat16  # the interpreter cuts bf16 off instead of rounding it

runs = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="test_triton_interpreter.py runs it, with Triton")
gpu = pytest.mark.gpu if not INTERPRETED else lambda test: test


def random_weight(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """With ties, zeros, and rows of different size."""
    weight = torch.randn(shape) * torch.arange(1, shape[-2] + 1).unsqueeze(-1) * 0.05
    weight.view(-1)[::3] = weight.view(-1)[0]
    weight.view(-1)[::7] = 0
    return weight.to(dtype).to(DEVICE)


def assert_equals_numerics(
    weights: list[Tensor], recipe: Recipe, parts: Sequence[tuple[int, ...]], dtype: torch.dtype
) -> None:
    expected = [torch.full_like(weight, 7, dtype=dtype) for weight in weights]
    expected_scale, scale = empty_scale(weights, parts), empty_scale(weights, parts).fill_(9)
    reference.run(weights, recipe, parts, expected, expected_scale)
    out = [torch.full_like(weight, 9, dtype=dtype) for weight in weights]
    chosen = EFFECTIVE_WEIGHT.select(weights, recipe, parts, out, scale)
    assert chosen.__module__.endswith("gpu_triton")
    chosen(weights, recipe, parts, out, scale)
    for one, other in zip(out, expected, strict=True):
        assert torch.equal(one, other)
    if recipe.values != "full":
        assert torch.equal(scale, expected_scale)


@runs
@gpu
@pytest.mark.parametrize(
    "recipe", [*all_recipes("6:8", ("int8",)), *all_recipes("3:5", ("int8",))], ids=lambda r: r.key
)
def test_effective_weights_of_every_recipe(recipe: Recipe) -> None:
    m = recipe.pattern.m
    assert_equals_numerics([random_weight(6, 3 * m), random_weight(3, 50 * m)], recipe, [(4, 2), ()], torch.float32)


@runs
@gpu
@pytest.mark.parametrize("pattern", ["1:2", "2:3", "2:4", "4:4", "4:6", "5:7", "3:8", "9:12", "8:16", "20:32", "31:31"])
def test_effective_weights_of_every_kind_of_pattern(pattern: str) -> None:
    recipe = Recipe(pattern)
    assert_equals_numerics([random_weight(5, 4 * recipe.pattern.m)], recipe, [()], torch.float32)


@runs
@gpu
@pytest.mark.parametrize("result", [torch.float32, HALF, torch.int8], ids=str)
@pytest.mark.parametrize("given", [torch.float32, HALF], ids=str)
def test_effective_weights_in_every_dtype(given: torch.dtype, result: torch.dtype) -> None:
    weights = [random_weight(48, 64, dtype=given), random_weight(6, 8, dtype=given)]
    assert_equals_numerics(weights, Recipe("6:8"), [(5, 7), ()], result)
    assert_equals_numerics(weights, Recipe("3:4", values="sign"), [(), ()], result)


@runs
@gpu
def test_effective_weights_of_more_than_one_tile_of_experts_and_of_views() -> None:
    weights = [random_weight(70, 256), random_weight(3, 6, 16), random_weight(9, 24)[1:]]
    assert_equals_numerics(weights, Recipe("6:8"), [(20, 15), (2, 1), ()], torch.float32)


@runs
@gpu
def test_effective_weight_of_zeros_has_the_smallest_scale() -> None:
    assert_equals_numerics([torch.zeros(2, 8, device=DEVICE)], Recipe("6:8"), [()], torch.float32)


@runs
@gpu
def test_weights_that_the_kernel_cannot_take_are_refused_with_the_reason() -> None:
    recipe, weight = Recipe("6:8"), random_weight(8, 16)
    cases = {
        "torch.float64": weight.double(),
        "not contiguous": random_weight(16, 8).T,
    }
    for reason, refused in cases.items():
        arguments = ([refused], recipe, [()], [torch.empty_like(refused)], empty_scale([refused], [()]))
        assert reason in EFFECTIVE_WEIGHT.explain(*arguments).splitlines()[0]


@runs
@gpu
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (5, 24), (2, 3, 64), (4, 720), (0, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_activations(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (torch.randn(shape) * 3).to(dtype).to(DEVICE)
    x[:1] = 0
    assert_activations_equal_numerics(x, kind)


@runs
@gpu
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_tokens_that_a_program_does_not_hold(kind: str) -> None:
    assert_activations_equal_numerics(torch.randn(2, 40000, device=DEVICE), kind)


@runs
@gpu
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_activations_of_a_view(kind: str) -> None:
    assert_activations_equal_numerics(torch.randn(24, 6, device=DEVICE).T, kind)


def assert_activations_equal_numerics(x: Tensor, kind: str) -> None:
    from sparse_bitnet.kernels.quantize_lifted import gpu_triton as lifted  # where triton is

    for m in (m for m in (4, 6, 8) if x.shape[-1] % m == 0):  # 4: no lift, the codes themselves
        for room in (x.new_empty(0, dtype=torch.int8), torch.zeros(x.shape, dtype=torch.int8, device=DEVICE)):
            assert lifted.supports(x, kind, m, room, None) is None
            codes = room.clone()
            expected = *quantize_lifted_reference.run(x, kind, m, room, None), room
            for found, wanted in zip((*lifted.run(x, kind, m, codes, None), codes), expected, strict=True):
                assert torch.equal(found, wanted)
    for dtype in (torch.float32, HALF):
        run = QUANTIZE_ACTIVATION.select(x, kind, dtype)
        assert run.__module__.endswith("gpu_triton")
        expected = fake_quantize_activation(x, kind, dtype)
        torch.testing.assert_close(run(x, kind, dtype), expected, rtol=torch.finfo(dtype).eps, atol=0)


@runs
@gpu
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_token_that_is_not_finite_is_nan_and_the_others_are_not(kind: str, bad: float) -> None:
    x = torch.randn(3, 300, device=DEVICE)
    x[1, 2] = bad
    fake = QUANTIZE_ACTIVATION.run(x, kind, torch.float32)
    assert fake[1].isnan().all()
    assert fake[::2].isfinite().all()
