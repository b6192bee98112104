"""Planes of gated activations on a GPU, each token read once; the kernel is quantize_lifted/gpu_cuda.cu."""

from __future__ import annotations

from torch import Tensor

from sparse_bitnet.formats.windows import WINDOW
from sparse_bitnet.kernels.quantize_lifted import GATE, gpu_cuda
from sparse_bitnet.kernels.quantize_planes import Planes, empty_planes
from sparse_bitnet.recipe import Activations

obstacle = gpu_cuda.obstacle


def supports(x: Tensor, activations: Activations) -> str | None:
    return gpu_cuda.supports(x, activations, WINDOW, x, GATE)


def run(x: Tensor, activations: Activations) -> Planes:
    planes = codes, total, scale = empty_planes(x)
    gpu_cuda.launch(x.contiguous(), GATE, WINDOW, lifted=codes, scale=scale, total=total)
    return planes
