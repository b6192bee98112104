"""The tables of a report: runs side by side, the settings in which they differ, and what they ran on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sparse_bitnet.report import series
from sparse_bitnet.report.runs import Run

NONE = "-"  # where a run has no such figure
MANY = 1_000_000


@dataclass(frozen=True)
class Row:
    """`cells`: one a run; `best`: indices of the best ones, where one can say so; `note`: how it is counted."""

    label: str
    cells: tuple[str, ...]
    best: tuple[int, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Quantity:
    label: str
    of: Callable[[Run], float | None]
    form: Callable[[float], str]
    lower_is_better: bool = False
    note: str = ""


def _count(value: float) -> str:
    return f"{value / MANY:,.2f} M" if value >= MANY else f"{value:,.0f}"


QUANTITIES = (
    Quantity("tokens seen", lambda run: tokens_seen(run), _count),
    Quantity("training loss at the end", lambda run: series.at_the_end(run, "loss"), "{:.4f}".format, True,
             "mean over the last 5 % of the steps done, nats a token"),
    Quantity("validation loss, last", lambda run: run.validations[-1].eval_loss if run.validations else None,
             "{:.4f}".format, True, "nats a token"),
    Quantity("validation loss, lowest", lambda run: lowest_validation(run), "{:.4f}".format, True),
    Quantity("validation perplexity, last",
             lambda run: math.exp(min(run.validations[-1].eval_loss, 700)) if run.validations else None,
             "{:,.2f}".format, True),
    Quantity("weights in sparse ternary layers", series.ternary_weights, _count),
    Quantity("zeros at the end", lambda run: series.at_the_end(run, "zeros"), series.percent),
    Quantity("of them before the mask", lambda run: series.at_the_end(run, "zeros_natural"), series.percent, False,
             "codes that rounding alone makes 0"),
    Quantity("flip rate at the end", lambda run: series.at_the_end(run, "flip_rate"), series.percent, False,
             "mask entries that changed between log events"),
    Quantity("polarisation at the end", lambda run: series.at_the_end(run, "polarisation"), series.percent, False,
             "latent weights settled on a code; 71 % for random ones"),
    Quantity("tokens a second", series.tokens_per_second, "{:,.0f}".format, False, "median over the log events"),
)  # fmt: skip


def tokens_seen(run: Run) -> float | None:
    return run.events[-1].step * run.tokens_per_step if run.events and run.tokens_per_step else None


def lowest_validation(run: Run) -> float | None:
    return min((event.eval_loss for event in run.validations), default=None)


def progress(run: Run) -> str:
    """Steps done, of those planned."""
    done = run.events[-1].step if run.events else 0
    if run.steps_planned is None:
        return f"{done:,}"
    return f"{done:,} of {run.steps_planned:,}" + ("" if done >= run.steps_planned else ", unfinished")


def method(run: Run) -> str:
    """Pattern, values and schedule, as far as they are known."""
    recipe, schedule = run.config.get("recipe") or {}, run.config.get("schedule") or {}
    if not recipe:
        return next((event.pattern for event in reversed(run.events) if event.pattern), NONE)
    told = [str(recipe.get("pattern", "")), str(recipe.get("values", "")), f"{recipe.get('activations')} activations"]
    kind = schedule.get("kind", "sparse")
    if kind == "dense-to-sparse":
        told.append(f"dense until {100 * schedule.get('at', 0.5):g} % of the steps")
    elif kind == "gradual":
        told.append(" → ".join(map(str, schedule.get("patterns", []))))
    return ", ".join(told)


def comparison(runs: Sequence[Run]) -> list[Row]:
    """The runs side by side; without the rows that no run has a figure for."""
    rows = [Row("method", tuple(map(method, runs))), Row("steps", tuple(map(progress, runs)))]
    for quantity in QUANTITIES:
        values = [quantity.of(run) for run in runs]
        known = [value for value in values if value is not None]
        if not known:
            continue
        cells = tuple(NONE if value is None else quantity.form(value) for value in values)
        best = min(known) if quantity.lower_is_better and len(known) > 1 else None
        marked = tuple(index for index, value in enumerate(values) if best is not None and value == best)
        rows.append(Row(quantity.label, cells, marked, quantity.note))
    return rows


def different_settings(runs: Sequence[Run]) -> list[Row]:
    """The settings that are not the same in all runs that have any, but for where they write."""
    flat = [dict(_flatten(run.config)) for run in runs]
    names = dict.fromkeys(name for settings in flat for name in settings if name != "output_dir")
    known = [settings for settings in flat if settings]
    return [
        Row(name, tuple(_written(settings.get(name)) for settings in flat))
        for name in names
        if len({_written(settings.get(name)) for settings in known}) > 1
    ]


def surroundings(runs: Sequence[Run]) -> list[Row]:
    """What made each run: directory, time, commit, hardware, versions."""
    rows = [Row("directory", tuple(str(run.directory) for run in runs))]
    for label in ("date", "commit", "command", "cpu", "gpus", "processes", "threads", "python"):
        rows.append(Row(label, tuple(_written(run.environment.get(label)) for run in runs)))
    packages = dict.fromkeys(name for run in runs for name in run.environment.get("versions", {}))
    for package in packages:
        rows.append(Row(package, tuple(_written(run.environment.get("versions", {}).get(package)) for run in runs)))
    return [row for row in rows if set(row.cells) != {NONE}]


def _flatten(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _written(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or NONE
    return NONE if value is None else str(value)
