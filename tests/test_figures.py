"""Every figure that the README and the pages tell is that of a result file."""

from __future__ import annotations

import json
import re
from statistics import median
from typing import Any

from fenced import ROOT
from sparse_bitnet.kernels.sparse_product.tiling import DEPTH, TILINGS
from sparse_bitnet.nn.sparse_forward import WORTHWHILE_GAIN

README = (ROOT / "README.md").read_text(encoding="utf-8")
INDEX, TUTORIAL, ON_GPUS, PERFORMANCE = (
    (ROOT / "docs" / page).read_text(encoding="utf-8")
    for page in ("index.md", "tutorial.md", "how-to/train-on-gpus.md", "explanation/performance.md")
)
LAYERS, PROMPTS = 36, (2048, 8192)  # of the 3B shape
PATTERNS = ("2:4", "6:8")
BANDWIDTH = 3.35e12  # bytes a second of the memory of an H100, by the data sheet
RESULTS = {file.stem: json.loads(file.read_text()) for file in (ROOT / "benchmarks" / "results").glob("*.json")}


def test_the_figures_of_the_readme_are_those_of_the_result_file() -> None:
    file = re.search(r"`(experiments/results/[\w-]+\.json)`", README)
    assert file is not None
    result = json.loads((ROOT / file[1]).read_text())
    assert {"command", "commit", "versions", "seed", "cpu"} <= set(result)
    assert not result["commit"].endswith("-dirty")
    seen = result["figures"]
    rows = [
        f"| {seen['parameters']:,}, of which {seen['ternary_weights']:,} ternary 6:8 |",
        f"| {seen['bits_per_weight']:.2f} |",
        f"| {seen['bytes_bf16'] / 1e6:.2f} / {seen['bytes_latent'] / 1e6:.2f} / {seen['bytes_packed'] / 1e6:.2f} MB |",
        f"| {100 * seen['zeros']:.1f} % |",
        f"| {100 * seen['flip_rate_first']:.2f} % to {100 * seen['flip_rate_last']:.2f} % |",
        f"| {seen['perplexity_unigram']:.1f} / {seen['perplexity_latent']:.3f} / {seen['perplexity_packed']:.3f} |",
        f"| {seen['train_tokens_per_second']:,.0f} / {seen['generate_tokens_per_second']:,.0f} |",
    ]
    assert [row for row in rows if row not in README] == []


def test_the_figures_of_the_tutorial_are_those_of_the_result_file() -> None:
    result = json.loads((ROOT / "experiments" / "results" / "tutorial-xeon-2-cores.json").read_text())
    assert {"command", "commit", "versions", "seed", "cpu"} <= set(result)
    assert not result["commit"].endswith("-dirty")
    seen, told = result["figures"], " ".join(TUTORIAL.split())
    for row in seen["readings"]:
        line = f"loss {row['loss']:.4f} flip rate {100 * row['flip_rate']:.2f} % zeros {100 * row['zeros']:.2f} %"
        assert f"step {row['step']}/400 {line}" in told
    assert f"rounding makes {100 * seen['zeros']:.1f} % of it" in told
    assert f"{seen['bytes_latent'] / 1e6:.2f} MB in fp32" in told
    assert f"`packed`, {seen['bytes_packed'] / 1e6:.2f} MB" in told
    assert f"The file, {seen['bytes_gguf'] / 1e6:.2f} MB" in told
    perplexities = f"{seen['perplexity_latent']:.3f} and {seen['perplexity_packed']:.3f}"
    assert f"a perplexity of {perplexities}, {seen['bits_per_byte_packed']:.2f} bits a byte" in told


def rows_of(text: str) -> set[str]:
    """The rows of the tables that hold speeds: those with a number of at least one decimal in a cell of its own."""
    return {line for line in text.splitlines() if re.search(r"^\| .*\| [\d,]+\.\d+[ |]", line)}


def test_the_speeds_of_the_front_pages_are_those_of_the_page_on_performance() -> None:
    speeds = rows_of(README.split("## Does the paper hold?")[0])
    assert speeds
    assert speeds - rows_of(PERFORMANCE) == {row for row in speeds if row in README.split("## Install")[0]}
    ours = next(row for row in RESULTS["train-0.5b-h200"]["systems"] if row["system"] == "ours")
    one = next(row for row in RESULTS["decode-1536-xeon-2-cores"]["decode"] if row["system"] == "i2")
    for page in (README, INDEX):
        assert f"at {ours['times_dense']:.2f} of the speed of dense layers" in " ".join(page.split())
    assert one["threads"] == 1
    assert f"{one['times_rival']:.2f} times llama.cpp's tokens a second" in INDEX


