"""Lifting to 2:4 and the fragments of it: products stay what they were, and golden words."""

from __future__ import annotations

import pytest
import torch

from sparse_bitnet.formats import fragments
from sparse_bitnet.formats.windows import lift_activation, lift_obstacle, lift_weight, lifted_width, lower_weight
from sparse_bitnet.numerics.nm_mask import nm_mask
from sparse_bitnet.recipe import NMPattern

PATTERNS = ["2:4", "1:4", "4:6", "3:8", "6:8", "8:10", "14:16", "30:32"]


def random_codes(rows: int, columns: int, pattern: str) -> torch.Tensor:
    """Ternary codes that hold the pattern, most of its groups filled."""
    codes = torch.where(torch.rand(rows, columns) < 0.5, -1, 1).to(torch.int8)
    codes = codes.masked_fill(torch.rand(rows, columns) < 0.1, 0)
    return codes * nm_mask(torch.randn(rows, columns), NMPattern.parse(pattern))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_lifted_product_is_the_product(pattern: str) -> None:
    m = NMPattern.parse(pattern).m
    codes, x = random_codes(7, 5 * m, pattern), torch.randint(-128, 128, (3, 5 * m))
    lifted = lift_weight(codes, m)
    assert lifted.shape == (7, lifted_width(5 * m, m))
    assert int((lifted.view(7, -1, 4) != 0).sum(-1).max()) <= 2
    assert torch.equal(lift_activation(x, m) @ lifted.long().T, x @ codes.long().T)
    assert torch.equal(lower_weight(lifted, m), codes)


def test_every_mask_of_6_of_8_has_a_lift() -> None:
    masks = torch.arange(256).unsqueeze(-1) >> torch.arange(8) & 1
    codes = masks[masks.sum(-1) <= 6].to(torch.int8)
    lifted = lift_weight(codes, 8).view(-1, 3, 4)
    assert torch.equal(lifted.sum((1, 2)), codes.sum(1))
    assert int(lifted.sum(-1).max()) == 2


def test_what_has_no_lift_is_refused_with_the_reason() -> None:
    assert lift_obstacle(NMPattern(6, 8)) is None
    assert "m must be even" in str(lift_obstacle(NMPattern(2, 5)))
    assert "keeps more than m - 2 = 6" in str(lift_obstacle(NMPattern(7, 8)))
    with pytest.raises(ValueError, match="a block of 8 codes holds more than 6"):
        lift_weight(torch.ones(1, 8, dtype=torch.int8), 8)


@pytest.mark.parametrize("shape", [(64, 128), (1, 4), (70, 260), (130, 640)])
def test_fragments_hold_every_code(shape: tuple[int, int]) -> None:
    codes = random_codes(*shape, "2:4")
    packed = fragments.pack(codes)
    assert packed.shape == fragments.shape(*shape)
    unpacked = fragments.unpack(packed, shape[0])
    assert torch.equal(unpacked[:, : shape[1]], codes)
    assert not unpacked[:, shape[1] :].any()


def test_golden_words() -> None:
    codes = torch.zeros(64, 128, dtype=torch.int8)
    codes[0, 1], codes[0, 3] = 1, -1  # thread 0: its metadata, and the first two codes of a0
    codes[9, 64 + 32 + 2] = -1  # row 1 + 8, second instruction, window 8: thread 7 its metadata, thread 4 in a3
    packed = fragments.pack(codes)[0, 0]
    empty = 0x44444444  # columns 0 and 1 of each window
    assert packed[0].tolist() == [empty - 4 + (1 | 3 << 2), 1 | 2 << 4, empty, 0]
    assert packed[7].tolist() == [empty, 0, empty - 4 + (2 | 3 << 2), 0]
    assert packed[4, 3].item() & 0xFFFFFFFF == 2 << 18
