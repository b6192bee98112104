"""Codes in planes are those of plain operations, and what a packed product takes."""

from __future__ import annotations

import pytest
import torch

from sparse_bitnet.kernels.quantize_planes import OPERATOR, quantize_gated_planes, quantize_planes
from sparse_bitnet.numerics.activation import quantize_activation

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("width", [8, 66])
def test_planes_hold_every_fourth_column(kind: str, width: int) -> None:
    x = torch.randn(3, width)
    codes, total, scale = quantize_planes(x, kind)
    expected, expected_scale = quantize_activation(x, kind)
    assert codes.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(codes.flatten(1)[:, :width], expected) and not codes.flatten(1)[:, width:].any()
    assert torch.equal(scale, expected_scale)
    assert torch.equal(total, expected.sum(-1, dtype=torch.int32))
    several = quantize_planes(x[:, None], kind)
    assert several[0].shape == codes.shape and several[2].shape == (3, 1, 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "width"), [(1, 16), (5, 96), (64, 2048), (64, 11008), (3, 18944), (4, 24), (7, 66)])
def test_gated_planes_are_those_of_plain_operations(tokens: int, width: int, dtype: torch.dtype, device: str) -> None:
    x = (torch.randn(tokens, 2 * width) * torch.logspace(-2, 1, tokens).view(-1, 1)).to(dtype).to(device)
    gate, up = x.chunk(2, dim=-1)
    expected, _, expected_scale = quantize_planes(torch.nn.functional.silu(gate) * up, "int8")
    codes, total, scale = quantize_gated_planes(x, "int8")
    torch.testing.assert_close(scale, expected_scale, rtol=0.01, atol=0)  # an exponential may be the one beside
    apart = (codes.int() - expected.int()).abs()
    assert int(apart.max()) <= 1 and float((apart > 0).float().mean()) < 0.001
    assert torch.equal(codes, expected) or device == "cuda"
    assert torch.equal(total, codes.sum((1, 2, 3), dtype=torch.int32))
    assert codes.is_contiguous(memory_format=torch.channels_last) or tokens == 1
    if device == "cuda" and width % 8 == 0:
        assert "gpu_cuda" in OPERATOR.select(x, "int8").__module__
    assert [len(one) for one in quantize_gated_planes(x[:0], "int8")] == [0, 0, 0]
    x[0, 0] = float("nan")
    codes, total, scale = quantize_gated_planes(x, "int8")
    assert not codes[0].any() and total[0] == 0 and not scale[0] > 0


def test_it_keeps_the_rules_of_torch_library_and_refuses_what_has_no_halves() -> None:
    torch.library.opcheck(torch.ops.sparse_bitnet.quantize_gated_planes.default, (torch.randn(3, 32), "int8"))
    with pytest.raises(ValueError, match="not halves of 15 columns"):
        quantize_gated_planes(torch.randn(3, 15), "int8")
