"""What torch.compile is to be told of an accelerated model: options, and a pass over its graphs.

In a block of a transformer the residual is added to what a product gives. The compiler makes a kernel of that, which
reads both and writes their sum; the products of this package can add the residual to their sums before they write them,
one rounding less, and a third of the bytes. The pass has them do so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

from sparse_bitnet.kernels import packed_product, sparse_product

ADD = torch.ops.aten.add.Tensor
EAGER = "eager_input_vals"  # by which the compiler knows how an operator's inputs are to lie in memory
PRODUCTS = (torch.ops.sparse_bitnet.sparse_product.default, torch.ops.sparse_bitnet.packed_product.default)


class AddInProducts(CustomGraphPass):
    """y = product(...) + residual, where y is all that the product is for, becomes one call of it; see PRODUCTS."""

    def __call__(self, graph: Graph) -> None:
        for node in list(graph.find_nodes(op="call_function", target=ADD)):
            for product, residual in (node.args, reversed(node.args)):
                if not node.kwargs and _can_add(product, residual, node):
                    _add_in_product(graph, product, residual, node)
                    break

    def uuid(self) -> Any:
        """What the compiler's cache knows the pass by."""
        return get_hash_for_files((__file__, str(sparse_product.__file__), str(packed_product.__file__)))


COMPILE_OPTIONS: dict[str, Any] = {
    "triton.tiling_prevents_reduction_fusion": False,
    "split_reductions": False,
    "post_grad_custom_post_pass": AddInProducts(),
}
"""For `torch.compile(model, options=...)` of an accelerated model. For up to 64 sequences that are written all that
stands between two of its products, quantisation and norm, is one kernel; products add the residual. The pass takes the
place of torch._inductor.config.post_grad_custom_post_pass."""


def _can_add(product: Any, residual: Any, total: Node) -> bool:
    """Whether `product` is one without a residual, `total` all that reads it, and `residual` just such a tensor."""
    if not isinstance(product, Node) or product.target not in PRODUCTS or not isinstance(residual, Node):
        return False
    arguments = _arguments(product, product.args, product.kwargs)
    if set(product.users) != {total} or arguments["residual"] is not None or product is residual:
        return False
    like = product.meta["val"]
    return all(_is_like(node.meta.get("val"), like) for node in (residual, total))


def _is_like(value: Any, other: Tensor) -> bool:
    """Whether, whatever sizes are unknown yet, it is a tensor of the same dtype that lies in memory alike."""
    if not isinstance(value, Tensor) or value.dtype != other.dtype or value.ndim != other.ndim:
        return False
    if not statically_known_true(sym_eq(tuple(value.shape), tuple(other.shape))):
        return False
    of_each = zip(value.shape, value.stride(), other.stride(), strict=True)
    return all(statically_known_true(size == 1) or statically_known_true(one == two) for size, one, two in of_each)


def _add_in_product(graph: Graph, product: Node, residual: Node, total: Node) -> None:
    value = total.meta["val"]
    with graph.inserting_before(total):
        arguments = _arguments(product, product.args, product.kwargs) | {"residual": residual}
        joint = graph.call_function(cast(OpOverload, product.target), tuple(arguments.values()))
    joint.meta["val"] = value
    if EAGER in product.meta:
        told = _arguments(product, *product.meta[EAGER]) | {"residual": value}
        joint.meta[EAGER] = tuple(told.values()), {}
    total.replace_all_uses_with(joint)
    graph.erase_node(total)
    graph.erase_node(product)


def _arguments(product: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """By name, in their order, those that are not given as they are by default."""
    schema = cast(OpOverload, product.target)._schema.arguments
    given = {**dict(zip((one.name for one in schema), args, strict=False)), **kwargs}
    return {one.name: given.get(one.name, one.default_value) for one in schema}
