"""The Triton kernels of `packed_linear` against the reference, bit for bit: on a GPU, and in Triton's interpreter.

Every way to cut the product up is tried on shapes that no tile divides.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from sparse_bitnet.formats import i2
from sparse_bitnet.kernels.dispatch import FORCE_VARIABLE
from sparse_bitnet.kernels.packed_linear import OPERATOR, PackedLayout, packed_linear, reference
from sparse_bitnet.kernels.packed_product import packed_product
from sparse_bitnet.kernels.quantize_planes import quantize_planes

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.float16 if INTERPRETED else torch.bfloat16  # the interpreter cuts bf16 off instead of rounding it

runs = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="test_triton_interpreter.py runs it, with Triton")
gpu = pytest.mark.gpu if not INTERPRETED else lambda test: test


@pytest.fixture(autouse=True)
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORCE_VARIABLE, "gpu_triton")


def packed(rows: int, width: int) -> Tensor:
    return i2.pack(torch.randint(-1, 2, (rows, width), dtype=torch.int8)).to(DEVICE)


def assert_equals_reference(
    x: Tensor, weight: Tensor, kind: str = "int8", parts: tuple[int, ...] = (), bias: Tensor | None = None
) -> None:
    x, scale = x.to(DEVICE), torch.rand(max(1, len(parts)), device=DEVICE) + 0.25
    arguments = (x, weight, scale, bias, PackedLayout("i2", x.shape[-1], kind, parts))
    found, expected = packed_linear(*arguments), reference.run(*arguments)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert torch.equal(found, expected)


@runs
@gpu
@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 130])
@pytest.mark.parametrize("shape", [(1, 1), (5, 16), (7, 66), (70, 600)], ids=str)
def test_equals_the_reference(tokens: int, shape: tuple[int, int]) -> None:
    assert_equals_reference(torch.randn(tokens, shape[1]) * 3, packed(*shape))


@runs
@gpu
@pytest.mark.parametrize("tokens", [1, 3, 9, 64])
@pytest.mark.parametrize("shape", [(1, 1), (7, 66), (70, 600), (3, 4096)], ids=str)
def test_quantised_by_plain_operations_the_product_is_the_same(tokens: int, shape: tuple[int, int]) -> None:
    x, bias = torch.randn(tokens, shape[1], device=DEVICE), torch.randn(shape[0], device=DEVICE)
    assert_quantised_by_plain_operations(x, packed(*shape), bias, PackedLayout("i2", shape[1], "int8"))


@runs
@gpu
@pytest.mark.parametrize("tokens", [0, 2, 17])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_so_it_is_with_parts_and_in_half_precision(tokens: int, kind: str) -> None:
    x, bias = torch.randn(tokens, 66, device=DEVICE).to(HALF), torch.randn(48, device=DEVICE).to(HALF)
    assert_quantised_by_plain_operations(x, packed(48, 66), bias, PackedLayout("i2", 66, kind, (12, 8, 4)))


@runs
@gpu
@pytest.mark.parametrize("tokens", [2, 17])
def test_codes_may_lie_in_any_order(tokens: int) -> None:
    codes, weight = torch.randint(-128, 128, (tokens, 24, 4, 1), dtype=torch.int8, device=DEVICE), packed(9, 96)
    one = torch.ones(1, device=DEVICE)
    rest = (codes.sum((1, 2, 3), dtype=torch.int32), one.expand(tokens, 1), weight, one, None, [], torch.float32)
    expected = packed_product(codes.contiguous(memory_format=torch.channels_last), *rest)
    assert torch.equal(packed_product(codes, *rest), expected)


def assert_quantised_by_plain_operations(x: Tensor, weight: Tensor, bias: Tensor, layout: PackedLayout) -> None:
    scale = torch.rand(max(1, len(layout.parts)), device=DEVICE) + 0.25
    expected = reference.run(x, weight, scale, bias, layout)
    rest = (*quantize_planes(x, layout.activations), weight, scale, bias, list(layout.parts))
    assert torch.equal(packed_product(*rest, x.dtype), expected)
    sums = packed_product(*rest, torch.float32)
    residual = torch.randn_like(expected).T.contiguous().T
    assert torch.equal(packed_product(*rest, x.dtype, residual), (sums + residual).to(x.dtype))


@runs
@gpu
@pytest.mark.parametrize("tokens", [3, 17])
@pytest.mark.parametrize("width", [64, 66])
def test_int4_activations(tokens: int, width: int) -> None:
    assert_equals_reference(torch.randn(tokens, width) * 3, packed(9, width), "int4")


@runs
@gpu
@pytest.mark.parametrize("tokens", [2, 17])
@pytest.mark.parametrize("shape", [(9000, 48), (70, 3000), (3, 4096)], ids=str)
def test_long_and_wide_weights(tokens: int, shape: tuple[int, int]) -> None:
    if INTERPRETED and shape[0] > 1000:
        pytest.skip("takes a minute in the interpreter")
    assert_equals_reference(torch.randn(tokens, shape[1]), packed(*shape))


@runs
@gpu
@pytest.mark.parametrize("tokens", [1, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, HALF], ids=str)
@pytest.mark.parametrize("parts", [(), (12, 8, 4), (1, 1, 1), (2, 4)], ids=str)
def test_parts_and_biases_in_every_dtype(tokens: int, dtype: torch.dtype, parts: tuple[int, ...]) -> None:
    x = torch.randn(tokens, 64).to(dtype)
    for bias in (torch.randn(48, device=DEVICE), torch.randn(48, device=DEVICE).to(dtype)):
        assert_equals_reference(x, packed(48, 64), "int8", parts, bias)


@runs
@gpu
@pytest.mark.parametrize("tokens", [1, 17])
def test_largest_sums(tokens: int) -> None:
    weight = torch.stack([torch.ones(4096), -torch.ones(4096)]).to(torch.int8)
    for value in (127.0, -127.0):
        assert_equals_reference(torch.full((tokens, 4096), value), i2.pack(weight).to(DEVICE))


@runs
@gpu
def test_views_and_empty_batches() -> None:
    weight = packed(12, 64)
    assert_equals_reference(torch.randn(64, 6).T, weight)
    assert_equals_reference(torch.randn(2, 3, 64)[:, 1], weight)
    assert_equals_reference(torch.randn(64), weight)
    assert_equals_reference(torch.randn(2, 20, 64), packed(24, 64)[::2])
    for empty in ((0, 64), (2, 0, 64)):
        assert_equals_reference(torch.randn(empty), weight)
    assert_equals_reference(torch.randn(0, 72), packed(12, 72))  # whose rows are no whole words


@runs
@gpu
def test_tokens_that_a_program_does_not_hold() -> None:
    assert_equals_reference(torch.randn(1, 40000), packed(2, 40000))


@runs
@gpu
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("tokens", [3, 12])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_token_that_is_not_finite_is_nan_and_the_others_are_not(kind: str, tokens: int, bad: float) -> None:
    x = torch.randn(tokens, 64, device=DEVICE)
    x[1, 2] = bad
    y = packed_linear(x, packed(8, 64), torch.ones(1, device=DEVICE), None, PackedLayout("i2", 64, kind))
    assert y[1].isnan().all()
    assert y[::2].isfinite().all()


@runs
@gpu
def test_what_the_kernel_cannot_take_is_refused_with_the_reason() -> None:
    x, weight, scale = torch.randn(2, 64, device=DEVICE), packed(4, 64), torch.ones(1, device=DEVICE)
    cases = {
        "torch.float64": (x.double(), PackedLayout("i2", 64, "int8")),
        "activations='none' are no integers": (x, PackedLayout("i2", 64, "none")),
        "it reads the format i2, not t5": (x, PackedLayout("t5", 64, "int8")),
        "above which fp32 is not exact": (x, PackedLayout("i2", 131073, "int8")),
    }
    for reason, (refused, layout) in cases.items():
        with pytest.raises(RuntimeError, match=f"gpu_triton: .*{reason}"):
            OPERATOR.select(refused, weight, scale, None, layout)
    with pytest.raises(ValueError, match="are not of in_features=60"):
        packed_linear(x, weight, scale, None, PackedLayout("i2", 60, "int8"))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [1, 5, 16, 200])
def test_a_graph_gives_what_the_calls_give(tokens: int) -> None:
    """Layers one after the other, whose scratch is used again, on new values in the buffer that the graph reads."""
    width = 2048
    weights = [packed(width, width) for _ in range(4)]
    scale, layout = torch.full((1,), 1 / width, device=DEVICE), PackedLayout("i2", width, "int8")

    def chain(x: Tensor, run=packed_linear) -> Tensor:
        for weight in weights:
            x = run(x, weight, scale, None, layout)
        return x

    x = torch.randn(tokens, width, device=DEVICE, dtype=torch.bfloat16)
    chain(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(x)
    for _ in range(20):
        x.copy_(torch.randn(tokens, width, device=DEVICE))
        graph.replay()
        assert torch.equal(y, chain(x, reference.run))
