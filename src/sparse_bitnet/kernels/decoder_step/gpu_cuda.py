"""On a GPU one launch for all layers: its blocks stay, and meet between the stages. The kernel is in gpu_cuda.cu."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparse_bitnet.kernels import cuda_device
from sparse_bitnet.kernels.decoder_step import Decoder, Matrix, Step
from sparse_bitnet.numerics.activation import SMALLEST_MAGNITUDE

SOURCE = Path(__file__).with_suffix(".cu")
THREADS, WARPS = 512, 16
CHUNK = 64  # columns whose codes a thread reads at once
HEADS = (64, 128, 256)
LAYER_BYTES = 216
MOST_SPLITS = 16  # of a text, for attention
WIDEST = 32768  # numbers of a token that its threads hold
MOST_SHARED_BYTES = 231_424  # of a block, without what has a fixed size
obstacle = cuda_device.obstacle


def supports(decoder: Decoder) -> str | None:
    device = decoder.cosines.device
    weights = [matrix.weight for layer in decoder.layers for matrix in layer.matrices]
    floats = [decoder.cosines, decoder.sines, *(one for layer in decoder.layers for one in layer.tensors)]
    wide = [one for layer in decoder.layers for one in (layer.input_norm, layer.ffn_norm, layer.keys, layer.values)]
    for tensor in (*floats, *weights):
        if not tensor.is_cuda or tensor.device != device:
            return f"a tensor is on {tensor.device}"
        if not tensor.is_contiguous():
            return "a tensor is not contiguous"
    if torch.cuda.get_device_capability(device) != cuda_device.CAPABILITY:
        return f"the decoder is on {device}, which is of another kind"
    for tensor in floats:
        if tensor.dtype != torch.bfloat16:
            return f"{tensor.dtype}; it takes {torch.bfloat16}"
    if any(one.data_ptr() % 16 for one in (*weights, *wide)):
        return "a tensor does not begin at a multiple of 16 bytes"
    for name, width in (("hidden", decoder.hidden), ("ffn", decoder.ffn), ("heads", decoder.heads * decoder.head)):
        if width % CHUNK or width > WIDEST:
            return f"{width} columns of {name} are not a multiple of {CHUNK} up to {WIDEST}"
    if decoder.head not in HEADS:
        return f"heads of {decoder.head} numbers are none of {', '.join(map(str, HEADS))}"
    plan = _Plan.of(decoder)
    if not plan.splits:
        return f"{decoder.heads} heads of {decoder.head} are too many for {plan.blocks} multiprocessors"
    if plan.shared_bytes > MOST_SHARED_BYTES:
        return f"{len(decoder.layers)} layers with {decoder.ffn} columns of ffn do not fit into shared memory"
    return None


def run(decoder: Decoder) -> Step:
    device, plan = decoder.cosines.device, _Plan.of(decoder)
    kernel = cuda_device.compile_kernel(
        SOURCE, "decoder_step", plan.shared_bytes, cooperative=True, **_definitions(decoder, plan)
    )
    table = torch.tensor(_words(decoder), dtype=torch.int64, device=device)
    queries, keys = decoder.heads * decoder.head, decoder.kv_heads * decoder.head
    room = torch.empty(queries + 2 * keys + queries + decoder.ffn, dtype=torch.bfloat16, device=device)
    qkv, attention, activated = room.split([queries + 2 * keys, queries, decoder.ffn])
    partials = torch.empty(plan.attending * plan.splits * plan.partial_bytes, dtype=torch.uint8, device=device)
    arrived = torch.zeros(1 + plan.attending, dtype=torch.int32, device=device)
    places = decoder.layers[0].keys.shape[1]
    pointers = [one.data_ptr() for one in (qkv, attention, activated, partials, arrived)]
    angles = [one.data_ptr() for one in (decoder.cosines, decoder.sines)]

    def step(x: Tensor, position: Tensor, keeps: tuple[object, ...] = (decoder, table, room, partials)) -> None:
        if x.shape != (decoder.hidden,) or x.dtype != torch.bfloat16 or not x.is_contiguous() or x.data_ptr() % 16:
            raise ValueError(f"x is {x.dtype} {list(x.shape)}: give {torch.bfloat16} [{decoder.hidden}], contiguous")
        if position.dtype != torch.int64 or position.numel() != 1:
            raise ValueError(f"position is {position.dtype} {list(position.shape)}: give {torch.int64} [1]")
        if x.device != device or position.device != device:
            raise ValueError(f"x is on {x.device} and position on {position.device}, and the decoder on {device}")
        with torch.cuda.device(device):
            arrived.zero_()
            kernel.launch(
                plan.blocks, THREADS, (), table.data_ptr(), x.data_ptr(), *pointers, position.data_ptr(), *angles,
                len(decoder.layers), places,
            )  # fmt: skip

    return step


@dataclass(frozen=True)
class _Plan:
    """How a decoder is divided among blocks.

    blocks     one on every multiprocessor
    part       heads of one group that a block attends with: two, if there are and its registers hold them
    attending  blocks that attend to one split of a text
    splits     of a text, at most; 0 where there are not blocks enough for one
    """

    blocks: int
    part: int
    attending: int
    splits: int
    attention_bytes: int
    partial_bytes: int
    shared_bytes: int

    @classmethod
    def of(cls, decoder: Decoder) -> _Plan:
        head, group = decoder.head, decoder.heads // decoder.kv_heads
        blocks = torch.cuda.get_device_properties(decoder.cosines.device).multi_processor_count
        part = 2 if head <= 128 and group > 1 else 1
        attending = decoder.kv_heads * -(-group // part)
        attention = 4 * part * head + 4 * head + WARPS * part * (8 + 4 * head)
        codes = max(decoder.hidden, decoder.ffn, decoder.heads * head)
        shared = -(-LAYER_BYTES * len(decoder.layers) // 16) * 16 + max(attention, codes)
        splits = min(MOST_SPLITS, blocks // attending)
        return cls(blocks, part, attending, splits, attention, 4 * part * (head + 2), shared)


def _definitions(decoder: Decoder, plan: _Plan) -> dict[str, int | str]:
    return {
        "BLOCKS": plan.blocks, "THREADS": THREADS, "HIDDEN": decoder.hidden, "FFN": decoder.ffn,
        "HEADS": decoder.heads, "KV_HEADS": decoder.kv_heads, "HEAD": decoder.head,
        "PART": plan.part, "SPLITS": plan.splits, "SCALING": f"{decoder.head**-0.5}f",
        "EPSILON": f"{float(decoder.epsilon)}f", "SMALLEST": f"{SMALLEST_MAGNITUDE}f",
        "LAYER_BYTES": LAYER_BYTES, "ATTENTION_BYTES": plan.attention_bytes, "PARTIAL_BYTES": plan.partial_bytes,
    }  # fmt: skip


def _words(decoder: Decoder) -> list[list[int]]:
    """The struct Layer of each layer, in words of 8 bytes."""
    words, scales = [], torch.cat([matrix.scale for layer in decoder.layers for matrix in layer.matrices])
    for layer, of_layer in zip(decoder.layers, scales.view(len(decoder.layers), -1).tolist(), strict=True):
        matrices = [
            word for one, scale in zip(layer.matrices, of_layer, strict=True) for word in _matrix_words(one, scale)
        ]
        norms = map(_address, (layer.input_norm, layer.ffn_norm, layer.query_norm, layer.key_norm))
        words.append([*matrices, *norms, layer.keys.data_ptr(), layer.values.data_ptr()])
    return words


def _matrix_words(matrix: Matrix, scale: float) -> tuple[int, int, int]:
    return matrix.weight.data_ptr(), _address(matrix.bias), struct.unpack("<q", struct.pack("<f4x", scale))[0]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
