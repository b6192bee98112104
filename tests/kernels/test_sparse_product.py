"""The product on sparse tensor cores and what feeds it: fragments equal bit for bit, integer sums exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from formats.test_windows import random_codes
from sparse_bitnet.formats.windows import lift_activation
from sparse_bitnet.kernels import quantize_lifted, sparse_product
from sparse_bitnet.kernels.dequantize_fragments import dequantize_fragments
from sparse_bitnet.kernels.quantize_lifted import reference as lifted_reference
from sparse_bitnet.kernels.sparse_product import reference as product_reference
from sparse_bitnet.kernels.sparse_product.tiling import TILINGS, Tiling
from sparse_bitnet.kernels.weight_fragments import empty_fragments, write_fragments
from sparse_bitnet.kernels.weight_fragments import reference as fragments_reference
from sparse_bitnet.numerics.norm import rms_norm

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]
PATTERNS = ["2:4", "4:6", "6:8", "8:10", "14:16"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]


def packed(codes: Tensor, m: int) -> Tensor:
    fragments = empty_fragments(codes, m)
    write_fragments([codes], m, [fragments])
    if fragments.is_cuda:
        torch.cuda.synchronize()  # a product may read them while the launch before it ends
    return fragments


def poison(count: int, dtype: torch.dtype, device: str) -> None:
    """Leave NaN in the memory that the next tensor of this size is given."""
    torch.full((count,), float("nan"), dtype=dtype, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_fragments_equal_the_reference(pattern: str, dtype: torch.dtype, device: str) -> None:
    m = int(pattern.partition(":")[2])
    weights = [random_codes(rows, columns * m, pattern) for rows, columns in ((64, 16), (130, 37), (8, 1))]
    scaled = [(weight * 0.3).to(dtype) if dtype != torch.int8 else weight for weight in weights]
    scaled[0][0, 0] = -0.0  # a float zero with a sign
    weights[0][0, 0] = 0
    out = [empty_fragments(weight, m).to(device) for weight in weights]
    write_fragments([weight.to(device) for weight in scaled], m, out)
    for weight, found in zip(weights, out, strict=True):
        expected = empty_fragments(weight, m)
        fragments_reference.run([weight], m, [expected])
        assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("tokens", "rows", "columns"), [(1, 8, 16), (7, 64, 128), (256, 128, 384), (300, 264, 1920), (1000, 520, 144)]
)
@pytest.mark.parametrize("pattern", ["2:4", "6:8"])
def test_sums_are_exact(pattern: str, tokens: int, rows: int, columns: int, dtype: torch.dtype, device: str) -> None:
    if device == "cuda" and dtype == torch.float32:
        pytest.skip("the sparse tensor cores' backend gives half precision alone")
    m = int(pattern.partition(":")[2])
    codes = random_codes(rows, columns * 2, pattern)
    x = torch.randint(-128, 128, (tokens, columns * 2), dtype=torch.int8)
    expected = (x.long() @ codes.long().T).clamp(-60000, 60000).to(dtype)
    one = torch.ones(1, device=device)
    fragments = packed(codes.to(device), m)
    poison(expected.numel(), dtype, device)
    lifted = lift_activation(x.to(device), m)
    y = sparse_product.sparse_product(lifted, one.expand(tokens, 1), fragments, one, None, rows, dtype)
    assert y.dtype == dtype
    assert torch.equal(y.clamp(-60000, 60000).cpu(), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scales", [1, 96])
@pytest.mark.parametrize("has_bias", [False, True])
def test_scales_and_bias(scales: int, has_bias: bool, device: str) -> None:
    codes, x = random_codes(96, 512, "6:8").to(device), torch.randn(2, 150, 512, device=device)
    lifted, token_scale = quantize_lifted.quantize_lifted(x, "int8", 8)
    row_scale = torch.rand(scales, device=device) + 0.5
    bias = torch.randn(96, device=device) if has_bias else None
    arguments = (lifted, token_scale, packed(codes, 8), row_scale, bias, 96)
    y = sparse_product.sparse_product(*arguments, torch.bfloat16)
    exact = lifted.double() / token_scale.double()
    plain = exact @ lift_weight_of(codes).double().T * row_scale.double() + (0 if bias is None else bias)
    assert y.shape == (2, 150, 96)
    torch.testing.assert_close(y.double(), plain, rtol=2**-8, atol=1e-4)
    residual = torch.randn(2, 150, 96, device=device).to(torch.bfloat16)
    y = sparse_product.sparse_product(*arguments, torch.bfloat16, residual)
    torch.testing.assert_close(y.double(), plain + residual, rtol=2**-8, atol=1e-4)
    for wrong in (residual[:, 1:], residual.float()):
        with pytest.raises(ValueError, match=r"residual is .*, and the product \[2, 150, 96\] in torch.bfloat16 on"):
            sparse_product.sparse_product(*arguments, torch.bfloat16, wrong)
    shifted = torch.cat([residual.new_zeros(1), residual.flatten()])[1:].view_as(residual)  # not where a copy can begin
    assert torch.equal(sparse_product.sparse_product(*arguments, torch.bfloat16, shifted), y)
    token_scale[0, 3] = torch.nan  # as plain mathematics gives it to a token with NaN
    found = sparse_product.sparse_product(*arguments, torch.bfloat16)
    assert found.isnan().nonzero()[:, :2].unique(dim=0).tolist() == [[0, 3]] and found[0, 3].isnan().all()


def test_tensors_that_do_not_belong_to_each_other_are_refused() -> None:
    lifted, token_scale = quantize_lifted.quantize_lifted(torch.randn(3, 512), "int8", 8)
    fragments, scale, bias = packed(random_codes(96, 512, "6:8"), 8), torch.ones(96), torch.zeros(96)
    for row_scale, one, rows, codes in (
        (scale[:95], bias, 96, lifted), (scale, bias[:95], 96, lifted), (scale, bias, 200, lifted),
        (scale.half(), bias, 96, lifted), (scale, bias.half(), 96, lifted), (scale, bias, 96, lifted[:, :256]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="do not belong to each other"):
            sparse_product.sparse_product(codes, token_scale, fragments, row_scale, one, rows, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("has_scales", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "rows", "columns"),
    [
        (1, 8, 256),
        (7, 64, 512),
        (129, 264, 640),
        (300, 520, 1920),
        (1000, 1160, 1040),
        (64, 264, 896),
        (2500, 2048, 896),
        (2500, 2048, 2064),
    ],
)
@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_every_tiling_gives_the_same(
    tiling: Tiling, tokens: int, rows: int, columns: int, dtype: torch.dtype, has_scales: bool
) -> None:
    """Odd numbers of tokens, columns that end within a stage, stages that splits do not divide."""
    from sparse_bitnet.kernels.sparse_product import gpu_sparse_tensor_core

    codes = random_codes(rows, columns, "2:4").cuda()
    x = torch.randint(-128, 128, (tokens, columns), dtype=torch.int8, device="cuda")
    one = torch.ones(1, device="cuda")
    row_scale = torch.rand(rows, device="cuda") + 0.5 if has_scales else one
    bias = torch.randn(rows, device="cuda") if has_scales else None
    weight = sparse_product.SparseWeight(packed(codes, 4), row_scale, bias, rows)
    if tiling.splits > weight.fragments.shape[1]:
        pytest.skip("more splits than stages: never chosen")
    poison(tokens * rows, dtype, "cuda")
    y = gpu_sparse_tensor_core.run(x, one.expand(tokens, 1), weight, dtype, tiling=tiling)
    sums = (x.double() @ codes.double().T).float()
    if bias is None:
        assert torch.equal(y.clamp(-60000, 60000), sums.clamp(-60000, 60000).to(dtype))
    else:
        exact = (sums.double() * row_scale + bias).clamp(-60000, 60000)
        torch.testing.assert_close(y.clamp(-60000, 60000).double(), exact, rtol=2**-8, atol=0.05)
    unsplit = gpu_sparse_tensor_core.run(x, one.expand(tokens, 1), weight, dtype, tiling=TILINGS[0])
    assert torch.equal(y, unsplit)
    residual = torch.randint(-512, 512, (tokens, rows), device="cuda").to(dtype)
    poison(tokens * rows, dtype, "cuda")
    y = gpu_sparse_tensor_core.run(x, one.expand(tokens, 1), weight, dtype, residual, tiling)
    if not has_scales:
        assert torch.equal(y.clamp(-60000, 60000), (sums + residual.float()).clamp(-60000, 60000).to(dtype))
    unsplit = gpu_sparse_tensor_core.run(x, one.expand(tokens, 1), weight, dtype, residual, TILINGS[0])
    assert torch.equal(y, unsplit)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_products_in_a_graph_wait_for_what_they_read() -> None:
    """They begin while the kernel before them ends: codes must be there, and room that others still read untouched."""
    codes = random_codes(2048, 4096, "6:8").cuda()
    weight = sparse_product.SparseWeight(packed(codes, 8), torch.ones(1, device="cuda"), None, 2048)
    inputs = [torch.randn(300, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(20)]

    def products(run: Callable[..., Tensor]) -> list[Tensor]:
        results: list[Tensor] = []
        for x in inputs:
            lifted = quantize_lifted.quantize_lifted(x, "int8", 8)
            once = run(*lifted, weight, torch.float16)
            results += [once, run(*lifted, weight, torch.float16, once)]  # a residual by the launch right before
        return results

    expected = products(product_reference.run)
    graph = torch.cuda.CUDAGraph()
    products(sparse_product.OPERATOR.run)
    with torch.cuda.graph(graph):
        recorded = products(sparse_product.OPERATOR.run)
    for _ in range(3):
        graph.replay()
        for found in (recorded, products(sparse_product.OPERATOR.run)):
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=2**-9, atol=1e-5)


def lift_weight_of(codes: Tensor) -> Tensor:
    from sparse_bitnet.formats.windows import lift_weight

    return lift_weight(codes, 8)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_fragments_give_the_effective_weight_back(pattern: str, dtype: torch.dtype, device: str) -> None:
    if device == "cuda" and dtype == torch.float32:
        pytest.skip("the GPU's backend gives half precision alone")
    m = int(pattern.partition(":")[2])
    for rows, groups, scales in ((64, 16, 1), (130, 37, 130), (8, 1, 1)):
        codes, row_scale = random_codes(rows, groups * m, pattern), torch.rand(scales) + 0.5
        fragments = packed(codes.to(device), m)
        poison(codes.numel(), dtype, device)
        found = dequantize_fragments(fragments, row_scale.to(device), rows, groups * m, m, dtype)
        assert torch.equal(found.cpu(), codes.to(dtype) * row_scale.to(dtype).unsqueeze(-1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("m", "width"), [(4, 16), (4, 4096), (6, 96), (8, 32), (8, 2048), (8, 11008), (32, 18944)])
def test_lifted_activations_equal_the_reference(m: int, width: int, dtype: torch.dtype, device: str) -> None:
    x = (torch.randn(3, 5, width) * torch.logspace(-8, 4, 15).view(3, 5, 1)).to(dtype)
    x[0, 1] = 0
    codes = torch.empty(x.shape, dtype=torch.int8)
    expected = *lifted_reference.run(x, "int8", m, codes, None), codes
    poison(expected[0].numel() // 4, torch.float32, device)
    found_codes = quantize_lifted.quantize_and_lift(x.to(device), "int8", m)
    for found, wanted in zip(found_codes, expected, strict=True):
        assert torch.equal(found.cpu(), wanted)
    assert torch.equal(quantize_lifted.quantize_lifted(x.to(device), "int8", m)[0].cpu(), expected[0])
    strange = x[0, 2:4].clone()
    strange[0, 3], strange[1, 7] = float("nan"), float("-inf")
    _, scale = quantize_lifted.quantize_lifted(strange.to(device), "int8", m)
    assert not bool((scale > 0).any())  # so that a loss becomes NaN or infinite


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("m", "width"), [(4, 16), (4, 11008), (6, 96), (8, 2048), (8, 11008), (32, 18944)])
def test_gated_activations_are_those_of_plain_operations(m: int, width: int, dtype: torch.dtype, device: str) -> None:
    x = (torch.randn(3, 5, 2 * width) * torch.logspace(-2, 1, 15).view(3, 5, 1)).to(dtype).to(device)
    gate, up = x.chunk(2, dim=-1)
    expected = quantize_lifted.quantize_lifted(torch.nn.functional.silu(gate) * up, "int8", m)
    poison(expected[0].numel() // 4, torch.float32, device)
    codes, scale = quantize_lifted.quantize_gated(x, "int8", m)
    torch.testing.assert_close(scale, expected[1], rtol=0.01, atol=0)  # an exponential may be the one beside
    apart = (codes.int() - expected[0].int()).abs()
    assert int(apart.max()) <= 1 and float((apart > 0).float().mean()) < 0.001
    assert torch.equal(codes, expected[0]) or device == "cuda"
    none = quantize_lifted.quantize_gated(x[:0], "int8", m)
    assert none[0].shape == (0, 5, expected[0].shape[-1])
    x[0, 0, 0], x[0, 1, width], x[0, 2, 1], x[0, 3] = float("nan"), float("inf"), -100, 0  # silu(-100) is hardly any
    assert (quantize_lifted.quantize_gated(x, "int8", m)[1][0].flatten() > 0).tolist() == [
        False,
        False,
        True,
        True,
        True,
    ]
    with pytest.raises(ValueError, match="not halves of 15 columns"):
        quantize_lifted.quantize_gated(x[..., :15], "int8", m)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("m", "width"), [(4, 16), (4, 2048), (6, 96), (8, 2048), (8, 8192), (8, 20480)])
def test_normed_activations_are_those_of_plain_operations(m: int, width: int, dtype: torch.dtype, device: str) -> None:
    x = (torch.randn(3, 5, width) * torch.logspace(-2, 1, 15).view(3, 5, 1)).to(dtype).to(device)
    norm = quantize_lifted.Norm((torch.randn(width) / 4 + 1).to(dtype).to(device), 1e-6)
    expected = quantize_lifted.quantize_lifted(rms_norm(x, norm.weight, norm.epsilon), "int8", m)
    poison(expected[0].numel() // 4, torch.float32, device)
    codes, scale = quantize_lifted.quantize_normed(x, norm, "int8", m)
    torch.testing.assert_close(scale, expected[1], rtol=0.01, atol=0)  # a sum may be the one beside
    apart = (codes.int() - expected[0].int()).abs()
    assert int(apart.max()) <= 1 and float((apart > 0).float().mean()) < 0.001
    assert torch.equal(codes, expected[0]) or device == "cuda"
    assert quantize_lifted.quantize_normed(x[:0], norm, "int8", m)[0].shape == (0, 5, expected[0].shape[-1])
    x[0, 0, 0], x[0, 1, 1], x[0, 2] = float("nan"), float("inf"), 0
    found = quantize_lifted.quantize_normed(x, norm, "int8", m)
    assert (found[1][0].flatten() > 0).tolist() == [False, False, True, True, True]
    assert not found[0][0, :3].any()
    for weight in (norm.weight[:-8], norm.weight.double()):
        with pytest.raises(ValueError, match="does not fit activations"):
            quantize_lifted.quantize_normed(x, quantize_lifted.Norm(weight, 1e-6), "int8", m)


@pytest.mark.parametrize("device", DEVICES)
def test_no_tokens_give_no_rows(device: str) -> None:
    codes = random_codes(16, 64, "2:4").to(device)
    lifted, scale = quantize_lifted.quantize_lifted(torch.zeros(0, 64, device=device), "int8", 4)
    y = sparse_product.sparse_product(lifted, scale, packed(codes, 4), scale.new_ones(1), None, 16, torch.bfloat16)
    assert y.shape == (0, 16)


@pytest.mark.parametrize("device", DEVICES)
def test_many_tiles_and_streams(device: str) -> None:
    """More tiles than a GPU has blocks, an odd number of row tiles, and two streams at once."""
    codes = random_codes(1160, 1024, "2:4")
    x = torch.randint(-128, 128, (5000, 1024), dtype=torch.int8)
    expected = (x.float() @ codes.float().T).to(torch.bfloat16)
    fragments, lifted = packed(codes.to(device), 4), x.to(device)
    scale = torch.ones(5000, 1, device=device)
    arguments = (lifted, scale, fragments, scale[0], None, 1160, torch.bfloat16)
    found = []
    for stream in [torch.cuda.Stream() for _ in range(2)] if device == "cuda" else [None]:
        with torch.cuda.stream(stream):
            found += [sparse_product.sparse_product(*arguments) for _ in range(5)]
    if device == "cuda":
        torch.cuda.synchronize()
    for y in found:
        assert torch.equal(y.cpu(), expected)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("m", [4, 6, 8])
def test_ops_keep_the_rules_of_torch_library(kind: str, m: int) -> None:
    x = torch.randn(2, 3, 8 * m)
    for arguments in ((False,), (True,), (False, True), (False, False, torch.randn(8 * m), 1e-6)):
        torch.library.opcheck(torch.ops.sparse_bitnet.quantize_lifted.default, (x, kind, m, *arguments))
    lifted, scale = quantize_lifted.quantize_lifted(x, kind, m)
    fragments = packed(random_codes(24, 8 * m, f"{m - 2}:{m}"), m)
    arguments = (lifted, scale, fragments, torch.ones(1), None, 24, torch.float32)
    torch.library.opcheck(torch.ops.sparse_bitnet.sparse_product.default, arguments)
    torch.library.opcheck(torch.ops.sparse_bitnet.sparse_product.default, (*arguments, torch.randn(2, 3, 24)))
    arguments = (fragments, torch.ones(1), 24, 8 * m, m, torch.float32)
    torch.library.opcheck(torch.ops.sparse_bitnet.dequantize_fragments.default, arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_the_tensor_cores_cannot_take_is_refused_with_the_reason() -> None:
    codes = random_codes(12, 64, "2:4").cuda()
    lifted, scale = quantize_lifted.quantize_lifted(torch.randn(3, 64).cuda(), "int8", 4)
    one, fragments = scale.new_ones(1), packed(codes, 4)

    def explain(codes: Tensor, rows: int, dtype: torch.dtype) -> str:
        weight = sparse_product.SparseWeight(fragments, one, None, rows)
        return sparse_product.OPERATOR.explain(codes, scale, weight, dtype)

    assert "out_features=12" in explain(lifted, 12, torch.bfloat16)
    assert "torch.float32" in explain(lifted, 16, torch.float32)
    assert "8 lifted columns" in explain(lifted[:, :8], 16, torch.bfloat16)
    assert "on cpu" in explain(lifted.cpu(), 16, torch.bfloat16)
