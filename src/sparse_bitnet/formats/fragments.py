"""Fragments: a lifted 2:4 ternary weight as the operand A of `wgmma.sp.m64n256k64`, 2 bits a lifted weight.

One instruction takes 64 rows by 64 columns, in which each of 128 threads holds two 32-bit words:

    metadata   8 windows x 4 bits: the columns of the two weights that are stored, 2 bits each, ascending
    values     16 codes x 2 bits: 0, 1, 2 for 0, +1, -1; code 2j at bits 4j, code 2j + 1 at bits 4j + 2, where j = 0..7

With w = thread / 32, r = thread / 4 % 8, q = thread % 4: the metadata are those of row 16 w + r + 8 (q % 2), windows
8 (q / 2) .. + 7. The values are four registers a0 .. a3 of four codes, two windows each:

    a0   row 16 w + r        windows 2 q, 2 q + 1           at bits 0, 4, 8, 12
    a1   row 16 w + r + 8    windows 2 q, 2 q + 1           16, 20, 24, 28
    a2   row 16 w + r        windows 8 + 2 q, 8 + 2 q + 1   2, 6, 10, 14
    a3   row 16 w + r + 8    windows 8 + 2 q, 8 + 2 q + 1   18, 22, 26, 30

so that a mask and a shift give the selectors of two byte permutations each. Two instructions are a stage, whose four
words a thread reads at once. Rows and columns that are missing are 0, which has metadata too.

Shapes: O out_features, K lifted columns, G = ceil(O / 64) groups of rows, S = ceil(K / 128) stages.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

ROWS, COLUMNS, WINDOWS, THREADS = 64, 64, 16, 128  # of an instruction
INSTRUCTIONS = 2  # a stage
WORDS = 2 * INSTRUCTIONS  # a thread and stage
METADATA_OF_ZEROS = 0x44444444  # columns 0 and 1 of each window


def shape(out_features: int, lifted_width: int) -> tuple[int, int, int, int]:
    """[G, S, 128, 4] of the fragments of a weight [O, K]."""
    return -(-out_features // ROWS), -(-lifted_width // (COLUMNS * INSTRUCTIONS)), THREADS, WORDS


def pack(lifted: Tensor) -> Tensor:
    """Lifted codes [O, K] int8 in {-1, 0, 1}, 2:4 -> fragments [G, S, 128, 4] int32."""
    groups, stages, _, _ = shape(*lifted.shape)
    height, width = groups * ROWS, stages * INSTRUCTIONS * COLUMNS
    whole = pad(lifted, (0, width - lifted.shape[1], 0, height - lifted.shape[0]))
    windows = whole.reshape(groups, ROWS, stages * INSTRUCTIONS, WINDOWS, 4).long()  # [G, 64, 2 S, 16, 4]
    columns, codes = _two_of_each(windows)
    metadata = columns[..., 0] | columns[..., 1] << 2  # [G, 64, 2 S, 16]
    values = torch.where(codes < 0, 2, codes)
    values = values[..., 0] | values[..., 1] << 4  # at bits 4 (2 i) and 4 (2 i + 1) of a register
    rows, first = _metadata_places(lifted.device)
    words = torch.zeros(groups, stages * INSTRUCTIONS, THREADS, 2, dtype=torch.long, device=lifted.device)
    for window in range(8):
        words[..., 0] |= metadata[:, rows, :, first + window].movedim(0, -1) << 4 * window
    for register in range(4):
        rows, first = _value_places(register, lifted.device)
        for window in range(2):
            bit = 16 * (register % 2) + 2 * (register // 2) + 8 * window
            words[..., 1] |= values[:, rows, :, first + window].movedim(0, -1) << bit
    words = words.reshape(groups, stages, INSTRUCTIONS, THREADS, 2).movedim(2, 3).flatten(-2)  # [G, S, 128, 4]
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def unpack(fragments: Tensor, out_features: int) -> Tensor:
    """Fragments [G, S, 128, 4] int32 -> lifted codes [O, 128 S] int8, zeros in the columns beyond K."""
    groups, stages, _, _ = fragments.shape
    words = fragments.long().reshape(groups, stages, THREADS, INSTRUCTIONS, 2).movedim(3, 2)
    words = words.flatten(1, 2)  # [G, 2 S, 128, 2]
    windows = torch.zeros(groups, ROWS, stages * INSTRUCTIONS, WINDOWS, 4, dtype=torch.long, device=fragments.device)
    metadata = torch.zeros(windows.shape[:-1], dtype=torch.long, device=fragments.device)
    rows, first = _metadata_places(fragments.device)
    for window in range(8):
        metadata[:, rows, :, first + window] = (words[..., 0] >> 4 * window & 15).movedim(-1, 0)
    for register in range(4):
        rows, first = _value_places(register, fragments.device)
        for window in range(2):
            bit = 16 * (register % 2) + 2 * (register // 2) + 8 * window
            for place in range(2):
                value = (words[..., 1] >> bit + 4 * place & 3).movedim(-1, 0)  # [128, G, 2 S]
                code = torch.where(value == 2, -1, value)
                column = metadata[:, rows, :, first + window] >> 2 * place & 3
                here = windows[:, rows, :, first + window]  # [128, G, 2 S, 4]
                windows[:, rows, :, first + window] = here.scatter_add(-1, column.unsqueeze(-1), code.unsqueeze(-1))
    return windows.flatten(2).flatten(0, 1)[:out_features].to(torch.int8)


def _two_of_each(windows: Tensor) -> tuple[Tensor, Tensor]:
    """The columns [..., 2], ascending, and codes [..., 2] of what windows [..., 4] hold; zeros where that is less."""
    present = windows != 0
    count = present.sum(-1)
    first = present.long().argmax(-1)  # 0 where there is none
    second = 3 - present.flip(-1).long().argmax(-1)
    second = torch.where(count == 0, 1, torch.where(count == 1, 3, second))
    first = torch.where((count == 1) & (first == 3), 2, first)
    columns = torch.stack([first, second], dim=-1)
    return columns, windows.gather(-1, columns)


@lru_cache(maxsize=16)
def _metadata_places(device: torch.device) -> tuple[Tensor, Tensor]:
    """The row and the first window [128] of each thread's metadata."""
    thread = torch.arange(THREADS, device=device)
    return thread // 32 * 16 + thread // 4 % 8 + thread % 2 * 8, thread % 4 // 2 * 8


@lru_cache(maxsize=64)
def _value_places(register: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The row and the first window [128] of each thread's codes in `register`."""
    thread = torch.arange(THREADS, device=device)
    return thread // 32 * 16 + thread // 4 % 8 + register % 2 * 8, register // 2 * 8 + thread % 4 * 2
