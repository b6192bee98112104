"""The native kernels of `packed_linear`, equal to the reference bit for bit on every instruction set of this machine.

Equal floats are more than equal integers: each step after the integers is rounded as the reference rounds it.
Shapes: T tokens, O out_features, I in_features.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_bitnet import Recipe, SparseBitLinear
from sparse_bitnet.formats import FORMATS
from sparse_bitnet.kernels.dispatch import FORCE_VARIABLE
from sparse_bitnet.kernels.packed_linear import NATIVE, OPERATOR, PackedLayout, packed_linear, reference
from sparse_bitnet.nn.packed_linear import PackedLinear

OBSTACLE = OPERATOR.obstacle(NATIVE)
if OBSTACLE is not None:
    pytest.skip(f"the native kernels are not built: {OBSTACLE}", allow_module_level=True)

from sparse_bitnet.kernels.packed_linear import cpu_native  # noqa: E402

NONZEROS = {"g4": (0, 1, 2), "g4s2": (2,), "g4s3": (3,)}  # in each group of four
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOKENS = [0, 1, 2, 3, 7, 8, 16, 33]
# O and I: single ones, odd ones, one below and one above what the kernels read at a time, whole vectors, 1536
SHAPES = [(1, 1), (3, 7), (5, 252), (50, 260), (13, 321), (97, 1028), (49, 1536)]


@pytest.fixture(params=cpu_native.instruction_sets())
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(cpu_native.CPU_VARIABLE, request.param)
    assert cpu_native.instruction_set() == request.param
    return request.param


def random_codes(format: str, rows: int, width: int) -> torch.Tensor:
    """Codes [O, I] that the format can hold; of g4..., I is rounded up to a multiple of four."""
    if format not in NONZEROS:
        return torch.randint(-1, 2, (rows, width), dtype=torch.int8)
    groups = (rows, -(-width // 4), 4)
    counts = torch.tensor(NONZEROS[format])
    kept = torch.rand(groups).argsort(-1) < counts[torch.randint(len(counts), (*groups[:2], 1))]
    return (kept * (2 * torch.randint(2, groups) - 1)).to(torch.int8).flatten(-2)


def arguments(
    format: str,
    rows: int,
    width: int,
    tokens: int,
    *,
    dtype: torch.dtype = torch.float32,
    parts: tuple[int, ...] = (),
    bias: torch.dtype | None = None,
    activations: str = "int8",
) -> tuple:
    codes = random_codes(format, rows, width)
    x = (torch.randn(tokens, codes.shape[1]) * 3).to(dtype)
    scale = torch.rand(max(1, len(parts))) + 0.1
    layout = PackedLayout(format, codes.shape[1], activations, parts)  # type: ignore[arg-type]
    return x, FORMATS[format].pack(codes), scale, None if bias is None else torch.randn(rows).to(bias), layout


def assert_equal_to_reference(*args) -> None:
    assert cpu_native.supports(*args) is None
    y, expected = cpu_native.run(*args), reference.run(*args)
    assert (y.dtype, y.shape) == (expected.dtype, expected.shape)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_equals_the_reference(format: str, shape: tuple[int, int], instruction_set: str) -> None:
    for number, tokens in enumerate(TOKENS):
        for activations in ("int8", "int4"):
            dtype = DTYPES[number % 3]
            for bias in (None, dtype):
                assert_equal_to_reference(
                    *arguments(format, *shape, tokens, dtype=dtype, bias=bias, activations=activations)
                )


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("parts", [(24, 12, 12), (1, 1, 1), (2, 4)], ids=str)
def test_parts_have_scales_of_their_own(parts: tuple[int, ...], tokens: int, instruction_set: str) -> None:
    assert_equal_to_reference(*arguments("i2", 96, 260, tokens, parts=parts, bias=torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", DTYPES, ids=str)
def test_bias_may_be_of_another_dtype(dtype: torch.dtype, bias: torch.dtype, instruction_set: str) -> None:
    for tokens in (1, 20):
        assert_equal_to_reference(*arguments("i2", 70, 100, tokens, dtype=dtype, bias=bias))


@pytest.mark.parametrize("code", [-1, 1])
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("width", [4096, reference.WIDEST_EXACT_IN_FP32])
@pytest.mark.parametrize("format", ["i2", "t5"])
def test_largest_sums_do_not_overflow(format: str, width: int, sign: int, code: int, instruction_set: str) -> None:
    packed = FORMATS[format].pack(torch.full((4, width), code, dtype=torch.int8))
    for tokens in (1, 9):
        x = torch.full((tokens, width), float(sign))
        y = cpu_native.run(x, packed, torch.tensor([127.0]), None, PackedLayout(format, width, "int8"))
        assert torch.equal(y, torch.full((tokens, 4), float(127 * width * sign * code)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activations", ["int8", "int4"])
def test_special_values(dtype: torch.dtype, activations: str, instruction_set: str) -> None:
    """Zeros, halves that round to even, subnormals, results beyond fp16; a token with NaN or an infinity is NaN."""
    x, weight, scale, bias, layout = arguments("i2", 24, 64, 8, dtype=dtype, bias=dtype, activations=activations)
    x[0] = 0
    x[1] = torch.arange(64) - 31.5
    x[1, 0] = 127
    x[2] = torch.finfo(dtype).tiny / 2
    x[3] = torch.finfo(dtype).max / 2
    x[4, 5] = float("nan")
    x[5, 6] = float("inf")
    x[6] *= 1e-6
    x[7, 7] = -0.0
    assert_equal_to_reference(x, weight, scale, bias, layout)
    assert_equal_to_reference(x[:4], weight, scale, None, layout)
    assert_equal_to_reference(x, weight, scale * 1e-9, None, layout)


@pytest.mark.parametrize("activations", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number_comes_in_and_goes_out_as_in_pytorch(dtype: torch.dtype, activations: str) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    layout = PackedLayout("i2", 1, activations)  # type: ignore[arg-type]
    weight = FORMATS["i2"].pack(torch.tensor([[1], [0], [-1]], dtype=torch.int8))
    for scale in (1.0, 0.37):
        assert_equal_to_reference(every[:, None], weight, torch.full((1,), scale), None, layout)


@settings(max_examples=200, deadline=None)
@given(
    format=st.sampled_from(list(FORMATS)),
    rows=st.integers(1, 130),
    width=st.integers(1, 700),
    tokens=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    activations=st.sampled_from(["int8", "int4"]),
    seed=st.integers(0, 2**32),
)
def test_equals_the_reference_whatever_the_shape(
    format: str, rows: int, width: int, tokens: int, dtype: torch.dtype, activations: str, seed: int
) -> None:
    torch.manual_seed(seed)
    args = arguments(format, rows, width, tokens, dtype=dtype, bias=dtype, activations=activations)
    assert_equal_to_reference(*args)


def test_more_tokens_than_are_quantised_at_a_time(instruction_set: str) -> None:
    assert_equal_to_reference(*arguments("g4", 20, 64, 1024 + 3, bias=torch.float32))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("tokens", [1, 40])
def test_any_number_of_threads_gives_the_same(threads: int, tokens: int) -> None:
    before = torch.get_num_threads()
    args = arguments("i2", 1030, 512, tokens)
    try:
        torch.set_num_threads(threads)
        for _ in range(20):
            assert_equal_to_reference(*args)
    finally:
        torch.set_num_threads(before)


def test_calls_from_several_threads_at_once() -> None:
    args = arguments("i2", 1030, 512, 3)
    expected, equal = reference.run(*args), []

    def call() -> None:
        equal.extend(torch.equal(cpu_native.run(*args), expected) for _ in range(200))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(equal) == 800
    assert all(equal)


FORK = """
import os, torch
torch.set_num_threads(2)
from sparse_bitnet import Recipe, SparseBitLinear
from sparse_bitnet.nn.packed_linear import PackedLinear
layer = PackedLinear.from_latent(SparseBitLinear(512, 1024, recipe=Recipe("6:8")))
x = torch.randn(1, 512)
y = layer(x)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(layer(x), y) else 1)
assert os.waitpid(child, 0)[1] == 0
"""


def test_works_in_a_child_after_a_fork() -> None:
    """Where the threads of the parent are not."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], check=True, timeout=60)


