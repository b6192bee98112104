"""The experts of a mixture whose weights are one tensor [E, O, I], as transformers 5 holds them.

Each expert, and of gate and up each, has a scale of its own; the router is another module and stays as it is.

Shapes: T tokens, K experts a token, S = T * K rows sorted by expert, E experts, H hidden, F width of an expert,
O out_features, I in_features, P parts, B bytes a row.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_bitnet.formats import Format, choose_format
from sparse_bitnet.kernels.packed_linear import PackedLayout, packed_linear
from sparse_bitnet.kernels.quantize_activation import fake_quantize_activation
from sparse_bitnet.nn.layer import SCALE, Fp32Scales, LatentLayer, PackedLayer, product_dtype
from sparse_bitnet.numerics.ternary import Parts, dequantize_weight
from sparse_bitnet.recipe import Recipe

GATE_UP, DOWN = "gate_up_proj", "down_proj"  # [E, 2F, H] and [E, H, F]
WEIGHTS = (GATE_UP, DOWN)
LAYOUT = {
    "has_gate": True,
    "has_bias": False,
    "is_transposed": False,
    "is_concatenated": True,
    "has_post_expert_norm": False,
    "_is_expert_parallel": False,
}
GROUPED_DTYPE, GROUPED_MULTIPLE = torch.bfloat16, 8  # what torch.nn.functional.grouped_mm takes, compiled or not


class ExpertsLayer:
    """One weight of all experts, as a layer: it is a parameter or buffer of `experts`, which stays the module."""

    def __init__(self, experts: nn.Module, name: str, shape: torch.Size, recipe: Recipe) -> None:
        self.experts, self.name, self.shape, self.recipe = experts, name, shape, recipe
        self.count, self.out_features, self.in_features = shape
        self.parts: Parts = (self.out_features // 2,) * 2 if name == GATE_UP else ()

    @property
    def weight(self) -> Tensor:
        return getattr(self.experts, self.name)


class LatentExpertsLayer(ExpertsLayer, LatentLayer):
    """[E, O, I] latent."""


class PackedExpertsLayer(ExpertsLayer, PackedLayer):
    """[E, O, B] packed, with scales [E, P]."""

    def __init__(self, experts: nn.Module, name: str, shape: torch.Size, recipe: Recipe, format: Format) -> None:
        super().__init__(experts, name, shape, recipe)
        self.format = format

    @property
    def weight_scale(self) -> Tensor:
        return getattr(self.experts, self.name + SCALE)

    def product(self, x: Tensor, expert: int) -> Tensor:
        """x [..., I] times the weight of one expert: [..., O]."""
        layout = PackedLayout(self.format.name, self.in_features, self.recipe.activations, self.parts)
        return packed_linear(x, self.weight[expert], self.weight_scale[expert], None, layout)


class Experts(nn.Module):
    """What latent and packed experts share: their weights as `layers` by name, and the way back.

    `exchanged` is the module that they stand for, without its weights: it knows how gate and up are joined. A tuple
    hides it from PyTorch: whoever initialises all modules of its class would look for those weights.
    """

    layers: dict[str, Any]

    def __init__(self, exchanged: nn.Module) -> None:
        super().__init__()
        emptied = copy.copy(exchanged)
        emptied._parameters = {}
        self._exchanged = (emptied,)

    @property
    def exchanged(self) -> nn.Module:
        return self._exchanged[0]

    def join(self, gate_up: Tensor) -> Tensor:
        """[S, 2F] -> [S, F], as a rule act(gate) * up."""
        return self.exchanged._apply_gate(gate_up)  # type: ignore[operator]

    def extra_repr(self) -> str:
        recipe = self.layers[DOWN].recipe
        shapes = (f"{name}={list(layer.shape)}" for name, layer in self.layers.items())
        return f"{', '.join(shapes)}, pattern={recipe.pattern}, values={recipe.values}"


class SparseBitExperts(Experts):
    """Trainable experts: latent weights under the names that they had, masked and ternarised in every forward pass.

    gate_up_proj  [E, 2F, H]
    down_proj     [E, H, F]
    """

    layers: dict[str, LatentExpertsLayer]

    def __init__(self, experts: nn.Module, recipe: Recipe) -> None:
        """Shares the parameters of `experts`; ValueError where `experts_obstacle` finds one, or m divides no row."""
        super().__init__(experts)
        self.layers = {}
        for name in WEIGHTS:
            weight = experts.get_parameter(name)
            recipe.pattern.check_width(weight.shape[-1], name)
            self.register_parameter(name, weight)
            self.layers[name] = LatentExpertsLayer(self, name, weight.shape, recipe)
        self.train(experts.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, H], the experts of each token [T, K] and their shares [T, K] -> [T, H]."""
        activations = self.layers[DOWN].recipe.activations
        dtype = product_dtype(self.layers[DOWN].weight, hidden_states)
        gate_up, down = (self.layers[name].effective_weight(dtype, self.training) for name in WEIGHTS)

        def run(x: Tensor, ends: Tensor) -> Tensor:
            joined = self.join(grouped_linear(x, gate_up, ends))
            return grouped_linear(fake_quantize_activation(joined, activations, dtype), down, ends)

        x = fake_quantize_activation(hidden_states, activations, dtype)  # here: a row for each token, not for each pair
        return mixture(x, top_k_index, top_k_weights, len(gate_up), run).to(hidden_states.dtype)


