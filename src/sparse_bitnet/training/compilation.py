"""torch.compile, a block of the model at a time."""

from __future__ import annotations

from torch import nn


def compile_blocks(model: nn.Module) -> None:
    """Compile the repeated blocks of a transformers model in place, or the whole of any other module.

    One block is compiled and its code serves all: 5 to 9 s for Qwen2.5-0.5B instead of 67 s for the whole (H200), at
    the same speed. Names of parameters and hooks, FSDP's too, stay as they are.
    """
    kinds: set[str] = set(getattr(model, "_no_split_modules", None) or ())  # transformers: names of classes
    blocks = [module for module in model.modules() if type(module).__name__ in kinds]
    for module in blocks or [model]:
        module.compile()