def test_input_may_be_strided_and_of_any_rank() -> None:
    x, weight, scale, bias, layout = arguments("i2", 24, 64, 12, bias=torch.float32)
    expected = reference.run(x, weight, scale, bias, layout)
    strided = x.T.contiguous().T
    assert torch.equal(cpu_native.run(strided, weight, scale, bias, layout), expected)
    assert torch.equal(cpu_native.run(x.view(2, 3, 2, 64), weight, scale, bias, layout), expected.view(2, 3, 2, 24))
    assert torch.equal(cpu_native.run(x[0], weight, scale, bias, layout), expected[0])
    rows = torch.stack([weight, weight])[:, 3:9].transpose(0, 1)[:, 1]
    assert torch.equal(cpu_native.run(x, rows, scale, None, layout), reference.run(x, rows, scale, None, layout))


def test_says_what_it_cannot_do() -> None:
    x, weight, scale, bias, layout = arguments("i2", 24, 64, 2, bias=torch.float32)
    none = PackedLayout("i2", 64, "none")
    assert cpu_native.supports(x, weight, scale, bias, none) == "activations='none' are no integers"
    assert "torch.float64; it takes torch.float32" in str(cpu_native.supports(x.double(), weight, scale, bias, layout))
    assert "torch.float64" in str(cpu_native.supports(x, weight, scale, torch.ones(24, dtype=torch.float64), layout))
    assert cpu_native.supports(x.to("meta"), weight, scale, bias, layout) == "a tensor is on meta"
    wide = PackedLayout("i2", 2**20, "int8")
    assert "in_features=1048576 is beyond 131072" in str(cpu_native.supports(x, weight, scale, bias, wide))
    assert "packed_linear/cpu_native: activations='none'" in OPERATOR.explain(x, weight, scale, bias, none)


