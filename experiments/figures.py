"""The figures of the report, as SVG, each from the result files; one that has no results yet is not drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import frontier, paper
from experiments.degradation import degradations, first_run
from experiments.results import Results
from experiments.settings import Scale
from experiments.statistics import mean
from experiments.tables import LARGER, MAKE, PATTERNS
from experiments.wording import NAMES

COLOURS = {"full": "#c44e52", "ternary": "#2a6f97", "sign": "#e09f3e"}
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "sparse-bitnet", "svg.fonttype": "path", "font.size": 9, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False, "figure.dpi": 110,
}  # fmt: skip
SHOWN = paper.PATTERN


def draw_figures(scale: Scale, results: Results, directory: Path) -> dict[str, str]:
    """Draw what can be drawn into `directory`; title -> file."""
    figures: dict[str, tuple[str, Callable[[Scale, Results], Figure | None]]] = {
        "Perplexity over dense, by pattern": ("degradation", degradation),
        "What a bit buys: perplexity against bits a weight": ("frontier", bits_and_perplexity),
        "Degradation by size": ("trend", trend),
        f"Mask entries that flip between readings, {SHOWN}": ("flips", flips),
        f"Latent weights and where the {SHOWN} mask cuts": ("histograms", histograms),
        f"Zeros by layer, ternary {SHOWN}": ("zeros", zeros),
        "Zero-shot accuracy": ("zero-shot", zero_shot),
    }
    directory.mkdir(parents=True, exist_ok=True)
    drawn = {}
    with plt.rc_context(STYLE):
        for title, (name, draw) in figures.items():
            figure = draw(scale, results)
            if figure is None:
                continue
            figure.savefig(directory / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
            plt.close(figure)
            drawn[title] = f"{name}.svg"
    return drawn


def degradation(scale: Scale, results: Results) -> Figure | None:
    rows = [row for row in degradations(scale, results, scale.sizes[0], PATTERNS) if any(row.ratios.values())]
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(5.5, 3.4))
    for values, name in NAMES.items():
        told = [(index, row.ratios[values]) for index, row in enumerate(rows) if row.ratios[values]]
        _with_bars(axes, told, COLOURS[values], f"{name}, mean and deviation")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(rows)), [row.pattern for row in rows])
    axes.set_ylabel("perplexity over dense, same precision")
    axes.legend()
    return figure


def trend(scale: Scale, results: Results) -> Figure | None:
    by_size = {size: degradations(scale.of_trend(size), results, size, LARGER) for size in scale.sizes}
    if not any(any(row.ratios.values()) for rows in by_size.values() for row in rows):
        return None
    figure, panels = plt.subplots(1, len(LARGER) - 1, figsize=(7, 3), sharey=True)
    for axes, pattern in zip(panels, LARGER[1:], strict=True):
        for values, name in NAMES.items():
            found = [
                (index, row.ratios[values])
                for index, size in enumerate(scale.sizes)
                for row in by_size[size]
                if row.pattern == pattern and row.ratios[values]
            ]
            _with_bars(axes, found, COLOURS[values], name)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xticks(range(len(scale.sizes)), scale.sizes)
        axes.set_title(pattern)
    panels[0].set_ylabel("perplexity over dense")
    panels[0].legend()
    return figure


def bits_and_perplexity(scale: Scale, results: Results) -> Figure | None:
    """Filled: as stored; hollow: the least that a code could take. Lines join what nothing so small beats."""
    points = [point for point in frontier.points(scale, results) if point.perplexities]
    if not points:
        return None
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for point in points:
        average, colour = mean(point.perplexities), COLOURS[point.values]
        marker = "D" if point.residual else "o"
        axes.plot([point.least_bits, point.stored_bits], [average.mean] * 2, color=colour, linewidth=0.6, alpha=0.5)
        axes.plot(point.least_bits, average.mean, marker, color=colour, fillstyle="none", markersize=4)
        axes.errorbar(point.stored_bits, average.mean, average.deviation, fmt=marker, color=colour, markersize=5)
        label = f"{point.pattern}{' + residual' if point.residual else ''}"
        axes.annotate(
            label, (point.least_bits, average.mean), (0, 5 if point.values == "ternary" else -12),
            textcoords="offset points", fontsize=7, ha="center",
        )  # fmt: skip
    for bits, line, label in (
        (frontier.stored_bits, "--", "frontier, as stored"),
        (frontier.least_bits, ":", "frontier, by least bits"),
    ):
        best = [(bits(point), mean(point.perplexities).mean) for point in frontier.efficient(points, bits)]
        axes.plot(*zip(*best, strict=True), color="black", linewidth=0.9, linestyle=line, label=label)
    for values in ("sign", "ternary"):
        axes.plot([], [], "o", color=COLOURS[values], label=values)
    axes.plot([], [], "o", color="grey", fillstyle="none", label="least bits of any code")
    axes.set_xlabel("bits a weight")
    axes.set_ylabel("test perplexity")
    axes.legend()
    return figure


def flips(scale: Scale, results: Results) -> Figure | None:
    figure, axes = plt.subplots(figsize=(5.5, 3.2))
    for values, name in NAMES.items():
        result = first_run(scale, results, scale.sizes[0], values, SHOWN)
        if result is not None:
            known = [(r["step"], 100 * r["flip_rate"]) for r in result["readings"] if r["flip_rate"] is not None]
            axes.plot(*zip(*known, strict=True), color=COLOURS[values], label=name)
    return _finished(figure, axes, "step", "mask entries that changed, %")


def histograms(scale: Scale, results: Results) -> Figure | None:
    found = {values: first_run(scale, results, scale.sizes[0], values, SHOWN) for values in MAKE}
    known = {values: result["histogram"] for values, result in found.items() if result and "histogram" in result}
    if not known:
        return None
    figure, panels = plt.subplots(1, len(known), figsize=(3.6 * len(known), 3), sharey=True, squeeze=False)
    for axes, (values, histogram) in zip(panels[0], known.items(), strict=True):
        counts = histogram["counts"]
        width = (histogram["to"] - histogram["from"]) / len(counts)
        places = [histogram["from"] + (index + 0.5) * width for index in range(len(counts))]
        share = [count / sum(counts) / width for count in counts]
        axes.bar(places, share, width, color=COLOURS[values], alpha=0.8)
        if histogram["threshold"] is not None:
            low, middle, high = histogram["threshold"]
            for side in (-1, 1):
                axes.axvspan(*sorted((side * low, side * high)), color="black", alpha=0.12, linewidth=0)
                axes.axvline(side * middle, color="black", linewidth=0.9)
        if values != "full":
            for side in (-0.5, 0.5):
                axes.axvline(side, color="black", linewidth=0.9, linestyle=":")
        axes.set_title(f"{NAMES[values]} {SHOWN}")
        axes.set_xlabel("latent weight / scale")
    panels[0][0].set_ylabel("density")
    figure.supxlabel(
        "line, band: median and quartiles of the mask's cut in a group; dotted: the rounding's", fontsize=7, y=-0.08
    )
    return figure


def zeros(scale: Scale, results: Results) -> Figure | None:
    result = first_run(scale, results, scale.sizes[0], "ternary", SHOWN)
    if result is None or "layers" not in result:
        return None
    names = list(result["layers"])
    figure, axes = plt.subplots(figsize=(max(6, 0.22 * len(names)), 3.2))
    natural = [100 * layer["zeros_natural"] for layer in result["layers"].values()]
    masked = [100 * layer["zeros_masked"] for layer in result["layers"].values()]
    axes.bar(range(len(names)), natural, color=COLOURS["ternary"], label="rounded to 0")
    axes.bar(range(len(names)), masked, bottom=natural, color=COLOURS["sign"], label="by the mask alone")
    short = [name.removeprefix("model.layers.").replace("_proj", "").replace("self_attn.", "") for name in names]
    axes.set_xticks(range(len(names)), short, rotation=90, fontsize=7)
    axes.set_ylabel("zeros, %")
    axes.set_ylim(0, 100)
    axes.legend()
    return figure


def zero_shot(scale: Scale, results: Results) -> Figure | None:
    tasks = {"blimp": ("BLiMP", "sum", 50), "hellaswag": ("HellaSwag, by character", "by_character", 25)}
    figure, panels = plt.subplots(1, len(tasks), figsize=(7, 3))
    drawn = False
    for axes, (task, (title, field, chance)) in zip(panels, tasks.items(), strict=True):
        for values, name in NAMES.items():
            told = []
            for index, pattern in enumerate(LARGER):
                result = first_run(scale, results, scale.sizes[-1], values, pattern)
                if result is not None:
                    told.append((index, [100 * result["zero_shot"][task][field]]))
            _with_bars(axes, told, COLOURS[values], name)
            drawn = drawn or bool(told)
        axes.axhline(chance, color="black", linewidth=0.8, linestyle=":")
        axes.set_xticks(range(len(LARGER)), LARGER)
        axes.set_title(f"{title}, {scale.sizes[-1]}")
    panels[0].set_ylabel("accuracy, % (dotted: chance)")
    if not drawn:
        plt.close(figure)
        return None
    panels[0].legend()
    return figure


def _with_bars(axes: Axes, told: Sequence[tuple[int, list[float]]], colour: str, label: str) -> None:
    """Means with deviations, and every seed as a small dot."""
    if not told:
        return
    means = [mean(found) for _, found in told]
    places = [index for index, _ in told]
    bars = [one.deviation or 0 for one in means]
    axes.errorbar(
        places, [one.mean for one in means], bars, fmt="o-", color=colour, label=label, capsize=3, markersize=4
    )
    for place, found in told:
        axes.plot([place] * len(found), found, ".", color=colour, alpha=0.4, markersize=4)


def _finished(figure: Figure, axes: Axes, x: str, y: str) -> Figure | None:
    if not axes.lines:
        plt.close(figure)
        return None
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend()
    return figure
