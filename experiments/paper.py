"""What arXiv 2603.05168 tells, of 0.5 B parameters and 50 B tokens, one seed."""

from __future__ import annotations

PATTERN = "6:8"  # its main one, which its ablations are at
DEGRADATIONS = {
    "7:8": (1.02, 1.01), "6:8": (1.05, 1.01), "5:8": (1.07, 1.03), "4:8": (1.19, 1.06), "3:8": (1.31, 1.15),
    "2:8": (1.45, 1.27),
}  # fmt: skip
"""Perplexity over dense, BF16 and ternary."""
ABLATIONS = {
    "mask from the quantised weights": 32.23 / 26.31, "dense until 25 %": 27.48 / 26.31,
    "dense until 50 %": 27.39 / 26.31, "dense until 75 %": 26.71 / 26.31,
}  # fmt: skip
"""Perplexity over that of the method. Of the other ablations it is known that they are worse."""
ZEROS = 0.42
"""Of trained ternary weights, without a mask."""
