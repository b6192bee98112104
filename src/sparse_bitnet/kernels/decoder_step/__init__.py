"""Inference: one token of one sequence through all layers of a packed decoder (Qwen2, Qwen3, Llama), as one op.

A step of a batch of one is bound by the number of its kernels: each ends, and the next begins, in the time that its
weights take to be read. A backend takes the decoder and gives its step, which computes what the modules of transformers
do, rounded in the same places but within attention, where its kernels do as they like.

Shapes: H hidden, F ffn, D numbers a head, A heads of queries, K heads of keys, L places of the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from sparse_bitnet.formats.i2 import bytes_per_row
from sparse_bitnet.kernels.dispatch import Backend, Operator

ON_GPU = Backend("gpu_cuda", needs=("cuda.bindings",))
OPERATOR = Operator(__name__, (ON_GPU, Backend("reference")))

Step = Callable[[Tensor, Tensor], None]
"""Given x [H], the embedding of a token, and its position [1] int64 below L: x becomes the output of the last layer,
and the caches get the keys and values of that place. One at a time: the steps of one decoder share their room."""


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
    """All layers have one shape; cosines and sines are [L, D], of each position for both halves of a head.

    ValueError where shapes do not fit.
    """

    layers: tuple[DecoderLayer, ...]
    heads: int
    epsilon: float
    cosines: Tensor
    sines: Tensor

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads of queries cannot share {self.kv_heads} of keys")
        queries, keys, caches = self.heads * self.head, self.kv_heads * self.head, self.layers[0].keys.shape
        rows = queries, keys, keys, self.hidden, self.ffn, self.ffn, self.hidden
        columns = self.hidden, self.hidden, self.hidden, queries, self.hidden, self.hidden, self.ffn
        for layer in self.layers:
            for matrix, height, width in zip(layer.matrices, rows, columns, strict=True):
                if matrix.weight.shape != (height, bytes_per_row(width)) or matrix.scale.numel() != 1:
                    told = f"{list(matrix.weight.shape)} with {matrix.scale.numel()} scales"
                    raise ValueError(f"a weight of {height} x {width} is {told}")
                if matrix.bias is not None and matrix.bias.numel() != height:
                    raise ValueError(f"a bias of {height} rows is {list(matrix.bias.shape)}")
            norms = (layer.input_norm, layer.ffn_norm), (layer.query_norm, layer.key_norm)
            fits = all(
                one is None or one.numel() == size
                for each, size in zip(norms, (self.hidden, self.head), strict=True) for one in each
            )  # fmt: skip
            if layer.keys.shape != caches or layer.values.shape != caches or not fits:
                raise ValueError("the layers are not of one shape")
            if (layer.query_norm is None) != (layer.key_norm is None):
                raise ValueError("a layer has a norm for queries or for keys alone")
        for angles in (self.cosines, self.sines):
            if angles.shape != caches[1:]:
                raise ValueError(f"cosines and sines are {list(angles.shape)}, and the caches {list(caches)}")

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
