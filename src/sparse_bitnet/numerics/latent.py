"""Latent weights made to order: what training starts from where the codes, or the mask, are given.

Shapes: O out_features, I in_features, P parts, G = I / m groups a row; leading dimensions (experts) are free.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_bitnet.numerics.ternary import Parts, absmean_scale, scale_by_row
from sparse_bitnet.recipe import NMPattern

BELOW = 0.5  # of the smallest weight kept: far enough that the first steps do not undo the mask, near enough to return


def latent_of_codes(codes: Tensor, scale: float) -> Tensor:
    """Codes [O, I] int8 and their scale, an fp32 number -> latent weight [O, I] fp32 that has just these.

    `scale * codes` would not do: where a share z of the codes is 0, its mean magnitude is scale * (1 - z). The latent
    weight is therefore codes * scale / (1 - z), which still rounds to the codes. No fp32 number need be that magnitude
    so nearly that the mean over millions of them is `scale` to the last bit: the first so many are one step larger.
    """
    count = int(codes.count_nonzero())
    if count == 0:
        return codes.float()
    magnitude = scale * codes.numel() / count
    step_down = torch.tensor(magnitude, dtype=torch.float32, device=codes.device)
    if float(step_down) > magnitude:
        step_down = torch.nextafter(step_down, torch.zeros_like(step_down))
    step_up = torch.nextafter(step_down, torch.full_like(step_down, torch.inf))
    larger = round((magnitude - float(step_down)) / (float(step_up) - float(step_down)) * count)
    is_larger = codes.ne(0).flatten().cumsum(0).view_as(codes) <= larger
    return codes * torch.where(is_larger, step_up, step_down)


def latent_under_mask(weight: Tensor, mask: Tensor, pattern: NMPattern) -> Tensor:
    """Latent weight [..., O, I] that ranks as `mask` [..., O, I] says, n of each m, where `weight` may rank otherwise.

    A mask is taken anew from the magnitudes at each forward pass, so a starting mask has to be in them. Weights that
    the mask keeps stay what they are; one that it drops though it is as large as the smallest one kept becomes half of
    that, sign kept. Zeroed, it would stay out for long: from there, dense gradients bring back what is needed. Where
    kept weights are 0 ties decide, among zeros.
    """
    shape = (*weight.shape[:-1], weight.shape[-1] // pattern.m, pattern.m)
    groups, kept = weight.reshape(shape), mask.reshape(shape)  # [..., G, m]
    smallest = groups.abs().masked_fill(~kept, torch.inf).amin(dim=-1, keepdim=True)  # [..., G, 1]
    shrunk = torch.where(~kept & (groups.abs() >= smallest), groups.sign() * smallest * BELOW, groups)
    return shrunk.flatten(-2)


def with_scale(weight: Tensor, scale: Tensor, parts: Parts = ()) -> Tensor:
    """`weight` [..., O, I] times what makes its absmean scale [..., P] `scale`, to the rounding of fp32; codes stay."""
    ratio = scale.double() / absmean_scale(weight, parts).double()
    return (weight * scale_by_row(ratio, parts, weight.shape[-2])).to(weight.dtype)