def test_memory_of_the_wrong_size_is_refused() -> None:
    x, weight, scale, bias, layout = arguments("i2", 24, 64, 2, bias=torch.float32)
    for args in (
        (x[:, :60], weight, scale, bias, layout),
        (x, weight[:, :15], scale, bias, layout),
        (x, weight, scale, bias, PackedLayout("i2", 64, "int8", (12, 12))),
        (x, weight, scale, torch.ones(23), layout),
        (x, weight, torch.ones(2), bias, PackedLayout("i2", 64, "int8", (5, 6))),
        (x, weight.int(), scale, bias, layout),
        (x[:, :0], weight[:, :0], scale, bias, PackedLayout("i2", 0, "int8")),
    ):
        with pytest.raises(ValueError, match=r"not of in_features=64|do not belong to 24 rows|24 rows do not|of uint8"):
            cpu_native.run(*args)


def test_unknown_instruction_set_is_refused_with_those_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu_native.CPU_VARIABLE, "mmx")
    with pytest.raises(ValueError, match=r"SPARSE_BITNET_CPU=mmx: this processor can run .*scalar$"):
        cpu_native.run(*arguments("i2", 24, 64, 2))


def test_the_dispatcher_takes_it_for_a_layer_and_under_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FORCE_VARIABLE, raising=False)
    layer = PackedLinear.from_latent(SparseBitLinear(64, 24, recipe=Recipe("6:8")))
    x = torch.randn(3, 64)
    layout = PackedLayout("i2", 64, "int8")
    args = (x, layer.weight, layer.weight_scale, layer.bias, layout)
    assert OPERATOR.select(*args) is cpu_native.run
    expected = packed_linear(*args)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(x), expected)
    assert torch.equal(layer(x), expected)


def test_doctor_names_the_instruction_set() -> None:
    for forced in cpu_native.instruction_sets():
        answer = subprocess.run(
            [sys.executable, "-m", "sparse_bitnet", "doctor"],
            env=os.environ | {cpu_native.CPU_VARIABLE: forced}, capture_output=True, text=True, check=True,
            cwd=Path(__file__).parent,
        )  # fmt: skip
        line = next(line for line in answer.stdout.splitlines() if line.startswith("  native "))
        assert line.split(maxsplit=1)[1] == f"{forced}, of {', '.join(cpu_native.instruction_sets())}"