def test_the_speeds_of_training_are_those_of_the_result_files() -> None:
    results = RESULTS
    assert all({"command", "commit", "versions", "seed", "gpus"} <= set(result) for result in results.values())
    systems = results["train-0.5b-h200"]["systems"]
    rows = [
        f"| {row['tokens_per_second']:,.0f} | {row['times_dense']:.3f} | {row['bytes_at_most'] / 2**30:.1f} |"
        for row in systems
    ]
    assert len(rows) == 4
    assert [row for row in rows if row not in PERFORMANCE] == []
    rate = {name: result["systems"][-1]["tokens_per_second"] for name, result in results.items() if "systems" in result}
    several = rate["train-0.5b-2-gpus-h200"] / rate["train-0.5b-1-gpu-h200"]
    short = rate["train-0.5b-2-gpus-no-accumulation-h200"] / rate["train-0.5b-h200"]
    split = results["train-0.5b-2-gpus-fsdp2-h200"]["systems"][1]["times_dense"]
    kernel = next(row for row in results["kernels-h200"]["kernels"] if row["pattern"] == "6:8")
    told = " ".join(PERFORMANCE.split())
    assert (
        f"is {several:.2f} times that of one with 65,536 tokens a GPU and step in 4 micro-batches, {short:.2f}" in told
    )
    assert f"`fsdp2` runs at {split:.2f} of the speed of dense" in told
    assert f"takes {kernel['ms']:.3f} ms, {100 * kernel['share_of_copy_bandwidth']:.0f} % of the bandwidth" in told
    assert f"take {kernel['times_plain']:.0f} times as long" in told
    share = {row["pattern"]: 100 * row["share_of_copy_bandwidth"] for row in results["kernels-h200"]["kernels"]}
    assert f"{share['8:16']:.0f} % and {share['20:32']:.0f} %" in told
    curves = json.loads((ROOT / "experiments" / "results" / "two-processes-h200.json").read_text())
    apart = curves["relative_difference_of_the_loss_from_one"]
    first, whole, seed = apart["ddp"]["first_10_at_most"], apart["ddp"]["at_most"], apart["seed"]["at_most"]
    told = " ".join(ON_GPUS.split())
    assert f"to {100 * first:.3f} % over 10 steps and {100 * whole:.1f} % over 100" in told
    assert f"another seed differs by {100 * seed:.1f} %" in told


def test_the_sparse_forward_is_that_of_the_result_files() -> None:
    rows = []
    for systems in (RESULTS[name]["systems"] for name in RESULTS if re.fullmatch("train-.*of.*-h100", name)):
        dense, sparse = systems[0], systems[-1]
        assert (dense["system"], sparse["system"]) == ("dense", "sparse")
        memory = f"{dense['bytes_at_most'] / 2**30:.1f}, {sparse['bytes_at_most'] / 2**30:.1f}"
        speeds = f"{dense['tokens_per_second']:,.0f} | {sparse['tokens_per_second']:,.0f}"
        rows.append(f"| {speeds} | {sparse['times_dense']:.3f} | {memory} |")
    assert len(rows) == 6
    assert [row for row in rows if row not in PERFORMANCE] == []
    products = RESULTS["products-h100"]["products"]
    told = " ".join(PERFORMANCE.split())
    large = {row["pattern"]: row for row in products if row["shape"] == [37888, 3584] and row["tokens"] == 16384}
    two, six = (
        [f"{large[n][f'{name}_ms']:.2f}" for name in ("ours", "bf16", "fp8", "cusparselt")] for n in ("2:4", "6:8")
    )
    assert f"2:4 takes {two[0]} ms where bf16 takes {two[1]}, fp8 {two[2]} and cuSPARSELt 0.8.0 {two[3]}" in told
    assert f"6:8 {six[0]}, {six[1]}, {six[2]} and {six[3]}" in told
    dense, sparse = (row["kernels"] for row in RESULTS["train-3b-6of8-checkpointed-h100"]["systems"])
    of_all, of_sparse = (sum(kernel["ms"] for kernel in kernels) for kernels in (dense, sparse))
    alone = next(kernel["ms"] for kernel in sparse if kernel["kernel"] == "sparse_product")
    replaced = sum(k["ms"] for k in dense if re.fullmatch("nvjet.*_TN[NT]", k["kernel"]) and k["calls"] % LAYERS == 0)
    assert f"products take {alone:.0f} ms of kernels instead of {replaced:.0f}" in told
    assert f"a step {of_sparse:.0f} instead of {of_all:.0f}:" in told
    assert 0.6 < 1 - (of_all - of_sparse) / (replaced - alone) < 0.72  # two thirds
    for page in (PERFORMANCE, ON_GPUS):
        assert f"where that is {WORTHWHILE_GAIN} times as fast as the dense product" in " ".join(page.split())


