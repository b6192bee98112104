"""The op `packed_linear`: its integers against an int64 product in NumPy, its floats against an fp64 oracle.

The integers are equal. A float may be off by at most twice what plain PyTorch is in that dtype.
Shapes: T tokens, O out_features, I in_features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from numerics import oracle
from sparse_bitnet.formats import i2
from sparse_bitnet.kernels.dispatch import FORCE_VARIABLE
from sparse_bitnet.kernels.packed_linear import OPERATOR, PackedLayout, packed_linear
from sparse_bitnet.kernels.packed_linear.reference import WIDEST_EXACT_IN_FP32, integer_product
from sparse_bitnet.kernels.packed_product import packed_product
from sparse_bitnet.kernels.quantize_activation import fake_quantize_activation as with_straight_through_gradient
from sparse_bitnet.numerics.activation import fake_quantize_activation
from sparse_bitnet.numerics.ternary import dequantize_weight

KINDS = ["int8", "int4", "none"]


@pytest.fixture(autouse=True, params=["reference", "the-best"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test runs on the reference, and on whatever this machine has that is faster."""
    monkeypatch.delenv(FORCE_VARIABLE, raising=False)
    if request.param == "reference":
        monkeypatch.setenv(FORCE_VARIABLE, "reference")
    else:
        obstacles = [OPERATOR.obstacle(one) for one in OPERATOR.backends if one.name != "reference"]
        if None not in obstacles:
            pytest.skip(f"no faster backend here: {'; '.join(filter(None, obstacles))}")


@dataclass
class Case:
    """Arguments of the op, before packing."""

    x: torch.Tensor
    codes: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None
    parts: tuple[int, ...]

    def run(self, kind: str) -> torch.Tensor:
        layout = PackedLayout("i2", self.codes.shape[1], kind, self.parts)
        return packed_linear(self.x, i2.pack(self.codes), self.scale, self.bias, layout)

    def plain(self, kind: str) -> torch.Tensor:
        weight = dequantize_weight(self.codes, self.scale, self.parts, self.x.dtype)
        return F.linear(fake_quantize_activation(self.x, kind, self.x.dtype), weight, self.bias)

    def exact(self, kind: str) -> np.ndarray:
        row_scale = oracle.scale_of_rows(self.scale.numpy(), len(self.codes), self.parts)[:, 0]
        y = oracle.integer_linear(oracle.array(self.x), self.codes.numpy(), row_scale, kind)
        return y if self.bias is None else y + oracle.array(self.bias).astype(np.float64)


def random_case(
    tokens: tuple[int, ...] = (9,),
    rows: int = 24,
    width: int = 66,
    *,
    bias: bool = True,
    parts: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float32,
) -> Case:
    generator = torch.Generator().manual_seed(0)
    return Case(
        x=(torch.randn(*tokens, width, generator=generator) * 2).to(dtype),
        codes=torch.randint(-1, 2, (rows, width), generator=generator, dtype=torch.int8),
        scale=torch.rand(max(1, len(parts)), generator=generator).half().float() + 0.25,
        bias=torch.randn(rows, generator=generator).to(dtype) if bias else None,
        parts=parts,
    )


def error(y: torch.Tensor, exact: np.ndarray) -> float:
    """Root mean square: over 1584 values it varies far less from machine to machine than the largest does."""
    return float(np.sqrt(np.mean((y.double().numpy() - exact) ** 2)))


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (9, 33, 130), (2, 4, 4096)])
def test_integer_product_is_exact(shape: tuple[int, int, int]) -> None:
    tokens, rows, width = shape
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-128, 128, (2, tokens, width), generator=generator, dtype=torch.int8)
    codes = torch.randint(-1, 2, (rows, width), generator=generator, dtype=torch.int8)
    product = integer_product(q, codes)
    np.testing.assert_array_equal(product.numpy(), q.numpy().astype(np.int64) @ codes.numpy().astype(np.int64).T)


