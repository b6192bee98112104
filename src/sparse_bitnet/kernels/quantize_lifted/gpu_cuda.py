"""Lifted int8 activations on a GPU, each token read once; the kernel is in gpu_cuda.cu.

Bit for bit the reference, but for gates, whose exponential in fp32 is that of CUDA on both sides only on a GPU, and
whose silu in 16 bits is right to 2^-17 before it is rounded; and for the order in which a norm adds squares.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sparse_bitnet.formats.windows import WINDOW, lifted_width
from sparse_bitnet.kernels import cuda_device
from sparse_bitnet.kernels.quantize_lifted import GATE, Before, Norm, width_of
from sparse_bitnet.numerics.activation import SMALLEST_MAGNITUDE
from sparse_bitnet.recipe import Activations

SOURCE = Path(__file__).with_suffix(".cu")
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
EIGHT, CHUNK = 8, 16  # columns read at once, bytes written at once
MOST_HELD = 8  # groups of eight columns in a thread's registers
WIDEST = 512 * MOST_HELD * EIGHT
obstacle = cuda_device.obstacle


def supports(x: Tensor, activations: Activations, m: int, codes: Tensor, before: Before) -> str | None:
    width = width_of(x, before)
    if not x.is_cuda:
        return f"the activations are on {x.device.type}"
    if x.dtype not in KINDS:
        return f"{x.dtype}; it takes {', '.join(map(str, KINDS))}"
    if activations != "int8":
        return f"activations={activations!r}; it gives int8"
    if width % EIGHT or (m != WINDOW and lifted_width(width, m) % CHUNK):
        return f"{width} columns, {lifted_width(width, m)} lifted, are not multiples of {EIGHT} and {CHUNK}"
    if width > WIDEST:
        return f"{width} columns are more than {WIDEST}"
    if any(tensor.data_ptr() % 16 for tensor in (x, *([before.weight] if isinstance(before, Norm) else []))):
        return "the activations, or the weight of a norm, do not begin at a multiple of 16 bytes"
    return None


def run(x: Tensor, activations: Activations, m: int, codes: Tensor, before: Before) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    width = lifted_width(width_of(x, before), m)
    lifted = torch.empty(*x.shape[:-1], width, dtype=torch.int8, device=x.device)
    scale = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    launch(x, before, m, lifted, scale, codes=codes)
    return lifted, scale


def shared_bytes(width: int, m: int) -> int:
    """Of a block: a token's codes before the lift; with m = 8, where what a thread reads is a group, after it."""
    if m == WINDOW:
        return 0
    return lifted_width(width, m) if m == EIGHT else width


def launch(
    x: Tensor, before: Before, m: int, lifted: Tensor, scale: Tensor,
    codes: Tensor | None = None, total: Tensor | None = None,
) -> None:  # fmt: skip
    """Write lifted codes and scales of a contiguous x; with `total` [T] int32, planes (quantize_planes) and that."""
    if not x.numel():
        return
    norm, width = before if isinstance(before, Norm) else None, width_of(x, before)
    eights, chunks = width // EIGHT, lifted_width(width, m) // CHUNK
    threads = 128 if eights <= 256 else 256 if eights <= 1024 else 512
    kernel = cuda_device.compile_kernel(
        SOURCE, "quantize_lifted", shared_bytes(width, m), waits=True,
        M=m, KIND=KINDS[x.dtype], THREADS=threads, HELD=-(-eights // threads), SMALLEST=f"{SMALLEST_MAGNITUDE}f",
        GATED=int(before == GATE), NORMED=int(norm is not None), EPSILON=f"{norm.epsilon if norm else 0.0}f",
        PLANES=int(total is not None),
    )  # fmt: skip
    with torch.cuda.device_of(x):
        kernel.launch(
            scale.numel(), threads, (),
            x.data_ptr(), norm.weight.data_ptr() if norm else 0, lifted.data_ptr(),
            codes.data_ptr() if codes is not None and codes.numel() else 0, scale.data_ptr(),
            total.data_ptr() if total is not None else 0, eights, chunks,
        )  # fmt: skip
