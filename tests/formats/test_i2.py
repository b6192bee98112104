"""Format `i2` against bytes written by hand, and unpack(pack(codes)) against codes: equal.

Shapes: O out_features, I in_features, B bytes a row.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from sparse_bitnet.formats import FORMATS, choose_format, get_format, i2
from sparse_bitnet.recipe import Recipe

GOLDEN = [
    ([0, 0, 0, 0], [0b01_01_01_01]),
    ([-1, 0, 1, 0], [0b01_10_01_00]),
    ([1, 1, 1, 1], [0b10_10_10_10]),
    ([-1, -1, -1, -1], [0b00_00_00_00]),
    ([1], [0b01_01_01_10]),
    ([-1, 1, 0], [0b01_01_10_00]),
    ([0, 0, 0, 1, -1], [0b10_01_01_01, 0b01_01_01_00]),
    ([1, 0, -1, 1, 0, -1, 1, 0, -1], [0b10_00_01_10, 0b01_10_00_01, 0b01_01_01_00]),
]


@st.composite
def code_tensors(draw: DrawFn) -> torch.Tensor:
    shape = (*draw(st.lists(st.integers(1, 3), max_size=2)), draw(st.integers(1, 33)), draw(st.integers(1, 130)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    return torch.randint(-1, 2, shape, generator=generator, dtype=torch.int8)


@pytest.mark.parametrize(("codes", "expected"), GOLDEN)
def test_packs_the_lowest_index_in_the_lowest_bits(codes: list[int], expected: list[int]) -> None:
    packed = i2.pack(torch.tensor([codes], dtype=torch.int8))
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [expected]


@pytest.mark.parametrize(("codes", "stored"), GOLDEN)
def test_unpacks_bytes_written_by_hand(codes: list[int], stored: list[int]) -> None:
    unpacked = i2.unpack(torch.tensor([stored], dtype=torch.uint8), len(codes))
    assert unpacked.dtype == torch.int8
    assert unpacked.tolist() == [codes]


def test_each_row_starts_on_a_byte() -> None:
    codes = torch.tensor([[1, 0, 0, 0, -1], [-1, 1, 1, 1, 0]], dtype=torch.int8)
    assert i2.pack(codes).tolist() == [[0b01_01_01_10, 0b01_01_01_00], [0b10_10_10_00, 0b01_01_01_01]]


@settings(deadline=None, max_examples=50)
@given(code_tensors())
def test_round_trip_is_exact(codes: torch.Tensor) -> None:
    before = codes.clone()
    packed = i2.pack(codes)
    assert packed.shape == (*codes.shape[:-1], i2.bytes_per_row(codes.shape[-1]))
    assert torch.equal(i2.unpack(packed, codes.shape[-1]), codes)
    assert torch.equal(codes, before)
    assert not i2.has_invalid_codes(packed)


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (33, 130), (2, 3, 5, 7)])
def test_round_trip_of_odd_shapes(shape: tuple[int, ...]) -> None:
    codes = torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    assert torch.equal(i2.unpack(i2.pack(codes), shape[-1]), codes)


def test_unpacking_leaves_the_bytes_alone() -> None:
    packed = torch.tensor([[0b01_10_01_00]], dtype=torch.uint8)
    i2.unpack(packed, 4)
    assert packed.tolist() == [[0b01_10_01_00]]


@pytest.mark.parametrize(("width", "expected"), [(1, 1), (4, 1), (5, 2), (8, 2), (130, 33)])
def test_bytes_per_row_round_up(width: int, expected: int) -> None:
    assert i2.bytes_per_row(width) == expected


@pytest.mark.parametrize("position", range(4))
def test_finds_the_pair_that_is_never_written(position: int) -> None:
    packed = torch.full((3, 5), 0b01_01_01_01, dtype=torch.uint8)
    assert not i2.has_invalid_codes(packed)
    packed[2, 4] |= 0b11 << 2 * position
    assert i2.has_invalid_codes(packed)


def test_neighbouring_bits_of_two_codes_are_no_invalid_pair() -> None:
    assert not i2.has_invalid_codes(torch.tensor([[0b01_10_01_10, 0b00_01_10_00]], dtype=torch.uint8))


def test_packs_on_the_meta_device() -> None:
    packed = i2.pack(torch.empty(3, 7, 130, dtype=torch.int8, device="meta"))
    assert (packed.device.type, packed.shape, packed.dtype) == ("meta", (3, 7, 33), torch.uint8)
    assert i2.unpack(packed, 130).shape == (3, 7, 130)


def test_unknown_format_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match=r"format 'i3' is unknown: use one of .*i2"):
        get_format("i3")


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_knows_its_own_name(name: str) -> None:
    assert get_format(name).name == name


def test_auto_chooses_a_format_for_every_recipe_with_codes() -> None:
    assert choose_format(Recipe("6:8")).name in FORMATS
    assert choose_format(Recipe("3:4", values="sign")).name in FORMATS
    assert choose_format(Recipe("6:8"), "i2").name == "i2"


def test_full_values_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match="values='full' are not ternary and cannot be packed"):
        choose_format(Recipe("6:8", values="full"))
