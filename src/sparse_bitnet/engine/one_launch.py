"""The layers of a packed transformers model as `kernels.decoder_step` takes them, to compute a token in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import StaticLayer

from sparse_bitnet.engine.architecture import ATTENTION, MLP
from sparse_bitnet.kernels.decoder_step import ON_GPU, OPERATOR, Decoder, DecoderLayer, Matrix, Step, decoder_step
from sparse_bitnet.kernels.dispatch import forcing
from sparse_bitnet.nn.fast_weight import i2_weight
from sparse_bitnet.nn.packed_linear import PackedLinear


def obstacle(model: PreTrainedModel) -> str | None:
    """Why the layers of a model (Qwen2, Qwen3, Llama) are not what `decoder_of` takes; None where they are."""
    config: Any = model.config
    if config.hidden_act != "silu":
        return f"hidden_act {config.hidden_act!r} is not silu"
    for name, module in model.base_model.named_modules():
        if name.rpartition(".")[2] not in (*ATTENTION, *MLP):
            continue
        if not isinstance(module, PackedLinear):
            return f"{name} is not packed"
        if module.recipe.activations != "int8":
            return f"{name} has activations={module.recipe.activations!r}, which are not int8"
        if module.parts:
            return f"{name} is several matrices in one"
        if i2_weight(module) is None:
            return f"{name} is in the format {module.format.name}: `accelerate` keeps it in i2 too"
    return None


def decoder_of(model: PreTrainedModel, caches: Sequence[StaticLayer]) -> Decoder:
    """The layers over the caches of one sequence; tensors of the model, not copies."""
    base, config = cast(Any, model.base_model), cast(Any, model.config)
    layers = tuple(_layer(layer, cache) for layer, cache in zip(base.layers, caches, strict=True))
    places = torch.arange(layers[0].keys.shape[1], device=model.device)
    cosines, sines = base.rotary_emb(layers[0].keys, places[None])
    return Decoder(layers, config.num_attention_heads, config.rms_norm_eps, cosines[0], sines[0])


def _layer(layer: Any, cache: Any) -> DecoderLayer:
    attention, mlp = layer.self_attn, layer.mlp
    return DecoderLayer(
        query=_matrix(attention.q_proj),
        key=_matrix(attention.k_proj),
        value=_matrix(attention.v_proj),
        output=_matrix(attention.o_proj),
        gate=_matrix(mlp.gate_proj),
        up=_matrix(mlp.up_proj),
        down=_matrix(mlp.down_proj),
        input_norm=layer.input_layernorm.weight.detach(),
        ffn_norm=layer.post_attention_layernorm.weight.detach(),
        query_norm=attention.q_norm.weight.detach() if hasattr(attention, "q_norm") else None,
        key_norm=attention.k_norm.weight.detach() if hasattr(attention, "k_norm") else None,
        keys=cache.keys[0],
        values=cache.values[0],
    )


def step_of(decoder: Decoder) -> Step | str:
    """Its step on a GPU, or why the GPU has none."""
    return forcing() or OPERATOR.refusal(ON_GPU, decoder) or decoder_step(decoder)


def _matrix(layer: PackedLinear) -> Matrix:
    weight = i2_weight(layer)
    assert weight is not None
    return Matrix(weight, layer.weight_scale, None if layer.bias is None else layer.bias.detach())
