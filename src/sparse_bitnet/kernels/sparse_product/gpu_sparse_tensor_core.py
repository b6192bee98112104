"""Hopper's sparse tensor cores, by a kernel of our own: gpu_sparse_tensor_core.cu tells how it works."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from sparse_bitnet.kernels import cuda_device
from sparse_bitnet.kernels.sparse_product import COLUMNS_MULTIPLE, ROWS_MULTIPLE, SparseWeight
from sparse_bitnet.kernels.sparse_product.tiling import ROW_BLOCKS, TILINGS, Tiling, best_tiling

SOURCE = Path(__file__).with_suffix(".cu")
MOST_COLUMNS = 65536  # half of them not 0, times 128, are at most 2^22
RESULTS = {torch.bfloat16: '"bf16"', torch.float16: '"f16"'}
obstacle = cuda_device.obstacle


def supports(
    codes: Tensor, token_scale: Tensor, weight: SparseWeight, dtype: torch.dtype, residual: Tensor | None = None
) -> str | None:
    if not codes.is_cuda:
        return f"the activations are on {codes.device.type}"
    if dtype not in RESULTS:
        return f"a result in {dtype}; it gives {', '.join(map(str, RESULTS))}"
    if codes.shape[-1] % COLUMNS_MULTIPLE or not codes.shape[-1]:
        return f"{codes.shape[-1]} lifted columns are not a multiple of {COLUMNS_MULTIPLE}, or are none"
    if codes.shape[-1] > MOST_COLUMNS:
        return f"{codes.shape[-1]} lifted columns are more than {MOST_COLUMNS}"
    if not weight.fragments.is_contiguous():
        return "the fragments are not contiguous"  # and what makes them so may not be over when they are read
    if weight.out_features % ROWS_MULTIPLE:
        return f"out_features={weight.out_features} are not a multiple of {ROWS_MULTIPLE}"
    return None


def run(
    codes: Tensor, token_scale: Tensor, weight: SparseWeight, dtype: torch.dtype, residual: Tensor | None = None,
    tiling: Tiling | None = None,
) -> Tensor:  # fmt: skip
    """`tiling`: another than is reckoned to be the best, with no more splits than stages."""
    y = codes.new_empty(*codes.shape[:-1], weight.out_features, dtype=dtype)
    if not y.numel():
        return y
    codes, token_scale = codes.contiguous(), token_scale.contiguous()
    fragments, row_scale = weight.fragments, weight.row_scale.contiguous()
    bias = None if weight.bias is None else weight.bias.contiguous()
    tokens, columns, scales = token_scale.numel(), codes.shape[-1], row_scale.numel()
    groups, stages = fragments.shape[:2]
    per_row, adds = scales > 1 or bias is not None, residual is not None
    residual = y if residual is None else _aligned(residual)  # y stands for none
    plan = _plan(dtype, per_row, adds, tokens, groups, stages, codes.device, tiling)
    own_tokens = plan.tiling.tokens // plan.tiling.splits
    maps = (
        cuda_device.tensor_map(codes, tokens, columns, plan.tiling.tokens // ROW_BLOCKS),
        cuda_device.tensor_map(y, tokens, weight.out_features, own_tokens),
        cuda_device.tensor_map(residual, tokens, weight.out_features, own_tokens),
    )
    with torch.cuda.device_of(codes):
        plan.kernel.launch(
            plan.blocks, plan.tiling.threads, maps,
            fragments.data_ptr(), token_scale.data_ptr(), row_scale.data_ptr(), 0 if bias is None else bias.data_ptr(),
            scales, tokens, weight.out_features, groups, stages, plan.row_tiles, plan.token_tiles,
        )  # fmt: skip
    return y


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous, and where the copy engine can begin; what torch allocates is."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


@dataclass(frozen=True)
class _Plan:
    """The kernel, and how the result is cut into tiles."""

    kernel: cuda_device.Kernel
    tiling: Tiling
    blocks: int
    row_tiles: int
    token_tiles: int


@lru_cache(maxsize=4096)
def _plan(
    dtype: torch.dtype,
    per_row: bool,
    adds: bool,
    tokens: int,
    groups: int,
    stages: int,
    device: torch.device,
    tiling: Tiling | None,
) -> _Plan:
    at_once = _clusters_at_once(device)
    tiling = tiling or best_tiling(groups, stages, tokens, at_once)
    kernel = cuda_device.compile_kernel(
        SOURCE, "sparse_product", tiling.shared_bytes, waits=True,
        RESULT=RESULTS[dtype], PER_ROW=int(per_row), ADDS=int(adds), **tiling.definitions,
    )  # fmt: skip
    row_tiles, token_tiles = tiling.tiles(groups, tokens)
    clusters = row_tiles * token_tiles  # one tile each where columns are split, since the ring then ends with sums
    if tiling.splits == 1:
        clusters = min(clusters, at_once[tiling])
    return _Plan(kernel, tiling, clusters * tiling.cluster, row_tiles, token_tiles)


@lru_cache(maxsize=64)
def _clusters_at_once(device: torch.device) -> dict[Tiling, int]:
    return {
        tiling: cuda_device.clusters_at_once(tiling.cluster, tiling.shared_bytes, device.index) for tiling in TILINGS
    }