def test_the_speeds_on_a_gpu_are_those_of_the_result_files() -> None:
    packed = {(*row["shape"], row["tokens"]): row for row in RESULTS["packed-h100"]["packed"]}
    products = {(*row["shape"], row["tokens"], row["pattern"]): row for row in RESULTS["products-h100"]["products"]}
    rows = []
    for height, width in {key[:2] for key in packed}:
        few = [packed[height, width, tokens] for tokens in (1, 16, 64)]
        cells = (f"{1e3 * row['ours_ms']:.1f}, {row['times_bf16']:.2f}, {row['times_fp8']:.2f}" for row in few)
        rows.append(f"| {height:,} \N{MULTIPLICATION SIGN} {width:,} | {' | '.join(cells)} |")
        for pattern in ("2:4", "6:8"):
            many = [products[height, width, tokens, pattern] for tokens in (512, 2048, 8192, 32768)]
            cells = (", ".join(f"{row[f'times_{name}+']:.2f}" for name in ("bf16", "int8", "fp8")) for row in many)
            rows.append(f"| {height:,} \N{MULTIPLICATION SIGN} {width:,}, {pattern} | {' | '.join(cells)} |")
    assert len(rows) == 15
    assert [row for row in rows if row not in PERFORMANCE] == []
    told = " ".join(PERFORMANCE.split())
    assert f"at {100 * packed[37888, 3584, 1]['share_of_copy_bandwidth']:.0f} % of the bandwidth of a copy" in told
    many = [row for row in products.values() if row["tokens"] >= 2048]
    middle = [row for row in products.values() if row["tokens"] in (512, 1024)]
    two, six, fewer = (
        [row["times_8bit+"] for row in rows if row["pattern"] == pattern]
        for rows, pattern in ((many, "2:4"), (many, "6:8"), (middle, "6:8"))
    )
    assert f"2:4 is {min(two):.2f} to {max(two):.2f} times as fast from 2,048 tokens on" in told
    assert f"and 6:8 {min(six):.2f} to {max(six):.2f} times ({min(fewer):.2f} to {max(fewer):.2f} with 512" in told
    reached = [100 * row["share_of_sparse_peak"] for row in many]
    assert (
        f"At best {max(reached):.0f} % is reached from 2,048 tokens on, in the middle {median(reached):.0f} %" in told
    )
    rival = [row["times_cusparselt"] for row in many]
    assert f"cuSPARSELt takes {min(rival):.2f} to {max(rival):.2f} times our time" in told
    tiling = TILINGS[0]  # of 256 tokens, whole
    operands = 2 * tiling.warpgroups * tiling.tokens * DEPTH // 2  # bytes that instructions of half the columns read
    passing = tiling.tokens * DEPTH + 2 * tiling.block_rows * DEPTH // 4  # written, and fragments read
    cycles, needed = (operands + passing) / 128, tiling.warpgroups * 64 * tiling.tokens * DEPTH * 2 / 16384
    kib = f"read {operands // 1024} KiB of activations from it, and {passing // 1024} KiB of activations and fragments"
    assert kib in told
    assert f"{cycles:.0f} cycles at 128 bytes each, where the multiplications take {needed:.0f}" in told
    assert f"That allows {100 * needed / cycles:.0f} % of the data sheet's peak at its clock" in told


def row_of(name: str, system: str, **size: int) -> dict[str, Any]:
    """Of the result of a whole model: a step of `batch` sequences, or a prompt of `tokens`."""
    rows = RESULTS[f"generation-3b-{name}"]["decode" if "batch" in size else "prefill"]
    return next(row for row in rows if row["system"] == system and size.items() <= row.items())


