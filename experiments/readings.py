"""What the latent weights of a finished model look like, and where the mask cuts.

Shapes: G groups of m weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparse_bitnet.nn.sparse_bit_linear import SparseBitLinear
from sparse_bitnet.nn.stored_settings import named_layers
from sparse_bitnet.numerics.ternary import absmean_scale, scale_by_row

WIDEST, BINS = 4.0, 160
QUARTILES = (0.25, 0.5, 0.75)
SAMPLED = 4_000_000  # groups; torch.quantile takes no more than 16 million numbers


@torch.no_grad()
def latent_histogram(model: nn.Module) -> dict[str, Any]:
    """Latent weights of all layers in units of the scale of their layer, from -4 to 4, what is beyond at the ends.

    `threshold` holds quartiles, over the groups, of the magnitude halfway between the smallest weight that the mask
    keeps and the largest that it does not; None where it keeps all.
    """
    counts, cuts = torch.zeros(BINS, dtype=torch.float64), []
    for _, layer in named_layers(model):
        assert isinstance(layer, SparseBitLinear)
        scale = scale_by_row(absmean_scale(layer.weight, layer.parts), layer.parts, layer.out_features)
        ratio = layer.weight.float() / scale  # [O, I]
        inside = ratio.clamp(-WIDEST, WIDEST)
        counts += torch.histc(inside, BINS, -WIDEST, WIDEST).double().cpu()
        pattern = layer.recipe.pattern
        if not pattern.is_dense:
            groups = ratio.abs().view(-1, pattern.m).sort(dim=-1, descending=True).values  # [G, m]
            cuts.append((groups[:, pattern.n - 1] + groups[:, pattern.n]).cpu() / 2)
    return {"from": -WIDEST, "to": WIDEST, "counts": counts.long().tolist(), "threshold": _quartiles(cuts)}


def _quartiles(cuts: list[Tensor]) -> list[float] | None:
    if not cuts:
        return None
    whole = torch.cat(cuts)
    return whole[:: -(-len(whole) // SAMPLED)].quantile(torch.tensor(QUARTILES)).tolist()
