"""A packed model that writes, all layers in C++ (`csrc/decoder.cpp`).

Shapes: T tokens, O out_features, I in_features, H hidden_size, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from sparse_bitnet import _native
from sparse_bitnet.checkpoint.directory import check_directory
from sparse_bitnet.engine.architecture import ATTENTION, Architecture, check_tokens, end_tokens
from sparse_bitnet.engine.batch import CHUNK, Batch
from sparse_bitnet.engine.sampling import Sampling
from sparse_bitnet.engine.weights import StoredTensors
from sparse_bitnet.kernels.packed_linear.cpu_native import CPU_VARIABLE, DTYPES, FORMATS, instruction_set_number

Head = Literal["int8", "stored"]
ROW_STEP = 64  # the rows of an int8 head are filled up to a multiple of this

Projection = tuple[int, int, int, int, int, int, int]


class Decoder:
    """A model directory as `convert` writes it, opened.

    Packed weights are read where they are mapped. The embedding is too; an int8 head is made of it, or of the untied
    head, once, of V x H bytes, while `head="stored"` multiplies by the floats in the file. ValueError in one line for a
    directory that is damaged; `NotSupportedError`, which is one, for a model that the engine does not have.
    """

    def __init__(self, directory: Path | str, *, head: Head = "int8", threads: int | None = None) -> None:
        if head not in get_args(Head):
            raise ValueError(f"head={head!r} is none of {', '.join(get_args(Head))}")
        directory = Path(directory)
        check_directory(directory)
        self.architecture = Architecture.read(directory)
        self.end_tokens = end_tokens(directory)
        self.threads = torch.get_num_threads() if threads is None else threads
        if self.threads < 1:
            raise ValueError(f"threads={threads} must be 1 or more")
        self._set = instruction_set_number(os.environ.get(CPU_VARIABLE))
        self._kept: list[Tensor] = []  # what the native model points to, and of that the packed weights and the head
        self._packed: list[Tensor] = []
        self._stored = StoredTensors(directory)
        self._model = self._build(head)

    @property
    def matrices(self) -> list[Tensor]:
        """What is read for each token: the packed weights and the head."""
        return [*self._packed, self._head]

    def logits(self, ids: Sequence[int]) -> Tensor:
        """[T, V] fp32 of every token of one sequence."""
        self.check(ids, 0)
        cache, rows = self.new_cache(len(ids)), []
        for start in range(0, len(ids), CHUNK):
            rows.append(self.forward([cache], [list(ids[start : start + CHUNK])], every=True))
        return torch.cat(rows)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop: Collection[int] = (),
    ) -> Iterator[tuple[int, int]]:
        """Pairs of a prompt's number and its next token, as they come; a token of `stop` ends its sequence.

        Sequences go on side by side, and one that ends makes room. The iterator can be left at any time. ValueError for
        a prompt that is empty, holds a token that is not in the vocabulary, or leaves no room for the new ones.
        """
        for prompt in prompts:
            self.check(prompt, max_new_tokens)
        return self._generate(prompts, max_new_tokens, sampling or Sampling(), stop)

    def _generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling, stop: Collection[int]
    ) -> Iterator[tuple[int, int]]:
        batch = Batch(self)
        numbers = {batch.add(prompt, max_new_tokens, sampling, stop): n for n, prompt in enumerate(prompts)}
        while len(batch):
            for writing, token in batch.step():
                if isinstance(token, ValueError):
                    raise token
                yield numbers[writing], token

    def forward(self, caches: list[_native.Cache], tokens: list[list[int]], every: bool = False) -> Tensor:
        """Go on by these tokens: logits [sequences, V] fp32 of the last of each, or [T, V] of every one."""
        rows = sum(map(len, tokens)) if every else len(tokens)
        logits = torch.empty(rows, self.architecture.vocabulary)
        _native.forward(self._model, caches, tokens, every, logits.data_ptr(), self._set, self.threads)
        return logits

    def check(self, ids: Sequence[int], new: int) -> None:
        """ValueError for a prompt that cannot be, or that leaves no room for `new` tokens."""
        context = self.architecture.context
        check_tokens(ids, self.architecture.vocabulary)
        if new < 0 or len(ids) + new > context:
            raise ValueError(f"{len(ids)} tokens of prompt and {new} new ones exceed the model's context of {context}")

    def cache_bytes(self, tokens: int) -> int:
        """What keys and values of a sequence take when it has so many tokens; ValueError as of `new_cache`."""
        return self.new_cache(tokens).bytes

    def new_cache(self, tokens: int) -> _native.Cache:
        """Room for keys and values of so many tokens; ValueError where the system refuses it.

        It may grant more than it has: memory is taken page by page as tokens come.
        """
        try:
            return _native.Cache(self._model, tokens)
        except MemoryError:
            raise ValueError(f"there is no memory for keys and values of {tokens} tokens: give fewer") from None

    def _build(self, head: Head) -> _native.Model:
        shape = self.architecture
        frequencies, rotary_scale = shape.rotary.frequencies()
        table = self._keep(self._stored.floats("model.embed_tokens.weight", (shape.vocabulary, shape.hidden)))
        model = _native.Model(
            shape.vocabulary, shape.hidden, shape.ffn, shape.heads, shape.kv_heads, shape.head, shape.epsilon,
            shape.settings.recipe.activations == "int4", frequencies.tolist(), rotary_scale,
            table.data_ptr(), DTYPES[table.dtype], self._fp32("model.norm.weight", shape.hidden),
        )  # fmt: skip
        for index in range(shape.layers):
            self._add_layer(model, f"model.layers.{index}")
        if not shape.is_tied:
            table = self._keep(self._stored.floats("lm_head.weight", (shape.vocabulary, shape.hidden)))
        self._head = table
        if head == "stored":
            model.set_head(table.data_ptr(), 0, DTYPES[table.dtype], shape.hidden)
        else:
            stride = -(-shape.hidden // ROW_STEP) * ROW_STEP
            codes = self._keep(torch.empty(shape.vocabulary, stride, dtype=torch.int8))
            scales = self._keep(torch.empty(shape.vocabulary))
            _native.quantize_head(
                table.data_ptr(), DTYPES[table.dtype], shape.vocabulary, shape.hidden, stride,
                codes.data_ptr(), scales.data_ptr(), self._set, self.threads,
            )  # fmt: skip
            model.set_head(codes.data_ptr(), scales.data_ptr(), 0, stride)
            self._head = codes
        return model

    def _add_layer(self, model: _native.Model, name: str) -> None:
        shape = self.architecture
        query, kv = shape.heads * shape.head, shape.kv_heads * shape.head
        sizes = {
            "q_proj": (query, shape.hidden), "k_proj": (kv, shape.hidden), "v_proj": (kv, shape.hidden),
            "o_proj": (shape.hidden, query), "gate_proj": (shape.ffn, shape.hidden),
            "up_proj": (shape.ffn, shape.hidden), "down_proj": (shape.hidden, shape.ffn),
        }  # fmt: skip
        rooms = {part: "self_attn" if part in ATTENTION else "mlp" for part in sizes}
        projections = [self._projection(f"{name}.{rooms[part]}.{part}", *size) for part, size in sizes.items()]
        head_norms = [
            self._fp32(f"{name}.self_attn.{part}.weight", shape.head) if shape.has_head_norms else 0
            for part in ("q_norm", "k_norm")
        ]
        norms = [
            self._fp32(f"{name}.{part}.weight", shape.hidden)
            for part in ("input_layernorm", "post_attention_layernorm")
        ]
        model.add_layer(projections, *norms, *head_norms)

    def _projection(self, name: str, rows: int, in_features: int) -> Projection:
        format = self.architecture.settings.format
        weight = self._keep(self._stored.packed(f"{name}.weight", rows, in_features, format))
        self._packed.append(weight)
        scale = self._keep(self._stored.scale(f"{name}.weight_scale"))
        bias = self._fp32(f"{name}.bias", rows) if name.rpartition(".")[2] in self.architecture.biased else 0
        return (
            weight.data_ptr(), rows, in_features, weight.shape[1], FORMATS[format], scale.data_ptr(), bias,
        )  # fmt: skip

    def _fp32(self, name: str, width: int) -> int:
        return self._keep(self._stored.fp32(name, (width,))).data_ptr()

    def _keep(self, tensor: Tensor) -> Tensor:
        self._kept.append(tensor)
        return tensor
