"""`bench generation`: a whole transformers model on a GPU that reads prompts and writes, dense in bf16 and packed.

    dense     `nn.Linear` in bf16
    6:8, 2:4  packed by `convert` in the format i2, its products chosen by `accelerate`

Both have random weights, the same code of transformers, the same static cache and the same attention, compiled whole;
but the layers of a step of one packed sequence are one launch where the GPU has that (engine/one_launch.py). A step of
decoding is one CUDA graph: embedding, layers, logits, the likeliest token as the next input, the next position. All are
in memory together, and are timed in turn, forwards and then backwards, as a warm GPU is a slower one.

Shapes: S sequences, P tokens of a prompt, L places of the cache, V vocabulary.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import list_options
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparse_bitnet.bench.checks import by_reference, check_layers, check_likeness
from sparse_bitnet.bench.timing import kernel_times
from sparse_bitnet.engine.cuda_graphs import GROUPED, PLACES, Sequences, attention
from sparse_bitnet.kernels.compilation import COMPILE_OPTIONS
from sparse_bitnet.kernels.timing import milliseconds_in_turn
from sparse_bitnet.nn.acceleration import accelerate
from sparse_bitnet.nn.packed_linear import PackedLinear
from sparse_bitnet.nn.swap import convert, prepare
from sparse_bitnet.recipe import NMPattern, Recipe
from sparse_bitnet.training.presets import PRESETS, preset_config

DENSE = "dense"
GROUPED_OPTION = "grouped"
BYTES = ("state_bytes", "linears_bytes", "held_bytes")
UNTIMED = 32  # places for steps that are not timed


@dataclass(frozen=True)
class GenerationBench:
    """What to measure: decoding of `batches` sequences after `context` tokens each, and reading of `prompts` tokens.

    systems    dense, or n:m of a packed model
    attention  of decoding: a name of transformers, or `grouped`, which does not repeat keys and values for the heads
               that share them, as `sdpa` with a mask does; that of prompts is `sdpa`, without a mask
    inductor   names of torch.compile's options that are switched on, for all systems; packed ones have
               COMPILE_OPTIONS too
    """

    preset: str = "qwen2.5-3b"
    systems: tuple[str, ...] = (DENSE, "6:8", "2:4")
    batches: tuple[int, ...] = (1, 64)
    prompts: tuple[int, ...] = (2048, 8192)
    context: int = 512
    vocabulary: int = 151_936
    attention: str = GROUPED_OPTION
    inductor: tuple[str, ...] = ()
    repeats: int = 30
    fuse: bool = True
    profile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset {self.preset!r} is unknown: choose from {', '.join(PRESETS)}")
        for system in self.systems:
            if system != DENSE:
                NMPattern.parse(system)
        if not self.systems or not (self.batches or self.prompts):
            raise ValueError("nothing to measure: give systems, and batches or prompts")
        if unknown := sorted(set(self.inductor) - set(list_options())):
            raise ValueError(f"torch.compile has no option {unknown[0]!r}: see torch._inductor.list_options()")


@torch.no_grad()
def bench_generation(bench: GenerationBench, device: torch.device) -> Iterator[dict[str, Any]]:
    """Rows of decoding and of prompts for all systems, with ratios to dense: after each size, what there is by then.

    ValueError where a system computes otherwise.
    """
    result: dict[str, Any] = {"settings": asdict(bench), "decode": [], "prefill": [], "memory": [], "choices": {}}
    models: dict[str, PreTrainedModel] = {}
    for system in bench.systems:
        _forget(device)
        before = _allocated(device)
        model = models[system] = _model(bench, system, device)
        tokens = sorted({*bench.batches, *bench.prompts})
        if system != DENSE and device.type == "cuda":
            result["choices"][system] = list(map(str, accelerate(model, tokens, model.dtype, bench.fuse)))
        check_layers(model, tokens, model.dtype)
        _forget(device)
        result["memory"].append({"system": system, **_bytes(model), "held_bytes": _allocated(device) - before})
    for kind, sizes, prepared in (("decode", bench.batches, _decode), ("prefill", bench.prompts, _prefill)):
        for size in sizes:
            _forget(device)
            works = {system: prepared(bench, model, size, device) for system, model in models.items()}
            result[kind] += _timed(bench, works, size, device)
            del works
            yield _compared(result)


@dataclass(frozen=True)
class _Work:
    """What is timed, and what is told of it."""

    run: Callable[[], Tensor]
    row: dict[str, Any]


def _timed(
    bench: GenerationBench, works: dict[str, _Work], tokens: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Rows of works of so many tokens at once, by system."""
    times = milliseconds_in_turn([work.run for work in works.values()], bench.repeats, device)
    for (system, work), ms in zip(works.items(), times, strict=True):
        speed = {"ms": ms, "tokens_per_second": 1e3 * tokens / ms}
        yield {"system": system, **work.row, **speed, "kernels": _profile(bench, work.run, device)}


