"""`sparse-bitnet bench generation | prefill`: whole models of transformers, dense and packed."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from sparse_bitnet.cli.options import Device, JsonFile, choose_device, numbers, write_figures

Preset = Annotated[str, typer.Option(help="Shape: tiny, qwen2.5-0.5b, qwen2.5-1.5b, qwen2.5-3b.")]
Systems = Annotated[str, typer.Option(help="dense, and n:m of packed ones, separated by commas.")]
Prompt = Annotated[str, typer.Option(help="Tokens of a prompt, separated by commas; empty for no prompts.")]
Batch = Annotated[str, typer.Option(help="Sequences that are written at once, separated by commas; empty for none.")]
Context = Annotated[int, typer.Option(min=1, help="Tokens of each sequence before those that are written.")]
Vocabulary = Annotated[int, typer.Option(min=2, help="Rows of embedding and head, which are one.")]
Attention = Annotated[
    str, typer.Option(help="Of decoding, compiled: grouped, or sdpa, flex_attention, ... of transformers.")
]
Inductor = Annotated[str, typer.Option(help="Options of torch.compile that are switched on, separated by commas.")]
Repeats = Annotated[int, typer.Option(min=1, help="Steps, or prompts, that are timed forwards, and again backwards.")]
NoFuse = Annotated[bool, typer.Option("--no-fuse", help="Multiply q, k and v, and gate and up, one by one.")]
Profile = Annotated[bool, typer.Option("--profile", help="Tell each kernel's time in one more step.")]

MEMORY = {"state": 9, "linears": 13, "held": 9}  # widths of columns


def generation(
    preset: Preset = "qwen2.5-3b",
    systems: Systems = "dense,6:8,2:4",
    batch: Batch = "1,64",
    prompt: Prompt = "2048,8192",
    context: Context = 512,
    vocabulary: Vocabulary = 151_936,
    attention: Attention = "grouped",
    inductor: Inductor = "",
    repeats: Repeats = 30,
    no_fuse: NoFuse = False,
    profile: Profile = False,
    device: Device = "auto",
    json: JsonFile = None,
) -> None:
    """Tokens a second of a whole model on a GPU, written and read: packed, and dense bf16 of transformers, compiled."""
    batches, prompts = (numbers(name, text) if text else () for name, text in (("batch", batch), ("prompt", prompt)))
    import torch

    from sparse_bitnet.bench.generation import GenerationBench, bench_generation

    bench = GenerationBench(
        preset, tuple(systems.split(",")), batches, prompts, context, vocabulary, attention,
        tuple(inductor.split(",")) if inductor else (), repeats, not no_fuse, profile,
    )  # fmt: skip
    result: dict[str, Any] = {}
    for result in bench_generation(bench, torch.device(choose_device(device))):
        write_figures(json, result, bench.seed)  # a long measurement that is stopped leaves what it has
    for system, choices in result["choices"].items():
        print(system, *choices, sep="\n")
    _tell(result)


def prefill(
    preset: Preset = "qwen2.5-3b",
    systems: Systems = "dense,6:8,2:4",
    prompt: Prompt = "2048,8192",
    vocabulary: Vocabulary = 151_936,
    inductor: Inductor = "",
    repeats: Repeats = 30,
    no_fuse: NoFuse = False,
    profile: Profile = False,
    device: Device = "auto",
    json: JsonFile = None,
) -> None:
    """Tokens a second of a prompt: `bench generation` without its decoding."""
    generation(
        preset, systems, batch="", prompt=prompt, vocabulary=vocabulary, inductor=inductor, repeats=repeats,
        no_fuse=no_fuse, profile=profile, device=device, json=json,
    )  # fmt: skip


def _tell(result: dict[str, Any]) -> None:
    for rows, size in (("decode", "batch"), ("prefill", "tokens")):
        if result[rows]:
            print(f"{rows:<10}{size:>7}{'ms':>10}{'tokens/s':>12}{'x dense':>9}{'GiB of work':>13}{'likeness':>10}")
        for row in result[rows]:
            ratio = f"{row['times_dense']:.2f}" if "times_dense" in row else "-"
            how = "   its layers in one launch" if row.get("not_in_one_launch", "") is None else ""
            print(
                f"{row['system']:<10}{row[size]:>7}{row['ms']:>10.3f}{row['tokens_per_second']:>12,.0f}{ratio:>9}"
                f"{row['work_bytes'] / 2**30:>13.2f}{row['likeness']:>10.4f}{how}"
            )
            for kernel in row["kernels"]:
                print(f"    {1e3 * kernel['ms']:>10.1f} us {kernel['calls']:>5} x {kernel['kernel']}")
    print(f"{'memory':<10}{'state':>9}{'its linears':>13}{'held':>9}   GiB, and of dense")
    for row in result["memory"]:
        sizes = "".join(f"{row[f'{key}_bytes'] / 2**30:>{width}.3f}" for key, width in MEMORY.items())
        shares = "".join(f"{100 * share:>7.1f} %" for share in row.get("share_of_dense", {}).values())
        print(f"{row['system']:<10}{sizes}   {shares}")
