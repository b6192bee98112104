"""The compiler's pass: a residual that is added to a product is added by the product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.fx import Graph, GraphModule

from formats.test_windows import random_codes
from kernels.test_sparse_product import DEVICES, packed
from sparse_bitnet.formats import i2
from sparse_bitnet.kernels.compilation import ADD, COMPILE_OPTIONS, PRODUCTS, AddInProducts
from sparse_bitnet.kernels.packed_product import packed_product, reference
from sparse_bitnet.kernels.quantize_lifted import quantize_lifted
from sparse_bitnet.kernels.quantize_planes import quantize_planes
from sparse_bitnet.kernels.sparse_product import sparse_product

TOKENS, ROWS, COLUMNS = 65, 16, 64  # so many that quantisation is the operator's in compiled code too


class Sparse:
    """A product of x [..., I] -> [..., O] in bf16, on sparse tensor cores."""

    def __init__(self, device: str = "cpu") -> None:
        self.fragments = packed(random_codes(ROWS, COLUMNS, "6:8").to(device), 8)
        self.scale = torch.full((1,), 0.1, device=device)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        lifted = quantize_lifted(x, "int8", 8)
        return sparse_product(*lifted, self.fragments, self.scale, None, ROWS, torch.bfloat16, residual)


class Packed:
    """The same with the packed weight."""

    def __init__(self, device: str = "cpu") -> None:
        self.weight = i2.pack(random_codes(ROWS, COLUMNS, "6:8")).to(device)
        self.scale = torch.full((1,), 0.1, device=device)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        planes = quantize_planes(x, "int8")
        return packed_product(*planes, self.weight, self.scale, None, [], torch.bfloat16, residual)


Layer = Sparse | Packed


@pytest.fixture(params=[Sparse, Packed])
def make(request: pytest.FixtureRequest) -> type[Layer]:
    return request.param


def inputs(device: str = "cpu") -> tuple[Tensor, Tensor]:
    """x [T, I] and a residual [T, O]."""
    x = torch.randn(TOKENS, COLUMNS, dtype=torch.bfloat16, device=device)
    return x, torch.randn(TOKENS, ROWS, dtype=torch.bfloat16, device=device)


def traced(function: Callable[..., Tensor]) -> Graph:
    """What the compiler's passes are given of a function of x and a residual."""
    found = []

    def keep(module: GraphModule, _: Any) -> Callable[..., Any]:
        found.append(module.graph)
        return module.forward

    torch.compiler.reset()
    torch.compile(function, backend=aot_autograd(fw_compiler=keep), fullgraph=True)(*inputs())
    return found[0]


def counts(graph: Graph) -> tuple[int, int]:
    """Products with a residual, and additions."""
    products = [node for node in graph.nodes if node.target in PRODUCTS]
    with_residual = sum(len(node.args) == len(node.target._schema.arguments) for node in products)
    return with_residual, sum(node.target is ADD for node in graph.nodes)


def counts_after(function: Callable[..., Tensor]) -> tuple[int, int]:
    """The same, when the pass has been over what is traced."""
    graph = traced(function)
    AddInProducts()(graph)
    graph.lint()
    return counts(graph)


def test_the_pass_adds_in_the_product_whichever_side_it_stands_on(make: type[Layer]) -> None:
    layer = make()
    assert counts_after(lambda x, residual: layer(x) + residual) == (1, 0)
    assert counts_after(lambda x, residual: residual + layer(x)) == (1, 0)


def test_a_chain_of_blocks_keeps_the_order_of_its_sums(make: type[Layer]) -> None:
    one, other = make(), make()

    def blocks(x: Tensor, residual: Tensor) -> Tensor:
        first = residual + one(x)
        return first + other(x * first.sum())

    assert counts_after(blocks) == (2, 0)


def test_the_stride_of_a_single_sequence_does_not_matter(make: type[Layer]) -> None:
    layer = make()

    def block(x: Tensor, residual: Tensor) -> Tensor:
        return residual.as_strided((1, TOKENS, ROWS), (ROWS, ROWS, 1)) + layer(x[None])

    assert counts_after(block) == (1, 0)


