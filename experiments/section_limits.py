"""What the report cannot tell, and what it would take."""

from __future__ import annotations

import textwrap
from math import isfinite
from statistics import fmean

from experiments import paper
from experiments.degradation import UNTOLD, by_pattern, degradations
from experiments.results import Results
from experiments.settings import SHAPES, Scale
from experiments.statistics import LEVEL, seeds_that_tell
from experiments.tables import DENSE, MAKE, PATTERNS, SWEPT, chosen_rate, swept, swept_rates
from experiments.wording import NAMES, NOT_YET, two_digits

GPU = 400e12  # operations a second that an H100 does
WIDTH = 120


def limits(scale: Scale, results: Results) -> str:
    parts = (_rates, _seeds, _precisions, _trend, _text, _sizes)
    told = [_point(part(scale, results)) for part in parts]
    return "## What this cannot tell, and what it would take\n\n" + "\n".join(told)


def _point(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), WIDTH, initial_indent="* ", subsequent_indent="  ")


def _rates(scale: Scale, results: Results) -> str:
    """What the paper's pattern costs at each rate of the sweep."""
    told = []
    for values, name in NAMES.items():
        costs, chosen = [], chosen_rate(scale, results, values)
        for rate in swept_rates(scale, results, values):
            runs = dict(zip(SWEPT, swept(scale, values, rate), strict=True))
            dense, sparse = (results.perplexity(runs[pattern], "valid") for pattern in (DENSE, paper.PATTERN))
            if dense is not None and sparse is not None:
                cost = f"{sparse / dense:.3f}" if isfinite(dense + sparse) else "diverged"
                costs.append(f"{cost} at {rate:g}{' (chosen)' if rate == chosen else ''}")
        told.append(f"{name} {', '.join(costs) or NOT_YET}")
    return f"""What sparsity costs depends on the learning rate. With the seed of the sweep, {paper.PATTERN} over dense
        in validation is: {"; ".join(told)}. So a rate at the edge of what is stable can make either claim. No interval
        in this report covers that choice, and of the sparse patterns only {paper.PATTERN} was swept."""


def _seeds(scale: Scale, results: Results) -> str:
    rows = [row for row in degradations(scale, results, scale.sizes[0], PATTERNS) if row.comparison is not None]
    told = []
    for row in rows:
        if row.verdict == UNTOLD:
            bf16, ternary = paper.DEGRADATIONS[row.pattern]
            seeds = seeds_that_tell(bf16 / ternary, row.ratios["full"], row.ratios["ternary"], LEVEL / len(rows))
            told.append(f"{seeds or 'very many'} at {row.pattern}")
    if not told:
        return "More seeds: no pattern asks for them." if rows else f"More seeds: how many is {NOT_YET}."
    return f"""Where no difference can be told, one as large as the paper's would have been found four times of five
        by so many seeds of each precision, with the deviations seen: {", ".join(told)}. There are
        {len(scale.seeds)}, which hardly tell a deviation, so that this is rough; it is of Welch's test at
        {LEVEL} / {len(rows)}, stricter than Holm. What is smaller takes more, and new ones: adding seeds to these
        after a look at them, and testing all again, finds differences that are not there."""


def _precisions(scale: Scale, results: Results) -> str:
    bf16, ternary = (_means(scale, results, values) for values in MAKE)
    beside = ""
    if better := [pattern for pattern in bf16 if DENSE in ternary and bf16[pattern] < ternary[DENSE]]:
        beside = f"""Dense ternary has a perplexity of {ternary[DENSE]:.2f}, BF16 with {better[-1]} one of
            {bf16[better[-1]]:.2f}."""
    return f"""Costs are relative, each precision beside its own dense model, as in the paper. {beside} The precisions
        differ in more than their weights: int8 activations and the weight decay, as in the paper, and the rate that
        was chosen for each."""


def _trend(scale: Scale, results: Results) -> str:
    first, last = scale.sizes[0], scale.sizes[-1]
    most, fewest = (scale.of_trend(size).tokens_each(size) for size in (first, last))
    needed = int(most * SHAPES[last].weights)
    same = " and ".join(scale.of_one_ratio)
    return f"""As many tokens a weight as in the paper get {same} alone. In the trend over sizes tokens a weight fall,
        from {two_digits(most)} at {first} to {two_digits(fewest)} at {last}, so that what changes may be due to
        either. As many a weight at {last} as at {first} are {needed / 1e9:.2g} B tokens,
        {results.passes(needed)} times through this text: it would take more text."""


def _text(scale: Scale, results: Results) -> str:
    least, most = min(map(scale.tokens, scale.sizes)), max(map(scale.tokens, scale.sizes))
    return f"""Novels of one language stand for RefineWeb, one text of other authors tests all models, and
        {least / 1e6:.0f} M to {most / 1e6:.0f} M tokens of training ({scale.trend_tokens / 1e6:.0f} M in the trend)
        stand for 50 B. Runs read the text
        {results.passes(least)} to {results.passes(most)} times, which may favour sparse models, as they learn less of
        it by heart; those of the trend over sizes read it {results.passes(scale.trend_tokens)} times. Intervals are
        over seeds alone, not over texts."""


def _sizes(scale: Scale, results: Results) -> str:
    seen = [one for values in MAKE for one in by_pattern(scale, results, scale.sizes[0], values, DENSE).values()]
    reached = f"{min(seen):.0f} to {max(seen):.0f}" if seen else NOT_YET
    small = [size for size in scale.sizes if SHAPES[size].embedding > SHAPES[size].weights]
    embedding = ""
    if small:
        embedding = f"At {' and '.join(small)} the embedding holds more parameters than the layers made sparse."
    hours = paper.OPERATIONS / GPU / 3600
    return f"""Perplexities of dense models ({scale.sizes[0]}: {reached}) are far from the paper's
        {paper.METHOD:.0f}, of another text and vocabulary. {embedding} The paper's smallest model takes
        {paper.OPERATIONS / 1e18:.0f} EFLOP a run, about {hours:.0f} hours of one H100 at
        {GPU / 1e12:.0f} TFLOP/s; its first table, {paper.RUNS} runs of one seed, about
        {paper.RUNS * hours / 24:.0f} days."""


def _means(scale: Scale, results: Results, values: str) -> dict[str, float]:
    """Mean test perplexity of the patterns that are run."""
    found = {pattern: by_pattern(scale, results, scale.sizes[0], values, pattern).values() for pattern in PATTERNS}
    return {pattern: fmean(perplexities) for pattern, perplexities in found.items() if perplexities}
