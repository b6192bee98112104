"""Latent weights made to order give back what they were made of, to the last bit where the maths is exact."""

from __future__ import annotations

import pytest
import torch

from sparse_bitnet.numerics.latent import latent_of_codes, latent_under_mask, with_scale
from sparse_bitnet.numerics.nm_mask import nm_mask
from sparse_bitnet.numerics.ternary import absmean_scale, quantize_weight
from sparse_bitnet.recipe import NMPattern, Recipe


@pytest.mark.parametrize("zeros", [0.0, 0.05, 0.42, 0.5, 0.7, 0.99])
@pytest.mark.parametrize("scale", [1.0, 1.6640625, 0.0123, 7.77e-4, 3.0000002])
def test_codes_and_scale_come_back_exactly(zeros: float, scale: float) -> None:
    scale = float(torch.tensor(scale))
    codes = torch.randint(0, 2, (96, 1000), dtype=torch.int8) * 2 - 1
    codes[torch.rand(codes.shape) < zeros] = 0
    latent = latent_of_codes(codes, scale)
    assert latent.dtype == torch.float32
    found, found_scale = quantize_weight(latent, Recipe("8:8"))
    assert torch.equal(found, codes)
    assert found_scale.tolist() == [scale]


def test_the_scale_times_the_codes_would_not_give_the_scale() -> None:
    codes = torch.tensor([[1, 0, -1, 0, 1, 0, -1, 1]], dtype=torch.int8)
    assert absmean_scale(codes * 2.0).item() == 1.25
    assert absmean_scale(latent_of_codes(codes, 2.0)).item() == 2.0


def test_a_weight_without_codes_stays_zero() -> None:
    assert not bool(latent_of_codes(torch.zeros(4, 8, dtype=torch.int8), 0.5).any())


@pytest.mark.parametrize("pattern", ["6:8", "2:4", "1:2", "8:8"])
@pytest.mark.parametrize("shape", [(24, 64), (3, 24, 64)], ids=str)
def test_the_mask_of_the_magnitudes_becomes_the_one_that_is_given(pattern: str, shape: tuple[int, ...]) -> None:
    parsed, weight = NMPattern.parse(pattern), torch.randn(shape)
    mask = nm_mask(weight.abs() * torch.rand(64).exp() ** 3, parsed)
    latent = latent_under_mask(weight, mask, parsed)
    assert torch.equal(nm_mask(latent, parsed), mask)
    assert torch.equal(latent[mask], weight[mask])
    assert torch.equal(latent.sign(), weight.sign())
    moved = latent != weight
    assert not bool((moved & mask).any())
    if not parsed.is_dense:
        assert bool(moved.any()) and not torch.equal(nm_mask(weight, parsed), mask)
    assert bool((latent.abs() <= weight.abs()).all())


def test_what_the_mask_drops_anyway_stays_and_what_it_drops_in_spite_of_its_size_becomes_half_of_the_smallest() -> None:
    weight = torch.tensor([[4.0, -3.0, 2.0, 1.0]])
    mask = torch.tensor([[True, False, True, False]])
    assert latent_under_mask(weight, mask, NMPattern(2, 4)).tolist() == [[4.0, -1.0, 2.0, 1.0]]


def test_ties_are_decided_as_the_mask_says() -> None:
    weight, mask = torch.ones(1, 4), torch.tensor([[False, True, False, True]])
    assert torch.equal(nm_mask(latent_under_mask(weight, mask, NMPattern(2, 4)), NMPattern(2, 4)), mask)


@pytest.mark.parametrize(("shape", "parts"), [((24, 64), ()), ((24, 64), (12, 8, 4)), ((3, 24, 64), (12, 12))])
def test_a_scale_is_given_back_and_codes_stay(shape: tuple[int, ...], parts: tuple[int, ...]) -> None:
    weight, recipe = torch.randn(shape), Recipe("8:8")
    codes, scale = quantize_weight(weight, recipe, parts)
    wanted = scale * torch.rand_like(scale).add(0.5)
    found, found_scale = quantize_weight(with_scale(weight, wanted, parts), recipe, parts)
    torch.testing.assert_close(found_scale, wanted, rtol=1e-6, atol=0)
    assert torch.equal(found, codes)
