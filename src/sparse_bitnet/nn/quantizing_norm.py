"""The norm before packed layers on a GPU, in one kernel with the quantisation of what they read.

torch.compile writes what a norm gives, and the kernel that quantises and lifts reads it again. Here that kernel takes
the norm itself. The model is still given what the norm gives; as nobody reads it, the compiler leaves it out. Without
torch.compile, and for the few tokens whose quantisation it joins to the norm by itself (they need no lift), nothing is
done ahead. As with layers that share an x, what the norm gives must not be written to before they have read it.

Shapes: T tokens, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparse_bitnet.formats.windows import WINDOW
from sparse_bitnet.kernels.quantize_lifted import Norm, quantize_normed
from sparse_bitnet.kernels.tracing import is_traced_with_few_tokens
from sparse_bitnet.nn.fast_weight import FastWeight
from sparse_bitnet.nn.shared_inputs import JointProduct, Share
from sparse_bitnet.numerics.norm import rms_norm

NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")  # of transformers
READERS = (
    ("input_layernorm", "self_attn", "q_proj"),
    ("post_attention_layernorm", "mlp", "gate_proj"),
)  # a norm of a block, and the first of the layers that read what it gives


class QuantizingNorm(nn.Module):
    """In the place of an RMS norm of transformers, of which it takes the weight, under its name.

    reader  the block that it is in, and the names by which the first of the layers that read what it gives is found
            there; if they are given something else, they compute with that. A copy has none, and does nothing ahead.
    """

    def __init__(self, norm: Any, block: nn.Module, *names: str) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon
        self.reader: tuple[nn.Module, tuple[str, ...]] | None = (block, names)  # in a tuple it is no child
        self.train(norm.training)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "reader": None}

    def forward(self, x: Tensor) -> Tensor:
        """x [..., H] -> its norm [..., H]."""
        normed = rms_norm(x, self.weight, self.variance_epsilon)
        needs_gradient = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        if torch.compiler.is_compiling() and not needs_gradient:
            self.multiply_ahead(x, normed)
        return normed

    def multiply_ahead(self, x: Tensor, normed: Tensor) -> None:
        """Leave the product of `normed` with its readers where they look for it, if sparse tensor cores make it."""
        joint = self.joint()
        if joint is None or not isinstance(weight := joint.multiply, FastWeight) or self._forward_hooks:
            return
        has_kernel = weight.layout.activations == "int8" and self.weight.dtype == x.dtype
        is_joined = weight.m == WINDOW and is_traced_with_few_tokens(x)
        if has_kernel and not is_joined and weight.is_sparse_for(x):
            norm = Norm(self.weight, self.variance_epsilon)
            lifted = quantize_normed(x, norm, weight.layout.activations, weight.m)
            joint.ahead = normed, weight.multiply_lifted(*lifted, x.dtype)

    def joint(self) -> JointProduct | None:
        """Of its readers, for as long as they compute as `accelerate` made them."""
        if self.reader is None:
            return None
        return _joint(*self.reader)


def quantize_in_norms(model: nn.Module) -> None:
    """Have the norms of an accelerated `model` that stand before joint products quantise for them."""
    for block in list(model.modules()):
        for name, *reader in READERS:
            norm = getattr(block, name, None)
            if norm is None or _joint(block, tuple(reader)) is None:
                continue
            if isinstance(norm, QuantizingNorm):
                norm.reader = block, tuple(reader)
            elif is_rms_norm(norm):
                setattr(block, name, QuantizingNorm(norm, block, *reader))


def _joint(block: nn.Module, names: tuple[str, ...]) -> JointProduct | None:
    """Of the layer of that name in `block`, if there is one that has a joint product."""
    parent, child = names
    fast = getattr(getattr(getattr(block, parent, None), child, None), "fast", None)
    return fast.joint if isinstance(fast, Share) else None


def is_rms_norm(module: Any) -> bool:
    """Whether it is one of NORMS, and computes what `numerics.norm.rms_norm` does."""
    kind = type(module)
    if kind.__name__ not in NORMS or not kind.__module__.startswith("transformers."):
        return False
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    x = torch.randn(2, len(module.weight), device=module.weight.device, dtype=module.weight.dtype)
    return torch.equal(module(x), rms_norm(x, module.weight, module.variance_epsilon))
