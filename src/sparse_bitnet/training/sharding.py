"""FSDP2: weights, gradients and optimizer state split over the processes, and whole again for checkpoints and readings.

No mixed-precision policy: a layer sees the fp32 masters, gathered, so that mask and codes are those of one process. A
policy with param_dtype=bf16 would hand it a rounded copy. Autocast does the arithmetic in bf16.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard_model(model: nn.Module, device: torch.device) -> None:
    """Split the parameters of `model`, equal on all processes, along their rows, in place, a unit for each block."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    blocks: set[str] = set(getattr(model, "_no_split_modules", None) or ())  # transformers: names of classes
    for module in list(model.modules()):
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole_tensor(tensor: Tensor) -> Tensor:
    """`tensor`, gathered if it is split; every process takes part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, whole, on the CPU of the first process, nothing on the others; every process takes part.

    What is tied stays tied.
    """
    gathered: dict[int, Tensor] = {}
    named: dict[str, Tensor] = model.state_dict(keep_vars=True)
    for tensor in named.values():
        if id(tensor) not in gathered:
            gathered[id(tensor)] = _on_first_process(tensor)
    return {name: gathered[id(tensor)] for name, tensor in named.items()} if dist.get_rank() == 0 else {}


@torch.no_grad()
def whole_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state dict as an optimizer on one process has it, on the first; every process takes part."""
    state = optimizer.state_dict()
    split: dict[int, dict[str, Tensor]] = state["state"]
    whole = {
        index: {name: _on_first_process(value) for name, value in values.items()} for index, values in split.items()
    }
    return {**state, "state": whole}


def split_optimizer_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The inverse of `whole_optimizer_state`, from a whole state on every process."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    split = {index: dict(values) for index, values in state["state"].items()}
    for index, values in split.items():
        mesh, placements = parameters[index].device_mesh, parameters[index].placements
        for name, value in values.items():
            if value.shape == parameters[index].shape:  # not the count of steps
                values[name] = distribute_tensor(value, mesh, placements, src_data_rank=None)
    return {**state, "state": split}


def _on_first_process(tensor: Tensor) -> Tensor:
    whole = whole_tensor(tensor.detach())
    return whole.cpu() if dist.get_rank() == 0 else whole.new_empty(0)
