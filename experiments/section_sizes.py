"""Larger models in the report: the trend of the degradation with size, what repeated text does, zero-shot accuracy."""

from __future__ import annotations

import math
from itertools import pairwise

from experiments.degradation import degradations, finished_runs, first_run, over
from experiments.results import Result, Results
from experiments.section_claim import degradation_table
from experiments.settings import Scale
from experiments.statistics import mean
from experiments.tables import DENSE, LARGER, MAKE
from experiments.wording import NAMES, NOT_YET, table, two_digits, values_of

LAST_POINTS = 3  # of the curve of the training loss, each a mean over about a hundredth of the steps


def at_one_ratio(scale: Scale, results: Results) -> str:
    """Table A again at the larger sizes that get as many tokens a weight; empty where none does."""
    first, *larger = scale.of_one_ratio
    if not larger:
        return ""
    read = ", ".join(f"{size} {results.passes(scale.tokens(size))} times" for size in scale.of_one_ratio)
    parts = [
        f"""## Table A at the same tokens a weight

{scale.tokens_a_weight[0]:g} a weight as at {first}, and in the paper; every seed, and the learning rates of {first},
narrowed by the width. The more weights, the more tokens, and the oftener the text is read: {read}.
The first seed was known before the others were run, and counts with them."""
    ]
    for size in larger:
        parts.append(f"### {size}\n\n{degradation_table(scale, results, size, LARGER)}")
    return "\n\n".join(parts)


def over_sizes(scale: Scale, results: Results) -> str:
    parts = [
        f"""## Table A over sizes

Every size on {scale.trend_tokens / 1e6:.3g} M tokens, {results.passes(scale.trend_tokens)} times through the text,
by {scale.trend_batch} sequences a step, at rates of its own. The larger a model, the fewer tokens each weight has: what
changes from size to size may be due to either."""
    ]
    for size in scale.sizes:
        trend = scale.of_trend(size)
        compared = degradation_table(trend, results, size, LARGER)
        parts.append(f"### {size}, {two_digits(trend.tokens_each(size))} tokens a weight\n\n{compared}")
    header = ["over dense", *(f"{name} {pattern}" for pattern in LARGER[1:] for name in NAMES.values())]
    rows = []
    for size in scale.sizes:
        each = {row.pattern: row for row in degradations(scale.of_trend(size), results, size, LARGER)}
        rows.append([size, *(values_of(each[pattern].ratios[values]) for pattern in LARGER[1:] for values in MAKE)])
    return "\n\n".join([*parts, f"### The trend\n\n{table(header, rows)}"])


def repeated_text(scale: Scale, results: Results) -> str:
    """The long runs: how well text is told that was read before, and text that was not."""
    rows = []
    for size in scale.sizes:
        read = f"{results.passes(scale.tokens(size))} times"
        for values, name in NAMES.items():
            dense = finished_runs(scale, results, size, values, DENSE)
            for pattern in LARGER:
                found = finished_runs(scale, results, size, values, pattern)
                if size not in scale.of_one_ratio:  # others are asked for with one seed
                    found = {seed: run for seed, run in found.items() if seed == scale.seeds[0]}
                cells, compared = [], []
                for known in (_training, _test):
                    each, base = ({seed: known(run) for seed, run in runs.items()} for runs in (found, dense))
                    cells.append(values_of(list(each.values()), 2))
                    compared.append("" if pattern == DENSE else values_of(over(each, base)))
                rows.append([size, read, name, pattern, *cells, *compared])
    header = [
        "size", "text read", "precision", "pattern", "training perplexity", "test perplexity", "training over dense",
        "test over dense",
    ]  # fmt: skip
    return f"""## What repeated text does

Runs as long as the set-up says, of all seeds or, where tokens a weight are fewer, of one. Training perplexity is that
of the last {LAST_POINTS} whole points of the curve of the loss, about a hundredth of the steps each, on text that was
read before; test perplexity is on text that never was, by other authors. Where a mask raises the former and not the
latter, it may take the room in which text is learnt by heart. Rates are those of the smallest size, narrowed by the
width; a rate that does not suit a size may do the same.

{table(header, rows)}"""


def zero_shot(scale: Scale, results: Results) -> str:
    rows = []
    for values, name in NAMES.items():
        for pattern in LARGER:
            found = first_run(scale, results, scale.sizes[-1], values, pattern)
            answer = {} if found is None else found["zero_shot"]
            asked = (("blimp", "sum"), ("hellaswag", "by_character"))
            told = [f"{100 * answer[task][field]:.2f}" if answer else NOT_YET for task, field in asked]
            rows.append([name, pattern, *told])
    header = ["precision", "pattern", "BLiMP, % (chance 50)", "HellaSwag, % by character (chance 25)"]
    return f"""## Zero-shot, {scale.sizes[-1]}

Of the same runs, seed {scale.seeds[0]}.

{table(header, rows)}"""


def _training(result: Result) -> float:
    """Of the last points that are whole: what is left of the steps is a stretch of its own, and short."""
    steps, losses = zip((0, math.nan), *result["loss"], strict=True)
    stretches = [later - earlier for earlier, later in pairwise(steps)]
    whole = [loss for loss, stretch in zip(losses[1:], stretches, strict=True) if stretch == stretches[0]]
    return math.exp(mean(whole[-LAST_POINTS:]).mean)


def _test(result: Result) -> float:
    return float(result["perplexity"]["test"])