def test_the_speeds_of_whole_models_on_a_gpu_are_those_of_the_result_files() -> None:
    one, many = ("one sequence, a step", {"batch": 1}), ("64 sequences, a step", {"batch": 64})
    prompts = [(f"a prompt of {tokens:,}", {"tokens": tokens}) for tokens in PROMPTS]
    rows = []
    for kind, size in (one, many, *prompts):
        for pattern in PATTERNS:
            dense, ours = (row_of("h100", system, **size) for system in ("dense", pattern))
            speeds = f"{ours['times_dense']:.2f} | {ours['tokens_per_second']:,.0f}"
            rows.append(f"| {kind}, {pattern} | {dense['ms']:.2f} | {ours['ms']:.2f} | {speeds} |")
    assert len(set(rows)) == 8
    assert [row for row in rows if row not in PERFORMANCE] == []
    assert len([row for row in rows if row in README]) == 5
    told = " ".join(PERFORMANCE.split())
    (two, six), (twos, sixes) = (
        [row_of("h200", pattern, batch=count)["times_dense"] for pattern in PATTERNS] for count in (1, 64)
    )
    short, long = (row_of("h200", "6:8", tokens=tokens)["times_dense"] for tokens in PROMPTS)
    assert f"steps of one sequence were {two:.2f} (2:4) and {six:.2f} times (6:8) as fast as bf16" in told
    assert f"of 64 {twos:.2f} and {sixes:.2f}, and 6:8 prompts of 2,048 and 8,192 {short:.2f} and {long:.2f}" in told
    memory = {row["system"]: row["share_of_dense"] for row in RESULTS["generation-3b-h100"]["memory"]}
    shares = [memory[pattern] for pattern in PATTERNS]
    held = [100 * share["held_bytes"] for share in shares]
    memory = (
        f"Weights take {100 * shares[0]['state_bytes']:.0f} % of the memory, and with the fragments that prompts use"
    )
    for page in (README, PERFORMANCE):
        assert f"{memory} beside them {held[0]:.0f} % (2:4) and {held[1]:.0f} % (6:8)." in " ".join(page.split())


def test_what_is_told_of_steps_of_one_sequence_on_a_gpu_is_of_the_result_files() -> None:
    told, step = " ".join(PERFORMANCE.split()), row_of("h100", "2:4", batch=1)
    layers, head = (kernel["ms"] for kernel in step["kernels"][:2])
    assert step["kernels"][0]["kernel"] == "decoder_step"
    assert f"Layers take {layers:.2f} of {step['ms']:.2f} ms, the head, which is bf16 in both, {head:.2f}." in told
    linears = RESULTS["generation-3b-h100"]["memory"][1]["linears_bytes"]
    assert f"would take {1e3 * linears / BANDWIDTH:.2f} ms by the data sheet" in told
    alone, together = (row["ms"] for row in RESULTS["generation-3b-sdpa-h100"]["decode"])
    assert f"takes {alone:.2f} ms for one sequence and {together:.2f} for 64" in told
    ratios = alone / step["ms"], together / row_of("h100", "2:4", batch=64)["ms"]
    assert f"packed 2:4 is {ratios[0]:.1f} and {ratios[1]:.1f} times as fast" in told


def test_what_is_told_of_steps_of_64_sequences_is_of_the_result_files() -> None:
    told, many = " ".join(PERFORMANCE.split()), RESULTS["generation-3b-h100"]
    other = row_of("64-gates-by-inductor-h100", "dense", batch=64)["ms"]
    packed = [row_of("h100", pattern, batch=64)["ms"] for pattern in PATTERNS]
    assert f"On another H100 the bf16 step of 64 took {other:.2f} ms" in told
    assert f"would be {other / packed[0]:.2f} and {other / packed[1]:.2f} times as fast." in told
    steps = [row_of("h100", system, batch=64)["kernels"] for system in ("dense", "2:4")]
    dense, ours = map(microseconds_of_a_layer, steps)
    assert (
        f"take {dense[0]:.0f} us in bf16 and {ours[0]:.0f} with 2:4, of which attention is {dense[2]:.0f} and" in told
    )
    assert f"and {ours[2]:.0f} and products are {dense[1]:.0f} and {ours[1]:.0f}." in told
    bytes_of = {row["system"]: row["linears_bytes"] for row in many["memory"]}
    roofs = [1e6 * bytes_of[system] / LAYERS / BANDWIDTH for system in ("dense", "2:4")]
    assert f"would take {roofs[0]:.0f} and {roofs[1]:.0f} us by the data sheet" in told
    chosen = [line for shape in many["choices"]["6:8"] for line in shape.splitlines() if "compiled" in line]
    assert [sum("us: sparse" in line.split(";")[way] for line in chosen) for way in (0, 1)] == [2, 1]
    late, soon = RESULTS["gates-by-inductor-h100"]["runs"]
    after = [_after_the_product_before(run["layer"]) for run in (soon, late)]
    assert f"ended {after[0]:.1f} and {after[1]:.1f} us after the product before it" in told
    assert f"took {soon['ms']:.2f} and {late['ms']:.2f} ms (`gates-by-inductor-h100.json`)" in told
    assert f"with ours, a step takes {packed[0]:.2f}." in told


