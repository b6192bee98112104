"""What arXiv 2603.05168 tells of its smallest model, 0.5 B parameters after about 50 B tokens.

The figures are from public summaries of the paper and from its authors' repository.
"""

from __future__ import annotations

PATTERN = "6:8"  # its main one, which its ablations and larger models are at
DEGRADATIONS = {
    "7:8": (1.02, 1.01), "6:8": (1.05, 1.01), "5:8": (1.07, 1.03), "4:8": (1.19, 1.06), "3:8": (1.31, 1.15),
    "2:8": (1.45, 1.27),
}  # fmt: skip
"""Perplexity over dense, BF16 and ternary."""
METHOD = 26.31
"""Perplexity of the method at PATTERN."""
ABLATIONS = {
    "mask from the quantised weights": 32.23 / METHOD, "dense until 25 %": 27.48 / METHOD,
    "dense until 50 %": 27.39 / METHOD, "dense until 75 %": 26.71 / METHOD,
}  # fmt: skip
"""Perplexity over the method's. Of its other ablations no figure is known here but that they are worse."""
ACCURACY = (-3.02, -1.15)
"""What PATTERN adds to the mean zero-shot accuracy, in points, BF16 and ternary."""
ZEROS = 0.42
"""Of trained ternary weights, without a mask."""
OPERATIONS = 6 * 0.5e9 * 50e9
"""Of one run."""
RUNS = 14
"""Of DEGRADATIONS, dense models among them."""
