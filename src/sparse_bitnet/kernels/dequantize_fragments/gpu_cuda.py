"""Effective weights from fragments on a GPU, at the speed of writing them. The kernel is in gpu_cuda.cu."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sparse_bitnet.kernels import cuda_device

SOURCE = Path(__file__).with_suffix(".cu")
RESULTS = {torch.bfloat16: '"bf16"', torch.float16: '"f16"'}
BLOCKS, THREADS = 16, 128  # a unit: groups of m of 64 rows, threads
obstacle = cuda_device.obstacle


def supports(
    fragments: Tensor, row_scale: Tensor, out_features: int, in_features: int, m: int, dtype: torch.dtype
) -> str | None:
    if not fragments.is_cuda:
        return f"the fragments are on {fragments.device.type}"
    if dtype not in RESULTS:
        return f"a result in {dtype}; it gives {', '.join(map(str, RESULTS))}"
    return None


def run(
    fragments: Tensor, row_scale: Tensor, out_features: int, in_features: int, m: int, dtype: torch.dtype
) -> Tensor:
    out = fragments.new_empty(out_features, in_features, dtype=dtype)
    fragments, row_scale = fragments.contiguous(), row_scale.contiguous()
    groups, stages = fragments.shape[:2]
    kernel = cuda_device.compile_kernel(SOURCE, "dequantize_fragments", M=m, RESULT=RESULTS[dtype])
    parts = -(-in_features // m // BLOCKS)
    with torch.cuda.device_of(fragments):
        kernel.launch(
            groups * parts, THREADS, (),
            fragments.data_ptr(), row_scale.data_ptr(), out.data_ptr(),
            row_scale.numel(), out_features, in_features // m, stages, parts,
        )  # fmt: skip
    return out
