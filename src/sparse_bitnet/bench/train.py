"""`bench train`: tokens a second of whole optimizer steps, of the same model with several kinds of linear layers.

dense   `nn.Linear`, bf16 arithmetic over fp32 masters, compiled
plain   the method as it is usually written in PyTorch (see baselines.py), not compiled; `plain-compiled`: compiled
ours    `SparseBitLinear` with effective weights made once a step, compiled
sparse  the same with forward products on sparse tensor cores, where they are measured to be faster

Under torchrun each process has a GPU and its own tokens: DDP, or FSDP2.
"""

from __future__ import annotations

import gc
import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparse_bitnet.bench.baselines import exchange_for_plain
from sparse_bitnet.bench.checks import check_kernels
from sparse_bitnet.bench.timing import kernel_times, matmul_rate
from sparse_bitnet.nn.sparse_forward import sparse_forward_gains, worthwhile_shapes
from sparse_bitnet.nn.step_weights import StepWeights
from sparse_bitnet.nn.stored_settings import named_layers
from sparse_bitnet.nn.swap import prepare
from sparse_bitnet.recipe import Recipe
from sparse_bitnet.training.compilation import compile_blocks
from sparse_bitnet.training.fused_loss import ONLY_THE_LOSS, fused_loss_obstacle, logits_budget
from sparse_bitnet.training.presets import preset_config
from sparse_bitnet.training.processes import join_processes
from sparse_bitnet.training.sharding import shard_model

SYSTEMS = ("dense", "plain", "plain-compiled", "ours", "sparse")
WARM_UP = 3


@dataclass(frozen=True)
class TrainBench:
    """What to measure: `batch` sequences a micro-batch, `accumulation` micro-batches a step, `rounds` of it all."""

    preset: str = "qwen2.5-0.5b"
    pattern: str = "6:8"
    sequence: int = 2048
    batch: int = 8
    accumulation: int = 1
    vocabulary: int = 151_936
    gradient_checkpointing: bool = False
    sharding: Literal["none", "fsdp2"] = "none"
    systems: tuple[str, ...] = ("dense", "plain", "ours")
    steps: int = 8
    rounds: int = 2
    profile: bool = False  # one more step, for the kernels that take its time
    seed: int = 0

    @property
    def tokens(self) -> int:
        """Of one process in one step."""
        return self.batch * self.sequence * self.accumulation


def bench_train(bench: TrainBench, device: torch.device) -> dict[str, Any]:
    """Settings, one row a system with its times in every round, and the rate of a large matrix product beside them.

    ValueError for an unknown system, or where a kernel is not equal to its reference: then no speed is told.
    """
    processes = join_processes().num_processes
    unknown = set(bench.systems) - set(SYSTEMS)
    if unknown:
        raise ValueError(f"{sorted(unknown)[0]!r} is no system to measure: choose from {', '.join(SYSTEMS)}")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device("meta"):
        shape = prepare(_model(bench), Recipe(bench.pattern))
    shapes = [(layer.out_features, layer.in_features) for _, layer in named_layers(shape)]
    check_kernels(shapes, Recipe(bench.pattern), dtype, device)
    rate = matmul_rate(device, dtype)
    rounds = []
    for index in range(bench.rounds):  # in turn forwards and backwards: a GPU gets warm, and a warm one is slower
        order = bench.systems[:: -1 if index % 2 else 1]
        rounds.append({system: _measure(bench, system, device, dtype) for system in order})
    operations = _operations_per_token(shape, bench) * bench.tokens
    rows = []
    for system in bench.systems:
        seconds = statistics.median(each[system]["seconds"] for each in rounds)
        rows.append(
            {
                "system": system,
                "tokens_per_second": processes * bench.tokens / seconds,
                "seconds_a_step": seconds,
                "seconds_by_round": [each[system]["seconds"] for each in rounds],
                "bytes_at_most": rounds[0][system]["bytes_at_most"],
                "share_of_matmul_rate": operations / seconds / rate,
                "first_loss": rounds[0][system]["first_loss"],
                "sparse_forward_gains": rounds[0][system]["sparse_forward_gains"],
                "kernels": rounds[0][system]["kernels"],
            }
        )
    if "dense" in bench.systems:
        base = next(row for row in rows if row["system"] == "dense")
        for row in rows:
            row["times_dense"] = base["seconds_a_step"] / row["seconds_a_step"]
            row["memory_over_dense"] = row["bytes_at_most"] / base["bytes_at_most"] if base["bytes_at_most"] else None
    return {"settings": asdict(bench), "processes": processes, "matmul_operations_per_second": rate, "systems": rows}


