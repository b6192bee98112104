"""The pictures of the formats, each made by the code that it shows: it cannot show anything else."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from drawing import BIT, CELL, LEFT, Drawing, code_class, code_text
from sparse_bitnet.formats import fragments, g4, i2, t5
from sparse_bitnet.formats.windows import lift_activation, lift_weight, lifted_width

WORD_BIT = 19  # of 32 in a row


def format_i2() -> str:
    codes = [1, 0, -1, 1, 0, 0, -1, 1]
    packed = i2.pack(torch.tensor([codes], dtype=torch.int8))[0].tolist()
    owned = owners(i2.pack, codes, [[index] for index in range(len(codes))])
    drawing = Drawing(
        8 * 4 * BIT / 2 + 8 * BIT + 60, 206, "Eight codes in two bytes of format i2",
        "<code>i2</code>: each code is stored as code + 1 in two bits, the lowest index in the lowest bits. "
        "The colours tell which bits change when a code changes.",
    )  # fmt: skip
    gap = 8 * BIT + 24
    for number, byte in enumerate(packed):
        x = 8 + number * gap
        for place in range(4):
            index = 4 * number + place
            middle = x + place * 2 * BIT + BIT - 1
            drawing.text(middle, 10, str(index), "faint small")
            drawing.box(middle - BIT + 2, 22, 2 * BIT - 4, CELL - 4, f"unit{index}", code_text(codes[index]))
            bits = [bit for bit in range(8) if owned[8 * number + bit] == index]
            target = x + (7 - sum(bits) / len(bits)) * BIT + BIT / 2 - 1
            drawing.line((middle, 54), (middle, 62), (target, 112), (target, 120), kind=f"link unit{index}")
        drawing.byte(x, 122, byte, owned[8 * number : 8 * number + 8])
    drawing.text(8 + gap - 12, 188, "bits 7 6 5 4 3 2 1 0 of each byte, left to right", "faint small")
    return str(drawing)


def format_t5() -> str:
    codes = [1, 0, -1, 1, 0]
    byte = int(t5.pack(torch.tensor([codes], dtype=torch.int8))[0, 0])
    digits = [byte // power % 3 for power in t5.POWERS]
    cell = 92
    drawing = Drawing(
        LEFT + 5 * cell + 10, 190, "Five codes in one byte of format t5",
        "<code>t5</code>: five ternary digits make a number of 0 to 242. No bit of it belongs to one code alone.",
    )  # fmt: skip
    for index, (code, digit, power) in enumerate(zip(codes, digits, t5.POWERS, strict=True)):
        x = LEFT + index * cell
        drawing.text(x + cell / 2 - 5, 10, str(index), "faint small")
        drawing.box(x, 22, cell - 10, 30, code_class(code), code_text(code))
        drawing.box(x, 62, cell - 10, 30, "plain", f"{digit} × {power}", "mono")
        if index:
            drawing.text(x - 5, 77, "+", "faint")
        drawing.line((x + cell / 2 - 5, 92), (x + cell / 2 - 5, 104), kind="line")
    drawing.line((LEFT + cell / 2 - 5, 104), (LEFT + 4.5 * cell - 5, 104), kind="line")
    middle = LEFT + 2.5 * cell - 5
    drawing.arrow(middle, 104, middle, 122)
    drawing.byte(middle - 4 * BIT, 126, byte)
    for name, y in (("codes", 37), ("digits", 77), ("byte", 139)):
        drawing.text(LEFT - 14, y, name, anchor="end")
    return str(drawing)


def format_g4() -> str:
    groups = [[1, 0, 0, -1], [0, 0, 1, 0], [0, -1, -1, 0], [0, 0, 0, 0]]
    return _stream(
        g4.AT_MOST_TWO, groups,
        "<code>g4</code>: four codes of which at most two are not 0 have a number of 0 to 32, in 6 bits; "
        "four of them fill three bytes.",
    )  # fmt: skip


def format_g4s3() -> str:
    groups = [[1, 0, -1, 1], [0, -1, -1, 1], [1, 1, 1, 0], [-1, 0, 1, -1], [1, -1, 0, 1], [0, 1, 1, 1], [-1, -1, 0, -1],
              [1, 0, 1, 1]]  # fmt: skip
    return _stream(
        g4.EXACTLY_THREE, groups,
        "<code>g4s3</code>: exactly three are not 0, 32 groups, 5 bits; eight of them fill five bytes. "
        "<code>g4s2</code>, exactly two, has 24 groups and the same 5 bits.",
    )  # fmt: skip


def codebook() -> str:
    """The entries of g4, by number."""
    entries = g4.AT_MOST_TWO.entries
    across, cell = 9, 15
    step = 4 * cell + 14
    rows = -(-len(entries) // across)
    drawing = Drawing(
        across * step, rows * 48, "The 33 groups of the codebook of format g4",
        "The codebook of <code>g4</code>, ordered by the group's byte in <code>i2</code>: orange is -1, blue +1.",
    )  # fmt: skip
    for number, byte in enumerate(entries):
        x, y = number % across * step + 4, number // across * 48
        drawing.text(x + 2 * cell - 1, y + 9, str(number), "faint small mono")
        group = i2.unpack(torch.tensor([[byte]], dtype=torch.uint8), 4)[0].tolist()
        for place, code in enumerate(group):
            drawing.box(x + place * cell, y + 18, cell - 2, cell + 4, code_class(code))
    return str(drawing)


def windows() -> str:
    codes = [1, -1, 0, 1, -1, 1, 0, 1]
    m, cell = 8, CELL + 4
    lifted = lift_weight(torch.tensor([codes], dtype=torch.int8), m)[0].tolist()
    columns = lift_activation(torch.arange(m).unsqueeze(0), m)[0].tolist()
    drawing = Drawing(
        LEFT + lifted_width(m, m) * cell + 40, 262, "A block of 6:8 weights lifted to three windows of 2:4",
        "A 6:8 block as 2:4 with 1.5 times the columns. Each code that is not 0 goes into the first window that has "
        "room; a dot is a code that another window holds. The activations are lifted by the same columns, so the "
        "product is the same.",
    )  # fmt: skip
    start = LEFT + 2 * cell
    drawing.text(LEFT - 14, 36, "6:8 block", anchor="end")
    for index, code in enumerate(codes):
        drawing.text(start + index * cell + cell / 2 - 2, 10, str(index), "faint small")
        drawing.box(start + index * cell, 20, cell - 4, CELL - 2, code_class(code), code_text(code))
    for window in range(len(lifted) // 4):
        y = 68 + window * 38
        drawing.text(LEFT - 14, y + 15, f"window {window}", anchor="end")
        for place in range(4):
            column = columns[4 * window + place]
            held = lifted[4 * window + place]
            text = code_text(held) if held or not codes[column] else "·"
            drawing.box(start + column * cell, y, cell - 4, 30, code_class(held) if held else "zero", text)
    y = 206
    drawing.text(LEFT - 14, y + 15, "lifted", anchor="end")
    for index, (code, column) in enumerate(zip(lifted, columns, strict=True)):
        x = LEFT + index * cell + index // 4 * 14
        drawing.box(x, y, cell - 4, 30, code_class(code), code_text(code))
        drawing.text(x + cell / 2 - 2, y + 44, f"x{column}", "faint small mono")
    return str(drawing)


def fragment_threads() -> str:
    """Which thread of the first warp holds which window of which row, and in which register."""
    rows, windows, cell, height = 16, fragments.WINDOWS, 38, 22
    drawing = Drawing(
        LEFT + windows * cell, rows * height + 64, "Threads that hold the windows of the first 16 rows of a fragment",
        "16 rows × 16 windows of 4 columns are the share of the first warp. A number is the thread that holds the two "
        "codes of the window, the colour its register: a0, a1, a2, a3.",
    )  # fmt: skip
    for window in range(windows):
        drawing.text(LEFT + window * cell + cell / 2 - 1, 12, str(window), "faint small mono")
    for row in range(rows):
        drawing.text(LEFT - 14, 34 + row * height, f"row {row}", "small", anchor="end")
        for window in range(windows):
            thread, bits = value_place(row, window)
            kind = f"unit{_register(bits)}"
            drawing.box(LEFT + window * cell, 24 + row * height, cell - 2, height - 2, kind, str(thread), "mono small")
    for register in range(4):
        x = LEFT + 20 + register * 90
        drawing.box(x, rows * height + 38, 18, 16, f"unit{register}")
        drawing.text(x + 26, rows * height + 46, f"a{register}", "mono small", anchor="start")
    return str(drawing)


def fragment_words() -> str:
    """The two words of thread 0, bit by bit."""
    drawing = Drawing(
        LEFT + 32 * WORD_BIT, 148, "The bits of the two words of thread 0",
        "The two 32-bit words of thread 0, bit 31 first, with the row and the window that bits belong to. Above, four "
        "bits a window: the columns of its two codes. Below, two bits a code; the colour is the register.",
    )  # fmt: skip
    drawing.text(LEFT - 14, 22, "metadata", anchor="end")
    drawing.text(LEFT - 14, 92, "codes", anchor="end")
    for row in range(16):
        for window in range(fragments.WINDOWS):
            thread, bit = metadata_place(row, window)
            if thread == 0:
                x = LEFT + (28 - bit) * WORD_BIT
                kind = f"unit{window % 2 + 6}"
                drawing.box(x, 8, 4 * WORD_BIT - 2, 28, kind, f"r{row} w{window}", "mono small")
            thread, bits = value_place(row, window)
            for first in bits[::2] if thread == 0 else ():
                x = LEFT + (30 - first) * WORD_BIT
                drawing.box(x, 78, 2 * WORD_BIT - 2, 28, f"unit{_register(bits)}", f"r{row} w{window}", "mono tiny")
    for bit in range(0, 32, 4):
        drawing.text(LEFT + (31 - bit) * WORD_BIT + WORD_BIT / 2, 124, str(bit), "faint tiny mono")
        drawing.text(LEFT + (31 - bit) * WORD_BIT + WORD_BIT / 2, 50, str(bit), "faint tiny mono")
    return str(drawing)


def value_place(row: int, window: int) -> tuple[int, list[int]]:
    """The thread and the bits of its second word in which `fragments.pack` puts the codes of a window."""
    lifted = torch.zeros(fragments.ROWS, fragments.COLUMNS, dtype=torch.int8)
    lifted[row, 4 * window : 4 * window + 2] = -1
    thread, word = _changed(lifted, 1)
    ones = [bit for bit in range(32) if word >> bit & 1]  # -1 is 10: the upper bit of each pair
    return thread, sorted(bit - low for bit in ones for low in (0, 1))


def metadata_place(row: int, window: int) -> tuple[int, int]:
    """The thread and the lowest of the four bits of its first word that tell where a window's codes stand."""
    lifted = torch.zeros(fragments.ROWS, fragments.COLUMNS, dtype=torch.int8)
    lifted[row, 4 * window + 2 : 4 * window + 4] = 1
    thread, word = _changed(lifted, 0)
    return thread, (word & -word).bit_length() // 4 * 4