@pytest.mark.parametrize("width", [WIDEST_EXACT_IN_FP32 - 1, WIDEST_EXACT_IN_FP32, WIDEST_EXACT_IN_FP32 + 1, 200001])
@pytest.mark.parametrize("value", [-128, 127])
def test_integer_product_is_exact_at_its_largest(width: int, value: int) -> None:
    q = torch.full((1, width), value, dtype=torch.int8)
    codes = torch.ones(2, width, dtype=torch.int8)
    codes[1, ::2] = -1
    product = integer_product(q, codes)
    expected = q.numpy().astype(np.int64) @ codes.numpy().astype(np.int64).T
    np.testing.assert_array_equal(product.numpy().astype(np.int64), expected)
    assert product.dtype == (torch.float32 if width <= WIDEST_EXACT_IN_FP32 else torch.float64)


def test_wide_rows_go_through_fp64_and_round_once() -> None:
    width = 200001  # 127 * 200001 is odd and above 2^24: fp32 does not hold it
    layout = PackedLayout("i2", width, "int8")
    packed = i2.pack(torch.ones(1, width, dtype=torch.int8))
    x = torch.full((1, width), 127.0, dtype=torch.float64)
    assert packed_linear(x, packed, torch.ones(1), None, layout).item() == 127 * width


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("parts", [(), (12, 8, 4), (1, 1, 1), (2, 4)], ids=str)
def test_is_off_by_at_most_twice_plain_pytorch(
    kind: str, dtype: torch.dtype, bias: bool, parts: tuple[int, ...]
) -> None:
    case = random_case((33,), 48, 258, bias=bias, parts=parts, dtype=dtype)
    y, exact = case.run(kind), case.exact(kind)
    assert (y.dtype, y.shape) == (dtype, (33, 48))
    assert error(y, exact) <= 2 * error(case.plain(kind), exact)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_scale_and_bias_by_hand(kind: str) -> None:
    codes = torch.tensor([[1, 1, 0, -1], [0, 0, 0, 0]], dtype=torch.int8)
    x = torch.tensor([[2.0, -2.0, 2.0, -2.0]])
    y = packed_linear(x, i2.pack(codes), torch.tensor([0.5]), torch.tensor([10.0, -1.0]), PackedLayout("i2", 4, kind))
    level = {"int8": 2.0, "int4": 3 * 2 / 7**0.5}[kind]  # what 2.0 becomes: 127 steps of 2 / 127, 3 of 2 / sqrt(7)
    np.testing.assert_allclose(y.numpy(), [[10 + 0.5 * level, -1.0]], rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (5, 4), (33, 130), (3, 5)])
def test_odd_shapes(kind: str, shape: tuple[int, int]) -> None:
    case = random_case((3,), *shape)
    np.testing.assert_allclose(case.run(kind).numpy(), case.exact(kind), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("parts", [(), (12, 8, 4)], ids=str)
def test_a_token_gives_the_same_alone_and_in_a_batch(kind: str, parts: tuple[int, ...]) -> None:
    case = random_case((2, 5), parts=parts)
    batch = case.run(kind)
    assert batch.shape == (2, 5, 24)
    for i in range(2):
        for j in range(5):
            alone = Case(case.x[i, j], case.codes, case.scale, case.bias, parts).run(kind)
            assert torch.equal(alone, batch[i, j])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [(0,), (2, 0), (0, 3)])
def test_empty_batch_gives_an_empty_result(kind: str, tokens: tuple[int, ...]) -> None:
    assert random_case(tokens).run(kind).shape == (*tokens, 24)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_result_is_the_fp32_one_rounded_once(kind: str) -> None:
    case = random_case(dtype=torch.bfloat16)
    wide = Case(case.x.float(), case.codes, case.scale, case.bias.float() if case.bias is not None else None, ())
    assert torch.equal(case.run(kind), wide.run(kind).bfloat16())


def test_strided_input_gives_the_same() -> None:
    case = random_case((8,), width=64)
    strided = Case(case.x.T.contiguous().T, case.codes, case.scale, case.bias, ())
    assert torch.equal(strided.run("int8"), case.run("int8"))


