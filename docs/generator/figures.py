"""The pictures of the site: the method, the formats, the choice of a kernel, and charts of the result files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from drawing import LEFT, Drawing, bars, code_class, code_text
from layouts import (
    codebook,
    format_g4,
    format_g4s3,
    format_i2,
    format_t5,
    fragment_threads,
    fragment_words,
    windows,
)
from sparse_bitnet.numerics.nm_mask import nm_mask
from sparse_bitnet.numerics.ternary import absmean_scale, effective_weight, ternary_codes
from sparse_bitnet.recipe import Recipe

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
ROW = (0.92, -0.34, 0.41, -1.24, 0.47, -0.05, 0.66, -0.58)  # a group of 8 latent weights


def method() -> str:
    """One group of 8 weights from latent to effective."""
    weight = torch.tensor([ROW])
    recipe = Recipe("6:8")
    scale = absmean_scale(weight)
    codes, mask = ternary_codes(weight, scale)[0].tolist(), nm_mask(weight, recipe.pattern)[0].tolist()
    effective = effective_weight(weight, recipe, (), torch.float32)[0].tolist()
    cell, top = 62, 128
    drawing = Drawing(
        LEFT + 8 * cell, top + 4 * 44 + 8, "A group of eight weights: latent, mask, codes, effective weight",
        f"A row of one group, pattern 6:8, scale γ = mean |W| = {float(scale):.3f}. Of the two weights that the mask "
        f"takes, {sum(not kept and not code for kept, code in zip(mask, codes, strict=True))} would be 0 anyway.",
    )  # fmt: skip
    drawing.text(LEFT - 14, 60, "latent W", anchor="end")
    drawing.line((LEFT, 60), (LEFT + 8 * cell, 60), kind="line faint")
    for index, value in enumerate(ROW):
        x, kept = LEFT + index * cell, mask[index]
        length = 36 * abs(value)
        kind = ("plus" if value > 0 else "minus") if kept else "masked"
        drawing.box(x + 14, 60 - length if value > 0 else 60, cell - 31, length, kind)
        drawing.text(x + cell / 2 - 1, 60 - length - 9 if value > 0 else 60 + length + 9, f"{value:+.2f}", "mono small")
        drawing.box(x, top, cell - 4, 32, "keep" if kept else "masked", "1" if kept else "0", "mono")
        ratio = f"{value / float(scale):+.2f}"
        drawing.box(x, top + 44, cell - 4, 32, "plain", ratio, "mono")
        drawing.box(x, top + 88, cell - 4, 32, code_class(codes[index]), code_text(codes[index]))
        kind = {-1: "minus", 0: "masked", 1: "plus"}[codes[index] * kept]
        drawing.box(x, top + 132, cell - 4, 32, kind, f"{effective[index]:+.3f}" if effective[index] else "0", "mono")
    for name, y in (("mask", 16), ("W / γ", 60), ("codes", 104), ("effective", 148)):
        drawing.text(LEFT - 14, top + y, name, anchor="end")
    return str(drawing)


def dispatch() -> str:
    """How an op finds its backend."""
    drawing = Drawing(
        690, 268, "How an op selects a backend",
        "Each backend is asked in turn, from the most to the least preferred. The reference refuses nothing.",
    )  # fmt: skip
    drawing.box(8, 12, 150, 44, "plain", "op(*arguments)", "mono")
    drawing.arrow(158, 34, 200, 34)
    drawing.box(200, 12, 200, 44, "plain", "next backend")
    drawing.arrow(300, 56, 300, 92)
    drawing.box(200, 92, 200, 44, "plain", "obstacle()?", "mono")
    drawing.text(308, 74, "the one that is forced, or each", "faint small", anchor="start")
    drawing.arrow(300, 136, 300, 172)
    drawing.text(308, 154, "none on this machine", "faint small", anchor="start")
    drawing.box(200, 172, 200, 44, "plain", "supports(*arguments)?", "mono")
    drawing.arrow(300, 216, 300, 236)
    drawing.box(200, 236, 200, 28, "plus", "run(*arguments)", "mono")
    for y in (114, 194):
        drawing.line((400, y), (560, y), kind="line")
    drawing.text(480, 104, "a reason", "faint small")
    drawing.text(480, 184, "a reason", "faint small")
    drawing.line((560, 194), (560, 34), kind="line")
    drawing.arrow(560, 34, 400, 34)
    drawing.text(570, 60, "noted;", "faint small", anchor="start")
    drawing.text(570, 78, "if none is left:", "faint small", anchor="start")
    drawing.text(570, 96, "RuntimeError", "mono small", anchor="start")
    drawing.text(570, 114, "with all reasons", "faint small", anchor="start")
    return str(drawing)


def decoding_speed() -> str:
    """Tokens a second of a whole model on a CPU, beside llama.cpp."""
    rows = json.loads((RESULTS / "decode-1536-xeon-2-cores.json").read_text())["decode"]
    kinds = {"i2": "plus", "g4s3": "plus", "llama.cpp TQ2_0": "zero"}
    shown = [row for row in rows if row["threads"] == 2 and row["system"] in kinds]
    shown.sort(key=lambda row: -row["tokens_per_second"])
    return str(
        bars(
            "Tokens a second of decoding on two cores",
            "Tokens a second, one at a time, two threads.",
            [
                (row["system"], row["tokens_per_second"], f"{row['tokens_per_second']:.1f}", kinds[row["system"]])
                for row in shown
            ],
        )
    )


def training_speed() -> str:
    """Tokens a second of training on one GPU."""
    rows = json.loads((RESULTS / "train-0.5b-h200.json").read_text())["systems"]
    rows.sort(key=lambda row: -row["tokens_per_second"])
    names = {
        "dense": "nn.Linear, compiled", "ours": "ours, 6:8, compiled", "plain-compiled": "plain PyTorch, compiled",
        "plain": "plain PyTorch",
    }  # fmt: skip
    return str(
        bars(
            "Tokens a second of training on one H200",
            "Tokens a second of training, one H200.",
            [
                (
                    names[row["system"]], row["tokens_per_second"], f"{row['tokens_per_second']:,.0f}",
                    "plus" if row["system"] == "ours" else "zero",
                )
                for row in rows
            ],
        )
    )  # fmt: skip


FIGURES: dict[str, Callable[[], str]] = {
    figure.__name__: figure
    for figure in (
        method, format_i2, format_t5, format_g4, format_g4s3, codebook, windows, fragment_threads, fragment_words,
        dispatch, decoding_speed, training_speed,
    )
}  # fmt: skip
