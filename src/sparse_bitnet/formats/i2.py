"""Format `i2`: 2 bits a weight, any pattern.

A byte holds four consecutive codes of a row, the lowest index in the lowest bits, each stored as code + 1:

    bits   7 6   5 4   3 2   1 0
    code   i+3   i+2   i+1   i        00 = -1   01 = 0   10 = +1   11 = never written

Rows start on a byte; where I is no multiple of 4 the last byte is filled up with code 0.
Shapes: O out_features, I in_features, B = ceil(I / 4) bytes a row; leading dimensions are free.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

CODES_PER_BYTE = 4


def bytes_per_row(in_features: int) -> int:
    return -(-in_features // CODES_PER_BYTE)


def pack(codes: Tensor) -> Tensor:
    """Codes [..., O, I] int8 in {-1, 0, 1} -> packed [..., O, B] uint8. The input is not changed."""
    in_features, width = codes.shape[-1], bytes_per_row(codes.shape[-1])
    filled = pad(codes, (0, width * CODES_PER_BYTE - in_features))
    digits = (filled + 1).to(torch.uint8).reshape(*codes.shape[:-1], width, CODES_PER_BYTE)  # [..., O, B, 4]
    return digits[..., 0] | digits[..., 1] << 2 | digits[..., 2] << 4 | digits[..., 3] << 6


def unpack(packed: Tensor, in_features: int) -> Tensor:
    """Packed [..., O, B] uint8 -> codes [..., O, I] int8, the inverse of `pack`."""
    digits = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1)  # [..., O, B, 4]
    return digits.flatten(-2)[..., :in_features].to(torch.int8) - 1


def has_invalid_codes(packed: Tensor) -> bool:
    """True where any pair of bits is 11, which `pack` never writes: the bytes are damaged or of another format."""
    return bool((packed & packed >> 1 & 0b01010101).any())
