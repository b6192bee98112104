"""Formats `g4`, `g4s2`, `g4s3`: four codes by their number in a codebook, 1.5 or 1.25 bits a weight.

    g4    at most two of four are not 0, as in any 2:4    33 entries    6 bits a group    1.5 bits a weight
    g4s2  exactly two, as in `sign` 2:4                   24 entries    5 bits            1.25
    g4s3  exactly three, as in `sign` 3:4 (Sherry)        32 entries    5 bits            1.25

The codebook lists the groups in ascending order of their byte in format `i2`. The numbers of a row follow each other
as one stream of bits, lowest bit first, so that 8 of them fill whole bytes. With 5 bits:

    byte        0                 1                  2             ...
    bits        7 6 5 4 3 2 1 0   7 6 5 4 3 2 1 0    7 6 5 4 3 2 1 0
    of number   1 1 1 0 0 0 0 0   3 2 2 2 2 2 1 1    4 4 4 4 3 3 3 3

Rows start on a byte; bits that are left over are 0. I is a multiple of 4.
Shapes: O out_features, I in_features, G = I / 4 groups, B = ceil(G x bits / 8) bytes a row; leading dimensions are
free.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_bitnet.formats import i2

GROUP = 4
AT_A_TIME = 8  # numbers, which fill `bits` bytes
NOT_IN_BOOK = 255


@dataclass(frozen=True)
class Codebook:
    """All groups of four codes of which so many are not 0."""

    nonzeros: tuple[int, ...]
    bits: int

    @cached_property
    def entries(self) -> tuple[int, ...]:
        """The groups as bytes of format `i2`, ascending: a group's number is its place here."""
        groups = [codes for codes in product((-1, 0, 1), repeat=GROUP) if GROUP - codes.count(0) in self.nonzeros]
        return tuple(sorted(int(byte) for byte in i2.pack(torch.tensor(groups, dtype=torch.int8)).flatten()))

    def bytes_per_row(self, in_features: int) -> int:
        return -(-in_features // GROUP * self.bits // 8)

    def pack(self, codes: Tensor) -> Tensor:
        """Codes [..., O, I] int8 in {-1, 0, 1} -> packed [..., O, B] uint8; ValueError for a group not in the book."""
        if codes.shape[-1] % GROUP:
            raise ValueError(f"in_features={codes.shape[-1]} is not a multiple of {GROUP}: use format i2 or t5")
        table = torch.full((256,), NOT_IN_BOOK, dtype=torch.uint8)
        table[list(self.entries)] = torch.arange(len(self.entries), dtype=torch.uint8)
        numbers = table.to(codes.device)[i2.pack(codes).to(torch.int64)]  # [..., O, G]
        if not numbers.is_meta and bool((numbers == NOT_IN_BOOK).any()):
            allowed = " or ".join(map(str, self.nonzeros))
            raise ValueError(f"not every group of {GROUP} codes has {allowed} that are not 0: use format i2 or t5")
        eights = pad(numbers, (0, -numbers.shape[-1] % AT_A_TIME)).reshape(*codes.shape[:-1], -1, AT_A_TIME)
        stream = (eights.to(torch.int64) << _multiples(self.bits, AT_A_TIME, codes.device)).sum(
            dim=-1
        )  # [..., O, G / 8]
        packed = stream.unsqueeze(-1) >> _multiples(8, self.bits, codes.device) & 255  # [..., O, G / 8, bits]
        return packed.flatten(-2)[..., : self.bytes_per_row(codes.shape[-1])].to(torch.uint8)

    def unpack(self, packed: Tensor, in_features: int) -> Tensor:
        """Packed [..., O, B] uint8 -> codes [..., O, I] int8, the inverse of `pack`."""
        table = torch.zeros(1 << self.bits, dtype=torch.uint8)
        table[: len(self.entries)] = torch.tensor(self.entries, dtype=torch.uint8)
        numbers = self._numbers(packed)[..., : in_features // GROUP]
        return i2.unpack(table.to(packed.device)[numbers], in_features)

    def has_invalid_codes(self, packed: Tensor) -> bool:
        """True where a number is beyond the codebook: the bytes are damaged or of another format."""
        return bool((self._numbers(packed) >= len(self.entries)).any())

    def _numbers(self, packed: Tensor) -> Tensor:
        """The numbers [..., O, at least G] int64 in the stream."""
        chunks = pad(packed, (0, -packed.shape[-1] % self.bits)).reshape(*packed.shape[:-1], -1, self.bits)
        stream = (chunks.to(torch.int64) << _multiples(8, self.bits, packed.device)).sum(dim=-1)
        numbers = stream.unsqueeze(-1) >> _multiples(self.bits, AT_A_TIME, packed.device) & (1 << self.bits) - 1
        return numbers.flatten(-2)


def _multiples(step: int, count: int, device: torch.device) -> Tensor:
    return torch.arange(0, step * count, step, device=device)


AT_MOST_TWO = Codebook((0, 1, 2), bits=6)
EXACTLY_TWO = Codebook((2,), bits=5)
EXACTLY_THREE = Codebook((3,), bits=5)
