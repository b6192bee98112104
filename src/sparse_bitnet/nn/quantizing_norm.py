"""The norm before packed layers on a GPU, in one kernel with the quantisation of what they read.

torch.compile writes what a norm gives, and the kernel that quantises and lifts reads it again. Here that kernel takes
the norm itself. The model is still given what the norm gives; as nobody reads it, the compiler leaves it out. Without
torch.compile, and for the few tokens whose quantisation it joins to the norm by itself, nothing is done ahead.

Shapes: T tokens, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparse_bitnet.kernels.quantize_lifted import Norm, quantize_normed
from sparse_bitnet.kernels.tracing import is_traced_with_few_tokens
from sparse_bitnet.nn.fast_weight import FastWeight
from sparse_bitnet.nn.packed_linear import PackedLinear
from sparse_bitnet.nn.shared_inputs import JointProduct, Share
from sparse_bitnet.numerics.norm import rms_norm

NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")  # of transformers
READERS = (
    ("input_layernorm", "self_attn", "q_proj"),
    ("post_attention_layernorm", "mlp", "gate_proj"),
)  # a norm of a block, and the first of the layers that read what it gives


class QuantizingNorm(nn.Module):
    """In the place of an RMS norm of transformers, of which it takes the weight, under its name.

    reader  the first of the layers that by their names read what it gives; if they are given something else, they
            compute with that
    """

    def __init__(self, norm: Any, reader: PackedLinear) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon
        self._reader = (reader,)  # it is no child
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., H] -> its norm [..., H]."""
        normed = rms_norm(x, self.weight, self.variance_epsilon)
        needs_gradient = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        if torch.compiler.is_compiling() and not is_traced_with_few_tokens(x) and not needs_gradient:
            self.multiply_ahead(x, normed)
        return normed

    def multiply_ahead(self, x: Tensor, normed: Tensor) -> None:
        """Leave the product of `normed` with its readers where they look for it, if sparse tensor cores make it."""
        joint = self.joint()
        if joint is None or not isinstance(weight := joint.multiply, FastWeight):
            return
        if x.numel() >= weight.sparse_from * x.shape[-1] and self.weight.dtype == x.dtype:
            norm = Norm(self.weight, self.variance_epsilon)
            lifted = quantize_normed(x, norm, weight.layout.activations, weight.m)
            joint.ahead = normed, weight.multiply_lifted(*lifted, x.dtype)

    def joint(self) -> JointProduct | None:
        """Of its readers, for as long as they compute as `accelerate` made them."""
        (reader,) = self._reader
        return reader.fast.joint if isinstance(reader.fast, Share) else None


def quantize_in_norms(model: nn.Module) -> None:
    """Have the norms of an accelerated `model` that stand before joint products quantise for them."""
    for block in list(model.modules()):
        for name, parent, child in READERS:
            norm, reader = getattr(block, name, None), getattr(getattr(block, parent, None), child, None)
            if isinstance(reader, PackedLinear) and isinstance(reader.fast, Share) and is_rms_norm(norm):
                setattr(block, name, QuantizingNorm(norm, reader))


def is_rms_norm(module: Any) -> bool:
    """Whether it is one of NORMS, and computes what `numerics.norm.rms_norm` does."""
    kind = type(module)
    if kind.__name__ not in NORMS or not kind.__module__.startswith("transformers."):
        return isinstance(module, QuantizingNorm)
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    x = torch.randn(2, len(module.weight), device=module.weight.device, dtype=module.weight.dtype)
    return torch.equal(module(x), rms_norm(x, module.weight, module.variance_epsilon))
