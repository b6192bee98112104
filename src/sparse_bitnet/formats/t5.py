"""Format `t5`: five codes a byte, 1.6 bits a weight, any pattern.

A byte is a number of five ternary digits, each a code + 1, the lowest index the lowest digit:

    byte = d[i] + 3 d[i+1] + 9 d[i+2] + 27 d[i+3] + 81 d[i+4]        0 to 242; 243 to 255 are never written

Rows start on a byte; where I is no multiple of 5 the last byte is filled up with code 0.
Shapes: O out_features, I in_features, B = ceil(I / 5) bytes a row; leading dimensions are free.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

CODES_PER_BYTE = 5
POWERS = (1, 3, 9, 27, 81)


def bytes_per_row(in_features: int) -> int:
    return -(-in_features // CODES_PER_BYTE)


def pack(codes: Tensor) -> Tensor:
    """Codes [..., O, I] int8 in {-1, 0, 1} -> packed [..., O, B] uint8. The input is not changed."""
    in_features, width = codes.shape[-1], bytes_per_row(codes.shape[-1])
    filled = pad(codes, (0, width * CODES_PER_BYTE - in_features))
    digits = (filled + 1).to(torch.uint8).reshape(*codes.shape[:-1], width, CODES_PER_BYTE)  # [..., O, B, 5]
    packed = digits[..., 0].clone()
    for position in range(1, CODES_PER_BYTE):
        packed += digits[..., position] * POWERS[position]
    return packed


def unpack(packed: Tensor, in_features: int) -> Tensor:
    """Packed [..., O, B] uint8 -> codes [..., O, I] int8, the inverse of `pack`."""
    digits = torch.stack([packed // power % 3 for power in POWERS], dim=-1)  # [..., O, B, 5]
    return digits.flatten(-2)[..., :in_features].to(torch.int8) - 1


def has_invalid_codes(packed: Tensor) -> bool:
    """True where a byte is 243 or more, which `pack` never writes: the bytes are damaged or of another format."""
    return bool((packed >= 3**CODES_PER_BYTE).any())