def _model(bench: TrainBench) -> PreTrainedModel:
    torch.manual_seed(bench.seed)
    shape = preset_config(bench.preset, bench.vocabulary, None)
    return AutoModelForCausalLM.from_config(shape, dtype=torch.float32).train()


def _measure(bench: TrainBench, system: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Median seconds of an optimizer step, the memory at its peak, the first loss (of a step's last micro-batch)."""
    torch.compiler.reset()
    gc.collect()  # the model before
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with device:
        model = _model(bench)
    recipe = Recipe(bench.pattern)
    if system in ("ours", "sparse"):
        prepare(model, recipe)
    elif system != "dense":
        exchange_for_plain(model, recipe.pattern)
    arguments = _arguments(model, bench)
    if bench.gradient_checkpointing:
        renamed = getattr(model, "activation_checkpointing_enable", None)  # in the course of transformers 5
        (renamed or model.gradient_checkpointing_enable)({"use_reentrant": False})
    if system != "plain" and device.type == "cuda":
        compile_blocks(model)
    run = _distributed(model, bench, device)
    step_weights = StepWeights(model, dtype) if system in ("ours", "sparse") else None
    gains: dict[tuple[int, int], float] = {}
    if system == "sparse" and step_weights is not None:
        products = bench.accumulation * (2 if bench.gradient_checkpointing else 1)
        gains = sparse_forward_gains(step_weights.shapes, recipe, bench.batch * bench.sequence, dtype, device, products)
        step_weights.sparse_shapes = worthwhile_shapes(gains)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, bench.vocabulary, (bench.accumulation, bench.batch, bench.sequence), device=device)
    losses: list[torch.Tensor] = []

    def step() -> None:
        if step_weights is not None:
            step_weights.refresh()
        for index, batch in enumerate(tokens):
            with _gradients_stay_here(run) if index < bench.accumulation - 1 else nullcontext():
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    loss = run(input_ids=batch, labels=batch, use_cache=False, **arguments).loss / bench.accumulation
                loss.backward()
        losses.append(loss.detach())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(WARM_UP):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = [_seconds(step, device) for _ in range(bench.steps)]
    return {
        "seconds": statistics.median(seconds),
        "bytes_at_most": torch.cuda.max_memory_allocated() if device.type == "cuda" else 0,
        "first_loss": bench.accumulation * float(losses[0]),
        "kernels": kernel_times(step) if bench.profile and device.type == "cuda" else [],
        "sparse_forward_gains": {f"{rows} x {columns}": gain for (rows, columns), gain in gains.items()},
    }


def _distributed(model: PreTrainedModel, bench: TrainBench, device: torch.device) -> nn.Module:
    if not dist.is_initialized():
        return model
    if bench.sharding == "fsdp2":
        shard_model(model, device)
        return model
    here = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=here, gradient_as_bucket_view=True)


def _gradients_stay_here(run: nn.Module) -> AbstractContextManager[None]:
    """What DDP does between the micro-batches of a step, as Trainer has it do."""
    return run.no_sync() if isinstance(run, nn.parallel.DistributedDataParallel) else nullcontext()


def _arguments(model: PreTrainedModel, bench: TrainBench) -> dict[str, Any]:
    """Patches the fused loss into `model`, where there is one, and gives the arguments that it needs."""
    if fused_loss_obstacle(model) is not None:
        return {}
    from liger_kernel.transformers import _apply_liger_kernel_to_instance  # pyright: ignore

    _apply_liger_kernel_to_instance(model=model, **ONLY_THE_LOSS)
    return logits_budget(model, bench.batch * bench.sequence)


def _seconds(step: Any, device: torch.device) -> float:
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _operations_per_token(model: PreTrainedModel, bench: TrainBench) -> float:
    """Of the matrix products of forward and backward: 6 a weight, and the causal half of attention."""
    weights = sum(layer.weight.numel() for _, layer in named_layers(model))
    head: Any = model.get_output_embeddings()
    config: Any = model.config
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    return 6 * (weights + head.weight.numel() + config.num_hidden_layers * width * bench.sequence)
