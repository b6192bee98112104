"""Hopper's sparse tensor cores, by a kernel of our own: gpu_sparse_tensor_core.cu tells how it works."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sparse_bitnet.kernels import cuda_device

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


def supports(
    codes: Tensor,
    token_scale: Tensor,
    fragments: Tensor,
    row_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    dtype: torch.dtype,
) -> str | None:
    if not codes.is_cuda:
        return f"the activations are on {codes.device.type}"
    if dtype not in RESULTS:
        return f"a result in {dtype}; it gives {', '.join(map(str, RESULTS))}"
    if codes.shape[-1] % 16:
        return f"{codes.shape[-1]} lifted columns are not a multiple of 16"
    if codes.shape[-1] > MOST_COLUMNS:
        return f"{codes.shape[-1]} lifted columns are more than {MOST_COLUMNS}"
    if out_features % 8:
        return f"out_features={out_features} are not a multiple of 8"
    return None


def run(
    codes: Tensor,
    token_scale: Tensor,
    fragments: Tensor,
    row_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    dtype: torch.dtype,
) -> Tensor:
    y = codes.new_empty(*codes.shape[:-1], out_features, dtype=dtype)
    if not y.numel():
        return y
    flat = codes.reshape(-1, codes.shape[-1]).contiguous()  # [T, K]
    tokens = flat.shape[0]
    groups, stages = fragments.shape[:2]
    per_row = row_scale.numel() > 1 or bias is not None
    kernel = cuda_device.compile_kernel(
        SOURCE, "sparse_product", SHARED_BYTES, RESULT=RESULTS[dtype], PER_ROW=int(per_row)
    )
    row_tiles = -(-groups // (WARPGROUPS * CLUSTER))
    tiles = row_tiles * -(-tokens // TOKENS)
    with torch.cuda.device_of(codes):
        clusters = min(tiles, torch.cuda.get_device_properties(codes.device).multi_processor_count // CLUSTER)
        kernel.launch(
            clusters * CLUSTER,
            THREADS,
            cuda_device.tensor_map(flat, TOKENS // CLUSTER),
            cuda_device.tensor_map(y.view(tokens, out_features), TOKENS),
            fragments.contiguous(),
            token_scale.contiguous(),
            row_scale.contiguous(),
            None if bias is None else bias.contiguous(),
            row_scale.numel(),
            tokens,
            out_features,
            groups,
            stages,
            row_tiles,
            tiles,
        )
    return y
