"""On a GPU one launch for all layers: its blocks stay, and meet between the stages. The kernel is in gpu_cuda.cu."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sparse_bitnet.kernels import cuda_device
from sparse_bitnet.kernels.decoder_step import Decoder, Step
from sparse_bitnet.kernels.decoder_step.plan import THREADS, Plan, definitions, layer_words, make_room

SOURCE = Path(__file__).with_suffix(".cu")
CHUNK = 64  # columns whose codes a thread reads at once
HEADS = (64, 128, 256)
WIDEST = 32768  # numbers of a token that its threads hold
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
    plan = _plan(decoder)
    if not plan.splits:
        return f"{decoder.heads} heads of {decoder.head} are too many for {plan.blocks} multiprocessors"
    if not plan.slots:
        size = f"{len(decoder.layers)} layers of {decoder.hidden} columns, {decoder.ffn} of ffn,"
        return f"{size} do not fit into shared memory"
    return None


def run(decoder: Decoder) -> Step:
    device, plan = decoder.cosines.device, _plan(decoder)
    kernel = cuda_device.compile_kernel(
        SOURCE, "decoder_step", plan.shared_bytes, cooperative=True, **definitions(decoder, plan)
    )
    table = torch.tensor(layer_words(decoder), dtype=torch.int64, device=device)
    room = make_room(decoder, plan)
    places = decoder.layers[0].keys.shape[1]

    def step(x: Tensor, position: Tensor) -> None:
        if x.shape != (decoder.hidden,) or x.dtype != torch.bfloat16 or not x.is_contiguous() or x.data_ptr() % 16:
            raise ValueError(f"x is {x.dtype} {list(x.shape)}: give {torch.bfloat16} [{decoder.hidden}], contiguous")
        if position.dtype != torch.int64 or position.numel() != 1:
            raise ValueError(f"position is {position.dtype} {list(position.shape)}: give {torch.int64} [1]")
        if x.device != device or position.device != device:
            raise ValueError(f"x is on {x.device} and position on {position.device}, and the decoder on {device}")
        with torch.cuda.device(device):
            tensors = (table, x, *room, position, decoder.cosines, decoder.sines)
            pointers = [tensor.data_ptr() for tensor in tensors]
            kernel.launch(plan.blocks, THREADS + 32, (), *pointers, len(decoder.layers), places)

    return step


def _plan(decoder: Decoder) -> Plan:
    device = decoder.cosines.device
    return Plan.of(decoder, torch.cuda.get_device_properties(device).multi_processor_count)