def _model(bench: GenerationBench, system: str, device: torch.device) -> PreTrainedModel:
    """Random weights, made on the device; bf16 on a GPU."""
    torch.manual_seed(bench.seed)
    config = preset_config(bench.preset, bench.vocabulary, None)
    with device:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    return model if system == DENSE else convert(prepare(model, Recipe(system)), "i2")


def _decode(bench: GenerationBench, model: PreTrainedModel, batch: int, device: torch.device) -> _Work:
    before = _allocated(device)
    places = -(-(bench.context + UNTIMED + 2 * bench.repeats) // PLACES) * PLACES
    work = Sequences(model, batch, places)
    start = work.read(_prompt(bench, batch, bench.context, device)).argmax(-1, keepdim=True)
    work.begin(start, bench.context)
    with by_reference(model):
        expected = work.greedy(work.step)()
    work.begin(start, bench.context)
    one_launch = work.step_in_one_launch()
    if isinstance(one_launch, str):
        compiled = _compiled(bench, model, work.greedy(work.step), device)
    else:
        compiled = work.greedy(one_launch)

    def step() -> Tensor:
        with attention(model, GROUPED if bench.attention == GROUPED_OPTION else bench.attention):
            return compiled()

    how = {
        "context": bench.context,
        "places": places,
        "not_in_one_launch": one_launch if isinstance(one_launch, str) else None,
    }
    return _Work(step, {"batch": batch, **how, **_first(step, expected, before, device)})


def _prefill(bench: GenerationBench, model: PreTrainedModel, tokens: int, device: torch.device) -> _Work:
    before = _allocated(device)
    work, prompt = Sequences(model, 1, tokens), _prompt(bench, 1, tokens, device)
    with by_reference(model):
        expected = work.read(prompt)
    read = _compiled(bench, model, lambda: work.read(prompt), device)
    return _Work(read, {"tokens": tokens, **_first(read, expected, before, device)})


def _first(run: Callable[[], Tensor], expected: Tensor, before: int, device: torch.device) -> dict[str, Any]:
    """How like the reference the logits of the first run are, and what cache and activations take in the next."""
    likeness = check_likeness(run().clone(), expected)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    run()
    return {"likeness": likeness, "work_bytes": _peak(device) - before}


def _prompt(bench: GenerationBench, batch: int, tokens: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(bench.seed)
    return torch.randint(bench.vocabulary, (batch, tokens), generator=generator).to(device)


def _compiled(
    bench: GenerationBench, model: PreTrainedModel, run: Callable[[], Tensor], device: torch.device
) -> Callable[[], Tensor]:
    if device.type != "cuda":
        return run
    is_packed = any(isinstance(module, PackedLinear) for module in model.modules())
    options = (COMPILE_OPTIONS if is_packed else {}) | dict.fromkeys(bench.inductor, True)
    return torch.compile(run, fullgraph=True, dynamic=False, options=options)


def _profile(bench: GenerationBench, run: Callable[[], object], device: torch.device) -> list[dict[str, Any]]:
    return kernel_times(run) if bench.profile and device.type == "cuda" else []


def _bytes(model: PreTrainedModel) -> dict[str, int]:
    """Of all parameters and buffers, and of those of the linear layers of the blocks."""
    tensors = [*model.parameters(), *model.buffers()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    linears = [module for module in model.base_model.modules() if isinstance(module, nn.Linear | PackedLinear)]
    of_linears = sum(one.nbytes for layer in linears for one in (*layer.parameters(), *layer.buffers()))
    return {"state_bytes": sum(storages.values()), "linears_bytes": of_linears}


def _forget(device: torch.device) -> None:
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _compared(result: dict[str, Any]) -> dict[str, Any]:
    """With ratios to the dense system where that is measured too."""
    for rows, size in (("decode", "batch"), ("prefill", "tokens")):
        dense = {row[size]: row["ms"] for row in result[rows] if row["system"] == DENSE}
        for row in result[rows]:
            if row[size] in dense:
                row["times_dense"] = dense[row[size]] / row["ms"]
    for base in [row for row in result["memory"] if row["system"] == DENSE]:
        for row in result["memory"]:
            row["share_of_dense"] = {key: row[key] / base[key] for key in BYTES if base[key]}
    return result