def _after_the_product_before(layer: list[dict[str, Any]]) -> float:
    place = next(index for index, kernel in enumerate(layer) if "silu" in kernel["kernel"])
    assert layer[place - 1]["kernel"] == "sparse_product"
    return layer[place]["end_us"] - layer[place - 1]["end_us"]


def test_what_bounds_a_prompt_is_told_by_the_result_file() -> None:
    told, hidden, ffn, key_values = " ".join(PERFORMANCE.split()), 2048, 11008, 512
    dense, ours = (row_of("h100", system, tokens=8192) for system in ("dense", "6:8"))
    of_dense, of_ours = (
        [LAYERS * time / 1e3 for time in microseconds_of_a_layer(row["kernels"])] for row in (dense, ours)
    )
    (_, of_bf16, _), (_, products, attention) = of_dense, of_ours
    rest = ours["ms"] - products - attention
    assert (
        f"of its {ours['ms']:.0f} ms products take {products:.0f} by the profile, where bf16 takes {of_bf16:.0f},"
        in told
    )
    assert f"and attention {attention:.0f}, which leaves {rest:.0f} for what lies between them." in told
    lifted = 1.5
    gates, quantised = ffn * (4 + lifted), 3 * hidden * (2 + lifted)  # bytes of a token: two norms, and before o_proj
    residuals, rotations = 2 * hidden * 2, (hidden + key_values) * 4
    least = 1e3 * 8192 * LAYERS * (gates + quantised + residuals + rotations) / BANDWIDTH
    best = dense["ms"] / (products + attention + least)
    assert f"would take {least:.0f} by the data sheet, and the whole be {best:.2f} times as fast as bf16" in told


def microseconds_of_a_layer(kernels: list[dict[str, Any]]) -> tuple[float, float, float]:
    """All of them, products, attention: of what runs in every layer, or in every few."""
    per_layer = [(kernel["kernel"], 1e3 * kernel["ms"] / LAYERS) for kernel in kernels if kernel["calls"] > 1]
    sums = (re.compile(pattern) for pattern in ("", "nvjet|splitK|_multiply|_finish_splits|^sparse_product", "sdpa"))
    return tuple(sum(time for name, time in per_layer if found.search(name)) for found in sums)  # type: ignore[return-value]


def test_the_speeds_on_a_cpu_are_those_of_the_result_file() -> None:
    result = RESULTS["linear-1536-xeon-2-cores"]
    found = {(row["format"], row["threads"], row["tokens"]): row for row in result["linears"]}
    for name in ("i2", "t5", "g4", "g4s3"):
        one, two = found[name, 1, 1], found[name, 2, 1]
        many, many_two = found[name, 1, 512], found[name, 2, 512]
        row = (
            f"| `{name}`, {one['bits']:g} | {one['tokens_per_second']:.1f} / {two['tokens_per_second']:.1f} "
            f"| {100 * one['share_of_roof']:.0f} / {100 * two['share_of_roof']:.0f} % "
            f"| {one['times_first']:.2f} / {two['times_first']:.2f} "
            f"| {many['tokens_per_second']:.0f} / {many_two['tokens_per_second']:.0f} |"
        )
        assert row in PERFORMANCE
    one, two = found["i2", 1, 1], found["i2", 2, 1]
    told = " ".join(PERFORMANCE.split())
    assert f"`i2` makes {one['op_tokens_per_second']:.1f} / {two['op_tokens_per_second']:.1f} tokens a second" in told
    assert f"the reference {1e3 / one['reference_ms']:.1f} / {1e3 / two['reference_ms']:.1f}." in told


