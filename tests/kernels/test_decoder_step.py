"""A token through all layers in one launch, against the reference, which tests/engine hold to transformers.

On a GPU, and by emulation on a CPU, where threads wait in an order that a seed draws (emulation/cuda.hpp).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.emulation import COMPILER, emulated_step
from sparse_bitnet.formats import i2
from sparse_bitnet.kernels.decoder_step import (
    ON_GPU,
    OPERATOR,
    Decoder,
    DecoderLayer,
    Matrix,
    Step,
    decoder_step,
    reference,
)

NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@dataclass(frozen=True)
class Shape:
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head: int
    layers: int = 2
    places: int = 384
    has_biases: bool = True
    has_head_norms: bool = False


@dataclass(frozen=True)
class Place:
    """Where steps run, and how they are made there."""

    device: str
    make: Callable[[Decoder], Step]


SHAPES = [
    Shape(2048, 11008, 16, 2, 128),
    Shape(896, 4864, 14, 2, 64),
    Shape(1536, 8960, 12, 2, 128, layers=3),
    Shape(4096, 14336, 32, 8, 128, has_biases=False),
    Shape(1024, 3072, 16, 8, 128, has_biases=False, has_head_norms=True),
    Shape(5120, 13824, 40, 40, 128, layers=1, has_biases=False),
    Shape(8192, 28672, 64, 8, 128, layers=1, has_biases=False),
    Shape(64, 64, 1, 1, 64, layers=4),
    Shape(192, 320, 15, 3, 256),
    Shape(3584, 18944, 28, 4, 128),
    Shape(128, 18944, 4, 4, 64),
]


EMULATED = [
    Shape(256, 576, 6, 2, 128, has_head_norms=True),
    Shape(192, 320, 15, 3, 256, has_biases=False),
    Shape(128, 2624, 4, 4, 64, layers=6),  # more slabs than there are slots in the ring
    Shape(64, 64, 7, 1, 64, layers=3),
]
BLOCKS = 16  # emulated


def random_decoder(shape: Shape, device: str = "cuda") -> Decoder:
    """With random codes, scales that keep numbers near 1, and caches full of numbers."""
    generator = None if device == "meta" else torch.Generator(device).manual_seed(shape.hidden)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=device).bfloat16()

    def matrix(rows: int, columns: int) -> Matrix:
        codes = torch.randint(-1, 2, (rows, columns), generator=generator, device=device, dtype=torch.int8)
        bias = normal(rows) if shape.has_biases else None
        return Matrix(i2.pack(codes), torch.full((1,), 1.3 / columns**0.5, device=device), bias)

    def norm(width: int) -> Tensor:
        return 1 + 0.1 * normal(width)

    def layer() -> DecoderLayer:
        queries, keys = shape.heads * shape.head, shape.kv_heads * shape.head
        caches = [normal(shape.kv_heads, shape.places, shape.head) for _ in range(2)]
        head_norms = [norm(shape.head) if shape.has_head_norms else None for _ in range(2)]
        return DecoderLayer(
            matrix(queries, shape.hidden), matrix(keys, shape.hidden), matrix(keys, shape.hidden),
            matrix(shape.hidden, queries), matrix(shape.ffn, shape.hidden), matrix(shape.ffn, shape.hidden),
            matrix(shape.hidden, shape.ffn), norm(shape.hidden), norm(shape.hidden), *head_norms, *caches,
        )  # fmt: skip

    frequencies = 100 ** -torch.linspace(0, 1, shape.head // 2, device=device)
    angles = torch.arange(shape.places, device=device)[:, None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    layers = tuple(layer() for _ in range(shape.layers))
    return Decoder(layers, shape.heads, 1e-6, angles.cos().bfloat16(), angles.sin().bfloat16())


def on_gpu(decoder: Decoder) -> Step:
    assert OPERATOR.refusal(ON_GPU, decoder) is None
    step = decoder_step(decoder)
    assert step.__module__.endswith(ON_GPU.name)
    return step


def emulated(decoder: Decoder) -> Step:
    return emulated_step(decoder, BLOCKS, seed=decoder.hidden)


ON_CUDA, ON_CPU = Place("cuda", on_gpu), Place("cpu", emulated)
NEEDS_COMPILER = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
CASES = [
    *(pytest.param(ON_CPU, shape, marks=NEEDS_COMPILER, id=f"cpu-{shape.hidden}") for shape in EMULATED),
    *(pytest.param(ON_CUDA, shape, marks=NEEDS_GPU, id=f"cuda-{shape.hidden}") for shape in SHAPES),
]


def copied(decoder: Decoder) -> Decoder:
    """With caches of its own."""
    layers = (replace(layer, keys=layer.keys.clone(), values=layer.values.clone()) for layer in decoder.layers)
    return replace(decoder, layers=tuple(layers))


def without(decoder: Decoder, *names: str) -> Decoder:
    """With matrices that give 0, as far as bf16 can tell."""

    def nothing(matrix: Matrix) -> Matrix:
        return Matrix(matrix.weight, torch.full_like(matrix.scale, 1e-12), None)

    layers = (replace(layer, **{name: nothing(getattr(layer, name)) for name in names}) for layer in decoder.layers)
    return replace(decoder, layers=tuple(layers))


def results(make: Callable[[Decoder], Step], decoder: Decoder, x: Tensor, position: int) -> list[Tensor]:
    """What a step leaves behind: x, and the caches of all layers."""
    decoder, x = copied(decoder), x.clone()
    make(decoder)(x, torch.tensor([position], device=x.device))
    return [x, *(cache for layer in decoder.layers for cache in (layer.keys, layer.values))]


def error(found: Tensor, expected: Tensor) -> float:
    """Relative, and infinite where a number is none."""
    found, expected = found.float(), expected.float()
    return float(torch.nan_to_num((found - expected).norm() / expected.norm(), float("inf")))


@pytest.mark.parametrize(("place", "shape"), CASES)
@pytest.mark.parametrize("zero", ["output", "gate", "down"])
def test_where_no_sum_is_rounded_a_step_equals_the_reference(place: Place, shape: Shape, zero: str) -> None:
    """x of +-1 has an exact norm, and attention to one place is that place's values; one stage at a time is left out.

    Without `output` what the FFN reads is x; without `gate` or `down` x ends as what attention adds to it.
    """
    decoder = without(random_decoder(replace(shape, layers=1), place.device), zero)
    x = torch.randint(0, 2, (shape.hidden,), device=place.device).bfloat16() * 2 - 1
    for found, expected in zip(results(place.make, decoder, x, 0), results(reference.run, decoder, x, 0), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("place", "shape"), CASES)
@pytest.mark.parametrize("position", [1, 200])
def test_a_step_is_that_of_the_reference(place: Place, shape: Shape, position: int) -> None:
    """But for the order of sums, by which a rounding to bf16 can fall otherwise, and codes after it."""
    decoder = random_decoder(shape, place.device)
    x = torch.randn(shape.hidden, device=place.device).bfloat16()
    found, expected = results(place.make, decoder, x, position), results(reference.run, decoder, x, position)
    assert error(found[0] - x, expected[0] - x) < 0.05
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert error(one[:, position], other[:, position]) < 0.05
    caches = [cache for layer in decoder.layers for cache in (layer.keys, layer.values)]
    for one, before in zip(found[1:], caches, strict=True):
        assert (one != before).any(dim=2).any(dim=0).nonzero().flatten().tolist() == [position]


@pytest.mark.parametrize(("place", "shape"), CASES)
@pytest.mark.parametrize("position", [1, 63, 64, 383])
def test_attention_is_that_of_the_reference(place: Place, shape: Shape, position: int) -> None:
    """One layer of it alone, with values that outweigh x: one place of 384 left out would be an error of 0.006."""
    decoder = without(random_decoder(replace(shape, layers=1), place.device), "down")
    decoder = replace(decoder, layers=tuple(replace(layer, values=8 * layer.values) for layer in decoder.layers))
    x = torch.randn(shape.hidden, device=place.device).bfloat16()
    found, expected = results(place.make, decoder, x, position), results(reference.run, decoder, x, position)
    assert error(found[0] - x, expected[0] - x) < 0.004
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert error(one[:, position], other[:, position]) < 0.004


@pytest.mark.parametrize("count", [pytest.param(30, marks=NEEDS_GPU)])
def test_steps_repeat_bit_for_bit(count: int) -> None:
    """Whichever block comes last; many times, since what blocks do not wait for shows now and then alone."""
    decoder = random_decoder(replace(SHAPES[0], layers=6))
    x = torch.randn(2048, device="cuda").bfloat16()
    first = results(on_gpu, decoder, x, 300)
    for _ in range(count):
        assert all(map(torch.equal, results(on_gpu, decoder, x, 300), first))


@pytest.mark.parametrize(("place", "shape"), CASES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(place: Place, shape: Shape, bad: float) -> None:
    x = torch.randn(shape.hidden, device=place.device).bfloat16()
    x[17] = bad
    assert not torch.isfinite(results(place.make, random_decoder(shape, place.device), x, 5)[0]).any()


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=NEEDS_GPU)])
def test_refusals_name_the_reason(device: str) -> None:
    for shape, reason in (
        (Shape(96, 64, 2, 1, 32), "96 columns of hidden are not a multiple of 64"),
        (Shape(64, 64, 2, 1, 32), "heads of 32 numbers are none of 64, 128, 256"),
        (Shape(64, 64, 150, 150, 64), "150 heads of 64 are too many for"),
    ):
        found = OPERATOR.refusal(ON_GPU, random_decoder(shape, device))
        assert found is not None and reason in found
    decoder = random_decoder(SHAPES[1], device)
    for changed, reason in (
        (replace(decoder, cosines=decoder.cosines.float()), "torch.float32; it takes torch.bfloat16"),
        (replace(decoder, sines=decoder.sines.T.contiguous().T), "a tensor is not contiguous"),
        (replace(decoder, sines=decoder.sines.cpu()), "a tensor is on cpu"),
    ):
        assert OPERATOR.refusal(ON_GPU, changed) == reason
    with pytest.raises(ValueError, match=r"x is torch.float32 \[896\]: give torch.bfloat16 \[896\]"):
        on_gpu(decoder)(torch.zeros(896, device=device), torch.zeros(1, dtype=torch.long, device=device))


def test_shapes_that_do_not_fit_are_refused() -> None:
    decoder = random_decoder(Shape(64, 64, 2, 1, 32), "cpu")
    layer = decoder.layers[0]

    def changed(**fields: Any) -> Decoder:
        return replace(decoder, layers=(replace(layer, **fields),))

    with pytest.raises(ValueError, match="3 heads of queries cannot share 2 of keys"):
        replace(random_decoder(Shape(64, 64, 4, 2, 32), "cpu"), heads=3)
    with pytest.raises(ValueError, match=r"a weight of 64 x 64 is \[64, 16\] with 2 scales"):
        changed(gate=Matrix(layer.gate.weight, torch.ones(2), None))
    with pytest.raises(ValueError, match=r"a weight of 32 x 64 is \[64, 16\] with 1 scales"):
        changed(key=layer.query)
    with pytest.raises(ValueError, match="the layers are not of one shape"):
        changed(values=layer.values[:, :-1])
    for fields in ({"ffn_norm": torch.ones(1)}, {"query_norm": torch.ones(1), "key_norm": torch.ones(32)}):
        with pytest.raises(ValueError, match="the layers are not of one shape"):
            changed(**fields)
    with pytest.raises(ValueError, match=r"a bias of 64 rows is \[1\]"):
        changed(output=replace(layer.output, bias=torch.ones(1)))
    with pytest.raises(ValueError, match="a norm for queries or for keys alone"):
        changed(query_norm=torch.ones(32))
    with pytest.raises(ValueError, match=r"cosines and sines are \[383, 32\], and the caches \[1, 384, 32\]"):
        replace(decoder, cosines=decoder.cosines[:-1])
