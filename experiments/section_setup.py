"""How the runs of the report were made: models, training, learning rates."""

from __future__ import annotations

from experiments.results import Results
from experiments.settings import SHAPES, Scale, full_precision
from experiments.tables import (
    DENSE,
    SWEPT,
    TABLES,
    chosen_rate,
    missing,
    swept,
    swept_loss,
    swept_rates,
    waiting,
)  # fmt: skip
from experiments.wording import NAMES, NOT_YET, table


def heading(scale: Scale, results: Results) -> str:
    asked = {run.key for runs in TABLES.values() for run in runs(scale, results)}
    found = [result for key, result in results.found.items() if key in asked]
    hardware = sorted({gpu for result in found for gpu in result["gpus"]} or {result["cpu"] for result in found})
    commits = sorted({str(result["commit"]) for result in found})
    left, later = len(missing(scale, results, list(TABLES))), waiting(scale, results)
    spare = len(results.found) - len(found)
    more = f" {spare} more are asked for by no table any longer ([the log](LOG.md))." if spare else ""
    made = f"{len(found)} runs on {', '.join(hardware)}, of commit {', '.join(commits)}." if found else "No runs yet."
    after = f", and {later} more of the trend wait for the rates that these find" if later else ""
    return f"""# Does the paper hold?

The tables of arXiv 2603.05168, re-run at a scale at which a run takes one GPU minutes, with seeds and intervals. Made
by `python -m experiments.report` from `experiments/results/runs/`: no result is typed. {made} Of the runs
that the tables ask for {left} are missing{after}.{more}"""


def method(scale: Scale, results: Results) -> str:
    one = full_precision(scale, scale.sizes[0], DENSE, scale.seeds[0], scale.rates[0])
    rows = []
    for size, ratio in zip(scale.sizes, scale.tokens_a_weight, strict=True):
        shape, tokens = SHAPES[size], scale.tokens(size)
        rows.append(
            [
                size,
                f"{shape.layers} layers, {shape.hidden} wide, FFN {shape.ffn}",
                f"{shape.weights / 1e6:.2f} M",
                f"{shape.embedding / 1e6:.2f} M",
                f"{tokens / 1e6:.0f} M, {ratio:g} a weight",
            ]
        )
    return f"""## Set-up

Qwen2 models trained from scratch on novels (16 k BPE made on them; text of other authors for validation and test),
sequences of {scale.sequence} tokens, {scale.batch} a step ({scale.trend_batch} in the trend over sizes); AdamW
{one.beta1} / {one.beta2}, {scale.warmup_steps} steps of warm-up, cosine to 1/{1 / one.final_rate_share:.0f}, clip
{one.clip}, weight decay {one.weight_decay}, which falls to 0 by the middle of the steps where values are quantised, as
the authors have it. bf16 arithmetic over fp32 masters. BF16 is the same layer without quantisation of weights and
activations, with the same mask. Embedding and head are tied and stay as they are. Tables tell the test perplexity of
the last step (windows of {scale.sequence} tokens, fp32), mean ± standard deviation over seeds
{", ".join(map(str, scale.seeds))}. A seed sets initial weights and the order of the data, for
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
too. So all patterns of a precision share a rate, in whose choice dense and 6:8 weigh the same. `sign` takes that of
ternary.
Rates are told as of {scale.sizes[0]}; larger models take them times their width's share of the smallest's: 1 / width,
for both precisions. For the trend they are chosen at each size.

{table(header, rows)}"""
