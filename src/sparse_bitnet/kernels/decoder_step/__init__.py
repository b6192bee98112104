"""Inference: one token of one sequence through all layers of a packed decoder (Qwen2, Qwen3, Llama), as one op.

A step of a batch of one is bound by the number of its kernels: each ends, and the next begins, in the time that its
weights take to be read. A backend takes the decoder and gives its step, which computes what the modules of transformers
do, rounded in the same places.

Shapes: H hidden, F ffn, D numbers a head, A heads of queries, K heads of keys, L places of the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from sparse_bitnet.kernels.dispatch import Backend, Operator

ON_GPU = Backend("gpu_cuda", needs=("cuda.bindings",))
OPERATOR = Operator(__name__, (ON_GPU, Backend("reference")))

Step = Callable[[Tensor, Tensor], None]
"""Given x [H], the embedding of a token, and its position [1] int64: x becomes the output of the last layer, and the
caches get their keys and values of the position."""


@dataclass(frozen=True)
class Matrix:
    """weight [O, I / 4] uint8 in the format i2, scale [1] fp32, bias [O] or None; activations are int8."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class DecoderLayer:
    """Matrices, norms (two of [H]; of queries and keys [D] or None), and caches [K, L, D]."""

    query: Matrix
    key: Matrix
    value: Matrix
    output: Matrix
    gate: Matrix
    up: Matrix
    down: Matrix
    input_norm: Tensor
    ffn_norm: Tensor
    query_norm: Tensor | None
    key_norm: Tensor | None
    keys: Tensor
    values: Tensor

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        return self.query, self.key, self.value, self.output, self.gate, self.up, self.down

    @property
    def tensors(self) -> list[Tensor]:
        """All that are in the dtype of the model, as x is."""
        norms = (self.input_norm, self.ffn_norm, self.query_norm, self.key_norm)
        biases = (matrix.bias for matrix in self.matrices)
        return [one for one in (*norms, *biases, self.keys, self.values) if one is not None]


@dataclass(frozen=True)
class Decoder:
    """All layers have one shape; cosines and sines are [L, D], of each position for both halves of a head."""

    layers: tuple[DecoderLayer, ...]
    heads: int
    epsilon: float
    cosines: Tensor
    sines: Tensor

    @property
    def hidden(self) -> int:
        return self.layers[0].input_norm.numel()

    @property
    def ffn(self) -> int:
        return len(self.layers[0].gate.weight)

    @property
    def kv_heads(self) -> int:
        return len(self.layers[0].keys)

    @property
    def head(self) -> int:
        return self.layers[0].keys.shape[-1]


def decoder_step(decoder: Decoder) -> Step:
    """The step of `decoder` by the best backend. What it holds must stay where it is as long as the step is used."""
    return OPERATOR.run(decoder)
