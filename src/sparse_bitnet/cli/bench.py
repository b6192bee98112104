"""`sparse-bitnet bench train | kernels | products | packed | linear | decode | prefill | generation`"""

from __future__ import annotations

from typing import Annotated

import typer

from sparse_bitnet.cli.bench_generation import generation, prefill
from sparse_bitnet.cli.options import Device, JsonFile, choose_device, numbers, write_figures

app = typer.Typer(help="Measure speeds side by side on this machine, as ratios, beside what its hardware could do.")
app.command("generation")(generation)
app.command("prefill")(prefill)


@app.command("train")
def train(
    preset: Annotated[str, typer.Option(help="Shape: tiny, qwen2.5-0.5b, qwen2.5-1.5b, qwen2.5-3b.")] = "qwen2.5-0.5b",
    pattern: Annotated[str, typer.Option(help="n:m of ours and of the plain layers.")] = "6:8",
    sequence: Annotated[int, typer.Option(min=2, help="Tokens a sequence.")] = 2048,
    batch: Annotated[int, typer.Option(min=1, help="Sequences a micro-batch.")] = 8,
    accumulation: Annotated[int, typer.Option(min=1, help="Micro-batches an optimizer step.")] = 1,
    vocabulary: Annotated[int, typer.Option(min=2, help="Rows of embedding and head.")] = 151_936,
    gradient_checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing")] = False,
    sharding: Annotated[str, typer.Option(help="Under torchrun: none is DDP, or fsdp2.")] = "none",
    systems: Annotated[str, typer.Option(help="Of dense, plain, plain-compiled, ours, sparse.")] = "dense,plain,ours",
    steps: Annotated[int, typer.Option(min=1, help="Steps that are timed, after a warm-up.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="How often all systems are measured.")] = 2,
    profile: Annotated[bool, typer.Option("--profile", help="Tell FILE each kernel's time in one more step.")] = False,
    device: Device = "auto",
    json: JsonFile = None,
) -> None:
    """Tokens a second of training: our layers, `nn.Linear`, and the method as it is usually written in PyTorch."""
    import torch

    from sparse_bitnet.bench.train import TrainBench, bench_train
    from sparse_bitnet.training.processes import is_first_process, join_processes, leave_processes

    if sharding not in ("none", "fsdp2"):
        raise ValueError(f"--sharding {sharding}: choose none or fsdp2")
    bench = TrainBench(
        preset, pattern, sequence, batch, accumulation, vocabulary, gradient_checkpointing, sharding,
        tuple(systems.split(",")), steps, rounds, profile,
    )  # fmt: skip
    joined = join_processes()
    if sharding != "none" and joined.num_processes == 1:
        raise ValueError(f"--sharding {sharding} needs several processes and there is one: start with torchrun")
    chosen = str(joined.device) if joined.num_processes > 1 else choose_device(device)
    result = bench_train(bench, torch.device(chosen))
    first = is_first_process()
    leave_processes()
    if not first:
        return
    print(f"{preset}, {pattern}, {result['processes'] * bench.tokens:,} tokens a step, {result['processes']} processes")
    print(f"{'system':<16}{'tokens/s':>10}{'ms a step':>11}{'x dense':>9}{'GiB':>8}{'of matmul rate':>16}")
    for row in result["systems"]:
        ratio = f"{row['times_dense']:.3f}" if "times_dense" in row else "-"
        memory = f"{row['bytes_at_most'] / 2**30:.1f}" if row["bytes_at_most"] else "-"
        print(
            f"{row['system']:<16}{row['tokens_per_second']:>10,.0f}{1e3 * row['seconds_a_step']:>11.1f}{ratio:>9}"
            f"{memory:>8}{100 * row['share_of_matmul_rate']:>14.1f} %"
        )
    write_figures(json, result, bench.seed)


@app.command("kernels")
def kernels(
    rows: Annotated[int, typer.Option(min=1, help="out_features of the weight.")] = 37888,
    columns: Annotated[int, typer.Option(min=1, help="in_features of weight and activations.")] = 3584,
    patterns: Annotated[str, typer.Option(help="n:m, separated by commas.")] = "2:4,6:8,8:8,8:16",
    tokens: Annotated[int, typer.Option(min=1, help="Rows of the activations.")] = 16384,
    device: Device = "auto",
    json: JsonFile = None,
) -> None:
    """The ops of training alone, beside a copy of the bytes that they move and the usual PyTorch."""
    import torch

    from sparse_bitnet.bench.kernels import bench_effective_weight, bench_quantize_activation

    target = torch.device(choose_device(device))
    torch.manual_seed(0)
    measured = bench_effective_weight((rows, columns), patterns.split(","), target)
    measured += bench_quantize_activation([(tokens, columns)], target)
    print(f"{'op':<22}{'shape':<16}{'n:m':<7}{'ms':>9}{'of copy bandwidth':>19}{'x plain PyTorch':>17}")
    for row in measured:
        shape = " x ".join(map(str, row["shape"]))
        print(
            f"{row['op']:<22}{shape:<16}{row['pattern']:<7}{row['ms']:>9.4f}"
            f"{100 * row['share_of_copy_bandwidth']:>17.1f} %{row['times_plain']:>17.1f}"
        )
    write_figures(json, {"kernels": measured}, seed=0)


@app.command("products")
def products(
    shapes: Annotated[str, typer.Option(help="out_features x in_features, separated by commas.")] = (
        "22016x2048,2048x11008,37888x3584,3584x18944,3584x3584"
    ),
    tokens: Annotated[str, typer.Option(help="Separated by commas.")] = "2048,8192,16384",
    patterns: Annotated[str, typer.Option(help="n:m with n <= m - 2, separated by commas.")] = "2:4,6:8",
    device: Device = "auto",
    json: JsonFile = None,
) -> None:
    """Products of a layer with many tokens: on sparse tensor cores, in bf16, in fp8, and by cuSPARSELt."""
    import torch

    from sparse_bitnet.bench.products import bench_products

    torch.manual_seed(0)
    target = torch.device(choose_device(device))
    rows = bench_products(_shapes(shapes), numbers("tokens", tokens), patterns.split(","), target)
    names = ("bf16", "int8", "fp8-precise", "fp8", "cusparselt", "ours", "bf16+", "int8+", "fp8+", "ours+")
    print(
        f"{'shape':<14}{'tokens':>7} {'n:m':<6}{''.join(f'{name:>12}' for name in names)} ms{'x best 8 bits+':>16}"
        "  of sparse peak"
    )
    for row in rows:
        times = "".join(f"{row[key]:>12.4f}" if (key := f"{name}_ms") in row else f"{'-':>12}" for name in names)
        shape = " x ".join(map(str, row["shape"]))
        eight = f"{row['times_8bit+']:.2f}" if "times_8bit+" in row else "-"
        share = 100 * row["share_of_sparse_peak"]
        print(f"{shape:<14}{row['tokens']:>7} {row['pattern']:<6}{times}   {eight:>16}{share:>14.1f} %")
    write_figures(json, {"products": rows}, seed=0)


@app.command("packed")
def packed(
    shapes: Annotated[str, typer.Option(help="out_features x in_features, separated by commas.")] = (
        "37888x3584,3584x18944,3584x3584,22016x2048,2048x11008"
    ),
    tokens: Annotated[str, typer.Option(help="Separated by commas.")] = "1,2,4,8,16,32,64,128,256",
    device: Device = "auto",
    json: JsonFile = None,
) -> None:
    """Packed layers with few tokens: 2 bits a weight against bf16 and fp8, quantisation included."""
    import torch

    from sparse_bitnet.bench.packed import bench_packed

    torch.manual_seed(0)
    chosen = choose_device(device)
    if chosen == "cpu":
        print("on a CPU, without fp8; `bench linear` measures the layers of a whole model there")
    rows = bench_packed(_shapes(shapes), numbers("tokens", tokens), torch.device(chosen))
    names = ("bf16", "fp8", "ours")
    print(f"{'shape':<14}{'tokens':>7}{''.join(f'{name:>10}' for name in names)} us{'x bf16':>8}{'x fp8':>7}  of copy")
    for row in rows:
        times = "".join(f"{1e3 * row[key]:>10.2f}" if (key := f"{name}_ms") in row else f"{'-':>10}" for name in names)
        fp8 = f"{row['times_fp8']:.2f}" if "times_fp8" in row else "-"
        shape = " x ".join(map(str, row["shape"]))
        share = 100 * row["share_of_copy_bandwidth"]
        print(f"{shape:<14}{row['tokens']:>7}{times}   {row['times_bf16']:>8.2f}{fp8:>7}{share:>7.1f} %")
    write_figures(json, {"packed": rows}, seed=0)


@app.command("linear")
def linear(
    hidden: Annotated[int, typer.Option(min=4, help="Width of the model.")] = 1536,
    ffn: Annotated[int, typer.Option(min=4, help="Width within its MLPs.")] = 4096,
    kv: Annotated[int, typer.Option(min=1, help="Width of keys and of values.")] = 256,
    layers: Annotated[int, typer.Option(min=1, help="Layers, each with weights of its own.")] = 24,
    formats: Annotated[str, typer.Option(help="Separated by commas.")] = "i2,t5,g4,g4s3",
    threads: Annotated[str, typer.Option(help="Separated by commas.")] = "1,2",
    tokens: Annotated[str, typer.Option(help="At a time: 1 is decoding, more a prompt.")] = "1,512",
    rounds: Annotated[int, typer.Option(min=1, help="How often all is measured.")] = 9,
    json: JsonFile = None,
) -> None:
    """The packed linears of a model on a CPU, beside reading the same bytes, and the reference."""
    _check_native("bench linear measures the native kernels")
    from sparse_bitnet.bench.linear import LinearBench, bench_linear

    bench = LinearBench(
        hidden,
        ffn,
        kv,
        layers,
        tuple(formats.split(",")),
        numbers("threads", threads),
        numbers("tokens", tokens),
        rounds,
    )
    result = bench_linear(bench)
    print(f"{result['weights']:,} weights in {layers} layers, {result['instruction_set']}")
    print(
        f"{'format':<8}{'bits':>5}{'threads':>9}{'tokens':>8}{'tokens/s':>11}{'Gweights/s':>12}{'of read roof':>14}"
        f"{'x ' + bench.formats[0]:>7}{'x reference':>13}{'op, tokens/s':>14}"
    )
    for row in result["linears"]:
        share = f"{100 * row['share_of_roof']:.0f} %" if "share_of_roof" in row else "-"
        print(
            f"{row['format']:<8}{row['bits']:>5g}{row['threads']:>9}{row['tokens']:>8}{row['tokens_per_second']:>11,.1f}"
            f"{row['gigaweights_per_second']:>12,.1f}{share:>14}{row['times_first']:>7.2f}{row['times_reference']:>13,.0f}"
            f"{row['op_tokens_per_second']:>14,.1f}"
        )
    write_figures(json, result, bench.seed)


@app.command("decode")
def decode(
    context: typer.Context,
    formats: Annotated[str, typer.Option(help="Separated by commas.")] = "i2,g4s3",
    threads: Annotated[str, typer.Option(help="Separated by commas.")] = "1,2",
    hidden: Annotated[int, typer.Option(min=4, help="Width of the model.")] = 1536,
    ffn: Annotated[int, typer.Option(min=4, help="Width within its MLPs.")] = 4096,
    layers: Annotated[int, typer.Option(min=1)] = 24,
    heads: Annotated[int, typer.Option(min=1)] = 12,
    kv_heads: Annotated[int, typer.Option(min=1, help="Heads of keys and of values.")] = 2,
    head: Annotated[int, typer.Option(min=2, help="Width of a head.")] = 128,
    vocabulary: Annotated[int, typer.Option(min=2)] = 32_000,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens that are read at once.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens that are written one by one.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="How often all is measured.")] = 5,
    device: Annotated[str, typer.Option(help="cuda: `bench generation` of its own model, decoding alone.")] = "cpu",
    compare: Annotated[str, typer.Option(help="llama.cpp: run it on the same weights, in the same rounds.")] = "",
    json: JsonFile = None,
) -> None:
    """A packed model with random weights on the native engine of a CPU, beside reading the bytes that a token takes."""
    from importlib.util import find_spec

    if device != "cpu":
        if compare:
            raise ValueError(
                f"--device {device} --compare {compare}: only the native engine of a CPU is compared with it"
            )
        given = [name for name in context.params if _is_given(context, name) and name not in ("device", "json")]
        if given:
            option = "--" + given[0].replace("_", "-")
            raise ValueError(f"{option} is for a CPU: `bench generation` has the options of --device {device}")
        return generation(prompt="", device=device, json=json)
    _check_native("bench decode measures the native engine")
    if compare not in ("", "llama.cpp"):
        raise ValueError(f"--compare {compare}: it can be compared with llama.cpp")
    if compare and not all(map(find_spec, ("llama_cpp", "gguf"))):
        raise ValueError("--compare llama.cpp needs it: run `pip install llama-cpp-python gguf`, which takes minutes")
    from sparse_bitnet.bench.decode import DecodeBench, bench_decode

    bench = DecodeBench(
        hidden, ffn, layers, heads, kv_heads, head, vocabulary, tuple(formats.split(",")),
        numbers("threads", threads), prompt, new_tokens, rounds, bool(compare),
    )  # fmt: skip
    result = bench_decode(bench)
    print(f"{layers} layers, hidden {hidden}, {result['instruction_set']}")
    print(
        f"{'system':<17}{'threads':>8}{'tokens/s':>10}{'of read roof':>14}{'x ' + bench.formats[0]:>8}{'x rival':>9}"
        f"{'prompt, tokens/s':>18}{'x rival':>9}"
    )
    for row in result["decode"]:
        share = f"{100 * row['share_of_roof']:.0f} %" if "share_of_roof" in row else "-"
        rival = [f"{row[name]:.2f}" if name in row else "-" for name in ("times_rival", "prefill_times_rival")]
        print(
            f"{row['system']:<17}{row['threads']:>8}{row['tokens_per_second']:>10.1f}{share:>14}"
            f"{row['times_first']:>8.2f}{rival[0]:>9}{row['prefill_tokens_per_second']:>18.1f}{rival[1]:>9}"
        )
    for row in result["memory"]:
        if row["peak_bytes"] is not None:
            parts = (("libraries", "Python and PyTorch"), ("weights", "the file"), ("cache", "keys and values"))
            told = ", ".join(f"{row[f'{part}_bytes'] / 1e6:.0f} of {words}" for part, words in parts)
            most, more = row["peak_bytes"] / 1e6, row["beyond_bytes"] / 1e6
            print(f"{row['format']}: {most:.0f} MB at most: {told}, {more:.0f} more")
    write_figures(json, result, bench.seed)


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _check_native(purpose: str) -> None:
    from sparse_bitnet.kernels.packed_linear import NATIVE, OPERATOR

    obstacle = OPERATOR.obstacle(NATIVE)
    if obstacle is not None:
        raise ValueError(f"{purpose}: {obstacle}")


def _shapes(text: str) -> list[tuple[int, int]]:
    sizes = [part.split("x") for part in text.split(",")]
    if not all(len(size) == 2 and all(side.isdigit() and int(side) for side in size) for size in sizes):
        raise ValueError(f"--shapes {text}: give out_features x in_features, separated by commas, as in 2048x11008")
    return [(int(rows), int(columns)) for rows, columns in sizes]
