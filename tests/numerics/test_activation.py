"""Activation codes and scales against the NumPy oracle and numbers worked out by hand.

Shapes: T tokens, I in_features.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from numerics import oracle
from sparse_bitnet.numerics.activation import fake_quantize_activation, quantize_activation

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INTEGER = ["int8", "int4"]
RANGE = {"int8": (-128, 127), "int4": (-8, 7)}


def random_activations(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2).to(dtype)


def assert_codes_follow_their_scale(x: torch.Tensor, activations: str) -> None:
    codes, scale = quantize_activation(x, activations)
    assert (codes.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert scale.shape == (*x.shape[:-1], 1)
    expected = oracle.activation_codes(oracle.array(x), scale.numpy(), activations)
    np.testing.assert_array_equal(codes.numpy(), expected, strict=True)


def test_int8_by_hand() -> None:
    codes, scale = quantize_activation(torch.tensor([[1.0, -1.0, 0.5, 0.0], [254.0, 3.0, 5.0, -1.0]]), "int8")
    assert scale.tolist() == [[127.0], [0.5]]
    assert codes.tolist() == [[127, -127, 64, 0], [127, 2, 2, 0]]  # 63.5, 1.5, 2.5, -0.5: halves go to even


def test_int4_by_hand() -> None:
    codes, scale = quantize_activation(torch.tensor([[1.0, -1.0, 1.0, -1.0], [16.0, -16.0, 0.0, 0.0]]), "int4")
    assert scale.tolist() == [[np.float32(7**0.5)], [np.float32(7**0.5) / 8]]
    assert codes.tolist() == [[3, -3, 3, -3], [5, -5, 0, 0]]


def test_int4_clips_to_minus_eight_and_seven() -> None:
    x = torch.zeros(2, 64)
    x[0, 0], x[1, 0] = 100.0, -100.0
    codes, _ = quantize_activation(x, "int4")
    assert codes[:, 0].tolist() == [7, -8]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activations", INTEGER)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 33), (2, 3, 64), (96,)])
def test_codes_follow_their_scale(shape: tuple[int, ...], activations: str, dtype: torch.dtype) -> None:
    assert_codes_follow_their_scale(random_activations(*shape, dtype=dtype), activations)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=12), st.sampled_from(INTEGER))
def test_codes_follow_their_scale_on_any_floats(values: list[float], activations: str) -> None:
    assert_codes_follow_their_scale(torch.tensor([values]), activations)


@settings(deadline=None, max_examples=50)
@given(st.integers(-60, 60), st.integers(0, 2**31 - 1), st.sampled_from(INTEGER))
def test_scale_is_exact_where_the_divisor_is_a_power_of_two(exponent: int, seed: int, activations: str) -> None:
    signs = torch.randint(0, 2, (3, 16), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
    x = signs * 2.0**exponent
    _, scale = quantize_activation(x, activations)
    np.testing.assert_array_equal(scale.numpy(), oracle.activation_scale(x.numpy(), activations), strict=True)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_int8_scale_is_the_correctly_rounded_quotient(dtype: torch.dtype) -> None:
    x = random_activations(1000, 8, dtype=dtype)
    _, scale = quantize_activation(x, "int8")
    np.testing.assert_array_equal(scale.numpy(), oracle.activation_scale(oracle.array(x), "int8"), strict=True)


def test_int4_scale_is_the_correctly_rounded_quotient() -> None:
    x = torch.randint(-8, 9, (1000, 8), generator=torch.Generator().manual_seed(0)) / 4  # means that fp32 holds exactly
    _, scale = quantize_activation(x, "int4")
    np.testing.assert_array_equal(scale.numpy(), oracle.activation_scale(x.numpy(), "int4"), strict=True)


@pytest.mark.parametrize("activations", INTEGER)
def test_scale_is_within_a_few_roundings_of_the_oracle(activations: str) -> None:
    x = random_activations(200, 96)
    _, scale = quantize_activation(x, activations)
    expected = oracle.activation_scale(x.numpy(), activations)
    np.testing.assert_allclose(scale.numpy(), expected, rtol=4 * np.finfo(np.float32).eps)  # mean, inverse, product


@pytest.mark.parametrize("activations", INTEGER)
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 1e-7])
def test_tiny_tokens_divide_by_the_floor(value: float, activations: str) -> None:
    codes, scale = quantize_activation(torch.full((2, 8), value), activations)
    numerator = {"int8": 127, "int4": 7**0.5}[activations]
    np.testing.assert_allclose(scale.numpy(), numerator / 1e-5, rtol=1e-6)
    assert codes.tolist() == [[round(value * numerator / 1e-5)] * 8] * 2


@pytest.mark.parametrize("activations", INTEGER)
def test_each_token_is_quantised_for_itself(activations: str) -> None:
    x = random_activations(5, 16) * torch.tensor([1.0, 1e3, 1e-3, 0.0, 7.0]).unsqueeze(-1)
    codes, scale = quantize_activation(x, activations)
    for token in range(5):
        alone_codes, alone_scale = quantize_activation(x[token], activations)
        assert torch.equal(codes[token], alone_codes)
        assert torch.equal(scale[token], alone_scale)


@pytest.mark.parametrize("activations", INTEGER)
def test_codes_stay_in_range_and_the_input_as_it_was(activations: str) -> None:
    x = random_activations(50, 64) ** 5
    before = x.clone()
    codes, _ = quantize_activation(x, activations)
    lowest, highest = RANGE[activations]
    assert lowest <= int(codes.min()) and int(codes.max()) <= highest
    assert torch.equal(x, before)


def test_no_tokens_give_no_codes() -> None:
    codes, scale = quantize_activation(torch.zeros(0, 8), "int8")
    assert (codes.shape, scale.shape) == ((0, 8), (0, 1))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activations", INTEGER)
def test_fake_quantised_values_are_codes_over_scale(activations: str, dtype: torch.dtype) -> None:
    x = random_activations(6, 32)
    codes, scale = quantize_activation(x, activations)
    expected = torch.from_numpy(codes.numpy().astype(np.float32) / scale.numpy()).to(dtype)
    fake = fake_quantize_activation(x, activations, dtype)
    assert fake.dtype == dtype
    assert torch.equal(fake, expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_none_only_casts(dtype: torch.dtype) -> None:
    x = random_activations(3, 5)
    assert torch.equal(fake_quantize_activation(x, "none", dtype), x.to(dtype))


def test_none_has_no_codes() -> None:
    with pytest.raises(ValueError, match="activations='none' have no integer codes"):
        quantize_activation(torch.ones(1, 4), "none")
