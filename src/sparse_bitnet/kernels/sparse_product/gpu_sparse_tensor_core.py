"""Hopper's sparse tensor cores, by a kernel of our own: gpu_sparse_tensor_core.cu tells how it works."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from sparse_bitnet.kernels import cuda_device
from sparse_bitnet.kernels.sparse_product import COLUMNS_MULTIPLE, ROWS_MULTIPLE, SparseWeight

SOURCE = Path(__file__).with_suffix(".cu")
WARPGROUPS, CLUSTER, STAGES, ROWS, TOKENS, DEPTH = 2, 2, 4, 64, 256, 128  # as in the source
THREADS = 128 * WARPGROUPS + 32
SHARED_BYTES = (
    1024 * -(-(1024 + WARPGROUPS * TOKENS * 8) // 1024)  # barriers, factors
    + WARPGROUPS * TOKENS * ROWS * 2  # results
    + STAGES * (TOKENS * DEPTH + WARPGROUPS * ROWS * DEPTH // 4)  # activations and fragments
)
MOST_COLUMNS = 65536  # half of them not 0, times 128, stay below 2^22
RESULTS = {torch.bfloat16: '"bf16"', torch.float16: '"f16"'}
obstacle = cuda_device.obstacle


def supports(codes: Tensor, token_scale: Tensor, weight: SparseWeight, dtype: torch.dtype) -> str | None:
    if not codes.is_cuda:
        return f"the activations are on {codes.device.type}"
    if dtype not in RESULTS:
        return f"a result in {dtype}; it gives {', '.join(map(str, RESULTS))}"
    if codes.shape[-1] % COLUMNS_MULTIPLE:
        return f"{codes.shape[-1]} lifted columns are not a multiple of {COLUMNS_MULTIPLE}"
    if codes.shape[-1] > MOST_COLUMNS:
        return f"{codes.shape[-1]} lifted columns are more than {MOST_COLUMNS}"
    if weight.out_features % ROWS_MULTIPLE:
        return f"out_features={weight.out_features} are not a multiple of {ROWS_MULTIPLE}"
    return None


def run(codes: Tensor, token_scale: Tensor, weight: SparseWeight, dtype: torch.dtype) -> Tensor:
    y = codes.new_empty(*codes.shape[:-1], weight.out_features, dtype=dtype)
    if not y.numel():
        return y
    codes, token_scale = codes.contiguous(), token_scale.contiguous()
    fragments, row_scale = weight.fragments.contiguous(), weight.row_scale.contiguous()
    bias = None if weight.bias is None else weight.bias.contiguous()
    tokens, columns, scales = token_scale.numel(), codes.shape[-1], row_scale.numel()
    groups, stages = fragments.shape[:2]
    plan = _plan(dtype, scales > 1 or bias is not None, tokens, groups, codes.device)
    maps = (
        cuda_device.tensor_map(codes, tokens, columns, TOKENS // CLUSTER),
        cuda_device.tensor_map(y, tokens, weight.out_features, TOKENS),
    )
    with torch.cuda.device_of(codes):
        plan.kernel.launch(
            plan.blocks, THREADS, maps,
            fragments.data_ptr(), token_scale.data_ptr(), row_scale.data_ptr(), 0 if bias is None else bias.data_ptr(),
            scales, tokens, weight.out_features, groups, stages, plan.row_tiles, plan.token_tiles,
        )  # fmt: skip
    return y


@dataclass(frozen=True)
class _Plan:
    """The kernel, and how the result is cut into tiles."""

    kernel: cuda_device.Kernel
    blocks: int
    row_tiles: int
    token_tiles: int


@lru_cache(maxsize=4096)
def _plan(dtype: torch.dtype, per_row: bool, tokens: int, groups: int, device: torch.device) -> _Plan:
    kernel = cuda_device.compile_kernel(
        SOURCE, "sparse_product", SHARED_BYTES, RESULT=RESULTS[dtype], PER_ROW=int(per_row)
    )
    row_tiles = -(-groups // (WARPGROUPS * CLUSTER))
    token_tiles = -(-tokens // TOKENS)
    clusters = min(row_tiles * token_tiles, torch.cuda.get_device_properties(device).multi_processor_count // CLUSTER)
    return _Plan(kernel, clusters * CLUSTER, row_tiles, token_tiles)