class PackedExperts(Experts, Fp32Scales):
    """Experts over packed codes; not trainable. The rows of each are those of a `PackedLinear`.

    gate_up_proj, down_proj              [E, 2F, B], [E, H, B] uint8
    gate_up_proj_scale, down_proj_scale  [E, 2], [E, 1] fp32, values representable in fp16
    """

    layers: dict[str, PackedExpertsLayer]

    def __init__(
        self, exchanged: nn.Module, shapes: Mapping[str, torch.Size], recipe: Recipe, format: str, device: Any = None
    ) -> None:
        """`shapes` [E, O, I] by the names of the weights."""
        super().__init__(exchanged)
        self.layers = {}
        layout = choose_format(recipe, format)
        for name in WEIGHTS:
            layer = PackedExpertsLayer(self, name, shapes[name], recipe, layout)
            size = (layer.count, layer.out_features, layout.bytes_per_row(layer.in_features))
            self.register_buffer(name, torch.zeros(size, dtype=torch.uint8, device=device))
            scales = (layer.count, max(1, len(layer.parts)))
            self.register_buffer(name + SCALE, torch.ones(scales, dtype=torch.float32, device=device))
            self.layers[name] = layer

    @classmethod
    def from_latent(cls, experts: SparseBitExperts, format: str = "auto", name: str = "experts") -> PackedExperts:
        """The codes and the scales of `experts`, packed; ValueError, with `name`, where a weight or scale cannot be."""
        found = {weight: layer.pack_weight(format, f"{name}.{weight}") for weight, layer in experts.layers.items()}
        shapes = {weight: layer.shape for weight, layer in experts.layers.items()}
        layout = found[DOWN][0].name
        packed = cls(experts.exchanged, shapes, experts.layers[DOWN].recipe, layout, device="meta")
        for weight, (_, codes, scale) in found.items():
            setattr(packed, weight, codes)
            setattr(packed, weight + SCALE, scale)
        return packed.train(experts.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, H], the experts of each token [T, K] and their shares [T, K] -> [T, H]; only chosen experts are read."""
        gate_up, down = self.layers[GATE_UP], self.layers[DOWN]

        def run(x: Tensor, ends: Tensor) -> Tensor:
            chosen = [(expert, rows) for expert, rows in enumerate(rows_by_expert(x, ends)) if len(rows)]
            found = [down.product(self.join(gate_up.product(rows, expert)), expert) for expert, rows in chosen]
            return torch.cat(found) if found else x

        return mixture(hidden_states, top_k_index, top_k_weights, gate_up.count, run).to(hidden_states.dtype)

    def to_experts(self, dtype: torch.dtype) -> nn.Module:
        """The module that was exchanged, over the effective weights in `dtype`; its activations are not quantised."""
        module = copy.copy(self.exchanged)
        module._parameters = {}
        for name, layer in self.layers.items():
            weight = dequantize_weight(layer.codes(), layer.weight_scale, layer.parts, dtype)
            module.register_parameter(name, nn.Parameter(weight, requires_grad=False))
        return module


def mixture(x: Tensor, index: Tensor, share: Tensor, count: int, run: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """x [T, H] through the experts `index` [T, K] of `count`, added up by `share` [T, K]: [T, H].

    `run` takes rows [S, H] sorted by expert, and where those of each expert end [E] int32, and gives [S, H]. Nothing
    is added by atomics, so that equal inputs give equal sums.
    """
    expert, order = index.flatten().sort(stable=True)  # [S] each
    ends = torch.searchsorted(expert, torch.arange(count, device=x.device), right=True, out_int32=True)  # [E]
    y = run(x[order // index.shape[-1]], ends)
    y = y[order.argsort()].view(*index.shape, y.shape[-1])  # [T, K, H]
    return (y * share.unsqueeze(-1)).sum(dim=-2)


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x [S, I], whose rows of each expert end at `ends` [E] int32, times weight [E, O, I] of theirs: [S, O].

    bf16 in one launch, with nothing asked of the device; other dtypes and odd widths expert by expert.
    """
    if weight.dtype == GROUPED_DTYPE and not any(size % GROUPED_MULTIPLE for size in weight.shape[1:]):
        return F.grouped_mm(x, weight.transpose(-2, -1), offs=ends)
    parts = zip(rows_by_expert(x, ends), weight.unbind(), strict=True)
    return torch.cat([F.linear(rows, one) for rows, one in parts])


def experts_in_one_tensor(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of `model` that hold the weights of several experts in one tensor, exchanged ones left out."""
    for name, module in model.named_modules():
        stacked = any(weight.dim() == 3 for weight in module.parameters(recurse=False))
        named = "experts" in name.split(".") or "Experts" in type(module).__name__
        if stacked and named and not isinstance(module, Experts):
            yield name, module


def experts_obstacle(module: nn.Module) -> str | None:
    """Why the experts in `module` cannot be exchanged, None where they can.

    They can where their weights are those of `SparseBitExperts` and they are called as it is, which transformers says
    in attributes of the module (transformers.integrations.moe): Qwen2-MoE, Qwen3-MoE, Mixtral, DeepSeek-V3 and others.
    """
    names = {name for name, _ in module.named_parameters(recurse=False)}
    if not names >= set(WEIGHTS):
        return f"{type(module).__name__} holds {', '.join(sorted(names))}, and not {GATE_UP} and {DOWN}"
    if not hasattr(module, "_apply_gate"):
        return f"{type(module).__name__} does not say how it is called"
    for attribute, wanted in LAYOUT.items():
        if getattr(module, attribute, wanted) != wanted:
            return f"{type(module).__name__} has {attribute}={not wanted}"
    return None


def rows_by_expert(x: Tensor, ends: Tensor) -> tuple[Tensor, ...]:
    """x [S, ...] cut where the rows of each expert end, [E] int32: a view for each."""
    return x.split(ends.diff(prepend=ends.new_zeros(1)).tolist())
