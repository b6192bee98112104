"""Sparse-BitNet: language models with ternary, N:M sparse weights: train, pack, run (arXiv 2603.05168).

>>> model = prepare(AutoModelForCausalLM.from_config(config), Recipe("6:8"))  # then train it as any model
>>> convert(model).save_pretrained("packed")  # 2 bits a weight
>>> AutoModelForCausalLM.from_pretrained("packed")  # after `import sparse_bitnet`

The public names load on first use, so that `import sparse_bitnet`, and with it every `--help`, does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sparse_bitnet import _transformers_hook

if TYPE_CHECKING:
    from sparse_bitnet.kernels.compilation import COMPILE_OPTIONS
    from sparse_bitnet.nn.acceleration import accelerate
    from sparse_bitnet.nn.packed_linear import PackedLinear
    from sparse_bitnet.nn.sparse_bit_linear import SparseBitLinear
    from sparse_bitnet.nn.step_weights import StepWeights
    from sparse_bitnet.nn.summary import Summary, summary
    from sparse_bitnet.nn.swap import convert, prepare, set_pattern, set_residual
    from sparse_bitnet.recipe import NMPattern, Recipe
    from sparse_bitnet.training.callback import SparseBitNetCallback

__version__ = "0.1.0"

__all__ = [
    "COMPILE_OPTIONS",
    "NMPattern",
    "PackedLinear",
    "Recipe",
    "SparseBitLinear",
    "SparseBitNetCallback",
    "StepWeights",
    "Summary",
    "accelerate",
    "convert",
    "prepare",
    "set_pattern",
    "set_residual",
    "summary",
]

_ROOMS = {
    "COMPILE_OPTIONS": "kernels.compilation",
    "NMPattern": "recipe",
    "PackedLinear": "nn.packed_linear",
    "Recipe": "recipe",
    "SparseBitLinear": "nn.sparse_bit_linear",
    "SparseBitNetCallback": "training.callback",
    "StepWeights": "nn.step_weights",
    "Summary": "nn.summary",
    "accelerate": "nn.acceleration",
    "convert": "nn.swap",
    "prepare": "nn.swap",
    "set_pattern": "nn.swap",
    "set_residual": "nn.swap",
    "summary": "nn.summary",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_transformers_hook.install()
