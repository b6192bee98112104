"""The layers of a packed transformers model as `kernels.decoder_step` takes them, to compute a token in one launch.

Shapes: L places of the cache.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import StaticLayer

from sparse_bitnet.engine.architecture import ATTENTION, MLP
from sparse_bitnet.kernels.decoder_step import ON_GPU, OPERATOR, Decoder, DecoderLayer, Matrix
from sparse_bitnet.kernels.dispatch import FORCE_VARIABLE
from sparse_bitnet.nn.acceleration import packed_in_i2
from sparse_bitnet.nn.packed_linear import PackedLinear


def obstacle(model: PreTrainedModel) -> str | None:
    """Why the layers of a model (Qwen2, Qwen3, Llama) are not what `decoder_of` takes; None where they are."""
    if getattr(model.config, "hidden_act", "silu") != "silu":
        return f"hidden_act {model.config.hidden_act!r} is not silu"
    for index, layer in enumerate(model.base_model.layers):
        for name in (*ATTENTION, *MLP):
            module = getattr(layer.self_attn if name in ATTENTION else layer.mlp, name)
            if not isinstance(module, PackedLinear):
                return f"{name} of layer {index} is not packed"
            if module.recipe.activations != "int8":
                return f"activations={module.recipe.activations!r} are not int8"
            if module.parts:
                return f"{name} of layer {index} is a fused projection"
    return None


def decoder_of(model: PreTrainedModel, caches: Sequence[StaticLayer]) -> Decoder:
    """The layers over the caches of one sequence; tensors of the model, not copies, but for weights not in i2."""
    layers = []
    for layer, cache in zip(model.base_model.layers, caches, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        norms: list[Any] = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        layers.append(
            DecoderLayer(
                *(_matrix(getattr(attention, name)) for name in ATTENTION),
                *(_matrix(getattr(mlp, name)) for name in MLP),
                layer.input_layernorm.weight,
                layer.post_attention_layernorm.weight,
                *(None if norm is None else norm.weight for norm in norms),
                cache.keys[0],
                cache.values[0],
            )
        )
    config: Any = model.config
    places = torch.arange(layers[0].keys.shape[1], device=model.device)
    cosines, sines = model.base_model.rotary_emb(layers[0].keys, places[None])
    return Decoder(tuple(layers), config.num_attention_heads, config.rms_norm_eps, cosines[0], sines[0])


def refusal(decoder: Decoder) -> str | None:
    """Why the GPU cannot compute a token of `decoder` in one launch; None where it can."""
    forced = os.environ.get(FORCE_VARIABLE)
    if forced not in (None, "", ON_GPU.name):
        return f"{FORCE_VARIABLE}={forced} asks for another kernel"
    return OPERATOR.refusal(ON_GPU, decoder)


def _matrix(layer: PackedLinear) -> Matrix:
    return Matrix(packed_in_i2(layer), layer.weight_scale, layer.bias)
