"""The sections of the report that are no tables of results, each a function of them."""

from __future__ import annotations

from experiments.degradation import by_pattern
from experiments.results import Results
from experiments.section_verdict import seeds_to_tell
from experiments.settings import SHAPES, Scale
from experiments.tables import (
    DENSE,
    MAKE,
    SWEPT,
    TABLES,
    chosen_rate,
    missing,
    swept,
    swept_loss,
    swept_rates,
)  # fmt: skip
from experiments.wording import NAMES, NOT_YET, table


def heading(scale: Scale, results: Results) -> str:
    asked = {run.key for runs in TABLES.values() for run in runs(scale, results)}
    found = [result for key, result in results.found.items() if key in asked]
    hardware = sorted({gpu for result in found for gpu in result["gpus"]} or {result["cpu"] for result in found})
    commits = sorted({str(result["commit"]) for result in found})
    left = len(missing(scale, results, list(TABLES)))
    spare = len(results.found) - len(found)
    more = f" No table asks for {spare} more ([the log](LOG.md))." if spare else ""
    made = f"{len(found)} runs on {', '.join(hardware)}, of commit {', '.join(commits)}." if found else "No runs yet."
    return f"""# Does the paper hold?

The tables of arXiv 2603.05168, re-run at a scale that one GPU has done in minutes, with seeds and intervals. Made by
`python -m experiments.report` from `experiments/results/runs/`; nothing here is typed. {made} Of the runs that the
tables ask for as far as is known now, {left} are missing.{more}"""


def method(scale: Scale, results: Results) -> str:
    rows = []
    for size, ratio in zip(scale.sizes, scale.tokens_a_weight, strict=True):
        shape, tokens = SHAPES[size], scale.tokens(size)
        rows.append(
            [
                size,
                f"{shape.layers} layers, {shape.hidden} wide, FFN {shape.ffn}",
                f"{shape.weights / 1e6:.2f} M",
                f"{shape.vocabulary * shape.hidden / 1e6:.2f} M",
                f"{tokens / 1e6:.0f} M, {ratio:g} a weight",
            ]
        )
    return f"""## Set-up

Qwen2 models trained from scratch on novels (16 k BPE made on them; text of other authors for validation and test),
sequences of {scale.sequence} tokens, {scale.batch} a step ({scale.trend_batch} in the trend over sizes); AdamW 0.9 /
0.95, {scale.warmup_steps} steps of warm-up, cosine to a thirtieth, clip 1.0, weight decay 0.1, which falls to 0 by the
middle of the steps where values are quantised, as the authors have it. bf16 arithmetic over fp32 masters. BF16 is the
same layer without quantisation of weights and activations, with the same mask. Embedding and head are tied and stay as
they are. Tables tell the test perplexity of the last step (windows of {scale.sequence} tokens, fp32), mean ± standard
deviation over seeds {", ".join(map(str, scale.seeds))}. A seed sets initial weights and the order of the data, for
every precision and pattern alike; "over dense" divides by the dense model of the same precision and seed.

{table(["size", "shape", "linear weights", "embedding", "training tokens"], rows)}"""


def learning_rates(scale: Scale, results: Results) -> str:
    rows = []
    of_trends = [(f"trend, {size}", scale.of_trend(size)) for size in scale.sizes]
    for told, one in ((f"all others, {scale.sizes[0]}", scale), *of_trends):
        for values, name in NAMES.items():
            chosen = chosen_rate(one, results, values)
            for rate in swept_rates(one, results, values):
                found = [results.perplexity(run, "valid") for run in swept(one, values, rate)]
                loss = swept_loss(one, results, values, rate)
                rows.append(
                    [
                        told,
                        name,
                        f"{rate:g}",
                        *(NOT_YET if perplexity is None else f"{perplexity:.2f}" for perplexity in found),
                        NOT_YET if loss is None else f"{loss:.4f}",
                        "chosen" if rate == chosen else "",
                    ]
                )
    header = [
        "for, at",
        "precision",
        "rate",
        *(f"validation perplexity {pattern}" for pattern in SWEPT),
        "mean loss",
        "",
    ]
    return f"""## Learning rates

Each precision has its own, chosen by the same rule: the lowest validation loss, mean of dense and 6:8, at full length,
with a seed ({scale.sweep_seed}) that no table uses; where the best was the lowest or highest tried, the next was tried
too. So all patterns of a precision share a rate that favours neither dense nor sparse. `sign` takes that of ternary.
Rates are told as of {scale.sizes[0]}; larger models take them times their width's share of the smallest's: 1 / width,
for both precisions. For the trend they are chosen at each size.

{table(header, rows)}"""


def figures(drawn: dict[str, str]) -> str:
    if not drawn:
        return f"## Figures\n\n{NOT_YET[0].upper()}{NOT_YET[1:]}."
    return "## Figures\n\n" + "\n\n".join(f"![{title}](figures/{file})\n\n{title}" for title, file in drawn.items())


def limits(scale: Scale, results: Results) -> str:
    small, tokens = scale.sizes[0], sorted(map(scale.tokens, scale.sizes))
    seen = [value for values in MAKE for value in by_pattern(scale, results, small, values, DENSE).values()]
    reached = f"{min(seen):.0f} to {max(seen):.0f}" if seen else NOT_YET
    times = f"{results.passes(tokens[0])} to {results.passes(tokens[-1])} times"
    return f"""## What this cannot tell, and what it would take

{seeds_to_tell(scale, results)}
* Novels of one language stand for RefineWeb, and {tokens[0] / 1e6:.0f} M to {tokens[-1] / 1e6:.0f} M tokens of training
  for 50 B. Runs read the text {times}, which may favour sparse models, as they learn less of it by heart; those of the
  trend over sizes read it {results.passes(scale.trend_tokens)} times.
* Perplexities of dense models ({small}: {reached}) are far from the paper's 26, of another text and vocabulary, and
  in models this small the embedding holds as many parameters as the layers that are made sparse, or more.
* The paper's own sizes take 0.5 B parameters and 50 B tokens: 1.5e20 operations a run, about 100 hours of one H100 at
  400 TFLOP/s; its first table, 14 runs of one seed, about 60 days of one such GPU."""
