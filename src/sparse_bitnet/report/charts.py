"""The charts of a report, drawn with matplotlib for a theme: for the page without legend, for pictures with one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from sparse_bitnet.report import series
from sparse_bitnet.report.runs import Moment, Run
from sparse_bitnet.report.themes import Theme, run_colour, run_dashes
from sparse_bitnet.training.run_log import HISTOGRAM_REACH

WIDTH, HEIGHT = 5.0, 3.1  # inches of 72 units: as wide as a phone's column, so that its text is read there as it is
COLOURS = "cividis"  # of maps: even steps of lightness, also to colour-blind readers
ROUNDING = 0.5  # |weight| / scale above which a weight is +-1


@dataclass(frozen=True)
class Chart:
    """`draw` makes it for a theme; `legend` names the runs that it shows together, by their index."""

    name: str
    title: str
    caption: str
    draw: Callable[[Theme], Figure] = field(repr=False)
    legend: tuple[int, ...] = ()


@dataclass(frozen=True)
class Axis:
    """What lies to the right: steps, or tokens where the runs take different numbers of them a step."""

    label: str
    units_per_step: tuple[float, ...]


def step_axis(runs: Sequence[Run]) -> Axis:
    tokens = [run.tokens_per_step for run in runs]
    if len(set(tokens)) > 1 and None not in tokens:
        return Axis("tokens", tuple(float(count or 0) for count in tokens))
    return Axis("optimizer steps", (1.0,) * len(runs))


def curve_charts(runs: Sequence[Run]) -> list[Chart]:
    """Loss, learning rate, flip rate, zeros and polarisation of all runs; without those that no run has logged."""
    axis = step_axis(runs)
    intervals = sorted({interval for run in runs if (interval := series.log_interval(run))})
    apart = " or ".join(map(str, intervals)) or "some"
    wanted = [
        ("loss", "Loss", "nats a token", 1, "Mean over the steps between log events; rings: on the validation text."),
        ("learning_rate", "Learning rate", "learning rate", 1, "As the schedule set it."),
        ("flip_rate", "Flip rate", "% of mask entries", 100,
         f"Mask entries that changed between one log event and the next, {apart} steps apart: it falls as the choice "
         f"of weights settles. Without changes of the pattern itself."),
        ("zeros", "Zeros", "% of weights", 100,
         "Codes that are 0. Solid or dashed: after the mask; thin dots: before it, those that rounding alone makes 0."),
        ("polarisation", "Polarisation", "% of weights", 100,
         "Latent weights outside the valley 0.25 < |weight| / scale < 0.75, hence settled on a code; 71 % at random."),
    ]  # fmt: skip
    charts = []
    for name, title, unit, factor, caption in wanted:
        shown = tuple(index for index, run in enumerate(runs) if series.curve(run, name)[0])
        if shown:
            draw = _curve_drawer(runs, shown, name, unit, factor, axis)
            charts.append(Chart(name.replace("_", "-"), title, caption, draw, shown))
    return charts


def _curve_drawer(
    runs: Sequence[Run], shown: Sequence[int], name: str, unit: str, factor: float, axis: Axis
) -> Callable[[Theme], Figure]:
    def draw(theme: Theme) -> Figure:
        figure = _figure(theme)
        axes = _axes(figure, theme, axis.label, unit)
        for index in shown:
            _draw_run(axes, runs[index], index, name, factor, axis.units_per_step[index], theme)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if name == "learning_rate":
            axes.set_ylim(bottom=0)
            axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
        return figure

    return draw


def _draw_run(axes: Axes, run: Run, index: int, name: str, factor: float, unit: float, theme: Theme) -> None:
    colour = run_colour(theme, index)
    dashes = run_dashes(index)
    steps, values = series.curve(run, name)
    axes.plot(
        np.array(steps) * unit,
        np.array(values) * factor,
        color=colour,
        linewidth=1.6,
        label=" " + run.name.replace("$", r"\$"),  # no mathematics; one that begins with _ has no legend
        linestyle=(0, dashes) if dashes else "solid",
    )
    if name == "zeros":
        steps, values = series.curve(run, "zeros_natural")
        axes.plot(np.array(steps) * unit, np.array(values) * factor, color=colour, linewidth=1, linestyle=":")
    if name == "loss" and run.validations:
        steps = np.array([event.step for event in run.validations]) * unit
        losses = [event.eval_loss for event in run.validations]
        axes.plot(steps, losses, color=colour, linewidth=0, marker="o", markersize=4.5, fillstyle="none")


def layer_chart(run: Run, index: int, limits: tuple[float, float]) -> Chart | None:
    """Zeros by layer over time as a map, with the same colours in all runs; None where it is not logged."""
    found = series.layer_map(run)
    if found is None:
        return None

    def draw(theme: Theme) -> Figure:
        figure = _figure(theme, height=3.6)
        axes = _axes(figure, theme, "optimizer steps", "", grid=False)
        rows = len(found.layers)
        image = axes.imshow(
            100 * found.zeros, aspect="auto", cmap=COLOURS, interpolation="none",
            vmin=limits[0], vmax=limits[1], extent=(0, found.steps[-1], rows, 0),
        )  # fmt: skip
        ends = np.cumsum([count for _, count in found.groups])
        axes.set_yticks(ends - np.array([count for _, count in found.groups]) / 2, [kind for kind, _ in found.groups])
        axes.tick_params(axis="y", length=0)
        axes.hlines(ends[:-1], 0, found.steps[-1], color=theme.card, linewidth=1.5)
        _colour_bar(figure, axes, image, "zeros, % of weights", theme)
        return figure

    least, most = (found.layers[int(place)] for place in (found.zeros[:, -1].argmin(), found.zeros[:, -1].argmax()))
    caption = (
        f"Each row is a layer; in each band the first block of the model is at the top. At the end between "
        f"{series.percent(found.zeros[:, -1].min())} ({least}) and {series.percent(found.zeros[:, -1].max())} ({most})."
    )
    return Chart(f"zeros-by-layer-{index}", run.name, caption, draw)


def map_limits(runs: Sequence[Run]) -> tuple[float, float]:
    """Least and most zeros of any layer of any run, in percent."""
    maps = [found.zeros for run in runs if (found := series.layer_map(run)) is not None]
    return (100 * min(map_.min() for map_ in maps), 100 * max(map_.max() for map_ in maps)) if maps else (0, 100)


def histogram_charts(run: Run, index: int) -> list[Chart]:
    """The latent weights at the end beside those at the beginning, over time, and by kind of layer."""
    if not run.moments:
        return []
    first, last = run.moments[0], run.moments[-1]
    kinds = series.layers_by_kind(list(last.layers))

    def at_the_end(theme: Theme) -> Figure:
        figure = _figure(theme)
        axes = _axes(figure, theme, "latent weight / scale", "% of weights, a bin of 1/16")
        _draw_histogram(axes, last, index, theme)
        outline = np.sum(series.densities(first), axis=0)
        axes.stairs(outline, series.bin_edges(), color=theme.ink, linewidth=1, label=f"step {first.step}, all")
        _legend(axes, theme)
        return figure

    def over_time(theme: Theme) -> Figure:
        figure = _figure(theme)
        axes = _axes(figure, theme, "optimizer steps", "latent weight / scale", grid=False)
        shares = series.density_over_time(run)
        image = axes.imshow(
            shares, aspect="auto", origin="lower", cmap=COLOURS, vmin=0,
            interpolation="none", extent=(0, max(last.step, 1), -HISTOGRAM_REACH, HISTOGRAM_REACH),
        )  # fmt: skip
        _colour_bar(figure, axes, image, "% of weights, a bin of 1/16", theme)
        return figure

    def by_kind(theme: Theme) -> Figure:
        rows = -(-len(kinds) // 2)
        figure = _figure(theme, height=0.4 + 1.15 * rows)
        grid = figure.subplots(rows, 2, squeeze=False, sharex=True, sharey=True)
        for axes, (kind, layers) in zip(grid.flat, kinds.items(), strict=False):
            _style(axes, theme, "", "", grid=True)
            axes.set_title(kind, color=theme.ink, fontsize=9, pad=3)
            _draw_histogram(axes, last, index, theme, layers)
        for axes in grid.flat[len(kinds) :]:
            axes.remove()
        figure.supxlabel("latent weight / scale", color=theme.muted, fontsize=9)
        figure.supylabel("% of weights, a bin of 1/16", color=theme.muted, fontsize=9)
        return figure

    pattern = f"{last.pattern}, {last.values} values"
    rounds = " The lines at -0.5 and 0.5 are where a weight rounds to another code." if last.values == "ternary" else ""
    return [
        Chart(
            f"weights-{index}", f"{run.name}: after step {last.step}",
            f"All layers, {pattern}. Filled: kept by the mask, and above it, lighter, masked. Outermost bins: all "
            f"beyond.{rounds}",
            at_the_end,
        ),
        Chart(
            f"weights-over-time-{index}", f"{run.name}: over time",
            f"The same at {len(run.moments)} moments of the run, a column each; the outermost rows hold all beyond.",
            over_time,
        ),
        Chart(
            f"weights-by-kind-{index}", f"{run.name}: by kind of layer",
            f"After step {last.step}, the layers of a kind together, each in units of its own scale.", by_kind,
        ),
    ]  # fmt: skip


def _draw_histogram(axes: Axes, moment: Moment, index: int, theme: Theme, layers: Sequence[str] | None = None) -> None:
    kept, masked = series.densities(moment, layers)
    colour, edges = run_colour(theme, index), series.bin_edges()
    axes.stairs(kept, edges, fill=True, color=colour, label="kept")
    axes.stairs(kept + masked, edges, baseline=kept, fill=True, color=colour, alpha=0.35, linewidth=0, label="masked")
    axes.set_xlim(-HISTOGRAM_REACH, HISTOGRAM_REACH)
    axes.set_ylim(bottom=0)
    if moment.values == "ternary":
        for threshold in (-ROUNDING, ROUNDING):
            axes.axvline(threshold, color=theme.muted, linewidth=0.8, dashes=(3, 2))


def _figure(theme: Theme, height: float = HEIGHT) -> Figure:
    return Figure(figsize=(WIDTH, height), layout="constrained", facecolor=theme.card)


def _axes(figure: Figure, theme: Theme, below: str, left: str, grid: bool = True) -> Axes:
    axes = figure.subplots()
    _style(axes, theme, below, left, grid)
    return axes


def _style(axes: Axes, theme: Theme, below: str, left: str, grid: bool) -> None:
    axes.set_facecolor("none")
    axes.set_xlabel(below, color=theme.muted)
    axes.set_ylabel(left, color=theme.muted)
    axes.tick_params(colors=theme.muted, length=3)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.spines[:].set_color(theme.line)
    if grid:
        axes.grid(color=theme.line, linewidth=0.8)
        axes.set_axisbelow(True)


def _legend(axes: Axes, theme: Theme) -> None:
    axes.legend(frameon=False, labelcolor=theme.muted, fontsize=8.5, loc="upper right", handlelength=1.4)


def _colour_bar(figure: Figure, axes: Axes, image: object, label: str, theme: Theme) -> None:
    bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=28)  # type: ignore[arg-type]
    bar.solids.set_rasterized(True)  # type: ignore[union-attr]  one picture, not 256 shapes
    bar.outline.set_visible(False)  # type: ignore[union-attr]
    bar.ax.set_facecolor("none")
    bar.ax.tick_params(colors=theme.muted, length=3)
    bar.set_label(label, color=theme.muted)