def test_the_speeds_of_the_engine_are_those_of_the_result_file() -> None:
    result = RESULTS["decode-1536-xeon-2-cores"]
    found = {(row["system"], row["threads"]): row for row in result["decode"]}
    for system in ("i2", "g4s3", "llama.cpp TQ2_0"):
        one, two = found[system, 1], found[system, 2]
        for name, form in (("tokens_per_second", ".1f"), ("times_rival", ".2f"), ("prefill_times_rival", ".2f")):
            assert f"| {one[name]:{form}} / {two[name]:{form}} |" in PERFORMANCE
    assert not result["commit"].endswith("-dirty")
    one, two = found["g4s3", 1], found["g4s3", 2]
    assert f"{one['times_first']:.2f} / {two['times_first']:.2f} come from sparsity" in PERFORMANCE
    beyond = {row["format"]: row["beyond_bytes"] / 1e6 for row in result["memory"]}
    assert f"`i2` takes {beyond['i2']:.0f} MB at most and `g4s3` {beyond['g4s3']:.0f}," in PERFORMANCE


def test_the_degradations_of_the_readme_are_those_of_the_report() -> None:
    report = (ROOT / "experiments" / "REPORT.md").read_text(encoding="utf-8")
    told = README.split("## Does the paper hold?")[1].split("\n\n")[2]
    assert told.startswith("| perplexity over dense |")
    assert told in report
    of_all = "| sparsity costs ternary less | at every pattern | smaller for ternary at 5:8, 3:8, 2:8 |"
    assert f"{of_all} yes at 3 of 6, else cannot be told |" in report
    assert "What ternary weights save is less than in the paper at 6:8, 4:8, 3:8, 2:8." in report
    costs = {
        row[0]: row[1:] for row in re.findall(r"^\| (.:8) \| (.*;.*) \| (.*;.*) \| (.*;.*) \|$", report, re.MULTILINE)
    }
    assert all(costs[pattern][0].endswith(": below") for pattern in ("6:8", "4:8", "3:8", "2:8"))
    changes = re.findall(r"^\| .* is worse \|.*\| (.*) \|$", report, re.MULTILINE)
    assert changes == 6 * ["no difference can be told"]
    over_sizes = re.findall(r"^\* (.*m) weights, (.*) tokens each: (.*)$", report, re.MULTILINE)
    assert over_sizes == [
        ("4.8m", "100", "smaller for ternary at no pattern and larger at 6:8"),
        ("1.8m", "67", "smaller for ternary at 4:8"),
        ("4.8m", "25", "smaller for ternary at 4:8"),
        ("21m", "5.6", "smaller for ternary at no pattern"),
    ]
    trend = {
        row[0]: row[1:]
        for row in re.findall(
            r"^\| (.*m) \| .* \| .* \| (.*) ± .* \| (.*) ± .* \|$",
            report.split("### The trend")[1].split("##")[0],
            re.MULTILINE,
        )
    }
    small, middle, large = ((ternary, bf16) for bf16, ternary in map(trend.get, ("1.8m", "4.8m", "21m")))
    paragraph = " ".join(README.split())
    assert f"({' beside '.join(small)}, {' beside '.join(middle)})" in paragraph
    assert f"it costs either precision little ({' and '.join(large)})" in paragraph
    assert "21m weights, 5.6 tokens each, 4:8" in report and "5.6 tokens a weight" in paragraph
    often = {
        row[0]: row[1:]
        for row in re.findall(
            r"^\| 4.8m \| (16 times \| .*) \| 6:8 \|.*\| (.*) ± .* \| (.*) ± .* \|$", report, re.MULTILINE
        )
    }
    (read, unread), (read_bf16, unread_bf16) = often["16 times | ternary"], often["16 times | BF16"]
    assert "4.8m weights, 100 tokens each, 4:8 | at 0.5 B | BF16 1.040 ± 0.003, ternary 1.051 ± 0.006 | no" in report
    assert "4:8 1.051 beside 1.040, which cannot be told apart" in paragraph
    assert (
        f"on text that was read ({read} beside {read_bf16}), and more on the test ({unread} beside {unread_bf16},"
        in paragraph
    )
