"""How a decoder is divided among the blocks of gpu_cuda.cu, and told to it; without a GPU."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from sparse_bitnet.kernels.decoder_step import Decoder, Matrix
from sparse_bitnet.numerics.activation import SMALLEST_MAGNITUDE

THREADS, WARPS = 512, 16
LAYER_BYTES = 216
MOST_SPLITS = 16  # of a text, for attention
LEAST_SLOT_BYTES = 16 * (64 * 16 + 16)  # 64 chunks of 16 rows, each with 16 bytes between
MOST_SLOTS = 16
MOST_SHARED_BYTES = 232_448  # of a block
COUNTERS = 32  # where those of splits begin, behind that of the blocks
MOST_ROWS_A_WARP = 32  # of one matrix, a lane each


@dataclass(frozen=True)
class Plan:
    """How a decoder is divided among blocks.

    blocks     one on every multiprocessor
    part       heads of one group that a block attends with: two, if there are and its registers hold them
    attending  blocks that attend to one split of a text
    splits     of a text, at most; 0 where there are not blocks enough for one
    slots      of the ring that weights come through; 0 where the widest do not fit twice
    """

    blocks: int
    part: int
    attending: int
    splits: int
    attention_bytes: int
    partial_bytes: int
    memory_bytes: int
    slots: int
    slot_bytes: int
    struct_bytes: int
    shared_bytes: int

    @classmethod
    def of(cls, decoder: Decoder, blocks: int) -> Plan:
        head, group = decoder.head, decoder.heads // decoder.kv_heads
        part = 2 if head <= 128 and group > 1 else 1
        attending = decoder.kv_heads * -(-group // part)
        attention = 2 * part * head + 4 * head + WARPS * part * (8 + 4 * head)
        codes = max(decoder.hidden, decoder.ffn, decoder.heads * head)
        memory = -(-max(attention, codes) // 16) * 16
        shared = -(-LAYER_BYTES * len(decoder.layers) // 16) * 16 + memory
        slot = max(LEAST_SLOT_BYTES, 2 * WARPS * decoder.hidden // 4)  # two rows for each warp
        rows = ceil(decoder.hidden / blocks)
        struct_bytes = 3 * 4 * WARPS + 4 * WARPS * ceil(rows / 16) * 16 + 4 * head + 16 + 16 * MOST_SLOTS
        slots = min(MOST_SLOTS, (MOST_SHARED_BYTES - struct_bytes - shared) // slot)
        if slots < 2 or not _fits_warps(decoder, blocks, slot):
            slots = 0
        splits = min(MOST_SPLITS, blocks // attending)
        partial = 4 * part * (head + 2)
        shared += slots * slot
        return cls(
            blocks, part, attending, splits, attention, partial, memory, slots, slot, struct_bytes, shared
        )  # fmt: skip


def _fits_warps(decoder: Decoder, blocks: int, slot: int) -> bool:
    """Whether each row of a matrix has a lane that finishes it."""
    count = min(8, slot // (decoder.hidden // 4) // WARPS // 2 * 2)  # of a slab, a warp
    queries = (decoder.heads + 2 * decoder.kv_heads) * decoder.head
    slabs = (
        ceil(ceil(queries / blocks) / (count * WARPS)),
        ceil(ceil(decoder.ffn / blocks) / (count // 2 * WARPS)),
    )
    return max(slabs) * count <= MOST_ROWS_A_WARP


def make_room(decoder: Decoder, plan: Plan) -> tuple[Tensor, ...]:
    """What a step writes between its stages, in the order of the kernel's arguments, on the decoder's device.

    q, k and v; the output of attention; the activated FFN; what splits of a text leave for each other; and how many
    blocks have arrived, 0 at first.
    """
    device, queries, keys = decoder.cosines.device, decoder.heads * decoder.head, decoder.kv_heads * decoder.head
    numbers = (
        torch.empty(size, dtype=torch.bfloat16, device=device) for size in (queries + 2 * keys, queries, decoder.ffn)
    )
    partials = torch.empty(plan.attending * plan.splits * plan.partial_bytes, dtype=torch.uint8, device=device)
    return *numbers, partials, torch.zeros(COUNTERS + plan.attending, dtype=torch.int32, device=device)


def definitions(decoder: Decoder, plan: Plan) -> dict[str, int | str]:
    return {
        "BLOCKS": plan.blocks, "THREADS": THREADS, "HIDDEN": decoder.hidden, "FFN": decoder.ffn,
        "HEADS": decoder.heads, "KV_HEADS": decoder.kv_heads, "HEAD": decoder.head,
        "PART": plan.part, "SPLITS": plan.splits, "SCALING": f"{decoder.head**-0.5}f",
        "EPSILON": f"{float(decoder.epsilon)}f", "SMALLEST": f"{SMALLEST_MAGNITUDE}f",
        "LAYER_BYTES": LAYER_BYTES, "ATTENTION_BYTES": plan.attention_bytes, "PARTIAL_BYTES": plan.partial_bytes,
        "MEMORY_BYTES": plan.memory_bytes, "SLOTS": plan.slots, "SLOT_BYTES": plan.slot_bytes,
        "SHARED_STRUCT_BYTES": plan.struct_bytes,
    }  # fmt: skip


def layer_words(decoder: Decoder) -> list[list[int]]:
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
