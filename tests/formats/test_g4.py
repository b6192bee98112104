"""Formats `g4...` against codebooks counted and bytes worked out by hand."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from sparse_bitnet.formats import i2
from sparse_bitnet.formats.g4 import AT_MOST_TWO, EXACTLY_THREE, EXACTLY_TWO, Codebook

BOOKS = {"g4": (AT_MOST_TWO, 33), "g4s2": (EXACTLY_TWO, 24), "g4s3": (EXACTLY_THREE, 32)}


@pytest.mark.parametrize("name", BOOKS)
def test_a_codebook_has_every_group_of_its_kind_once_in_ascending_order(name: str) -> None:
    book, count = BOOKS[name]
    assert len(book.entries) == count <= 1 << book.bits
    assert list(book.entries) == sorted(set(book.entries))
    groups = {codes for codes in product((-1, 0, 1), repeat=4) if 4 - codes.count(0) in book.nonzeros}
    listed = i2.unpack(torch.tensor(book.entries, dtype=torch.uint8).unsqueeze(1), 4)
    assert set(map(tuple, listed.tolist())) == groups


@pytest.mark.parametrize(
    ("book", "groups", "stored"),
    [
        # exactly three: 00_00_00_01 = (0, -1, -1, -1) is entry 0, 00_00_01_00 entry 1, the last is (1, 1, 1, 0) = 31
        (EXACTLY_THREE, [(0, -1, -1, -1)], [0]),
        (EXACTLY_THREE, [(-1, 0, -1, -1)], [1]),
        (EXACTLY_THREE, [(0, 1, 1, 1)], [31]),
        (EXACTLY_THREE, [(0, 1, 1, 1), (0, -1, -1, -1)], [0b000_11111, 0b00]),
        (EXACTLY_THREE, [(0, -1, -1, -1), (0, 1, 1, 1)], [0b111_00000, 0b11]),
        (EXACTLY_THREE, [(-1, 0, -1, -1)] * 8, [0b00100001, 0b10000100, 0b00010000, 0b01000010, 0b00001000]),
        # exactly two: 00_00_01_01 is entry 0
        (EXACTLY_TWO, [(0, 0, -1, -1)], [0]),
        (EXACTLY_TWO, [(0, 0, 1, 1)], [23]),
        # at most two: 00_00_01_01 is entry 0, 10_10_01_01 entry 32
        (AT_MOST_TWO, [(0, 0, -1, -1)], [0]),
        (AT_MOST_TWO, [(0, 0, 1, 1)], [32]),
        (AT_MOST_TWO, [(0, 0, 1, 1), (0, 0, -1, -1), (0, 0, 1, 1)], [0b00_100000, 0b0000_0000, 0b10]),
        (AT_MOST_TWO, [(0, 0, 1, 1)] * 4, [0b00100000, 0b00001000, 0b10000010]),
    ],
)
def test_bytes_worked_out_by_hand(book: Codebook, groups: list[tuple[int, ...]], stored: list[int]) -> None:
    codes = torch.tensor(groups, dtype=torch.int8).reshape(1, -1)
    assert book.pack(codes).tolist() == [stored]
    assert torch.equal(book.unpack(torch.tensor([stored], dtype=torch.uint8), codes.shape[1]), codes)


@pytest.mark.parametrize("name", BOOKS)
def test_a_group_that_is_not_in_the_book_is_refused(name: str) -> None:
    book, _ = BOOKS[name]
    with pytest.raises(ValueError, match=r"not every group of 4 codes has .* that are not 0: use format i2 or t5"):
        book.pack(torch.tensor([[1, 1, 1, 1]], dtype=torch.int8))


def test_a_width_that_is_no_multiple_of_four_is_refused() -> None:
    with pytest.raises(ValueError, match="in_features=6 is not a multiple of 4: use format i2 or t5"):
        AT_MOST_TWO.pack(torch.zeros(1, 6, dtype=torch.int8))


@pytest.mark.parametrize("name", ["g4", "g4s2"])
def test_finds_numbers_beyond_the_codebook(name: str) -> None:
    book, count = BOOKS[name]
    for place in range(8):
        stream = torch.zeros(1, book.bits, dtype=torch.uint8)
        assert not book.has_invalid_codes(stream)
        for bit in range(book.bits):
            if count >> bit & 1:
                position = place * book.bits + bit
                stream[0, position // 8] |= 1 << position % 8
        assert book.has_invalid_codes(stream)
