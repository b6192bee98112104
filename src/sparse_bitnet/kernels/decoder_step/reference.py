"""The slow truth: plain PyTorch on any device, rounded to the dtype of the model where transformers rounds."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_bitnet.kernels.decoder_step import Decoder, DecoderLayer, Matrix, Step
from sparse_bitnet.kernels.packed_linear import PackedLayout, reference
from sparse_bitnet.numerics.norm import rms_norm


def obstacle() -> None:
    return None


def supports(decoder: Decoder) -> None:
    return None


def run(decoder: Decoder) -> Step:
    @torch.no_grad()
    def step(x: Tensor, position: Tensor) -> None:
        for layer in decoder.layers:
            token = rms_norm(x, layer.input_norm, decoder.epsilon)
            x += _multiply(_attend(decoder, layer, token, position), layer.output)
            token = rms_norm(x, layer.ffn_norm, decoder.epsilon)
            x += _multiply(F.silu(_multiply(token, layer.gate)) * _multiply(token, layer.up), layer.down)

    return step


def _multiply(x: Tensor, matrix: Matrix) -> Tensor:
    return reference.run(x, matrix.weight, matrix.scale, matrix.bias, PackedLayout("i2", x.shape[-1], "int8"))


def _attend(decoder: Decoder, layer: DecoderLayer, x: Tensor, position: Tensor) -> Tensor:
    query, key = (_multiply(x, matrix).view(-1, decoder.head) for matrix in (layer.query, layer.key))
    if layer.query_norm is not None and layer.key_norm is not None:
        query, key = rms_norm(query, layer.query_norm, decoder.epsilon), rms_norm(key, layer.key_norm, decoder.epsilon)
    query, key = (_turn(decoder, heads, position) for heads in (query, key))
    value = _multiply(x, layer.value).view(-1, decoder.head)
    layer.keys.index_copy_(1, position, key[:, None])
    layer.values.index_copy_(1, position, value[:, None])
    seen = int(position) + 1
    query = query.view(decoder.kv_heads, -1, decoder.head).float()  # heads that share keys
    scores = query @ layer.keys[:, :seen].float().mT * decoder.head**-0.5
    return (scores.softmax(-1) @ layer.values[:, :seen].float()).to(x.dtype).flatten()


def _turn(decoder: Decoder, heads: Tensor, position: Tensor) -> Tensor:
    low, high = heads.chunk(2, dim=-1)
    return heads * decoder.cosines[position] + torch.cat((-high, low), dim=-1) * decoder.sines[position]
