"""What each of two processes does for test_processes.py; started by torchrun with a task and a directory.

`together` writes what each process saw to seen-RANK.json: one launch for many runs, since the imports take longest.
`layers` prints it for the layers alone, on GPUs where there are any.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Trainer

from sparse_bitnet import Recipe, prepare
from sparse_bitnet.nn.stored_settings import named_layers
from sparse_bitnet.numerics.ternary import quantize_weight
from sparse_bitnet.training.config import load_config
from sparse_bitnet.training.monitors import MaskMonitor, non_finite_tensors
from sparse_bitnet.training.processes import (
    OtherProcessFailed,
    first_process_first,
    join_processes,
    leave_processes,
)
from sparse_bitnet.training.run import train
from sparse_bitnet.training.sharding import shard_model, whole_tensor, whole_weights

STEPS, ROWS = 6, 8


def quantized_in_forward(model: nn.Module, ids: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Codes and scale that each layer uses in a forward pass, read where it reads its weight."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def look(name: str) -> Callable[..., None]:
        return lambda layer, _: seen.update({name: layer.quantize_weight()})

    hooks = [layer.register_forward_pre_hook(look(name)) for name, layer in named_layers(model)]
    with torch.no_grad(), torch.autocast(ids.device.type, torch.bfloat16):
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return seen


def step(model: PreTrainedModel, optimizer: torch.optim.Optimizer, ids: Tensor) -> float:
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def split_and_whole() -> dict[str, Any]:
    """A model split over the processes, each with its rows of the batch, beside the same model whole, with all rows."""
    device, rank = join_processes().device, dist.get_rank()
    torch.manual_seed(0)
    shape = Qwen2Config(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    whole = prepare(AutoModelForCausalLM.from_config(shape, dtype=torch.float32), Recipe("6:8")).to(device)
    split = copy.deepcopy(whole)
    shard_model(split, device)
    # before a forward pass, after which the parameters outside of the blocks stay gathered until the next backward
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in (whole, split)]
    ids = torch.randint(0, 320, (STEPS, ROWS, 16), generator=torch.Generator().manual_seed(0)).to(device)
    own = ids[:, rank * ROWS // 2 : (rank + 1) * ROWS // 2]

    def equal_codes() -> bool:
        one, other = quantized_in_forward(whole, own[0]), quantized_in_forward(split, own[0])
        pairs = [(one[name], other[name]) for name in one]
        return len(other) == 14 and all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in pairs)

    monitors = MaskMonitor(), MaskMonitor()
    result: dict[str, Any] = {"share": sum(weight.to_local().numel() for weight in split.parameters())}
    outside = zip(named_layers(whole), named_layers(split), strict=True)
    result["codes_outside"] = all(
        torch.equal(mine, whole_tensor(theirs))
        for (_, one), (_, other) in outside
        for mine, theirs in zip(one.quantize_weight(), other.quantize_weight(), strict=True)
    )
    result["codes_before"] = equal_codes()
    result["readings_before"] = monitors[0].read(whole) == monitors[1].read(split)
    result["all"] = whole.num_parameters()
    untrained = quantized_in_forward(split, own[0])
    result["losses"] = []
    for full, part in zip(ids, own, strict=True):
        loss = torch.tensor(step(split, optimizers[1], part), device=device)
        dist.all_reduce(loss)
        result["losses"].append((step(whole, optimizers[0], full), loss.item() / 2))
    trained = quantized_in_forward(split, own[0])
    result["moved"] = [name for name in trained if not torch.equal(trained[name][0], untrained[name][0])]
    exported = whole_weights(split)
    if rank == 0:
        codes = {name: quantize_weight(exported[f"{name}.weight"], Recipe("6:8")) for name in trained}
        result["exported"] = all(torch.equal(codes[name][0], trained[name][0].cpu()) for name in codes)
        result["tied"] = exported["lm_head.weight"] is exported["model.embed_tokens.weight"]
        whole.load_state_dict(exported)
    for weight in whole.parameters():  # from here on both hold the weights that were trained split
        dist.broadcast(weight.data, 0)
    result["codes_after"] = equal_codes()
    result["readings_after"] = MaskMonitor().read(whole) == MaskMonitor().read(split)
    if rank == 1:
        split.model.layers[0].mlp.up_proj.weight.detach().to_local()[0, 0] = float("nan")
    result["non_finite"] = non_finite_tensors(split)
    return result


def stop_after(step: int) -> None:
    """The second process alone gets SIGTERM in this step."""
    training_step, calls = Trainer.training_step, iter(range(1, 99))

    def interrupted(self: Trainer, *args: Any, **kwargs: Any) -> Tensor:
        if next(calls) == step and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return training_step(self, *args, **kwargs)

    Trainer.training_step = interrupted


def spoil(step: int) -> None:
    """The second process alone gets a loss that is NaN in this step."""
    training_step, calls = Trainer.training_step, iter(range(1, 99))

    def spoilt(self: Trainer, *args: Any, **kwargs: Any) -> Tensor:
        loss = training_step(self, *args, **kwargs)
        return loss * float("nan") if next(calls) == step and dist.get_rank() == 1 else loss

    Trainer.training_step = spoilt


def failing(work: Callable[[], object]) -> str:
    try:
        work()
    except (ValueError, OtherProcessFailed) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def together(root: Path) -> None:
    def run(name: str, *overrides: str, resume: str = "never") -> dict[str, Any]:
        config = load_config(root / "config.yaml", [f"output_dir={root / name}", *overrides])
        result = train(config, resume)
        losses = [event["loss"] for event in result.log if "loss" in event]
        evaluated = [event["eval_loss"] for event in result.log if "eval_loss" in event]
        return {"losses": losses, "evaluated": evaluated, "steps": result.steps, "complete": result.stopped_by is None}

    seen: dict[str, Any] = {"ddp": run("ddp")}
    seen["streamed"] = run("streamed", "data.streaming=true")
    seen["fsdp2"] = run("fsdp2", "training.sharding=fsdp2", "training.eval_every=8")
    seen["bf16"] = run("bf16", "training.sharding=fsdp2", "training.precision=bf16", "training.gradient_accumulation=2")
    seen["resumed"] = run("resumed", "training.sharding=fsdp2", resume=str(root / "one" / "checkpoint-4"))
    stop_after(3)
    seen["stopped"] = run("stopped", "training.sharding=fsdp2")
    seen["exported_when_stopped"] = (root / "stopped" / "model").exists()
    seen["went_on"] = run("stopped", "training.sharding=fsdp2", resume="auto")
    seen["refused"] = failing(lambda: run("ddp"))
    seen["failed_on_first"] = failing(lambda: run("empty", f"data.files=[{root / 'empty.txt'}]"))
    spoil(3)
    seen["diverged"] = failing(lambda: run("diverged", "training.sharding=fsdp2"))
    with first_process_first():
        seen["order"] = sorted(path.name for path in root.glob("order-*"))
        (root / f"order-{dist.get_rank()}").touch()
    seen["layers"] = split_and_whole()
    (root / f"seen-{dist.get_rank()}.json").write_text(json.dumps(seen))
    leave_processes()


def killed_while_saving(root: Path) -> None:
    """The second process is killed when checkpoint-6 has all of its files but one."""
    save = Trainer._save_rng_state

    def killed(self: Trainer, output: str) -> None:
        if "checkpoint-6" in output and self.args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        save(self, output)

    Trainer._save_rng_state = killed
    train(load_config(root / "config.yaml", [f"output_dir={root / 'killed'}"]))


def layers(root: Path) -> None:
    join_processes()
    print(json.dumps(split_and_whole()), flush=True)
    leave_processes()


if __name__ == "__main__":
    tasks = {"together": together, "killed_while_saving": killed_while_saving, "layers": layers}
    tasks[sys.argv[1]](Path(sys.argv[2]))