def test_of_two_products_one_takes_the_other_as_its_residual(make: type[Layer]) -> None:
    one, other = make(), make()
    assert counts_after(lambda x, residual: one(x) + other(x)) == (1, 0)


@pytest.mark.parametrize(
    "function",
    [
        lambda layer, x, residual: (y := layer(x)) + residual * y,  # y is read twice
        lambda layer, x, residual: (y := layer(x)) + y,
        lambda layer, x, residual: layer(x) + residual[0],
        lambda layer, x, residual: layer(x) + residual[:1].expand(TOKENS, ROWS),  # it would be copied
        lambda layer, x, residual: layer(x) + residual.view(ROWS, TOKENS).T,
        lambda layer, x, residual: layer(x).view(-1) + residual.view(-1),  # another shape than the product's
        lambda layer, x, residual: layer(x) + residual.float(),
        lambda layer, x, residual: torch.add(layer(x), residual, alpha=2),
        lambda layer, x, residual: layer(x) + 1.0,
        lambda layer, x, residual: (y := layer(x), y + residual)[1] + 0 * y.sum().to(y.dtype),
        lambda layer, x, residual: layer(x, residual) + residual,  # it has one already
    ],
    ids=[
        "read twice", "itself", "broadcast", "expanded", "transposed", "viewed", "fp32", "alpha", "number",
        "read after", "has one",
    ],
)  # fmt: skip
def test_what_is_no_residual_stays(function: Callable[..., Tensor], make: type[Layer]) -> None:
    layer = make()
    before = counts(traced(lambda x, residual: function(layer, x, residual)))
    assert before[1] >= 1
    assert counts_after(lambda x, residual: function(layer, x, residual)) == before


@pytest.mark.parametrize("device", DEVICES)
def test_a_compiled_model_adds_in_its_products(device: str, make: type[Layer]) -> None:
    layer, (x, residual) = make(device), inputs(device)
    options = COMPILE_OPTIONS | {"fx_graph_cache": False}
    torch.compiler.reset()
    compiled = torch.compile(lambda x, residual: residual + layer(x), fullgraph=True, options=options)
    assert torch.equal(compiled(x, residual), layer(x, residual))
    assert not torch.equal(layer(x, residual), residual + layer(x))  # which rounds twice


def test_planes_are_handed_on_as_planes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the product would copy them: the compiler looks at what it was told of the operator's inputs."""
    layer, (x, residual), seen = Packed(), inputs(), []
    run = reference.run

    def keep(codes: Tensor, *rest: Any) -> Tensor:
        seen.append(codes.is_contiguous(memory_format=torch.channels_last))
        return run(codes, *rest)

    monkeypatch.setattr(reference, "run", keep)
    torch.compiler.reset()
    options = COMPILE_OPTIONS | {"fx_graph_cache": False}
    torch.compile(lambda x, residual: residual + layer(x), fullgraph=True, options=options)(x, residual)
    assert seen == [True]


@pytest.mark.parametrize("dynamic", [True, None])
def test_prompts_of_several_lengths(dynamic: bool | None, make: type[Layer]) -> None:
    layer = make()
    torch.compiler.reset()

    def block(x: Tensor, residual: Tensor) -> Tensor:
        return residual + layer(x) + x.shape[0]

    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, options=COMPILE_OPTIONS)
    for tokens in (TOKENS, TOKENS + 7, TOKENS + 30):
        x, residual = torch.randn(tokens, COLUMNS).bfloat16(), torch.randn(tokens, ROWS).bfloat16()
        assert torch.equal(compiled(x, residual), layer(x, residual) + tokens)


def test_an_input_that_is_added_to_in_place_is_what_it_was_before_the_product(make: type[Layer]) -> None:
    layer, (x, residual) = make(), inputs()
    torch.compiler.reset()

    def block(x: Tensor, residual: Tensor) -> Tensor:
        first = layer(x)
        residual.mul_(2)
        return residual.add_(first)

    expected = layer(x, 2 * residual)
    found = torch.compile(block, fullgraph=True, options=COMPILE_OPTIONS)(x, residual)
    assert torch.equal(found, expected) and torch.equal(residual, expected)