def test_integers_are_no_activations() -> None:
    case = random_case((2,), width=64)
    with pytest.raises(ValueError, match=r"x is torch.int64: a packed layer takes floats"):
        replace(case, x=torch.ones(2, 64, dtype=torch.int64)).run("int8")


def test_integers_are_exact_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORCE_VARIABLE, "reference")
    case = random_case((8,), width=512)
    expected = case.run("int8")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(case.run("int8"), expected)


def test_unknown_format_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="format 'i3' is unknown"):
        packed_linear(
            torch.ones(1, 4), torch.zeros(1, 1, dtype=torch.uint8), torch.ones(1), None, PackedLayout("i3", 4, "int8")
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_op_keeps_the_rules_of_torch_library(kind: str, bias: bool) -> None:
    case = random_case((2, 3), bias=bias, parts=(12, 8, 4))
    arguments = (case.x.requires_grad_(), i2.pack(case.codes), case.scale, case.bias, "i2", 66, kind, [12, 8, 4])
    torch.library.opcheck(torch.ops.sparse_bitnet.packed_linear.default, arguments)


def test_the_product_alone_keeps_the_rules_of_torch_library() -> None:
    codes = torch.randint(-128, 128, (3, 6, 4, 1), dtype=torch.int8).contiguous(memory_format=torch.channels_last)
    weight = i2.pack(torch.randint(-1, 2, (8, 24), dtype=torch.int8))
    total, scales = codes.sum((1, 2, 3), dtype=torch.int32), torch.ones(3, 1)
    arguments = (codes, total, scales, weight, torch.ones(2), torch.randn(8), [3, 5], torch.float16)
    torch.library.opcheck(torch.ops.sparse_bitnet.packed_product.default, arguments)
    several = (codes, total, scales.view(1, 3, 1), *arguments[3:])
    for residual in (None, torch.randn(1, 3, 8).half()):
        torch.library.opcheck(torch.ops.sparse_bitnet.packed_product.default, (*several, residual))
    for wrong in (torch.randn(3, 8).half(), torch.randn(1, 3, 8)):
        with pytest.raises(ValueError, match=r"residual is .* and the product \[1, 3, 8\] in torch.float16 on cpu"):
            packed_product(*several, wrong)
    for place, wrong in ((0, codes[:2]), (1, total[:2]), (3, weight[:, :5]), (4, torch.ones(3)), (5, torch.ones(7))):
        with pytest.raises(ValueError, match="do not belong to each other"):
            packed_product(*several[:place], wrong, *several[place + 1 :])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [(), (8, 16)])
def test_gradients_are_those_of_the_layer_that_is_not_packed(kind: str, parts: tuple[int, ...]) -> None:
    """Straight through the rounding of the activations: that of x is equal bit for bit: it is the same product."""
    case = random_case((3, 5), parts=parts)
    assert case.bias is not None
    leaves = (case.x.requires_grad_(), case.bias.requires_grad_())
    weight = dequantize_weight(case.codes, case.scale, parts, case.x.dtype)
    plain = F.linear(with_straight_through_gradient(case.x, kind, case.x.dtype), weight, case.bias)
    dy = torch.randn_like(plain)
    dx, dbias = torch.autograd.grad(case.run(kind), leaves, dy)
    plain_dx, plain_dbias = torch.autograd.grad(plain, leaves, dy)
    assert torch.equal(dx, plain_dx)
    assert torch.allclose(dbias, plain_dbias, rtol=1e-6)  # a sum in another order


def test_gradients_pass_through_compiled_layers() -> None:
    case = random_case((3,), rows=66, width=66)
    x, packed = case.x.requires_grad_(), i2.pack(case.codes)
    layout = PackedLayout("i2", 66, "int8", ())

    def two_layers(x: torch.Tensor) -> torch.Tensor:
        return packed_linear(packed_linear(x, packed, case.scale, None, layout), packed, case.scale, None, layout).sum()

    (eager,) = torch.autograd.grad(two_layers(x), x)
    (compiled,) = torch.autograd.grad(torch.compile(two_layers, fullgraph=True, backend="aot_eager")(x), x)
    assert torch.equal(eager, compiled)
    assert int(eager.count_nonzero()) > 0
