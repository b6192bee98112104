"""Format `t5` against bytes worked out by hand."""

from __future__ import annotations

import pytest
import torch

from sparse_bitnet.formats import t5

GOLDEN = [
    ([0, 0, 0, 0, 0], [1 + 3 + 9 + 27 + 81]),
    ([-1, -1, -1, -1, -1], [0]),
    ([1, 1, 1, 1, 1], [242]),
    ([1, -1, 0, -1, 1], [2 + 0 + 9 + 0 + 162]),
    ([-1], [0 + 3 + 9 + 27 + 81]),
    ([0, 1, -1, 0, 1, 1], [1 + 6 + 0 + 27 + 162, 2 + 3 + 9 + 27 + 81]),
]


@pytest.mark.parametrize(("codes", "stored"), GOLDEN)
def test_the_lowest_index_is_the_lowest_digit(codes: list[int], stored: list[int]) -> None:
    assert t5.pack(torch.tensor([codes], dtype=torch.int8)).tolist() == [stored]
    assert t5.unpack(torch.tensor([stored], dtype=torch.uint8), len(codes)).tolist() == [codes]


@pytest.mark.parametrize(("byte", "invalid"), [(0, False), (242, False), (243, True), (255, True)])
def test_finds_bytes_that_are_never_written(byte: int, invalid: bool) -> None:
    assert t5.has_invalid_codes(torch.tensor([[121, byte]], dtype=torch.uint8)) == invalid