def _changed(lifted: torch.Tensor, which: int) -> tuple[int, int]:
    """The one thread whose word differs from that of a weight of zeros, and the bits that do."""
    words, zeros = (fragments.pack(one)[0, 0, :, which] for one in (lifted, torch.zeros_like(lifted)))
    (thread,) = (words != zeros).nonzero().flatten().tolist()
    return thread, int(words[thread] ^ zeros[thread]) & 0xFFFFFFFF


def _stream(book: g4.Codebook, groups: Sequence[Sequence[int]], caption: str) -> str:
    """Groups, their numbers, and the bits of the bytes that these fill."""
    codes = [code for group in groups for code in group]
    units = [list(range(4 * index, 4 * index + 4)) for index in range(len(groups))]
    packed = book.pack(torch.tensor([codes], dtype=torch.int8))[0].tolist()
    alternatives = i2.unpack(torch.tensor(book.entries, dtype=torch.uint8).unsqueeze(1), 4).tolist()
    owned = owners(book.pack, codes, units, alternatives)
    across = min(4, len(groups))
    cell, step = 26, 4 * 26 + 30
    lines = -(-len(groups) // across)
    per_line = min(3, len(packed))
    byte_lines = -(-len(packed) // per_line)
    top = 84 * lines
    width = max(across * step, per_line * (8 * BIT + 14))
    drawing = Drawing(width, top + 66 * byte_lines, f"Groups of four codes, {book.bits} bits each", caption)
    for index, group in enumerate(groups):
        x, y = index % across * step + 4, index // across * 84
        for place, code in enumerate(group):
            drawing.box(x + place * cell, y + 4, cell - 3, cell, code_class(code), code_text(code), "small")
        number = book.entries.index(int(i2.pack(torch.tensor([group], dtype=torch.int8))[0, 0]))
        bits = f"{number:0{book.bits}b}"
        drawing.box(x, y + 38, 4 * cell - 3, 26, f"unit{index % 8}", f"{number} = {bits}", "mono")
    for index, byte in enumerate(packed):
        x, y = index % per_line * (8 * BIT + 14) + 4, top + index // per_line * 66
        drawing.byte(x, y, byte, owned[8 * index : 8 * index + 8])
    return str(drawing)


def owners(
    pack: Callable[[torch.Tensor], torch.Tensor],
    codes: Sequence[int],
    units: Sequence[Sequence[int]],
    alternatives: Sequence[Sequence[int]] = ((-1,), (0,), (1,)),
) -> list[int]:
    """For every bit of the packed row, lowest first byte by byte, the unit of codes whose change changes it."""
    before = pack(torch.tensor([codes], dtype=torch.int8))[0].tolist()
    found = [-1] * (8 * len(before))
    for number, unit in enumerate(units):
        for values in alternatives:
            changed = list(codes)
            for index, value in zip(unit, values, strict=True):
                changed[index] = value
            after = pack(torch.tensor([changed], dtype=torch.int8))[0].tolist()
            for place, (one, other) in enumerate(zip(before, after, strict=True)):
                for bit in range(8):
                    if (one ^ other) >> bit & 1:
                        assert found[8 * place + bit] in (-1, number)
                        found[8 * place + bit] = number
    return found


def _register(bits: Sequence[int]) -> int:
    """a0 .. a3 of the bits of a window, see formats/fragments.py."""
    return bits[0] // 16 + bits[0] // 2 % 2 * 2
