"""On a GPU one launch for all layers: its blocks stay, and meet between the stages. The kernel is in gpu_cuda.cu."""

from __future__ import annotations

import struct
from pathlib import Path

import torch
from torch import Tensor

from sparse_bitnet.kernels import cuda_device
from sparse_bitnet.kernels.decoder_step import Decoder, Matrix, Step
from sparse_bitnet.numerics.activation import SMALLEST_MAGNITUDE

SOURCE = Path(__file__).with_suffix(".cu")
THREADS = 512
CHUNK = 64  # columns whose codes a thread reads at once
HEADS = (64, 128, 256)
LAYER_BYTES = 216  # of the struct Layer
MOST_SPLITS = 16  # of a text, for attention
WIDEST = 32768  # numbers of a token that its threads hold
obstacle = cuda_device.obstacle


def supports(decoder: Decoder) -> str | None:
    for layer in decoder.layers:
        weights = [matrix.weight for matrix in layer.matrices]
        for tensor in (*layer.tensors, *weights):
            if not tensor.is_cuda or tensor.device != decoder.cosines.device:
                return f"a tensor is on {tensor.device}"
            if not tensor.is_contiguous():
                return "a tensor is not contiguous"
        if any(one.data_ptr() % 16 for one in (*weights, layer.input_norm, layer.ffn_norm, layer.keys, layer.values)):
            return "a tensor does not begin at a multiple of 16 bytes"
        for tensor in layer.tensors:
            if tensor.dtype != torch.bfloat16:
                return f"{tensor.dtype}; it takes {torch.bfloat16}"
    for name, width in (("hidden", decoder.hidden), ("ffn", decoder.ffn), ("heads", decoder.heads * decoder.head)):
        if width % CHUNK or width > WIDEST:
            return f"{width} columns of {name} are not a multiple of {CHUNK} up to {WIDEST}"
    if decoder.head not in HEADS:
        return f"heads of {decoder.head} numbers are none of {', '.join(map(str, HEADS))}"
    blocks = _blocks(decoder)
    if _attending(decoder) > blocks:
        return f"{decoder.heads} heads of {decoder.head} are too many for {blocks} multiprocessors"
    return None


def run(decoder: Decoder) -> Step:
    device, head, blocks, part = decoder.cosines.device, decoder.head, _blocks(decoder), _part(decoder)
    attending = _attending(decoder)
    splits = min(MOST_SPLITS, blocks // attending)
    kernel = cuda_device.compile_kernel(
        SOURCE, "decoder_step", _shared_bytes(decoder), cooperative=True, BLOCKS=blocks, HIDDEN=decoder.hidden,
        FFN=decoder.ffn, HEADS=decoder.heads, KV_HEADS=decoder.kv_heads, HEAD=head, PART=part,
        SPLITS=splits, SCALING=f"{head**-0.5}f", EPSILON=f"{decoder.epsilon}f", SMALLEST=f"{SMALLEST_MAGNITUDE}f",
    )  # fmt: skip
    table = torch.tensor(_words(decoder), dtype=torch.int64, device=device)
    queries, keys = decoder.heads * head, decoder.kv_heads * head
    room = torch.empty(queries + 2 * keys + queries + decoder.ffn, dtype=torch.bfloat16, device=device)
    qkv, attention, activated = room.split([queries + 2 * keys, queries, decoder.ffn])
    partials = torch.empty(attending * splits * part * (head + 2), dtype=torch.float32, device=device)
    arrived = torch.zeros(1 + attending, dtype=torch.int32, device=device)
    places = decoder.layers[0].keys.shape[1]
    pointers = [one.data_ptr() for one in (qkv, attention, activated, partials, arrived)]
    angles = [one.data_ptr() for one in (decoder.cosines, decoder.sines)]

    def step(x: Tensor, position: Tensor, keeps: tuple[object, ...] = (decoder, table, room, partials)) -> None:
        if x.shape != (decoder.hidden,) or x.dtype != torch.bfloat16 or not x.is_contiguous() or x.data_ptr() % 16:
            raise ValueError(f"x is {x.dtype} {list(x.shape)}: give {torch.bfloat16} [{decoder.hidden}], contiguous")
        with torch.cuda.device_of(x):
            arrived.zero_()
            kernel.launch(
                blocks, THREADS, (), table.data_ptr(), x.data_ptr(), *pointers, position.data_ptr(), *angles,
                len(decoder.layers), places,
            )  # fmt: skip

    return step


def _blocks(decoder: Decoder) -> int:
    """One on every multiprocessor."""
    return torch.cuda.get_device_properties(decoder.cosines.device).multi_processor_count


def _part(decoder: Decoder) -> int:
    """Heads of one group that a block attends with: two, if there are and its registers hold them."""
    return 2 if decoder.head <= 128 and decoder.heads > decoder.kv_heads else 1


def _attending(decoder: Decoder) -> int:
    """Blocks that attend to one split of a text."""
    return decoder.kv_heads * -(-decoder.heads // (decoder.kv_heads * _part(decoder)))


def _shared_bytes(decoder: Decoder) -> int:
    """For the table of layers, and the codes of a token or the struct Attention."""
    warps, part, head = THREADS // 32, _part(decoder), decoder.head
    attention = 4 * part * head + 4 * head + warps * part * (8 + 4 * head)
    table = -(-LAYER_BYTES * len(decoder.layers) // 16) * 16
    return table + max(attention, decoder.hidden, decoder.ffn, decoder.heads * head)


def _words(decoder: Decoder) -> list[list[int]]:
    """The struct Layer of each layer, in words of 8 bytes."""
    scales = torch.cat([matrix.scale for layer in decoder.layers for matrix in layer.matrices]).tolist()
    words, scale = [], iter(scales)
    for layer in decoder.layers:
        matrices = [word for matrix in layer.matrices for word in _matrix_words(matrix, next(scale))]
        norms = map(_address, (layer.input_norm, layer.ffn_norm, layer.query_norm, layer.key_norm))
        words.append([*matrices, *norms, layer.keys.data_ptr(), layer.values.data_ptr()])
    return words


def _matrix_words(matrix: Matrix, scale: float) -> tuple[int, int, int]:
    return matrix.weight.data_ptr(), _address(matrix.bias), struct.unpack("<q", struct.pack("<f4x", scale))[0]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
