"""What the others do: the layers that ours are measured against."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_bitnet.nn.stored_settings import named_layers
from sparse_bitnet.nn.swap import prepare
from sparse_bitnet.recipe import NMPattern, Recipe


class PlainLinear(nn.Linear):
    """The method as it is usually written in PyTorch: mask by argsort, fake quantisation, `w + (q - w).detach()`."""

    pattern = NMPattern(6, 8)

    def forward(self, input: Tensor) -> Tensor:
        weight, x = plain_effective_weight(self.weight, self.pattern, self.weight.dtype), input
        scale = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        fake = (x * scale).round().clamp(-128, 127) / scale
        return F.linear(x + (fake - x).detach(), self.weight + (weight - self.weight).detach(), self.bias)


def plain_effective_weight(weight: Tensor, pattern: NMPattern, dtype: torch.dtype) -> Tensor:
    """Latent weight [O, I] -> effective weight in `dtype`, with the mask from a sort of each group of m."""
    magnitudes = weight.abs().view(weight.shape[0], -1, pattern.m)  # [O, I / m, m]
    order = torch.argsort(magnitudes, dim=-1, descending=True)
    mask = torch.zeros_like(magnitudes).scatter_(-1, order[..., : pattern.n], 1.0).view_as(weight)
    scale = weight.abs().mean().clamp(min=1e-5)
    return ((weight / scale).round().clamp(-1, 1) * scale * mask).to(dtype)


def exchange_for_plain(model: nn.Module, pattern: NMPattern) -> None:
    """Turn the layers that `prepare` takes into `PlainLinear`, in place."""
    kind = type("PlainLinear", (PlainLinear,), {"pattern": pattern})
    prepared: list[Any] = [layer for _, layer in named_layers(prepare(model, Recipe(pattern)))]
    for layer in prepared:
        layer.__class__ = kind
