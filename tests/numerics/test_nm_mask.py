"""`nm_mask` against a mask found by sorting each group in Python: equal in every bit, ties included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from numerics import oracle
from sparse_bitnet.numerics.nm_mask import nm_mask
from sparse_bitnet.recipe import NMPattern

SUBNORMAL = float(np.float32(1e-45))
FEW_VALUES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, SUBNORMAL, -SUBNORMAL, 2 * SUBNORMAL])
ANY_VALUE = st.floats(width=32, allow_nan=False)


@st.composite
def patterns(draw: st.DrawFn) -> NMPattern:
    m = draw(st.integers(2, 32))
    return NMPattern(draw(st.integers(1, m)), m)


@st.composite
def patterned_scores(draw: st.DrawFn, values: st.SearchStrategy[float]) -> tuple[torch.Tensor, NMPattern]:
    pattern = draw(patterns())
    rows, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    size = rows * groups * pattern.m
    flat = draw(st.lists(values, min_size=size, max_size=size))
    return torch.tensor(flat, dtype=torch.float32).reshape(rows, -1), pattern


def assert_equals_oracle(scores: torch.Tensor, pattern: NMPattern) -> None:
    mask = nm_mask(scores, pattern)
    assert mask.dtype == torch.bool
    np.testing.assert_array_equal(mask.numpy(), oracle.nm_mask(oracle.array(scores), pattern))


@pytest.mark.parametrize(
    ("scores", "pattern", "kept"),
    [
        ([1.0, 1.0, 1.0, 1.0], "2:4", [1, 1, 0, 0]),
        ([1.0, -2.0, 2.0, 2.0], "2:4", [0, 1, 1, 0]),
        ([0.0, 0.0, 0.0, 3.0], "2:4", [1, 0, 0, 1]),
        ([-5.0, 4.0, 3.0, 6.0], "1:4", [0, 0, 0, 1]),
        ([1.0, 2.0, 2.0, 1.0, 3.0, 3.0], "1:2", [0, 1, 1, 0, 1, 0]),
        ([-0.0, 0.0, SUBNORMAL], "1:3", [0, 0, 1]),
    ],
)
def test_keeps_the_largest_and_of_equals_the_first(scores: list[float], pattern: str, kept: list[int]) -> None:
    assert nm_mask(torch.tensor(scores), NMPattern.parse(pattern)).tolist() == [bool(bit) for bit in kept]


@settings(deadline=None, max_examples=50)
@given(patterned_scores(FEW_VALUES))
def test_equals_the_oracle_where_most_values_tie(case: tuple[torch.Tensor, NMPattern]) -> None:
    assert_equals_oracle(*case)


@settings(deadline=None, max_examples=50)
@given(patterned_scores(ANY_VALUE))
def test_equals_the_oracle_on_any_floats(case: tuple[torch.Tensor, NMPattern]) -> None:
    assert_equals_oracle(*case)


@settings(deadline=None, max_examples=50)
@given(patterned_scores(FEW_VALUES))
def test_every_group_keeps_exactly_n(case: tuple[torch.Tensor, NMPattern]) -> None:
    scores, pattern = case
    counts = nm_mask(scores, pattern).unflatten(-1, (-1, pattern.m)).sum(dim=-1)
    assert bool((counts == pattern.n).all())


@pytest.mark.parametrize("m", range(2, 33))
def test_equals_the_oracle_for_every_n_of_every_m(m: int) -> None:
    scores = torch.randint(-3, 4, (3, 2 * m), generator=torch.Generator().manual_seed(m)).float()
    for n in range(1, m + 1):
        assert_equals_oracle(scores, NMPattern(n, m))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_equals_the_oracle_in_every_dtype(dtype: torch.dtype) -> None:
    scores = (torch.randn(5, 48, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    for pattern in ("6:8", "1:2", "3:4", "5:16"):
        assert_equals_oracle(scores, NMPattern.parse(pattern))


def test_ranks_in_the_dtype_that_it_is_given() -> None:
    scores = torch.tensor([1.0, 1.0 + 2**-20])
    assert nm_mask(scores, NMPattern(1, 2)).tolist() == [False, True]
    assert nm_mask(scores.bfloat16(), NMPattern(1, 2)).tolist() == [True, False]
    assert nm_mask(1 + torch.tensor([0.0, 2**-40], dtype=torch.float64), NMPattern(1, 2)).tolist() == [False, True]


def test_all_zeros_keep_the_first_n() -> None:
    assert nm_mask(torch.zeros(2, 8), NMPattern(3, 4)).tolist() == [[True, True, True, False] * 2] * 2


def test_dense_pattern_keeps_everything() -> None:
    assert bool(nm_mask(torch.zeros(3, 16), NMPattern(8, 8)).all())


def test_leading_dimensions_are_free() -> None:
    scores = torch.randint(-2, 3, (2, 3, 5, 8), generator=torch.Generator().manual_seed(1)).float()
    mask = nm_mask(scores, NMPattern(2, 4))
    assert mask.shape == scores.shape
    assert torch.equal(mask, nm_mask(scores.reshape(-1, 8), NMPattern(2, 4)).reshape(scores.shape))
    assert torch.equal(mask[0, 0, 0], nm_mask(scores[0, 0, 0], NMPattern(2, 4)))


def test_strides_make_no_difference_and_the_scores_stay() -> None:
    scores = torch.randint(-2, 3, (8, 6), generator=torch.Generator().manual_seed(2)).float()
    before = scores.clone()
    assert torch.equal(nm_mask(scores.T, NMPattern(2, 4)), nm_mask(scores.T.contiguous(), NMPattern(2, 4)))
    assert torch.equal(scores, before)


@pytest.mark.parametrize(("width", "pattern"), [(10, "2:4"), (7, "6:8"), (33, "32:32")])
def test_refuses_a_width_that_does_not_divide_with_the_numbers(width: int, pattern: str) -> None:
    m = NMPattern.parse(pattern).m
    with pytest.raises(ValueError, match=rf"in_features={width} is not a multiple of m={m}\b.*{pattern}"):
        nm_mask(torch.zeros(2, width), NMPattern.parse(pattern))
